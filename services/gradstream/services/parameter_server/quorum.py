"""Which slots count in a round with a quorum: the decision, and the leader's part in it.

A slot is whole when every server has all of its contributions. A round with `local.quorum` K is committed without the
slots that are not whole `local.grace_seconds` after the K-th one is. Contributions that come later are dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gradstream.core.errors import ProtocolError
from gradstream.core.log import get_logger
from gradstream.core.plan.leases import slots_text
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.local import LocalConfig
from gradstream.proto.v1 import parameter_server_pb2 as pb

log = get_logger()


@dataclass(frozen=True)
class Count:
    """The slots that count; while this is open none, and the time at which it will be decided if that is known."""

    slots: tuple[int, ...] = ()
    decided_at: float | None = None


def decide_slots(
    now: float, whole_at: Mapping[int, float], num_slots: int, quorum: int, grace_seconds: float
) -> tuple[Count, str]:
    """Decide which slots of a round count; return (decision, reason). `whole_at` has when each slot became whole."""
    whole = tuple(sorted(whole_at))
    if len(whole) == num_slots:
        return Count(whole), "all slots are whole"
    if len(whole) < quorum:
        return Count(), f"{len(whole)} slots are whole, and the quorum is {quorum}"
    late = slots_text([slot for slot in range(num_slots) if slot not in whole_at])
    decided_at = sorted(whole_at.values())[quorum - 1] + grace_seconds
    if now < decided_at:
        return Count((), decided_at), f"{len(whole)} slots are whole; {late} may still become whole"
    return Count(whole), f"{late} not whole {grace_seconds:g} s after {quorum} others"


class SlotLeader:
    """The leader's part: hears which slots are whole where, decides once a round, and keeps the decision."""

    def __init__(self, plan: Plan, local: LocalConfig, clock: Callable[[], float] = time.monotonic):
        self._quorum, self._grace_seconds = local.quorum or plan.num_slots, local.grace
        self._plan = plan
        self._clock = clock
        self._step = plan.start_version
        self._holders: dict[int, set[int]] = {}  # the servers that have a slot whole
        self._whole_at: dict[int, float] = {}
        self._decided: tuple[int, tuple[int, ...]] = (-1, ())
        self._pending: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()
        self._timer: asyncio.TimerHandle | None = None

    def begin_step(self, step: int) -> None:
        """Begin the step or round from a version."""
        self._step = step
        self._holders.clear()
        self._whole_at.clear()

    async def complete(self, request: pb.CompleteSlotsRequest) -> tuple[int, ...]:
        """Take a server's report of the slots that it has whole; return the slots that count once that is decided.

        Raises ProtocolError.
        """
        step, slots = self._decided
        if request.step == step:
            return slots
        undecided = self._plan.counted_slots(request.step) is None
        if request.step != self._step or not undecided or request.server >= len(self._plan.servers):
            raise ProtocolError(
                f"server {request.server} has slots of step {request.step}, which no quorum decides on while step "
                f"{self._step} is under way; it must load the plan again"
            )
        if any(slot >= self._plan.num_slots for slot in request.slots):
            raise ProtocolError(f"server {request.server} has {slots_text(request.slots)} of {self._plan.num_slots}")
        pending = self._pending
        for slot in request.slots:
            holders = self._holders.setdefault(slot, set())
            holders.add(request.server)
            if len(holders) == len(self._plan.servers):
                self._whole_at.setdefault(slot, self._clock())
        self._judge()
        return await asyncio.shield(pending)

    def _judge(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        count, reason = decide_slots(now, self._whole_at, self._plan.num_slots, self._quorum, self._grace_seconds)
        if count.slots:
            if len(count.slots) < self._plan.num_slots and count.slots != self._decided[1]:
                log.info("slots are left out", job=self._plan.job_id, version=self._step, reason=reason)
            self._decided = self._step, count.slots
            pending, self._pending = self._pending, asyncio.get_running_loop().create_future()
            pending.set_result(count.slots)
        elif count.decided_at is not None:
            self._timer = asyncio.get_running_loop().call_later(count.decided_at - now, self._judge)

    def close(self, error: Exception) -> None:
        """Raise `error` in all calls of `complete` that wait."""
        if self._timer is not None:
            self._timer.cancel()
        if not self._pending.done():
            self._pending.set_exception(error)
            self._pending.exception()  # mark the error as seen, in case no call waits
