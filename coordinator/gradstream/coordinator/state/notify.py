"""Append to a job's history and wake its watchers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from gradstream.coordinator.state.state import State
from gradstream.proto.v1 import jobs_pb2

PAGE_ITEMS = 256


class Notifier:
    """Appends to histories and lets any number of watchers follow, each with one page in memory."""

    def __init__(self, state: State):
        self._state = state
        self._changes: dict[str, asyncio.Event] = {}

    def append(self, job_id: str, items: Sequence[jobs_pb2.WatchJobResponse]) -> None:
        """Add items to a job's history."""
        self._state.append(job_id, items)
        self.changed(job_id)

    def changed(self, job_id: str) -> None:
        """Wake the job's watchers: its history or its state has changed."""
        event = self._changes.pop(job_id, None)
        if event is not None:
            event.set()

    def change(self, job_id: str) -> asyncio.Event:
        """Return an event that is set at the next change of the job's history or state."""
        return self._changes.setdefault(job_id, asyncio.Event())

    async def follow(
        self, job_id: str, after_cursor: int, is_over: Callable[[], bool], kinds: Sequence[str] = ()
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        """Yield the items after a cursor, of all kinds or of `kinds`.

        Ends when all items were sent and `is_over` returns True: no more will come.
        """
        while True:
            # Subscribe before reading: an item that is added between the read and the wait is not missed.
            change = self.change(job_id)
            over = is_over()
            page = self._state.read_history(job_id, after_cursor, PAGE_ITEMS, kinds)
            for item in page:
                yield item
                after_cursor = item.cursor
            if page:
                continue
            if over:
                return
            await change.wait()
