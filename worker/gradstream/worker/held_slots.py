"""The slots that a worker holds according to the newest lease table, and those that it computes in a round instead."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RoundSlots:
    """The slots that the coordinator wants computed here in the round from `version`, in order.

    Those in `copies` another worker computes as well.
    """

    version: int
    slots: tuple[int, ...]
    copies: tuple[int, ...] = ()


class HeldSlots:
    """The slots of one worker in one job. On the event loop, but for `drops`."""

    def __init__(self) -> None:
        self.table = 0
        """The number of the newest lease table."""
        self.slots: list[int] = []
        self.last: list[int] = []
        """The slots from the last table that gave this worker any."""
        self._round = RoundSlots(-1, ())
        self._changed = asyncio.Event()

    def take(self, table: int, slots: list[int]) -> None:
        """Take over the slots of a newer table."""
        self.table, self.slots = table, slots
        if slots:
            self.last = slots
        self.wake()

    def take_round(self, slots: RoundSlots) -> None:
        """Compute these slots in their round, instead of those that the worker holds."""
        self._round = slots
        self.wake()

    def to_compute(self, version: int) -> Sequence[int]:
        """The slots to compute at a version, in order. Those that are done are among them."""
        return self._round.slots if self._round.version == version else self.slots

    def drops(self, version: int, slot: int) -> bool:
        """Whether a slot is no longer to be computed at a version, although it was begun. Called from any thread.

        A slot that another lease table took away is computed to its end.
        """
        wanted = self._round
        return wanted.version == version and slot not in wanted.slots

    def copies(self, version: int) -> Sequence[int]:
        """The slots of a version that another worker computes as well."""
        return self._round.copies if self._round.version == version else ()

    def wake(self) -> None:
        """Wake the task that waits for a change, so that it checks its condition again."""
        self._changed.set()

    def next_change(self) -> Coroutine[Any, Any, bool]:
        """Return a coroutine that waits for the next change after this call."""
        self._changed.clear()  # now, not when the coroutine is awaited: a table may come in between
        return self._changed.wait()
