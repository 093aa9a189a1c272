"""Threads on which the state is read and written, so that a slow disk or a long read delays no heartbeat."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gradstream.coordinator.state.state import State, StateReader

CLOSE_SECONDS = 5.0
"""Maximum time that the calls under way get when the coordinator stops."""

T = TypeVar("T")


class StateReads:
    """One thread with a connection of its own, for the calls of people. Reads run one by one, in order."""

    def __init__(self, state: State):
        self._state = state
        self._reader: StateReader | None = None
        self._thread = ThreadPoolExecutor(1, "state-reads")

    async def call(self, function: Callable[[StateReader], T]) -> T:
        """Call a function with the reader, which sees everything that was stored before.

        Raises what the function raises.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(self._opened()))

    def _opened(self) -> StateReader:
        if self._reader is None:
            self._reader = self._state.open_reader()
        return self._reader

    async def close(self) -> None:
        """Close the connection after the reads under way."""
        if self._reader is not None:
            await _end(self._thread, self._reader.close)
        self._thread.shutdown(wait=False)


class StateWrites:
    """One thread that writes what nodes report. Writes run one by one, in order, and their callers go on in this order.

    Transitions are written by the event loop: they are rare, and the view in memory must not change meanwhile. The
    state lets one write in at a time.
    """

    def __init__(self, state: State):
        self._state = state
        self._thread = ThreadPoolExecutor(1, "state-writes")

    async def call(self, function: Callable[[State], T]) -> T:
        """Call a function with the state, for one write. Raises what the function raises.

        The function must not read: the event loop's thread reads.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, self._state)

    async def close(self) -> None:
        """Store what was appended, after the writes under way."""
        await _end(self._thread, self._state.flush)
        self._thread.shutdown(wait=False)


async def _end(thread: ThreadPoolExecutor, last: Callable[[], None]) -> None:
    await asyncio.wait([asyncio.get_running_loop().run_in_executor(thread, last)], timeout=CLOSE_SECONDS)
