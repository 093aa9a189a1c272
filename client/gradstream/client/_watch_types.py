"""The items of a job's history."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gradstream.client._values import Value, time_of
from gradstream.core.errors import ConfigError
from gradstream.proto.v1 import jobs_pb2


class _WatchValue(Value):
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


@dataclass(frozen=True, slots=True)
class Event(_WatchValue):
    """An entry of a job's event history."""

    cursor: int
    time: datetime
    kind: str
    message: str


@dataclass(frozen=True, slots=True)
class Step(_WatchValue):
    """A committed or skipped step: version `version` became the next one. `loss` is in nats a target token.

    Without local steps, `step` equals `version`, and `num_steps` is 1. A round has `num_steps` inner steps, of which
    `step` is the first.
    """

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
    version: int
    num_steps: int
    slots: tuple[int, ...] = ()
    """Of a round with a quorum, the slots that counted; empty: all slots."""


@dataclass(frozen=True, slots=True)
class Validation(_WatchValue):
    """A validation pass over version `version`, at which `step` steps are done. `loss` is in nats a target token."""

    cursor: int
    version: int
    loss: float
    num_tokens: int
    step: int


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
    """A checkpoint of `version`, at which `step` steps are done. `cursor` is 0 when it does not come from a watch."""

    cursor: int
    version: int
    path: str
    num_bytes: int
    state_sha256: str
    time: datetime
    step: int

    @classmethod
    def from_proto(cls, message: jobs_pb2.Checkpoint, cursor: int = 0) -> Checkpoint:
        """The checkpoint that a message describes."""
        return cls(
            cursor=cursor,
            version=message.version,
            path=message.path,
            num_bytes=message.num_bytes,
            state_sha256=message.state_sha256,
            time=time_of(message.unix_ms),
            step=message.step if message.HasField("step") else message.version,
        )


WatchItem = Event | Step | Validation | LogLine | Checkpoint


def check_selected(request: jobs_pb2.WatchJobRequest, response: jobs_pb2.WatchJobResponse) -> None:
    """Raise ConfigError for a response of a coordinator of an earlier release, which selects items by kind only."""
    if response.items or not response.WhichOneof("item"):
        return
    asked = [
        name
        for name, value in (
            ("event_kinds", request.event_kinds),
            ("nodes", request.nodes),
            ("level", request.level),
            ("since", request.since_unix_ms),
            ("tail", request.tail),
        )
        if value
    ]
    if asked:
        raise ConfigError(
            f"the coordinator is of an earlier release and cannot select by {', '.join(asked)}; update it, or watch "
            f"all items"
        )


def watch_item(message: jobs_pb2.WatchJobResponse) -> WatchItem | None:
    """The item of a watch's response, or None when it is of a kind that this version does not know."""
    cursor = message.cursor
    match message.WhichOneof("item"):
        case "event":
            event = message.event
            return Event(cursor, time_of(event.unix_ms), event.kind, event.message)
        case "step":
            step = message.step
            return Step(
                cursor=cursor,
                time=time_of(step.unix_ms),
                epoch=step.epoch,
                step=step.first_step if step.HasField("first_step") else step.step,
                num_tokens=step.num_tokens,
                num_samples=step.num_samples,
                loss=step.loss,
                grad_norm=step.grad_norm,
                learning_rate=step.learning_rate,
                skipped=step.skipped,
                pushed_bytes=step.pushed_bytes,
                version=step.step,
                num_steps=step.num_steps if step.HasField("num_steps") else 1,
                slots=tuple(step.slots),
            )
        case "validation":
            validation = message.validation
            done = validation.step if validation.HasField("step") else validation.version
            return Validation(cursor, validation.version, validation.loss, validation.num_tokens, done)
        case "log":
            line = message.log.line
            return LogLine(cursor, time_of(line.unix_ms), message.log.node, line.level, line.text)
        case "checkpoint":
            return Checkpoint.from_proto(message.checkpoint, cursor)
    return None
