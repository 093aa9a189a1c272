"""What the client returns: frozen values with datetimes, timedeltas and enums in place of the wire's numbers.

Every type has `to_dict`, which gives what `json.dumps` takes: times as ISO 8601 in UTC, durations in seconds (their
keys end in `_seconds`), enums as their lower-case names, and numbers that JSON cannot write (NaN, infinity) as null.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from gradstream.core import job_states
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2


class JobState(StrEnum):
    """Where a job is in its life."""

    UNSPECIFIED = "unspecified"
    QUEUED = "queued"
    PLANNING = "planning"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        """Whether the job makes no more steps unless it is resumed."""
        return self in _ENDED


class NodeKind(StrEnum):
    """What a node is."""

    UNSPECIFIED = "unspecified"
    PARAMETER_SERVER = "parameter-server"
    WORKER = "worker"


_JOB_STATES = {number: JobState(name.removeprefix("JOB_STATE_").lower()) for name, number in jobs_pb2.JobState.items()}
_ENDED = frozenset(_JOB_STATES[number] for number in job_states.ENDED)
_NODE_KINDS = {
    number: NodeKind(name.removeprefix("NODE_KIND_").lower().replace("_", "-"))
    for name, number in coordinator_pb2.NodeKind.items()
}


class _Value:
    """Base of all results: to_dict."""

    def to_dict(self) -> dict[str, Any]:
        """This value as what `json.dumps` takes."""
        assert dataclasses.is_dataclass(self)
        result: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            key = f"{field.name}_seconds" if "timedelta" in str(field.type) else field.name
            result[key] = _plain(value)
        return result


class _WatchValue(_Value):
    """Base of the items of a job's history: to_dict also says which type it is."""

    def to_dict(self) -> dict[str, Any]:
        """This item as what `json.dumps` takes; `type` names its class in lower case."""
        return {"type": _WATCH_NAMES[type(self).__name__], **super().to_dict()}


_WATCH_NAMES = {
    "Event": "event",
    "Step": "step",
    "Validation": "validation",
    "LogLine": "log",
    "Checkpoint": "checkpoint",
}


def _plain(value: Any) -> Any:
    if isinstance(value, _Value):
        return value.to_dict()
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _time(unix_ms: int) -> datetime:
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return datetime.fromtimestamp(0, UTC)


def _time_or_none(unix_ms: int) -> datetime | None:
    return _time(unix_ms) if unix_ms else None


