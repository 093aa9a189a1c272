"""Storage that stops answering after a job was submitted: only operations that need it wait, and status shows it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc.aio
import pytest
from coordinator_fakes import Cluster, report_checkpoint, step_report

from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.telemetry import timelines
from gradstream.core.errors import UnreachableError
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.core.storage import files
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import jobs_pb2

SOON = 0.8
BOUND_SECONDS = 20.0


class Hung:
    """Directories below `root` do not answer while `hangs` is set."""

    def __init__(self, root: Path):
        self.root = str(root)
        self._answers = threading.Event()
        self._answers.set()
        self.num_asked = 0

    def wait(self, path: str) -> None:
        if path.startswith(self.root) and not self._answers.is_set():
            self.num_asked += 1
            self._answers.wait(BOUND_SECONDS)

    def stop(self) -> None:
        self._answers.clear()

    def go_on(self) -> None:
        self._answers.set()


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hung]:
    """The runs of a cluster, whose storage can be stopped; deadlines are short."""
    storage = Hung(tmp_path / "runs")
    list_names, glob = files.list_names, Path.glob

    def listed(directory: str) -> list[str]:
        storage.wait(directory)
        return list_names(directory)

    def globbed(self: Path, pattern: str) -> Iterator[Path]:
        storage.wait(str(self))
        return glob(self, pattern)

    monkeypatch.setattr(files, "list_names", listed)
    monkeypatch.setattr(Path, "glob", globbed)
    monkeypatch.setattr("gradstream.coordinator.jobs.controller.LOAD_SECONDS", SOON)
    monkeypatch.setattr("gradstream.coordinator.jobs.checkpoints.CHOOSING_SECONDS", SOON)
    monkeypatch.setattr(timelines.Timelines.__init__, "__defaults__", (SOON,))
    yield storage
    storage.go_on()


@pytest.fixture
async def cluster(tmp_path: Path, hung: Hung, transformers_imported: None) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path)
    await cluster.start()
    yield cluster
    hung.go_on()
    await cluster.stop()


async def test_a_coordinator_begins_and_answers_while_its_jobs_storage_hangs(cluster: Cluster, hung: Hung) -> None:
    job_id = await cluster.submit()
    servers, (worker,) = await cluster.running(job_id)
    for step in (0, 1):
        await cluster.stub.ReportStep(step_report(job_id, step))
    await report_checkpoint(servers[0], 2)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 2)
    hung.stop()
    async with asyncio.timeout(BOUND_SECONDS / 2):
        await cluster.restart()
        for node in (*servers, worker):
            await node.reconnect(cluster.address)
        job = await cluster.job(job_id)  # whose timelines hang too
        assert (job.state, job.version) == (jobs_pb2.JOB_STATE_RUNNING, 2)
    assert hung.num_asked == 2
    active = cluster.coordinator.controller.active
    assert active is not None
    assert active.checkpoints == {2}, "what was acknowledged"


async def test_a_plan_waits_for_its_storage_and_says_so(cluster: Cluster, hung: Hung) -> None:
    hung.stop()
    job_id = await cluster.submit()
    running = asyncio.create_task(cluster.running(job_id))
    async with asyncio.timeout(BOUND_SECONDS):
        while True:
            waits = [wait.what for wait in (await cluster.job(job_id)).waits]
            if any(f"has not answered for {SOON} s; check that it is mounted" in what for what in waits):
                break
            await asyncio.sleep(0.05)
    assert not running.done()
    hung.go_on()
    await asyncio.wait_for(running, BOUND_SECONDS)


async def test_an_export_does_not_wait_for_a_removal_that_hangs(cluster: Cluster, hung: Hung) -> None:
    job_id = await cluster.submit()
    servers, _ = await cluster.running(job_id)
    for step in (0, 1):
        await cluster.stub.ReportStep(step_report(job_id, step))
    await report_checkpoint(servers[0], 2)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 2)
    controller: Controller = cluster.coordinator.controller
    root = f"{hung.root}/{job_id}/checkpoints"
    async with controller.pins.choosing(root):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in cluster.jobs.ExportCheckpoint(jobs_pb2.ExportCheckpointRequest(job_id=job_id)):
                pass
    error = error_from_rpc(caught.value, "coordinator")
    assert isinstance(error, UnreachableError)
    assert "old checkpoints are being removed below" in str(error)


async def test_what_must_not_be_given_up_is_waited_for() -> None:
    storage = StorageThreads(call_seconds=SOON, max_threads_a_place=1)
    released = threading.Event()
    first = asyncio.create_task(storage.finish("/", released.wait))
    await asyncio.sleep(0)
    with pytest.raises(UnreachableError, match="1 calls wait for storage that does not answer"):
        await storage.finish("/", released.wait)
    assert not first.done()
    released.set()
    assert await first
