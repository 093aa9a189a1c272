"""A process's memory: its limit, and the return of memory to the system as soon as a model or shard is dropped."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

# The files with a container's limit: control groups of version 2 and of version 1.
LIMIT_FILES = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def available_bytes(limit_files: Sequence[Path] = LIMIT_FILES) -> int:
    """The machine's memory, or the limit of this process's container if that is less."""
    import psutil

    total: int = psutil.virtual_memory().total
    for path in limit_files:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):
            # There is no such file, or it says "max".
            continue
    return total


def settle() -> None:
    """Exclude the objects that exist now from later garbage collections: a million objects of imported modules."""
    gc.freeze()


def use_huge_pages() -> None:
    """Make torch ask Linux for huge pages for its tensors. Must be called before torch is imported.

    The C library returns a large tensor's pages when the tensor is freed, and the kernel clears new pages for the next
    tensor. With pages of 4 KiB this takes a good part of a worker's time, because a worker makes the same tensors for
    each microbatch. A value of torch's THP_MEM_ALLOC_ENABLE that is already set is kept.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def give_back() -> None:
    """Free dropped objects now, and return their memory to the system.

    Models and their hooks refer to each other, and errors refer to the frames that raised them. Such cycles live until
    the next full garbage collection, which may be minutes away, and until then two models or two shards are in memory.
    The C library keeps freed memory, which `status` would show as used.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Return freed memory that the C library keeps to the system. Blocks, without the interpreter lock."""
    malloc_trim = _malloc_trim()
    if malloc_trim is not None:
        malloc_trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None with another C library."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
