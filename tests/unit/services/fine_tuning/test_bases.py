"""The base that a recipe names, and uploaded files of examples."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.canned_coordinator import CannedCoordinator, jobs_of
from support.tiny import LLAMA

from gradstream.core.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    CredentialsError,
    DataError,
    GradstreamError,
    ProtocolError,
    UnreachableError,
)
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig
from gradstream.core.recipe.loading import parse_recipe
from gradstream.proto.v1 import jobs_pb2
from gradstream.proto.v1.fine_tuning_pb2 import UploadExamplesRequest
from gradstream.services.fine_tuning.bases import held_base, keep_base
from gradstream.services.fine_tuning.coordinator_jobs import CoordinatorJobs
from gradstream.services.fine_tuning.examples import preparation
from gradstream.services.fine_tuning.examples.preparation import check_data, receive
from gradstream.services.fine_tuning.store import Store

RECIPE = parse_recipe(
    {
        "name": "pretrained",
        "model": {"config": LLAMA},
        "training": {"num_steps": 8, "num_slots": 1, "global_batch": 1, "microbatch": 1, "sequence_length": 8},
        "data": {"path": "/data"},
    }
)


async def resolved(jobs: CoordinatorJobs, base_model: str) -> tuple[str, str]:
    async with held_base(jobs, base_model) as found:
        return found


async def test_a_path_is_itself() -> None:
    async with jobs_of(CannedCoordinator()) as jobs:
        assert await resolved(jobs, "/models/tiny") == ("/models/tiny", "/models/tiny")
        assert await resolved(jobs, "s3://models/tiny") == ("s3://models/tiny", "s3://models/tiny")


async def test_a_job_is_its_newest_checkpoint() -> None:
    coordinator = CannedCoordinator()
    coordinator.add(RECIPE)
    async with jobs_of(coordinator) as jobs:
        assert await resolved(jobs, "job:pretrained-1") == ("/runs/8", "job:pretrained-1@8")
        assert await resolved(jobs, "job:pretrained-1@4") == ("/runs/4", "job:pretrained-1@4")
        with pytest.raises(CheckpointError, match="no checkpoint of version 5"):
            await resolved(jobs, "job:pretrained-1@5")
        with pytest.raises(ConfigError, match="there is no job 'other'"):
            await resolved(jobs, "job:other")
        with pytest.raises(ConfigError, match="not of the form job:ID or job:ID@VERSION"):
            await resolved(jobs, "job:pretrained-1@newest")
        coordinator.checkpoints = []
        with pytest.raises(CheckpointError, match="has no checkpoint yet"):
            await resolved(jobs, "job:pretrained-1")


async def test_a_jobs_checkpoint_is_kept_when_the_job_removes_it(tmp_path: Path) -> None:
    coordinator = CannedCoordinator()
    coordinator.add(RECIPE)
    source = tmp_path / "step-00000008"
    source.mkdir()
    (source / "manifest.json").write_text("{}")
    coordinator.checkpoints = [jobs_pb2.Checkpoint(version=8, path=str(source))]
    async with jobs_of(coordinator) as jobs:
        kept = await keep_base(jobs, "job:pretrained-1", tmp_path / "base")
        assert kept == (str(tmp_path / "base"), "job:pretrained-1@8")
        # It takes no more room.
        assert (tmp_path / "base" / "manifest.json").stat().st_nlink == 2
        (source / "manifest.json").unlink()
        source.rmdir()
        assert (tmp_path / "base" / "manifest.json").read_text() == "{}"
        with pytest.raises(CheckpointError, match="was removed while it was being kept"):
            await keep_base(jobs, "job:pretrained-1", tmp_path / "base")


async def test_a_base_is_held_while_it_is_read() -> None:
    """It is the coordinator that removes old checkpoints."""
    coordinator = CannedCoordinator()
    coordinator.add(RECIPE)
    async with jobs_of(coordinator) as jobs:
        for name, version in (("job:pretrained-1", 8), ("job:pretrained-1@4", 4)):
            async with held_base(jobs, name):
                assert coordinator.held == [version]
            async with asyncio.timeout(20):
                while coordinator.held:  # noqa: ASYNC110 (the end of a call cannot be awaited on the other side)
                    await asyncio.sleep(0.01)


async def test_a_checkpoint_of_a_running_job_is_waited_for_without_a_deadline() -> None:
    """A step may take minutes; a deadline would ask for one checkpoint after another, for ever."""
    coordinator = CannedCoordinator()
    coordinator.add(RECIPE).state = jobs_pb2.JOB_STATE_RUNNING
    async with jobs_of(coordinator) as jobs:
        assert await resolved(jobs, "job:pretrained-1") == ("/runs/8", "job:pretrained-1@8")
    assert coordinator.deadlines == [None]


@pytest.mark.parametrize(
    "refusal", [BusyError("512 calls are under way"), CredentialsError("the token has expired"), GradstreamError("?")]
)
async def test_a_coordinator_that_refuses_for_a_passing_reason_is_asked_again(refusal: GradstreamError) -> None:
    waits: list[str] = []
    answers: list[GradstreamError | str] = [refusal, "job"]

    async def call() -> str:
        answer = answers.pop(0)
        if isinstance(answer, GradstreamError):
            raise answer
        return answer

    async def damaged() -> str:
        raise CheckpointError("it has no manifest")

    async with jobs_of(CannedCoordinator()) as jobs:
        assert await jobs.patiently(call, waits.append) == "job"
        assert str(refusal) in waits[0]
        assert "refuses" in waits[0]
        with pytest.raises(CheckpointError):
            await jobs.patiently(damaged, waits.append)
    assert len(waits) == 1


async def pieces(*requests: UploadExamplesRequest) -> AsyncIterator[UploadExamplesRequest]:
    for request in requests:
        yield request


async def test_a_file_is_stored_under_its_hash(tmp_path: Path) -> None:
    store = Store(tmp_path)
    parts = [UploadExamplesRequest(file="task.jsonl", payload=b"ab"), UploadExamplesRequest(payload=b"c")]
    path, sha256 = await receive(store, pieces(*parts))
    assert sha256 == hashlib.sha256(b"abc").hexdigest()
    assert Path(path) == tmp_path / "uploads" / f"{sha256}-task.jsonl"
    assert Path(path).read_bytes() == b"abc"
    # The same file again is the same file.
    assert await receive(store, pieces(*parts)) == (path, sha256)
    assert len(list(store.uploads.iterdir())) == 1
    assert list(store.temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["", "../task.jsonl", "a/b", ".hidden", "x" * 200, "a\0b"])
async def test_a_files_name_is_not_trusted(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ProtocolError, match="not a plain one"):
        await receive(store, pieces(UploadExamplesRequest(file=name, payload=b"x")))
    assert list(store.uploads.iterdir()) == list(store.temporary.iterdir()) == []


async def test_a_files_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "MAX_UPLOAD_BYTES", 5)
    store = Store(tmp_path)
    parts = [UploadExamplesRequest(file="task.jsonl", payload=b"abc")] * 2
    with pytest.raises(DataError, match=r"task\.jsonl is larger than"):
        await receive(store, pieces(*parts))
    with pytest.raises(ProtocolError, match="no file was sent"):
        await receive(store, pieces())
    assert list(store.uploads.iterdir()) == list(store.temporary.iterdir()) == []


async def test_uploads_leave_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "SPARE_BYTES", 1 << 60)
    store = Store(tmp_path)
    with pytest.raises(DataError, match="the disk is nearly full"):
        await receive(store, pieces(UploadExamplesRequest(file="task.jsonl", payload=b"abc")))
    assert list(store.uploads.iterdir()) == list(store.temporary.iterdir()) == []


async def test_an_upload_that_stands_still_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stalled() -> AsyncIterator[UploadExamplesRequest]:
        yield UploadExamplesRequest(file="task.jsonl", payload=b"abc")
        await asyncio.Event().wait()

    monkeypatch.setattr(preparation, "IDLE_SECONDS", 0.05)
    store = Store(tmp_path)
    with pytest.raises(UnreachableError, match="nothing of the file came"):
        await receive(store, stalled())
    assert list(store.uploads.iterdir()) == list(store.temporary.iterdir()) == []


def test_data_that_the_service_does_not_see(tmp_path: Path) -> None:
    there = tmp_path / "task.jsonl"
    there.write_text("{}")
    check_data(ExamplesConfig(path=str(there)))
    with pytest.raises(DataError, match=r"correct data\.validation_path, or send the file with --upload"):
        check_data(ExamplesConfig(path=str(there), validation_path=str(tmp_path / "other.jsonl")))
    with pytest.raises(DataError, match="cannot be accessed"):
        check_data(ExamplesConfig(path="nothing-like-it://x/y.jsonl"))
