"""Reads of the state on a thread of their own, for the calls of people: a long or slow read delays no heartbeat."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gradstream.coordinator.state.state import State, StateReader

CLOSE_SECONDS = 5.0

T = TypeVar("T")


class StateReads:
    """One thread with a connection of its own. Calls run one by one, in order."""

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
        """Close the connection after the reads under way, for which a storage that hangs gets CLOSE_SECONDS."""
        if self._reader is not None:
            closing = asyncio.get_running_loop().run_in_executor(self._thread, self._reader.close)
            await asyncio.wait([closing], timeout=CLOSE_SECONDS)
        self._thread.shutdown(wait=False)
