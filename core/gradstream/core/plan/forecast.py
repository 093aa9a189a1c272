"""What a plan will cost, as the coordinator forecasts it: time, memory, bytes on every link."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from gradstream.proto.v1 import jobs_pb2


@dataclass(frozen=True)
class StageForecast:
    """A stage: its segments by name, its place, and its seconds forward and backward a microbatch."""

    stage: int
    place: int
    segments: tuple[str, ...]
    num_parameters: int
    forward_seconds: float
    backward_seconds: float
    measured: bool


@dataclass(frozen=True)
class PlaceForecast:
    """A place of a replica: the workers it is planned for, what each needs, and what the least of them offers (0: it
    did not say)."""

    place: int
    workers: tuple[str, ...]
    need_bytes: int
    offered_bytes: int


@dataclass(frozen=True)
class ServerForecast:
    """A parameter server: what it needs at most, of that all the time, and what it offers (0: it did not say)."""

    server: str
    num_parameters: int
    need_bytes: int
    state_bytes: int
    offered_bytes: int


@dataclass(frozen=True)
class LinkForecast:
    """Bytes of a step from one node to another: `kind` is push, pull, activations or gradients; a sender or receiver
    "worker in place p" stands for each such worker."""

    kind: str
    sender: str
    receiver: str
    step_bytes: int


@dataclass(frozen=True)
class Forecast:
    """What a step of a plan costs. Times are None where the segments' costs are not known. `step_seconds` is the sum of
    compute and of what of push and pull does not overlap it. `reasons` has the plan's decisions by subject, `warnings`
    what could not be checked or measured, one line each."""

    num_parameters: int
    num_replicas: int
    num_microbatches: int
    stages: tuple[StageForecast, ...]
    places: tuple[PlaceForecast, ...]
    servers: tuple[ServerForecast, ...]
    links: tuple[LinkForecast, ...]
    schedule: str
    link_bits_per_second: float
    compute_seconds: float | None
    bubble: float | None
    push_seconds: float
    pull_seconds: float
    exposed_seconds: float | None
    step_seconds: float | None
    tokens_per_second: float | None
    reasons: dict[str, str]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """This as what `json.dumps` takes."""
        return asdict(self)

    def to_proto(self) -> jobs_pb2.Forecast:
        """This as a message."""
        parts = {name: [_PARTS[name][1](**vars(part)) for part in getattr(self, name)] for name in _PARTS}
        reasons = [jobs_pb2.ForecastReason(subject=subject, text=text) for subject, text in self.reasons.items()]
        return jobs_pb2.Forecast(**{**vars(self), **parts, "reasons": reasons})

    @classmethod
    def from_proto(cls, message: jobs_pb2.Forecast) -> Forecast:
        """The forecast in a message."""
        values = _values(cls, message)
        for name, (kind, _) in _PARTS.items():
            values[name] = tuple(kind(**_values(kind, part)) for part in values[name])
        return cls(**{**values, "reasons": {reason.subject: reason.text for reason in message.reasons}})


_PARTS: dict[str, tuple[Any, Any]] = {
    "stages": (StageForecast, jobs_pb2.StageForecast),
    "places": (PlaceForecast, jobs_pb2.PlaceForecast),
    "servers": (ServerForecast, jobs_pb2.ServerForecast),
    "links": (LinkForecast, jobs_pb2.LinkForecast),
}
"""The parts of a forecast, and their messages, whose fields have the same names."""


def _values(kind: Any, message: Any) -> dict[str, Any]:
    """A message's fields by name: tuples where they are repeated, None where they are absent."""
    found: dict[str, Any] = {}
    for field in fields(kind):
        value = getattr(message, field.name)
        if str(field.type).startswith("tuple"):
            value = tuple(value)
        elif str(field.type).endswith("| None") and not message.HasField(field.name):
            value = None
        found[field.name] = value
    return found
