"""Append to a job's history and wake its watchers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from gradstream.coordinator.state.history import ALL, HistoryFilter
from gradstream.coordinator.state.state import MAX_WAITING_ITEMS, WAIT_SECONDS, State, StateReader
from gradstream.coordinator.state.threads import StateReads, StateWrites
from gradstream.core.errors import UnreachableError, one_line
from gradstream.core.log import get_logger
from gradstream.proto.v1 import jobs_pb2

PAGE_ITEMS = 256

log = get_logger()


class Watcher:
    """Waits for changes of a job that a caller wants."""

    def __init__(self, wanted: HistoryFilter):
        self._wanted = wanted
        self._changed = asyncio.Event()

    def begin(self) -> None:
        """Forget earlier changes. The caller then looks, and waits for what changes after the look began."""
        self._changed.clear()

    async def wait(self) -> None:
        """Wait for a change after the last `begin`."""
        await self._changed.wait()

    def tell(self, items: Sequence[jobs_pb2.WatchJobResponse] | None) -> bool:
        """Wake the waiter if it wants one of the new items; None stands for a change that everyone wants."""
        if not self._changed.is_set() and (items is None or any(map(self._wanted.selects, items))):
            self._changed.set()
            return True
        return False


class Notifier:
    """Appends to histories and lets any number of watchers follow, each with one page in memory."""

    def __init__(self, state: State, reads: StateReads, writes: StateWrites):
        self._state = state
        self._reads = reads
        self._writes = writes
        # Items of histories that watchers hear of once they are stored, with their jobs.
        self._appended: deque[tuple[str, Sequence[jobs_pb2.WatchJobResponse]]] = deque(maxlen=MAX_WAITING_ITEMS)
        self._storing: asyncio.Task[None] | None = None
        self._watchers: dict[str, set[Watcher]] = {}
        # Number of times that a watcher was woken.
        self.num_wakes = 0
        # Functions that are called with the job and the new items of each history, once these are stored.
        self.observers: list[Callable[[str, Sequence[jobs_pb2.WatchJobResponse]], None]] = []

    def append(self, job_id: str, items: Sequence[jobs_pb2.WatchJobResponse]) -> None:
        """Add items to a job's history soon, and before what a later write adds. If this fails, they are lost."""
        self._state.append_later(job_id, items)
        self._appended.append((job_id, items))
        if self._storing is None:
            self._storing = asyncio.create_task(self._store())

    async def _store(self) -> None:
        try:
            while self._appended:
                told = list(self._appended)
                self._appended.clear()
                try:
                    await self._writes.call(lambda state: state.flush())
                except UnreachableError as error:
                    log.error("items of a history were not stored", cause=one_line(error))
                for job_id, items in told:
                    self.changed(job_id, items)
        finally:
            self._storing = None

    def changed(self, job_id: str, items: Sequence[jobs_pb2.WatchJobResponse] | None = None) -> None:
        """Wake the job's watchers that want one of the new items of its history; without items, wake all."""
        for observe in self.observers:
            observe(job_id, items or ())
        for watcher in self._watchers.get(job_id, ()):
            self.num_wakes += watcher.tell(items)

    @contextmanager
    def watching(self, job_id: str, wanted: HistoryFilter = ALL) -> Iterator[Watcher]:
        """Register a watcher for a job's new items that are wanted, and for its end."""
        watcher = Watcher(wanted)
        self._watchers.setdefault(job_id, set()).add(watcher)
        try:
            yield watcher
        finally:
            watchers = self._watchers[job_id]
            watchers.discard(watcher)
            if not watchers:
                del self._watchers[job_id]

    async def follow(
        self,
        job_id: str,
        after_cursor: int,
        is_over: Callable[[], bool],
        wanted: HistoryFilter = ALL,
        tail: int = 0,
    ) -> AsyncIterator[list[jobs_pb2.WatchJobResponse]]:
        """Yield pages of the wanted items after a cursor; with `tail` only the last ones of those that are recorded.

        Ends when all items were sent and `is_over` returns True: no more will come.
        """
        if self._storing is not None:
            # Items that were appended before this call; a slow disk delays no answer for long.
            await asyncio.wait([self._storing], timeout=WAIT_SECONDS)
        if tail:
            last = await self._reads.call(lambda reader: reader.cursor_before_last(job_id, tail, wanted))
            after_cursor = max(after_cursor, last)
        with self.watching(job_id, wanted) as watcher:
            while True:
                # Before the read: an item that is added between the read and the wait is not missed.
                watcher.begin()
                over = is_over()
                read = partial(_read_page, job_id=job_id, after_cursor=after_cursor, wanted=wanted)
                page = await self._reads.call(read)
                if page:
                    yield page
                    after_cursor = page[-1].cursor
                if len(page) == PAGE_ITEMS:
                    continue
                if over:
                    return
                await watcher.wait()


def _read_page(
    reader: StateReader, *, job_id: str, after_cursor: int, wanted: HistoryFilter
) -> list[jobs_pb2.WatchJobResponse]:
    return reader.read_history(job_id, after_cursor, PAGE_ITEMS, wanted)