def _duration(seconds: float) -> timedelta | None:
    try:
        return timedelta(seconds=seconds)
    except (OverflowError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Wait(_Value):
    """Something that a job or a node waits for."""

    what: str
    whom: str
    since: datetime | None


@dataclass(frozen=True, slots=True)
class ServerMemory(_Value):
    """What a server holds of a job, and what its plan predicted, in bytes.

    State is weights, moments, accumulators, reference and published bundles; early are contributions that wait for
    their turn. `newcomer_bytes` are in `state_bytes`, but not in its prediction: whole bundles for workers without the
    version before, where other workers pull differences.
    """

    name: str
    num_parameters: int
    state_bytes: int
    predicted_state_bytes: int
    early_bytes: int
    most_early_bytes: int
    newcomer_bytes: int = 0
    max_newcomer_bytes: int = 0

    @classmethod
    def from_proto(cls, message: jobs_pb2.ServerMemory) -> ServerMemory:
        """The value that a message describes."""
        return cls(
            name=message.name,
            num_parameters=message.num_parameters,
            state_bytes=message.state_bytes,
            predicted_state_bytes=message.predicted_state_bytes,
            early_bytes=message.early_bytes,
            most_early_bytes=message.most_early_bytes,
            newcomer_bytes=message.newcomer_bytes,
            max_newcomer_bytes=message.max_newcomer_bytes,
        )


@dataclass(frozen=True, slots=True)
class Pipeline(_Value):
    """A job's pipeline: `num_workers` of a replica have `num_stages` stages between them.

    `bubble` is the share of the workers' time in which they waited over the last versions, `ideal_bubble` what GPipe
    and 1F1B would have with stages that all take equally long; None before the first was measured.
    """

    num_stages: int
    num_workers: int
    schedule: str
    bubble: float | None
    ideal_bubble: float | None

    @classmethod
    def from_proto(cls, message: jobs_pb2.Pipeline) -> Pipeline:
        """The value that a message describes."""
        return cls(
            num_stages=message.num_stages,
            num_workers=message.num_workers,
            schedule=message.schedule,
            bubble=message.bubble if message.HasField("bubble") else None,
            ideal_bubble=message.ideal_bubble if message.HasField("ideal_bubble") else None,
        )


@dataclass(frozen=True, slots=True)
class StepParts(_Value):
    """The parts of a step, in seconds.

    Passes of the model, waits for weights that are under way, contributions that are sent after the last pass, waits
    for the slots of slower workers, the servers' commit, and the rest.
    """

    compute_seconds: float
    weights_seconds: float
    send_seconds: float
    slots_seconds: float
    servers_seconds: float
    other_seconds: float

    @property
    def step_seconds(self) -> float:
        """The step's duration: the sum of all parts."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @classmethod
    def from_proto(cls, message: jobs_pb2.StepParts) -> StepParts:
        """The parts that a message describes."""
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class WorkerTimes(_Value):
    """A worker's parts of a step, its slots a step, and payload bytes a second up and down."""

    worker: str
    num_slots: float
    parts: StepParts
    push_bytes_per_second: float
    pull_bytes_per_second: float

    @classmethod
    def from_proto(cls, message: jobs_pb2.WorkerTimes) -> WorkerTimes:
        """The times that a message describes."""
        return cls(
            worker=message.worker,
            num_slots=message.num_slots,
            parts=StepParts.from_proto(message.parts),
            push_bytes_per_second=message.push_bytes_per_second,
            pull_bytes_per_second=message.pull_bytes_per_second,
        )


@dataclass(frozen=True, slots=True)
class StepBreakdown(_Value):
    """Where the time of a job's last `num_steps` steps went; `mean` is that of all workers."""

    num_steps: int
    mean: StepParts
    slowest_worker: str
    """Empty when no worker is clearly slower."""
    slowest_link: str
    """The worker whose link costs it most, with its rates; empty when links cost next to nothing."""
    advice: str
    workers: tuple[WorkerTimes, ...]

    @classmethod
    def from_proto(cls, message: jobs_pb2.StepBreakdown) -> StepBreakdown:
        """The breakdown that a message describes."""
        return cls(
            num_steps=message.num_steps,
            mean=StepParts.from_proto(message.mean),
            slowest_worker=message.slowest_worker,
            slowest_link=message.slowest_link,
            advice=message.advice,
            workers=tuple(WorkerTimes.from_proto(worker) for worker in message.workers),
        )


@dataclass(frozen=True, slots=True)
class Job(_Value):
    """A job: its state, its progress and what it waits for."""

    job_id: str
    name: str
    state: JobState
    reason: str
    epoch: int
    version: int
    num_steps: int
    num_tokens: int
    num_samples: int
    loss: float | None
    validation_loss: float | None
    initial_validation_loss: float | None
    num_skipped: int
    tokens_per_second: float
    push_bytes_per_second: float
    pull_bytes_per_second: float
    eta: timedelta | None
    submitted: datetime | None
    ended: datetime | None
    waits: tuple[Wait, ...]
    num_parameters: int
    run_directory: str
    recipe: Mapping[str, Any]
    slot_holders: tuple[str, ...]
    decisions: tuple[str, ...]
    hidden_share: float | None
    """Share of the time with something being sent or received during which the worker computed as well."""
    codecs: str
    server_memory: tuple[ServerMemory, ...]
    pipeline: Pipeline | None
    """None for a job without a pipeline, and before its plan."""
    step_breakdown: StepBreakdown | None
    """None before a step was measured."""

    @property
    def submitted_num_steps(self) -> int:
        """The number of steps that the job was submitted with; `resume` may have given it another one since."""
        earlier = self.recipe.get("training", {}).get("earlier")
        return int(earlier[0]["num_steps"]) if earlier else self.num_steps

    @classmethod
    def from_proto(cls, message: jobs_pb2.Job) -> Job:
        """The job that a message describes."""
        try:
            recipe = json.loads(message.recipe_json) if message.recipe_json else {}
        except ValueError:
            recipe = {}
        return cls(
            job_id=message.job_id,
            name=message.name,
            state=_JOB_STATES.get(message.state, JobState.UNSPECIFIED),
            reason=message.reason,
            epoch=message.epoch,
            version=message.version,
            num_steps=message.num_steps,
            num_tokens=message.num_tokens,
            num_samples=message.num_samples,
            loss=message.loss if message.HasField("loss") else None,
            validation_loss=message.validation_loss if message.HasField("validation_loss") else None,
            initial_validation_loss=(
                message.initial_validation_loss if message.HasField("initial_validation_loss") else None
            ),
            num_skipped=message.num_skipped,
            tokens_per_second=message.tokens_per_second,
            push_bytes_per_second=message.push_bytes_per_second,
            pull_bytes_per_second=message.pull_bytes_per_second,
            eta=_duration(message.eta_seconds) if message.HasField("eta_seconds") else None,
            submitted=_time_or_none(message.submitted_unix_ms),
            ended=_time_or_none(message.ended_unix_ms),
            waits=tuple(Wait(wait.what, wait.whom, _time_or_none(wait.since_unix_ms)) for wait in message.waits),
            num_parameters=message.num_parameters,
            run_directory=message.run_directory,
            recipe=recipe if isinstance(recipe, dict) else {},
            slot_holders=tuple(message.slot_holders),
            decisions=tuple(message.decisions),
            hidden_share=message.hidden_share if message.HasField("hidden_share") else None,
            codecs=message.codecs,
            server_memory=tuple(ServerMemory.from_proto(memory) for memory in message.server_memory),
            pipeline=Pipeline.from_proto(message.pipeline) if message.HasField("pipeline") else None,
            step_breakdown=(
                StepBreakdown.from_proto(message.step_breakdown) if message.HasField("step_breakdown") else None
            ),
        )


@dataclass(frozen=True, slots=True)
class Activity(_Value):
    """What a node does."""

    job_id: str
    phase: str
    step: int
    waiting_for: str
    waiting_since: datetime | None
    sent_bytes: int
    received_bytes: int
    resident_bytes: int
    missing_slots: tuple[int, ...]
    state_bytes: int
    early_bytes: int
    num_parameters: int

    @classmethod
    def from_proto(cls, message: coordinator_pb2.Activity) -> Activity:
        """The activity that a message describes."""
        return cls(
            job_id=message.job_id,
            phase=message.phase or "idle",
            step=message.step,
            waiting_for=message.waiting_for,
            waiting_since=_time_or_none(message.waiting_since_unix_ms),
            sent_bytes=message.sent_bytes,
            received_bytes=message.received_bytes,
            resident_bytes=message.resident_bytes,
            missing_slots=tuple(message.missing_slots),
            state_bytes=message.state_bytes,
            early_bytes=message.early_bytes,
            num_parameters=message.num_parameters,
        )


@dataclass(frozen=True, slots=True)
class Node(_Value):
    """A node of the cluster."""

    node_id: str
    name: str
    kind: NodeKind
    address: str
    alive: bool
    last_heartbeat: datetime | None
    activity: Activity
    memory_bytes: int
    device: str
    flops_per_second: float

    @classmethod
    def from_proto(cls, message: jobs_pb2.Node) -> Node:
        """The node that a message describes."""
        return cls(
            node_id=message.node_id,
            name=message.name,
            kind=_NODE_KINDS.get(message.kind, NodeKind.UNSPECIFIED),
            address=message.address,
            alive=message.alive,
            last_heartbeat=_time_or_none(message.last_heartbeat_unix_ms),
            activity=Activity.from_proto(message.activity),
            memory_bytes=message.memory_bytes,
            device=message.device,
            flops_per_second=message.flops_per_second,
        )


@dataclass(frozen=True, slots=True)
class Event(_WatchValue):
    """An entry of a job's event history."""

    cursor: int
    time: datetime
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Step(_WatchValue):
    """A committed or skipped step: version `step` became version `step + 1`. `loss` is in nats a target token."""

    cursor: int
    time: datetime
    epoch: int
    step: int
    num_tokens: int
    num_samples: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    pushed_bytes: int


@dataclass(frozen=True, slots=True)
class StepMetrics(_Value):
    """What a job's ledger has of one step. Step t starts from version t: both losses are of that version.

    The last version has no step yet: where it was validated, a row comes last that has `step`, `num_tokens` and
    `validation_loss` alone.
    """

    step: int
    epoch: int | None
    time: datetime | None
    """Of the commit."""
    num_tokens: int
    """Target tokens trained on from the job's beginning to the end of this step."""
    loss: float | None
    """In nats a target token; NaN where a skipped step had no finite one."""
    validation_loss: float | None
    """In nats a target token; None where there was no validation pass."""
    learning_rate: float | None
    grad_norm: float | None
    """Global, before clipping."""
    step_time: timedelta | None
    """From the commit before to this one; None for an epoch's first step and after a boundary at which the job may
    have rested."""
    pushed_bytes: int | None
    """Payload bytes of gradients that the servers took in."""
    pulled_bytes: int | None
    """Payload bytes of weights that the servers sent; None where an earlier gradstream reported the step."""
    skipped: bool

    @classmethod
    def from_proto(cls, message: jobs_pb2.StepMetrics) -> StepMetrics:
        """The row that a message describes."""
        return cls(
            step=message.step,
            epoch=message.epoch or None,
            time=_time_or_none(message.unix_ms),
            num_tokens=message.num_tokens,
            loss=message.loss if message.HasField("loss") else None,
            validation_loss=message.validation_loss if message.HasField("validation_loss") else None,
            learning_rate=message.learning_rate if message.HasField("learning_rate") else None,
            grad_norm=message.grad_norm if message.HasField("grad_norm") else None,
            step_time=_duration(message.step_seconds) if message.HasField("step_seconds") else None,
            pushed_bytes=message.pushed_bytes if message.HasField("pushed_bytes") else None,
            pulled_bytes=message.pulled_bytes if message.HasField("pulled_bytes") else None,
            skipped=message.skipped,
        )


@dataclass(frozen=True, slots=True)
class Validation(_WatchValue):
    """A validation pass over version `version`. `loss` is in nats a target token."""

    cursor: int
    version: int
    loss: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class LogLine(_WatchValue):
    """A line that a node logged."""

    cursor: int
    time: datetime
    node: str
    level: str
    text: str


@dataclass(frozen=True, slots=True)
class Checkpoint(_WatchValue):
    """A checkpoint that exists. `cursor` is 0 when it does not come from a watch."""

    cursor: int
    version: int
    path: str
    num_bytes: int
    state_sha256: str
    time: datetime

    @classmethod
    def from_proto(cls, message: jobs_pb2.Checkpoint, cursor: int = 0) -> Checkpoint:
        """The checkpoint that a message describes."""
        return cls(
            cursor=cursor,
            version=message.version,
            path=message.path,
            num_bytes=message.num_bytes,
            state_sha256=message.state_sha256,
            time=_time(message.unix_ms),
        )


@dataclass(frozen=True, slots=True)
class ExportProgress(_Value):
    """How far an export is: `received_bytes` of the `file_bytes` of `file`, `total_bytes` over all files so far."""

    file: str
    received_bytes: int
    file_bytes: int
    total_bytes: int


WatchItem = Event | Step | Validation | LogLine | Checkpoint


def watch_item(message: jobs_pb2.WatchJobResponse) -> WatchItem | None:
    """The item of a watch's response, or None when it is of a kind that this version does not know."""
    cursor = message.cursor
    match message.WhichOneof("item"):
        case "event":
            event = message.event
            return Event(cursor, _time(event.unix_ms), event.kind, event.message)
        case "step":
            step = message.step
            return Step(
                cursor=cursor,
                time=_time(step.unix_ms),
                epoch=step.epoch,
                step=step.step,
                num_tokens=step.num_tokens,
                num_samples=step.num_samples,
                loss=step.loss,
                grad_norm=step.grad_norm,
                learning_rate=step.learning_rate,
                skipped=step.skipped,
                pushed_bytes=step.pushed_bytes,
            )
        case "validation":
            validation = message.validation
            return Validation(cursor, validation.version, validation.loss, validation.num_tokens)
        case "log":
            line = message.log.line
            return LogLine(cursor, _time(line.unix_ms), message.log.node, line.level, line.text)
        case "checkpoint":
            return Checkpoint.from_proto(message.checkpoint, cursor)
    return None
