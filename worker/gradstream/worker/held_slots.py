"""The slots that a worker holds by the newest lease table."""

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
        """Those of the last table that gave this worker any."""
        self._changed = asyncio.Event()

    def take(self, table: int, slots: list[int]) -> None:
        """Take the slots of a newer table."""
        self.table, self.slots = table, slots
        if slots:
            self.last = slots
        self.wake()

    def wake(self) -> None:
        """Make the task that waits for a change look again."""
        self._changed.set()

    def next_change(self) -> Coroutine[Any, Any, bool]:
        """Wait for a change from the moment of this call on."""
        self._changed.clear()  # now, not when the result is awaited: a table may come between
        return self._changed.wait()
