"""Limits: calls under way and call rate of one caller, slow peers, and the memory of all requests together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limit:
    """The limit of one caller, known by credential and host."""

    calls: int
    """Maximum number of calls and streams at the same time."""
    calls_per_second: float
    burst: int
    """Number of calls that may come at once after a pause."""


MAX_NODES = 4096
"""Number of nodes of a kind for which the limits of all services are made."""

# A worker has two streams to each service, may have left another on a broken connection, and sends reports. All workers
# may share one address and one credential. `Receiving` bounds the requests besides, and stream_limits a parameter
# server's streams.
SERVICE_LIMIT = Limit(calls=3 * MAX_NODES, calls_per_second=2000.0, burst=4 * MAX_NODES)
PERSON_LIMIT = Limit(calls=64, calls_per_second=200.0, burst=800)


@dataclass(eq=False)
class Meter:
    """The number of one caller's calls under way, and a token bucket for its call rate. The clock is an argument."""

    limit: Limit
    under_way: int = 0
    allowance: float = field(init=False)
    seen_at: float | None = None

    def __post_init__(self) -> None:
        self.allowance = float(self.limit.burst)

    def enter(self, now: float) -> str:
        """Count a new call, or return why it is refused. `now` is in seconds of a monotonic clock."""
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
        """Count the end of a call."""
        self.under_way -= 1


MIN_BYTES_PER_SECOND = 128 << 10
"""Lowest rate of a stream whose peer makes this side wait."""
MIN_RATE = f"{MIN_BYTES_PER_SECOND >> 10} KiB a second"
SHORT_SHARE = 1 / 60
"""Share of `Patience.max_seconds`: shorter waits cost nothing and are never cut off."""


@dataclass(eq=False)
class Patience:
    """The time for which the peer of a stream may still keep this side waiting. The clock is an argument.

    The time decreases while this side waits. It increases while this side does not wait, and with each transferred
    byte. A peer that takes or sends one message just before each deadline is therefore cut off too, which frees the
    resources of its call for others.
    """

    max_seconds: float
    left_seconds: float = field(init=False)
    _at: float | None = None

    def __post_init__(self) -> None:
        self.left_seconds = self.max_seconds

    @property
    def is_worn(self) -> bool:
        """Whether earlier waits have used up more than half of the time."""
        return self.left_seconds < self.max_seconds / 2

    def begin(self, now: float) -> float:
        """Begin a wait; return the number of seconds that it may last."""
        if self._at is not None:
            self._add(now - self._at)
        self._at = now
        return max(self.left_seconds, self.max_seconds * SHORT_SHARE)

    def end(self, now: float, num_bytes: Callable[[], int]) -> None:
        """End the wait with a message of `num_bytes()`, which is called only after a wait that counts."""
        assert self._at is not None
        waited, self._at = now - self._at, now
        if waited > self.max_seconds * SHORT_SHARE:
            self._add(num_bytes() / MIN_BYTES_PER_SECOND - waited)

    def _add(self, seconds: float) -> None:
        self.left_seconds = min(self.max_seconds, max(0.0, self.left_seconds + seconds))


MAX_REQUEST_BYTES = 128 << 20
MAX_REQUEST_BYTES_A_CALLER = 32 << 20


class Receiving:
    """A bound on the bytes of unary requests that a server reads and serves at the same time.

    When the bound is reached, the next request is not read until another one has ended; gRPC's flow control stops its
    sender. Each caller has a smaller bound of its own, so no caller can keep others out.

    `waiting_bytes` returns the bytes of requests that may be served for long, such as the pulls of a plan's workers.
    Both bounds are larger by that number, or else requests that wait for others could keep the others out.
    """

    def __init__(
        self,
        max_bytes: int = MAX_REQUEST_BYTES,
        max_bytes_a_caller: int = MAX_REQUEST_BYTES_A_CALLER,
        waiting_bytes: Callable[[], int] = lambda: 0,
    ):
        self._max_bytes = max_bytes
        self._max_bytes_a_caller = max_bytes_a_caller
        self._waiting_bytes = waiting_bytes
        self._held: Counter[Meter] = Counter()
        self._waiting: dict[asyncio.Future[None], tuple[Meter, int]] = {}  # in order of arrival
        self.held_bytes = 0

    async def reserve(self, caller: Meter, num_bytes: int) -> None:
        """Wait until `num_bytes` are free, and take them. `release` gives them back."""
        if self._is_free(caller, num_bytes):
            self._take(caller, num_bytes)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting[turn] = (caller, num_bytes)
        try:
            await turn
        except asyncio.CancelledError:
            if self._waiting.pop(turn, None) is None:  # the bytes were reserved at the same moment
                self.release(caller, num_bytes)
            raise

    def release(self, caller: Meter, num_bytes: int) -> None:
        """Give bytes back, and let waiting callers continue."""
        self._take(caller, -num_bytes)
        if not self._held[caller]:
            del self._held[caller]
        for turn, (other, wanted) in list(self._waiting.items()):
            if not turn.done() and self._is_free(other, wanted):
                del self._waiting[turn]
                self._take(other, wanted)
                turn.set_result(None)

    def _is_free(self, caller: Meter, num_bytes: int) -> bool:
        more = num_bytes - self._waiting_bytes()
        return self.held_bytes + more <= self._max_bytes and self._held[caller] + more <= self._max_bytes_a_caller

    def _take(self, caller: Meter, num_bytes: int) -> None:
        self._held[caller] += num_bytes
        self.held_bytes += num_bytes
