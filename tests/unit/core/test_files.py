"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
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


def synced(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[Path]:
    """The paths that `act` flushes to the disk, in order."""
    found: list[Path] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        act()
    return found


def test_a_new_directory_is_noted_durably_in_each_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "run" / "checkpoints" / "step-00000002"
    noted = synced(monkeypatch, lambda: files.make_directory(str(deep)))
    assert noted == [tmp_path, tmp_path / "run", tmp_path / "run" / "checkpoints"]
    assert deep.is_dir()
    assert synced(monkeypatch, lambda: files.make_directory(str(deep))) == []


def test_a_directory_that_must_be_new_is(tmp_path: Path) -> None:
    files.make_local_directory(tmp_path / "a" / "b", exist_ok=False)
    with pytest.raises(FileExistsError):
        files.make_local_directory(tmp_path / "a" / "b", exist_ok=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        files.make_directory(str(tmp_path / "file"))


def test_a_whole_directory_is_noted_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export() -> None:
        with files.whole_directory(tmp_path / "out" / "model") as temporary:
            (temporary / "file").write_text("x")

    assert synced(monkeypatch, export)[-1] == tmp_path / "out"


def test_the_size_of_a_file_or_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert files.size_of(str(tmp_path / "file")) == 5
    assert files.size_of(str(tmp_path / "nothing")) is None
    assert files.size_of(str(tmp_path / "file" / "below")) is None
