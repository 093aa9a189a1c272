"""What this worker has done in the round under way, for heartbeats."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from gradstream.proto.v1 import coordinator_pb2


@dataclass(frozen=True)
class _Slot:
    """A slot under way. Of the step under way it has the place and the time of its begin; so of the first step here."""

    slot: int
    place: int
    began: float
    first_place: int
    first_began: float


class RoundReport:
    """Set in the compute thread, but for `begin`, and read on the event loop. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._version: int | None = None
        self._computed: tuple[int, ...] = ()
        self._slot: _Slot | None = None
        self._seconds = 0.0  # of an inner step

    def begin(self, version: int | None) -> None:
        """Begin the round from a version, or with None a step that is no round. The compute thread is idle."""
        self._version, self._computed, self._slot = version, (), None

    def begin_step(self, slot: int, place: int) -> None:
        """Note that a slot's inner step begins, the one after `place` others."""
        now, last = self._clock(), self._slot
        if last is None or last.slot != slot:
            self._slot = _Slot(slot, place, now, place, now)
            return
        self._seconds = (now - last.first_began) / (place - last.first_place)
        self._slot = _Slot(slot, place, now, last.first_place, last.first_began)

    def end_slot(self, slot: int) -> None:
        """Note that a slot is computed, and its contributions are on the way."""
        if not self._seconds and self._slot is not None:
            self._seconds = self._clock() - self._slot.began  # rounds of one step
        self._slot = None
        self._computed += (slot,)

    def leave_slot(self) -> None:
        """Note that no slot is under way. One that was is abandoned."""
        self._slot = None

    @property
    def slot(self) -> int | None:
        """The slot under way."""
        slot = self._slot
        return slot.slot if slot is not None else None

    def message(self) -> coordinator_pb2.RoundProgress | None:
        """The report; None outside of rounds."""
        slot = self._slot
        if self._version is None:
            return None
        report = coordinator_pb2.RoundProgress(
            version=self._version, inner_step_seconds=self._seconds, computed=self._computed
        )
        if slot is not None:
            report.slot, report.num_done = slot.slot, slot.place
            # A step that takes longer than the others so far may hang.
            report.inner_step_seconds = max(self._seconds, self._clock() - slot.began) if self._seconds else 0.0
        return report
