"""Threads for storage that may be slow or never answer, such as a network file system whose server is gone.

A thread that hangs in the kernel cannot be ended. Each call on such storage therefore runs in its own thread, with a
bounded number of threads for each place, and has a deadline after which the caller continues without the thread. Event
loops, and calls on other places, never wait for a thread that hangs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, TypeVar

from gradstream.core.errors import UnreachableError
from gradstream.core.threads import start_call

P = ParamSpec("P")
T = TypeVar("T")

CALL_SECONDS = 20.0
RETRY_SECONDS = 1.0
LOAD_SECONDS = 60.0
"""Deadline of calls that read a tokenizer, or list, write or remove checkpoints."""
BULK_SECONDS = 600.0
"""Deadline of calls that read or hash whole files of weights."""
MAX_THREADS = 32
MAX_THREADS_A_PLACE = 8
_SHOWN_CHARACTERS = 200


@dataclass(eq=False)
class _Place:
    """The calls on one place that have not returned, with the time at which each began."""

    begun: dict[int, float] = field(default_factory=dict)


class StorageThreads:
    """Calls functions that use storage, each in its own thread. Belongs to one event loop."""

    def __init__(
        self,
        call_seconds: float = CALL_SECONDS,
        max_threads: int = MAX_THREADS,
        max_threads_a_place: int = MAX_THREADS_A_PLACE,
    ):
        """`call_seconds` is the longest wait of a caller, for a thread and for the answer together."""
        self.call_seconds = call_seconds
        self._max_threads = max_threads
        self._max_threads_a_place = max_threads_a_place
        self._places: dict[str, _Place] = {}
        self._freed = asyncio.Event()
        self._next = 0

    async def call(self, place: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function`, which uses the storage at `place` (a path or URL); return its result.

        Raises the errors of `function`, and UnreachableError when the storage has not answered in time. The call then
        continues in its thread: use functions that may safely end late or never.
        """
        deadline = time.monotonic() + self.call_seconds
        future = await self._start(place, deadline, partial(function, *args, **kwargs))
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await future
        except TimeoutError:
            if future.done() and not future.cancelled():
                return future.result()
            raise UnreachableError(
                f"the storage of {place[:_SHOWN_CHARACTERS]} has not answered for {self.call_seconds:g} s; check that "
                f"it is mounted and its server reachable"
            ) from None

    async def finish(self, place: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `call`, but wait for the answer without a deadline: for functions that must not continue unnoticed.

        Raises the errors of `function`, and UnreachableError when no thread has become free in time.
        """
        deadline = time.monotonic() + self.call_seconds
        return await (await self._start(place, deadline, partial(function, *args, **kwargs)))

    async def patiently(self, place: str, function: Callable[[], T], on_wait: Callable[[str], object]) -> T:
        """As `call`, but retry until the storage answers; after each failed try `on_wait` gets the error's text.

        Raises the errors of `function`.
        """
        while True:
            try:
                return await self.call(place, function)
            except UnreachableError as error:
                on_wait(str(error))
            await asyncio.sleep(RETRY_SECONDS)

    async def _start(self, place: str, deadline: float, function: Callable[[], T]) -> asyncio.Future[T]:
        key = place_of(place)
        while not self._has_room(key):
            await self._wait_for_thread(place, key, deadline)
        number, self._next = self._next, self._next + 1
        self._places.setdefault(key, _Place()).begun[number] = time.monotonic()
        return start_call("storage", function, partial(self._return, key, number))

    @property
    def num_threads(self) -> int:
        """Number of calls that have not returned, including those whose caller no longer waits."""
        return sum(len(place.begun) for place in self._places.values())

    def _has_room(self, key: str) -> bool:
        held = self._places.get(key)
        return self.num_threads < self._max_threads and len(held.begun if held else ()) < self._max_threads_a_place

    async def _wait_for_thread(self, place: str, key: str, deadline: float) -> None:
        self._freed.clear()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                await self._freed.wait()
        except TimeoutError:
            held = self._places.get(key) or max(self._places.values(), key=lambda each: len(each.begun))
            since = time.monotonic() - min(held.begun.values())
            raise UnreachableError(
                f"{place[:_SHOWN_CHARACTERS]} was not accessed: {len(held.begun)} calls wait for storage that does "
                f"not answer, the oldest for {since:.0f} s; check what is mounted there"
            ) from None

    def _return(self, key: str, number: int) -> None:
        place = self._places[key]
        del place.begun[number]
        if not place.begun:
            del self._places[key]
        self._freed.set()


def place_of(path: str) -> str:
    """The storage that a path is on, found from its text without access to the storage.

    It is the scheme and host of a URL, or the mount point of a local path, links not followed.
    """
    scheme, separator, rest = path.partition("://")
    if separator and "/" not in scheme:
        return f"{scheme}://{rest.partition('/')[0]}"
    return max((point for point in _mount_points() if _is_below(path, point)), key=len, default="/")


def _is_below(path: str, point: str) -> bool:
    return path == point or path.startswith(f"{point.rstrip('/')}/")


def _mount_points() -> list[str]:
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
            # The kernel writes blanks and similar characters as octal escapes.
            return [line.split(" ")[1].encode("latin-1", "replace").decode("unicode_escape") for line in mounts]
    except (OSError, IndexError, ValueError):
        return ["/"]
