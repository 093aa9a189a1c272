"""Jobs, as the client returns them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from gradstream.client._step_types import StepBreakdown
from gradstream.client._values import Value, duration_of, time_or_none
from gradstream.core import job_states
from gradstream.core.errors import ConfigError, nearest
from gradstream.proto.v1 import jobs_pb2


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


_JOB_STATES = {number: JobState(name.removeprefix("JOB_STATE_").lower()) for name, number in jobs_pb2.JobState.items()}


def job_state(name: str) -> jobs_pb2.JobState.ValueType:
    """The state with this name. Raises ConfigError that suggests the nearest one."""
    known = {str(state): number for number, state in _JOB_STATES.items() if state is not JobState.UNSPECIFIED}
    if name not in known:
        raise ConfigError(f"a job has no state '{name[:100]}'{nearest(name, known)}")
    return known[name]


_ENDED = frozenset(_JOB_STATES[number] for number in job_states.ENDED)


@dataclass(frozen=True, slots=True)
class Wait(Value):
    """Something that a job or a node waits for."""

    what: str
    whom: str
    since: datetime | None


@dataclass(frozen=True, slots=True)
class ServerMemory(Value):
    """What a server holds of a job, and what its plan predicted, in bytes.

    State is weights, moments, accumulators, reference and published bundles; early are contributions that wait to
    be added. `newcomer_bytes` are in `state_bytes`, but not in its prediction: whole bundles for workers without the
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
class Pipeline(Value):
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
class Job(Value):
    """A job: its state, its progress and what it waits for.

    `version` counts commits, `step` the steps that are done, of `num_steps`. With local steps a commit is a round of
    inner steps, each of which counts as a step; else the two are equal.
    """

    job_id: str
    name: str
    state: JobState
    reason: str
    epoch: int
    version: int
    step: int
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
            step=message.step if message.HasField("step") else message.version,
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
            eta=duration_of(message.eta_seconds) if message.HasField("eta_seconds") else None,
            submitted=time_or_none(message.submitted_unix_ms),
            ended=time_or_none(message.ended_unix_ms),
            waits=tuple(Wait(wait.what, wait.whom, time_or_none(wait.since_unix_ms)) for wait in message.waits),
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
class ExportProgress(Value):
    """How far an export is: `received_bytes` of the `file_bytes` of `file`, `total_bytes` over all files so far."""

    file: str
    received_bytes: int
    file_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class RemovedJob(Value):
    """What a removal took away of a job, or would take away. `left` stays in the job's directory."""

    job_id: str
    num_bytes: int
    versions: tuple[int, ...]
    run_directory: str
    left: tuple[str, ...]

    @classmethod
    def from_proto(cls, message: jobs_pb2.RemoveJobResponse) -> RemovedJob:
        """The value that a message describes."""
        return cls(
            job_id=message.job_id,
            num_bytes=message.num_bytes,
            versions=tuple(message.versions),
            run_directory=message.run_directory,
            left=tuple(message.left),
        )
