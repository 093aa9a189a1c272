"""Storage that does not answer holds a bounded number of threads, and no caller beyond a deadline."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gradstream.core.errors import UnreachableError
from gradstream.core.storage.pool import StorageThreads, place_of

HUNG, OTHER = "ftp://hung/x", "ftp://other/x"


@contextmanager
def hanging() -> Iterator[threading.Event]:
    """What a hung call waits for; set at the end, so that no thread is left."""
    released = threading.Event()
    try:
        yield released
    finally:
        released.set()


async def test_a_result_and_an_error_come_back() -> None:
    storage = StorageThreads()
    assert await storage.call("/tmp", lambda number: number + 1, 1) == 2
    with pytest.raises(ZeroDivisionError):
        await storage.call("/tmp", lambda: 1 // 0)
    assert storage.num_threads == 0


async def test_a_call_that_hangs_is_given_up_with_a_line_that_names_the_place() -> None:
    storage = StorageThreads(call_seconds=0.1)
    with hanging() as released:
        with pytest.raises(UnreachableError, match=r"the storage of ftp://hung/x has not answered for 0\.1 s; check"):
            await storage.call(HUNG, released.wait)
        assert storage.num_threads == 1, "its thread still hangs"
    assert await storage.call(OTHER, lambda: "answered") == "answered"


async def test_a_place_that_hangs_takes_its_own_threads_alone() -> None:
    storage = StorageThreads(call_seconds=0.3, max_threads=8, max_threads_a_place=2)
    with hanging() as released:
        calls = [asyncio.create_task(storage.call(HUNG, released.wait)) for _ in range(20)]
        await asyncio.sleep(0)
        begun = time.monotonic()
        assert await storage.call(OTHER, lambda: "answered") == "answered"
        assert time.monotonic() - begun < 0.25
        assert storage.num_threads == 2
        errors = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error, UnreachableError) for error in errors)
    told = [str(error) for error in errors if "was not accessed: 2 calls wait for storage" in str(error)]
    assert len(told) == 18


async def test_a_caller_who_waits_gets_the_next_free_thread() -> None:
    storage = StorageThreads(max_threads=1)
    released = threading.Event()
    first = asyncio.create_task(storage.call(HUNG, released.wait))
    others = [asyncio.create_task(storage.call(HUNG, lambda: "answered")) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert not any(other.done() for other in others)
    released.set()
    assert await asyncio.gather(first, *others) == [True, "answered", "answered", "answered"]


def test_a_place_is_a_host_or_a_mount() -> None:
    assert place_of("s3://bucket/a/b") == place_of("s3://bucket/c") == "s3://bucket"
    assert place_of("/no/such/directory") == "/"
    assert place_of("/proc/self/x") == "/proc"
    assert place_of("/process") != "/proc"
