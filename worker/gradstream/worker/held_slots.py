"""The slots that a worker holds according to the newest lease table."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class HeldSlots:
    """The slots of one worker in one job. On the event loop."""

    def __init__(self) -> None:
        self.table = 0
        """The number of the newest lease table."""
        self.slots: list[int] = []
        self.last: list[int] = []
        """The slots from the last table that gave this worker any."""
        self._changed = asyncio.Event()

    def take(self, table: int, slots: list[int]) -> None:
        """Take over the slots of a newer table."""
        self.table, self.slots = table, slots
        if slots:
            self.last = slots
        self.wake()

    def wake(self) -> None:
        """Wake the task that waits for a change, so that it checks its condition again."""
        self._changed.set()

    def next_change(self) -> Coroutine[Any, Any, bool]:
        """Return a coroutine that waits for the next change after this call."""
        self._changed.clear()  # now, not when the coroutine is awaited: a table may come in between
        return self._changed.wait()
