"""A process's memory: how much there is; given back when a job's model or shard is dropped, instead of whenever it
happens to be."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

# Where a container finds its own limit: control groups of version 2 and of version 1.
LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available_bytes(limit_files: Sequence[Path] = LIMIT_FILES) -> int:
    """The machine's memory, or the limit of the container that this process runs in where that is less."""
    import psutil

    total: int = psutil.virtual_memory().total
    for path in limit_files:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):
            # No such file, or "max".
            continue
    return total


def settle() -> None:
    """Leave what is imported by now out of later garbage collections: a million objects that stay anyway."""
    gc.freeze()


def use_huge_pages() -> None:
    """Have torch ask Linux for huge pages for its tensors; to be called before torch is imported.

    The C library returns a large tensor's pages when it is freed, and the kernel clears new ones for the next: with
    pages of 4 KiB that is a good part of what a worker does that makes the same tensors for each microbatch. Who sets
    torch's THP_MEM_ALLOC_ENABLE keeps what they set.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def give_back() -> None:
    """Free what was dropped: now, and back to the system.

    Models hold their hooks and hooks their models, errors hold the frames that raised them: such cycles live until some
    full collection, which may be minutes away, and two models or two shards are in memory until then. The C library
    keeps freed memory, which `status` would show as used.
    """
    gc.collect()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, where that is the C library."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
