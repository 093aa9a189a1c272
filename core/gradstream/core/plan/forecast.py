"""The coordinator's forecast of a plan's cost: time, memory, and bytes on each link."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from gradstream.proto.v1 import jobs_pb2


@dataclass(frozen=True)
class StageForecast:
    """A stage: its segments by name, its place, and the seconds of a microbatch's forward and backward pass."""

    stage: int
    place: int
    segments: tuple[str, ...]
    num_parameters: int
    forward_seconds: float
    backward_seconds: float
    measured: bool


@dataclass(frozen=True)
class PlaceForecast:
    """A place of a replica: its planned workers, one for each replica, and their memory.

    `need_bytes` is what each of them needs, `offered_bytes` the smallest offer among them (0: unknown).
    """

    place: int
    workers: tuple[str, ...]
    need_bytes: int
    offered_bytes: int


@dataclass(frozen=True)
class ServerForecast:
    """A parameter server and its memory.

    `need_bytes` is its maximum need, `state_bytes` the part of it that it needs at all times, and `offered_bytes` its
    offer (0: unknown).
    """

    server: str
    num_parameters: int
    need_bytes: int
    state_bytes: int
    offered_bytes: int


@dataclass(frozen=True)
class LinkForecast:
    """The bytes that a step, or a round, sends from one node to another.

    `kind` is push, pull, activations, gradients or, in rounds, tied gradients. "worker in place p" as sender or
    receiver means each such worker.
    """

    kind: str
    sender: str
    receiver: str
    step_bytes: int


@dataclass(frozen=True)
class ExchangeOption:
    """A way to exchange with the servers, and the share of the time in which workers then compute (`utilisation`).

    `steps` is the number of inner steps of a round, 0 for ordinary steps, whose `inner_state` is "". `push` and `pull`
    are codecs. `worker_step_bytes` is what the busiest worker sends and receives, divided by the steps.
    """

    steps: int
    push: str
    pull: str
    inner_state: str
    utilisation: float
    worker_step_bytes: float
    advised: bool = False


@dataclass(frozen=True)
class Forecast:
    """The forecast cost of a step of a plan; with local steps, of a round of `round_steps` inner steps.

    Times are None if the segments' costs are unknown. `step_seconds` is the sum of `compute_seconds` and of
    `exposed_seconds`, the time of push and pull that does not overlap compute; of a round it is that sum divided by
    `round_steps`, which is 0 without local steps. `worker_step_bytes` is what the busiest worker sends and receives in
    a step, and `utilisation` the share of the time in which workers compute. `reasons` has the plan's decisions by
    subject. `warnings` has the checks and measurements that were not possible, one line each. `options` are ways to
    exchange, one of them advised for the reason `advice`; there are none if times are unknown.
    """

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
    round_steps: int = 0
    worker_step_bytes: float = 0.0
    utilisation: float | None = None
    options: tuple[ExchangeOption, ...] = ()
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The forecast as a dict for `json.dumps`."""
        return asdict(self)

    def to_proto(self) -> jobs_pb2.Forecast:
        """Encode this forecast as a message."""
        parts = {name: [_PARTS[name][1](**vars(part)) for part in getattr(self, name)] for name in _PARTS}
        reasons = [jobs_pb2.ForecastReason(subject=subject, text=text) for subject, text in self.reasons.items()]
        return jobs_pb2.Forecast(**{**vars(self), **parts, "reasons": reasons})

    @classmethod
    def from_proto(cls, message: jobs_pb2.Forecast) -> Forecast:
        """Decode a message."""
        values = _values(cls, message)
        for name, (kind, _) in _PARTS.items():
            values[name] = tuple(kind(**_values(kind, part)) for part in values[name])
        return cls(**{**values, "reasons": {reason.subject: reason.text for reason in message.reasons}})


_PARTS: dict[str, tuple[Any, Any]] = {
    "stages": (StageForecast, jobs_pb2.StageForecast),
    "places": (PlaceForecast, jobs_pb2.PlaceForecast),
    "servers": (ServerForecast, jobs_pb2.ServerForecast),
    "links": (LinkForecast, jobs_pb2.LinkForecast),
    "options": (ExchangeOption, jobs_pb2.ExchangeOption),
}
"""The parts of a forecast, and their messages, whose fields have the same names."""


def _values(kind: Any, message: Any) -> dict[str, Any]:
    """A message's fields by name. Repeated fields are tuples, and absent ones are None."""
    found: dict[str, Any] = {}
    for field in fields(kind):
        value = getattr(message, field.name)
        if str(field.type).startswith("tuple"):
            value = tuple(value)
        elif str(field.type).endswith("| None") and not message.HasField(field.name):
            value = None
        found[field.name] = value
    return found
