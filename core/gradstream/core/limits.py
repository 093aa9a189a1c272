"""How much one caller may have under way, and how often it may call. Pure: the clock is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field

from gradstream.core.rpc import MAX_MESSAGE_BYTES


@dataclass(frozen=True)
class Limit:
    """What one caller may do, by credential and host."""

    calls: int
    """Calls and streams at the same time."""
    calls_per_second: float
    burst: int
    """Calls at once after a pause."""

    @property
    def bytes_in_flight(self) -> int:
        """The most bytes of its messages that can wait to be looked at: one message a call. What a stream has taken up
        is bounded by its credit."""
        return self.calls * MAX_MESSAGE_BYTES


# A worker has a stream or two to each server, and its reports; a host may have many workers.
SERVICE_LIMIT = Limit(calls=512, calls_per_second=2000.0, burst=8000)
PERSON_LIMIT = Limit(calls=64, calls_per_second=200.0, burst=800)


@dataclass
class Meter:
    """What one caller has under way, and a token bucket of its calls."""

    limit: Limit
    under_way: int = 0
    allowance: float = field(init=False)
    seen_at: float | None = None

    def __post_init__(self) -> None:
        self.allowance = float(self.limit.burst)

    def enter(self, now: float) -> str:
        """Take up a call, or return why not. `now` is in seconds of a clock that never goes back."""
        limit = self.limit
        if self.seen_at is not None:
            refill = (now - self.seen_at) * limit.calls_per_second
            self.allowance = min(float(limit.burst), self.allowance + refill)
        self.seen_at = now
        if self.under_way >= limit.calls:
            return f"{limit.calls} calls of these credentials are under way from this host already; wait for one to end"
        if self.allowance < 1:
            return f"more than {limit.calls_per_second:g} calls a second come from these credentials; call less often"
        self.allowance -= 1
        self.under_way += 1
        return ""

    def leave(self) -> None:
        """A call has ended."""
        self.under_way -= 1
