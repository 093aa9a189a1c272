"""Writes a large local file past the page cache, or through it where the disk is slow and the cache is faster.

A copy through the page cache costs a core its time and the machine its memory: 0.5 GB took 1.3 s of a core on a
virtual machine whose memory was new, and 0.02 s with O_DIRECT. A slow disk is better off with the page cache, which
takes the bytes at once as long as there is memory for them. Where both are slow, as on a busy machine, the faster one
is kept: the page cache took about 100 MB/s there, and the disk 480.
"""

from __future__ import annotations

import errno
import fcntl
import io
import mmap
import os
import time
from collections.abc import Callable

BLOCK_BYTES = 4 << 20
"""Bytes of a write; a multiple of every file system's block."""
FAST_BYTES_PER_SECOND = 300e6
"""Below this speed the other way is tried, through the page cache or past it."""
_TRIAL_BLOCKS = 16
"""Blocks over which the speed is judged."""


class DirectStream(io.RawIOBase):
    """A stream for writing, which begins at the beginning of a new file of a local file system.

    `seconds` is a clock. The caller closes the file of `descriptor`.
    """

    def __init__(self, descriptor: int, seconds: Callable[[], float] = time.monotonic):
        self.is_direct = _set_direct(descriptor, True)
        """Whether the page cache is passed by."""
        self._is_able = self.is_direct
        self._descriptor = descriptor
        self._seconds = seconds
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # begins at a page, as O_DIRECT needs
        self._filled = 0
        self._num_blocks = 0
        self._block_seconds = 0.0
        self._speeds: dict[bool, float] = {}  # by `is_direct`, the newest in bytes a second

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        """Take all bytes of `data`. Raises OSError."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        begin = 0
        while begin < len(view):
            end = min(len(view), begin + BLOCK_BYTES - self._filled)
            self._block[self._filled : self._filled + end - begin] = view[begin:end]
            self._filled += end - begin
            begin = end
            if self._filled == BLOCK_BYTES:
                self._put()
        return len(view)

    def flush(self) -> None:
        """Write what is left, which is no whole number of disk blocks. Nothing can be written afterwards."""
        if self._filled:
            self._pass_through_cache()
            self._put()

    def _put(self) -> None:
        began = self._seconds()
        with memoryview(self._block)[: self._filled] as view:
            self._write_all(view)
        self._filled = 0
        self._num_blocks += 1
        self._block_seconds += self._seconds() - began
        if self._is_able and self._num_blocks == _TRIAL_BLOCKS:
            self._speeds[self.is_direct] = _TRIAL_BLOCKS * BLOCK_BYTES / max(self._block_seconds, 1e-9)
            self._num_blocks, self._block_seconds = 0, 0.0
            if changes_way(self._speeds[self.is_direct], self._speeds.get(not self.is_direct)):
                self.is_direct = _set_direct(self._descriptor, not self.is_direct)

    def _write_all(self, view: memoryview) -> None:
        written = 0
        while written < len(view):
            try:
                written += os.write(self._descriptor, view[written:])
            except OSError as error:
                # The file system took the flag and does not take the write, or only a part of a block was written.
                if error.errno != errno.EINVAL or not self.is_direct:
                    raise
                self._pass_through_cache()

    def _pass_through_cache(self) -> None:
        """Write the rest of the file through the page cache."""
        self._is_able = False
        if self.is_direct:
            _set_direct(self._descriptor, False)
            self.is_direct = False


def changes_way(speed: float, other: float | None) -> bool:
    """Whether a file is written the other way from now on, from the speeds of both ways in bytes a second.

    `other` is None as long as the other way has not been tried.
    """
    return speed < FAST_BYTES_PER_SECOND and (other is None or other > speed)


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Set or clear O_DIRECT; return whether it is set. Not every file system has it."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | flag if direct else flags & ~flag)
    except OSError:
        return False
    return direct
