"""How much one caller may have under way, how often it may call, and how much all requests together may hold."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limit:
    """What one caller may do, by credential and host."""

    calls: int
    """Calls and streams at the same time."""
    calls_per_second: float
    burst: int
    """Calls at once after a pause."""


# A worker has a stream or two to each service, and its reports; 1,000 workers may be behind one address with one
# credential. Requests are bounded beside this (`Receiving`), and so are a parameter server's streams (stream_limits).
SERVICE_LIMIT = Limit(calls=4096, calls_per_second=2000.0, burst=8000)
PERSON_LIMIT = Limit(calls=64, calls_per_second=200.0, burst=800)


@dataclass(eq=False)
class Meter:
    """What one caller has under way, and a token bucket of its calls. The clock is an argument."""

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


MIN_BYTES_PER_SECOND = 128 << 10
"""Of a stream that the peer keeps waiting."""
MIN_RATE = f"{MIN_BYTES_PER_SECOND >> 10} KiB a second"
SHORT_SHARE = 1 / 60
"""Of the patience at the beginning: waits that are shorter cost nothing and are never cut off."""


@dataclass(eq=False)
class Patience:
    """How long the peer of a stream may still keep this side waiting. The clock is an argument.

    It is used up while this side waits, and comes back with the time in which it does not, and with the bytes that go
    over. So a peer that takes or gives a message just before each deadline is cut off all the same: what the call
    holds, others may want.
    """

    max_seconds: float
    left_seconds: float = field(init=False)
    _at: float | None = None

    def __post_init__(self) -> None:
        self.left_seconds = self.max_seconds

    @property
    def is_worn(self) -> bool:
        """Whether the peer has used up more than half of it by earlier waits."""
        return self.left_seconds < self.max_seconds / 2

    def begin(self, now: float) -> float:
        """A wait begins; returns how many seconds it may last."""
        if self._at is not None:
            self._add(now - self._at)
        self._at = now
        return max(self.left_seconds, self.max_seconds * SHORT_SHARE)

    def end(self, now: float, num_bytes: Callable[[], int]) -> None:
        """The wait has ended with a message of `num_bytes()`, which is asked only where that matters."""
        assert self._at is not None
        waited, self._at = now - self._at, now
        if waited > self.max_seconds * SHORT_SHARE:
            self._add(num_bytes() / MIN_BYTES_PER_SECOND - waited)

    def _add(self, seconds: float) -> None:
        self.left_seconds = min(self.max_seconds, max(0.0, self.left_seconds + seconds))


MAX_REQUEST_BYTES = 128 << 20
MAX_REQUEST_BYTES_A_CALLER = 32 << 20


class Receiving:
    """Bounds the bytes of unary requests that a server reads and serves at the same time.

    Where a bound is reached the next request is not read until another has ended: gRPC's flow control holds its sender.
    No caller can take it all, so none can keep others out.
    """

    def __init__(self, max_bytes: int = MAX_REQUEST_BYTES, max_bytes_a_caller: int = MAX_REQUEST_BYTES_A_CALLER):
        self._max_bytes = max_bytes
        self._max_bytes_a_caller = max_bytes_a_caller
        self._held: Counter[Meter] = Counter()
        self._waiting: dict[asyncio.Future[None], tuple[Meter, int]] = {}  # in the order in which they came
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
            if self._waiting.pop(turn, None) is None:  # taken for it in the same moment
                self.release(caller, num_bytes)
            raise

    def release(self, caller: Meter, num_bytes: int) -> None:
        """Give bytes back; those who waited for them go on."""
        self._take(caller, -num_bytes)
        if not self._held[caller]:
            del self._held[caller]
        for turn, (other, wanted) in list(self._waiting.items()):
            if not turn.done() and self._is_free(other, wanted):
                del self._waiting[turn]
                self._take(other, wanted)
                turn.set_result(None)

    def _is_free(self, caller: Meter, num_bytes: int) -> bool:
        fits = self.held_bytes + num_bytes <= self._max_bytes
        return fits and self._held[caller] + num_bytes <= self._max_bytes_a_caller

    def _take(self, caller: Meter, num_bytes: int) -> None:
        self._held[caller] += num_bytes
        self.held_bytes += num_bytes
