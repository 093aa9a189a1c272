"""Steps of a job: the ledger's rows, and where their time went."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime, timedelta

from gradstream.client._values import Value, duration_of, time_or_none
from gradstream.proto.v1 import jobs_pb2


@dataclass(frozen=True, slots=True)
class StepParts(Value):
    """The parts of a step, in seconds; with local steps those of a round.

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
class WorkerTimes(Value):
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
class StepBreakdown(Value):
    """Where the time of a job's last `num_steps` steps, or rounds, went; `mean` is that of all workers."""

    num_steps: int
    mean: StepParts
    slowest_worker: str
    """Empty when no worker is clearly slower."""
    slowest_link: str
    """The worker whose link costs it most, with its rates; empty when links cost next to nothing."""
    slowest_server: str
    """The server whose contributions are under way much longer than those of the others; empty when there is none."""
    advice: str
    workers: tuple[WorkerTimes, ...]
    round_steps: int = 0
    """The inner steps of each round that was measured; 0 if they were ordinary steps."""

    @classmethod
    def from_proto(cls, message: jobs_pb2.StepBreakdown) -> StepBreakdown:
        """The breakdown that a message describes."""
        return cls(
            num_steps=message.num_steps,
            mean=StepParts.from_proto(message.mean),
            slowest_worker=message.slowest_worker,
            slowest_link=message.slowest_link,
            slowest_server=message.slowest_server,
            advice=message.advice,
            workers=tuple(WorkerTimes.from_proto(worker) for worker in message.workers),
            round_steps=message.round_steps,
        )


@dataclass(frozen=True, slots=True)
class StepMetrics(Value):
    """What a job's ledger has of one step. Step t starts from version t: both losses are of that version.

    The last version has no step yet: where it was validated, a row comes last that has `step`, `version`, `num_tokens`
    and `validation_loss` alone.

    With local steps a round has one row, for its `num_steps` inner steps from `step` on. Loss, bytes and time are those
    of the whole round, the norm is that of the mean difference, and the learning rate that of the last inner step.
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
    version: int
    """From which the step starts; without local steps it equals `step`."""
    num_steps: int | None
    """1, or the inner steps of a round."""
    slots: tuple[int, ...] = ()
    """Of a round with a quorum, the slots that counted; tokens and loss are those of these slots. Empty: all slots."""

    @classmethod
    def from_proto(cls, message: jobs_pb2.StepMetrics) -> StepMetrics:
        """The row that a message describes."""
        return cls(
            step=message.step,
            epoch=message.epoch or None,
            time=time_or_none(message.unix_ms),
            num_tokens=message.num_tokens,
            loss=message.loss if message.HasField("loss") else None,
            validation_loss=message.validation_loss if message.HasField("validation_loss") else None,
            learning_rate=message.learning_rate if message.HasField("learning_rate") else None,
            grad_norm=message.grad_norm if message.HasField("grad_norm") else None,
            step_time=duration_of(message.step_seconds) if message.HasField("step_seconds") else None,
            pushed_bytes=message.pushed_bytes if message.HasField("pushed_bytes") else None,
            pulled_bytes=message.pulled_bytes if message.HasField("pulled_bytes") else None,
            skipped=message.skipped,
            version=message.version if message.HasField("version") else message.step,
            # An earlier coordinator gives neither; without an epoch the row has no step.
            num_steps=(message.num_steps or 1) if message.epoch else None,
            slots=tuple(message.slots),
        )
