"""Large files are written past the page cache, to the same bytes, unless the disk is slow or cannot do so."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradstream.core.storage import direct, files
from gradstream.core.storage.direct import BLOCK_BYTES, DirectStream


@pytest.mark.parametrize("sizes", [[], [1], [8, BLOCK_BYTES - 8], [BLOCK_BYTES, 3 * BLOCK_BYTES + 5, 7], [4097] * 3])
def test_the_bytes_are_those_that_were_written(tmp_path: Path, sizes: list[int]) -> None:
    pieces = [os.urandom(size) for size in sizes]

    def write(stream: object) -> None:
        for piece in pieces:
            stream.write(memoryview(piece))  # type: ignore[attr-defined]

    files.write_atomic(str(tmp_path / "file"), write, large=True)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_slow_disk_is_written_through_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_TRIAL_BLOCKS", 2)
    for block_seconds, stays in ((0.001, True), (1.0, False)):
        now = 0.0

        def clock(step: float = block_seconds) -> float:
            nonlocal now
            now += step
            return now

        with (tmp_path / "file").open("wb") as stream:
            written = DirectStream(stream.fileno(), clock)
            if not written.is_direct:
                pytest.skip("this file system has no O_DIRECT")
            written.write(bytes(2 * BLOCK_BYTES))
            assert written.is_direct is stays


@pytest.mark.parametrize(("cache_seconds", "ends_direct"), [(2.0, True), (0.5, False), (0.001, False)])
def test_where_both_ways_are_slow_the_faster_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_seconds: float, ends_direct: bool
) -> None:
    monkeypatch.setattr(direct, "_TRIAL_BLOCKS", 1)
    now = 0.0
    data = os.urandom(6 * BLOCK_BYTES)
    with (tmp_path / "file").open("wb") as stream:

        def clock() -> float:
            nonlocal now
            now += 1.0 if written is None or written.is_direct else cache_seconds
            return now

        written = None
        written = DirectStream(stream.fileno(), clock)
        if not written.is_direct:
            pytest.skip("this file system has no O_DIRECT")
        written.write(data)
        assert written.is_direct is ends_direct
        written.flush()
    assert (tmp_path / "file").read_bytes() == data


def test_a_file_system_that_takes_no_direct_write_gets_an_ordinary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def answers() -> Iterator[int]:
        yield errno.EINVAL

    left = answers()

    def write(descriptor: int, data: bytes) -> int:
        error = next(left, 0)
        if error:
            raise OSError(error, os.strerror(error))
        return real(descriptor, data)

    with (tmp_path / "file").open("wb") as stream:
        written = DirectStream(stream.fileno())
        if not written.is_direct:
            pytest.skip("this file system has no O_DIRECT")
        monkeypatch.setattr(os, "write", write)
        written.write(b"x" * (BLOCK_BYTES + 1))
        written.flush()
        monkeypatch.undo()
        assert not written.is_direct
    assert (tmp_path / "file").read_bytes() == b"x" * (BLOCK_BYTES + 1)
