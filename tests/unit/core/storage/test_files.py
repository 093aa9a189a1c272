"""Files that appear complete or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from threading import Barrier
from typing import BinaryIO

import numpy as np
import pytest

from gradstream.core.checkpoint.shard import write_shard
from gradstream.core.errors import DataError
from gradstream.core.plan.fragments import Tensor, cut
from gradstream.core.storage import files, shared_storage
from gradstream.proto.v1 import coordinator_pb2


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


def test_a_file_is_written_where_it_may_lie_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that was put in a directory's place after the path was checked leads nowhere."""
    monkeypatch.setenv("GRADSTREAM_PATHS", str(tmp_path / "allowed"))
    for name in ("allowed", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "allowed" / "runs").symlink_to(tmp_path / "elsewhere")
    path = str(tmp_path / "allowed" / "runs" / "manifest.json")
    with pytest.raises(PermissionError, match=r"leads to .*/elsewhere/.*, which is not below .*/allowed"):
        files.write_atomic(path, lambda stream: stream.write(b"x"), judged=True)
    tensors = [Tensor("w", (4,), False, 0)]
    shard = [(fragment, {"weight": np.zeros(4, np.float32)}) for fragment in cut(tensors, 4)]
    with pytest.raises(PermissionError):
        write_shard(str(tmp_path / "allowed" / "runs"), "server-0.safetensors", tensors, shard)
    check = coordinator_pb2.StorageCheck(
        check_id="0" * 16, directory=str(tmp_path / "allowed" / "runs"), write="node-0"
    )
    assert "cannot write to" in shared_storage.answer(check)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    (tmp_path / "allowed" / "runs").unlink()
    (tmp_path / "allowed" / "runs").mkdir()
    files.write_atomic(path, lambda stream: stream.write(b"x"), judged=True)
    assert Path(path).read_bytes() == b"x"


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


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    """A pipe would be waited for until somebody writes to it, and a device has no end."""
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero", str(tmp_path)):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            files.read_bytes(path)


def test_a_file_that_was_recorded_is_read_only_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"as recorded")
    sha256 = hashlib.sha256(b"as recorded").hexdigest()
    assert files.read_verified(str(path), sha256) == b"as recorded"
    with files.open_verified(str(path), sha256, 11) as stream:
        assert stream.read(2) == b"as"
    with pytest.raises(DataError, match="is not the file that was recorded"):
        files.open_verified(str(path), sha256, 12)
    # In place, of the same size and within the file system's clock tick; then another file under the name.
    path.write_bytes(b"AS recorded")
    with pytest.raises(DataError, match=r"is not the file that was recorded \(sha256 .* of 11 bytes"):
        files.read_verified(str(path), sha256)
    path.unlink()
    (tmp_path / "key").write_bytes(b"the key")
    path.symlink_to(tmp_path / "key")
    with pytest.raises(DataError, match="is not the file that was recorded"):
        files.read_verified(str(path), sha256)


def test_a_file_is_hashed_once_for_as_long_as_it_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"tokens")

    class Counting(BytesIO):
        def __init__(self, descriptor: int):
            super().__init__(b"tokens")
            self.descriptor, self.num_reads = descriptor, 0

        def fileno(self) -> int:
            return self.descriptor

        def getbuffer(self) -> memoryview:
            self.num_reads += 1
            return super().getbuffer()

    with path.open("rb") as stream:
        fresh = [Counting(stream.fileno()) for _ in range(2)]
        assert files.digest(fresh[0]) == files.digest(fresh[1]) == hashlib.sha256(b"tokens").hexdigest()
        assert [each.num_reads for each in fresh] == [1, 1], "its times may not tell a change yet"
