"""Keeps one version of a shard until its file is written, without a copy of the whole shard.

The file's thread copies each bundle into a buffer just before it writes the bundle. A bundle that a commit is going to
update before that is copied first, into a buffer of a bounded pool. With all buffers in use the commit waits.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Generator, Sequence

import numpy as np
import numpy.typing as npt

from gradstream.core.checkpoint.shard import MAX_COPY_BYTES
from gradstream.services.parameter_server.weight_bundle import FragmentState, WeightBundle

Buffer = npt.NDArray[np.uint8]


class BufferPool:
    """Buffers for copies of bundles. They are memory of the system's own, so that freed ones go back to the system."""

    def __init__(self, buffer_bytes: int, max_bytes: int = MAX_COPY_BYTES):
        self._buffer_bytes = max(1, buffer_bytes)
        self._num_left = max(2, max_bytes // self._buffer_bytes)
        self._free: list[Buffer] = []
        self._changed = threading.Condition()

    def reserve(self) -> bool:
        """Reserve a buffer for a commit; return whether one was left. The last one is left to the file's thread."""
        with self._changed:
            if self._num_left < 2:
                return False
            self._num_left -= 1
            return True

    def wait(self) -> None:
        """Reserve a buffer, the last one too; blocks until there is one."""
        with self._changed:
            while not self._num_left:
                self._changed.wait()
            self._num_left -= 1

    def take(self) -> Buffer:
        """A reserved buffer. Raises OSError when the system has no memory for it."""
        with self._changed:
            if self._free:
                return self._free.pop()
        return np.frombuffer(mmap.mmap(-1, self._buffer_bytes), dtype=np.uint8)

    def give_back(self, buffer: Buffer | None) -> None:
        """Return a reserved buffer, None if it was not taken."""
        with self._changed:
            self._num_left += 1
            if buffer is not None:
                self._free.append(buffer)
            self._changed.notify()

    def clear(self) -> None:
        """Return the memory of free buffers to the system."""
        with self._changed:
            self._free.clear()


class GivenUpError(Exception):
    """The snapshot's version is not needed any more, or is no longer whole."""


class Snapshot:
    """One version of a shard's bundles.

    `progressed` is called, in any thread, when a bundle may be updated or a buffer is free again. Methods marked
    "worker thread" block for as long as a bundle is copied.
    """

    def __init__(self, states: Sequence[WeightBundle], pool: BufferPool, progressed: Callable[[], None]):
        self.sizes = [size for state in states for size in state.saved_sizes()]
        """The kinds and sizes of all fragments, in the order of `fragments`."""
        self._states = list(states)
        self._places = {state.bundle.index: place for place, state in enumerate(states)}
        self._pool = pool
        self._progressed = progressed
        self._locks = [threading.Lock() for _ in states]
        self._copies: dict[int, tuple[Buffer, list[FragmentState]]] = {}
        self._written = [False] * len(states)  # by the attempt under way
        self._updated = [False] * len(states)  # the bundle itself is at a later version
        self._ended = False

    def must_keep(self, bundle: int) -> bool:
        """Whether the file needs a bundle that is neither written nor copied."""
        place = self._places[bundle]
        return not (self._ended or self._written[place] or place in self._copies)

    def keep(self, bundle: int) -> None:
        """Copy a bundle, in a buffer that is reserved, unless it has been written meanwhile. Worker thread.

        Raises what a copy without memory raises; the snapshot is then no longer whole.
        """
        place = self._places[bundle]
        with self._locks[place]:
            if not self.must_keep(bundle):
                self._pool.give_back(None)
            else:
                buffer = None
                try:
                    buffer = self._pool.take()
                    self._copies[place] = buffer, self._states[place].snapshot(buffer)
                except BaseException:
                    self._pool.give_back(buffer)
                    raise
        self._progressed()

    def updating(self, bundle: int) -> None:
        """Note that a bundle is going to be updated."""
        self._updated[self._places[bundle]] = True

    def begin_attempt(self) -> bool:
        """Begin to write from the first fragment; return whether every bundle is still at hand."""
        self._written = [False] * len(self._states)
        return not self._ended and not any(
            updated and place not in self._copies for place, updated in enumerate(self._updated)
        )

    def fragments(self) -> Generator[FragmentState, None, None]:
        """Generate all fragments in order, each valid until the next one is requested. Worker thread.

        Raises GivenUpError when the snapshot has ended.
        """
        self._pool.wait()
        own: Buffer | None = None
        try:
            own = self._pool.take()
            for place, state in enumerate(self._states):
                with self._locks[place]:
                    if self._ended:
                        raise GivenUpError
                    copy = self._copies.pop(place, None)
                    found = copy[1] if copy is not None else state.snapshot(own)
                    self._written[place] = True
                self._progressed()
                try:
                    yield from found
                finally:
                    if copy is not None:
                        self._pool.give_back(copy[0])
                        self._progressed()
        finally:
            self._pool.give_back(own)

    def end(self) -> None:
        """Free the copies: the file is written, or given up."""
        self._ended = True
        for place, lock in enumerate(self._locks):
            with lock:
                copy = self._copies.pop(place, None)
            if copy is not None:
                self._pool.give_back(copy[0])
        self._states = []
        self._progressed()
