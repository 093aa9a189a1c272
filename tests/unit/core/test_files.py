"""Files that are there whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import BinaryIO

import pytest

from gradstream.core import files


def test_writers_of_one_path_do_not_disturb_each_other(tmp_path: Path) -> None:
    path, together = tmp_path / "file", Barrier(2)

    def write(content: bytes) -> None:
        def halves(stream: BinaryIO) -> None:
            stream.write(content[:4])
            together.wait(timeout=10)
            stream.write(content[4:])

        files.write_atomic(str(path), halves)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (b"aaaaaaaa", b"bbbbbbbb")))
    assert path.read_bytes() in (b"aaaaaaaa", b"bbbbbbbb")
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_atomic(str(path), lambda stream: stream.write(b"before"))

    def fail(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        files.write_atomic(str(path), fail)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
