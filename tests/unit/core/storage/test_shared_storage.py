"""A node's part in the proof that a directory is shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradstream.core.errors import ProtocolError
from gradstream.core.storage import shared_storage
from gradstream.core.storage.shared_storage import COORDINATOR, answer, clean_up, unseen, write
from gradstream.proto.v1.coordinator_pb2 import StorageCheck

ID = "0123456789abcdef"


def check(directory: Path, name: str = "node-0", *read: str) -> StorageCheck:
    return StorageCheck(check_id=ID, directory=str(directory), write=name, read=read or (COORDINATOR,))


def test_nodes_that_share_a_directory_see_each_others_files(tmp_path: Path) -> None:
    write(str(tmp_path), ID, COORDINATOR)
    assert answer(check(tmp_path, "node-0")) == ""
    assert answer(check(tmp_path, "node-1")) == ""
    assert unseen(str(tmp_path), ID, ["node-0", "node-1"]) == []
    assert answer(check(tmp_path, "", "node-0", "node-1")) == ""
    assert unseen(str(tmp_path), ID, ["node-2"]) == ["node-2"]
    (tmp_path / "model").mkdir()
    clean_up(str(tmp_path), ID)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_of_ones_own_is_told(tmp_path: Path) -> None:
    found = answer(check(tmp_path))
    assert found == f"does not see in {tmp_path} what the coordinator wrote there"
    assert list(tmp_path.iterdir()) == [], "it writes nothing there"
    assert "does not see" in answer(check(tmp_path / "nowhere"))
    # Another check's file, of an earlier time, proves nothing.
    write(str(tmp_path), ID, COORDINATOR)
    other = StorageCheck(check_id="f" * 16, directory=str(tmp_path), read=[COORDINATOR])
    assert "does not see" in answer(other)
    (tmp_path / f".shared-{'f' * 16}-{COORDINATOR}").write_text(ID)
    assert "does not see" in answer(other)


def test_a_node_that_answers_late_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another node's answer ends the check while this one writes: what it writes after the cleaning it removes."""
    write(str(tmp_path), ID, COORDINATOR)
    real = shared_storage.write

    def write_late(directory: str, check_id: str, who: str) -> None:
        clean_up(directory, check_id)
        real(directory, check_id, who)

    monkeypatch.setattr(shared_storage, "write", write_late)
    assert answer(check(tmp_path)) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(str(tmp_path), ID, COORDINATOR)

    def refuse(directory: str, check_id: str, who: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shared_storage, "write", refuse)
    assert answer(check(tmp_path)) == f"cannot write to {tmp_path} (Permission denied)"


@pytest.mark.parametrize(
    "change",
    [{"check_id": "../x"}, {"check_id": ""}, {"write": "../x"}, {"directory": "runs"}, {"directory": "s3://x"}],
)
def test_a_check_that_no_coordinator_asks_for_is_refused(tmp_path: Path, change: dict[str, str]) -> None:
    asked = check(tmp_path)
    for key, value in change.items():
        setattr(asked, key, value)
    with pytest.raises(ProtocolError):
        answer(asked)
