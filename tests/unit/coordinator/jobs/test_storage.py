"""Checkpoints and the disk: checks of a manifest, kept checkpoints, and disks that do not show their files."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from coordinator_fakes import SERVER, Cluster, FakeNode, make_recipe, report_checkpoint, step_report, write_checkpoint

from gradstream.coordinator.jobs import checkpoints, plan_making, reports
from gradstream.coordinator.jobs.checkpoints import bases_under, missing
from gradstream.coordinator.planning import planner
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

FINISHED, PLANNING, RUNNING = (
    jobs_pb2.JOB_STATE_FINISHED,
    jobs_pb2.JOB_STATE_PLANNING,
    jobs_pb2.JOB_STATE_RUNNING,
)


async def commit(cluster: Cluster, job_id: str, leader: FakeNode, version: int, epoch: int = 1) -> None:
    """Report the steps up to a version, and its checkpoint."""
    first = (await cluster.job(job_id)).version
    for step in range(first, version):
        await cluster.stub.ReportStep(step_report(job_id, step, epoch))
    await report_checkpoint(leader, version)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == version)


def root_of(node: FakeNode) -> Path:
    assert node.plan is not None
    return Path(node.plan.checkpoint_root)


async def listed(cluster: Cluster, job_id: str) -> list[int]:
    answer = await cluster.jobs.ListCheckpoints(jobs_pb2.ListCheckpointsRequest(job_id=job_id))
    return [checkpoint.version for checkpoint in answer.checkpoints]


# --- a manifest states what exists ------------------------------------------------------------------------------------


async def test_files_on_a_disk_of_its_own_make_no_checkpoint(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job goes on, its servers hold the state; status names the server, and the checkpoint comes with its files."""
    monkeypatch.setattr(reports, "MANIFEST_RETRY_SECONDS", 0.05)
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    for step in range(4):
        await cluster.stub.ReportStep(step_report(job_id, step))
    files = write_checkpoint(ps[0], 4)
    hidden = cluster.directory / "another-machine"
    shutil.move(root_of(ps[0]) / "step-00000004" / "server-1.safetensors", hidden)
    for report in files:
        await ps[0].stub.ReportCheckpoint(report)
    held = await cluster.event(job_id, "the checkpoint of version 4 could not be written, trying again")
    assert "parameter server ps-1 reported" in held.event.message
    assert "server-1.safetensors" in held.event.message
    assert await listed(cluster, job_id) == []
    job = await cluster.job(job_id)
    assert job.state == RUNNING
    assert any("the checkpoint of version 4: parameter server ps-1 reported" in wait.what for wait in job.waits)
    shutil.move(hidden, root_of(ps[0]) / "step-00000004" / "server-1.safetensors")
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 4)
    history = [item async for item in cluster.jobs.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id))]
    assert sum("could not be written" in item.event.message for item in history) == 1, "tried again without a word"


# --- what is chosen stays ---------------------------------------------------------------------------------------------


def paused(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> tuple[threading.Event, threading.Event]:
    """Have a function that runs in a thread stop at its start: (it has begun, let it go on)."""
    real, begun, go_on = getattr(module, name), threading.Event(), threading.Event()

    def stopping(*arguments: Any, **more: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return real(*arguments, **more)

    monkeypatch.setattr(module, name, stopping)
    return begun, go_on


@pytest.mark.parametrize("cluster", [{"reunion_seconds": 1.0}], indirect=True, ids=["soon"])
async def test_a_plans_checkpoint_outlives_a_newer_one_that_is_written_meanwhile(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(cluster.directory, num_steps=8)
    recipe = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"keep": 1})})
    submitted = await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json()))
    job_id = submitted.job.job_id
    ps, (worker,) = await cluster.running(job_id)
    await commit(cluster, job_id, ps[0], 2)
    for step in (2, 3):
        await cluster.stub.ReportStep(step_report(job_id, step))
    writing, go_on_writing = paused(monkeypatch, reports, "write_manifest")
    planning, go_on_planning = paused(monkeypatch, planner, "make_plan")
    for report in write_checkpoint(ps[0], 4):
        await ps[0].stub.ReportCheckpoint(report)
    assert await asyncio.to_thread(writing.wait, 30)
    # The manifest of version 4 is on its way when a server is lost and a plan is made from version 2.
    await ps[1].kill()
    cluster.nodes.remove(ps[1])
    spare = cluster.node(SERVER, "ps-spare")
    assert await asyncio.to_thread(planning.wait, 30)
    go_on_writing.set()
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 4)
    go_on_planning.set()
    plan = await spare.plan_of(2)
    assert plan.start_version == 2
    assert (Path(plan.checkpoint_path) / "manifest.json").exists()
    # Its servers may still load it; once they have written one of their own, nobody needs it.
    await worker.plan_of(2)
    await commit(cluster, job_id, spare, 4, epoch=2)
    await cluster.event(job_id, "removed version 2")
    assert await listed(cluster, job_id) == [4]


async def test_what_an_export_has_chosen_stays(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention cannot come between the choice and the reading."""
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    await commit(cluster, job_id, ps[0], 1)
    await commit(cluster, job_id, ps[0], 2)
    choosing, go_on = paused(monkeypatch, checkpoints, "versions_on_disk")
    call = cluster.jobs.ExportCheckpoint(jobs_pb2.ExportCheckpointRequest(job_id=job_id, version=1))
    exported = asyncio.create_task(collect(call))
    assert await asyncio.to_thread(choosing.wait, 30)
    monkeypatch.undo()
    await cluster.stub.ReportStep(step_report(job_id, 2))
    await report_checkpoint(ps[0], 3)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 3)
    go_on.set()
    assert "config.json" in await asyncio.wait_for(exported, 60)


async def test_what_a_service_reads_stays_until_it_has_read_it(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    await commit(cluster, job_id, ps[0], 1)
    await commit(cluster, job_id, ps[0], 2)
    held = cluster.jobs.HoldCheckpoint(jobs_pb2.HoldCheckpointRequest(job_id=job_id, version=1))
    answer = await held.read()
    assert answer.checkpoint.version == 1
    await commit(cluster, job_id, ps[0], 3)
    assert 1 in await listed(cluster, job_id)
    held.cancel()
    pins = cluster.coordinator.controller.pins
    async with asyncio.timeout(30):
        root = checkpoints.root_of((await cluster.job(job_id)).run_directory)
        while 1 in pins.of(root):  # noqa: ASYNC110 (the end of a call cannot be awaited on the other side)
            await asyncio.sleep(0.01)
    await commit(cluster, job_id, ps[0], 4)
    assert 1 not in await listed(cluster, job_id)
    # The last one, where none is named.
    newest = cluster.jobs.HoldCheckpoint(jobs_pb2.HoldCheckpointRequest(job_id=job_id))
    assert (await newest.read()).checkpoint.version == 4
    newest.cancel()


async def collect(call: Any) -> set[str]:
    return {piece.file async for piece in call}


def test_the_bases_of_jobs_that_wait_are_known_by_their_directories() -> None:
    root = "/runs/a-1/checkpoints"
    paths = [f"{root}/step-00000004", f"file://{root}/step-00000006/", "/runs/b-1/checkpoints/step-00000008", "", "/x"]
    assert bases_under(root, paths) == {4, 6}


# --- a disk that shows less than was acknowledged ---------------------------------------------------------------------


def test_a_checkpoint_that_was_acknowledged_must_be_there() -> None:
    assert missing("/runs/a-1/checkpoints", [], [], "a-1") == ""
    assert missing("/runs/a-1/checkpoints", [2, 4], [2, 4], "a-1") == ""
    # Retention removes old ones; a manifest may be there before it is acknowledged.
    assert missing("/runs/a-1/checkpoints", [4, 6], [2, 4], "a-1") == ""
    line = missing("/runs/a-1/checkpoints", [], [2, 4], "a-1")
    assert "version 4" in line
    assert line.endswith("/step-00000004; mount or restore /runs/a-1/checkpoints")
    assert "`gradstream resume a-1` to go back to version 2" in missing("/runs/a-1/checkpoints", [2], [2, 4], "a-1")


@pytest.fixture
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_making, "HOLD_SECONDS", 0.05)


async def lose_a_server(cluster: Cluster, job_id: str, ps: list[FakeNode], hide: Callable[[Path], object]) -> FakeNode:
    """Change the disk, then lose a server and start another; the job must not begin anew."""
    hide(root_of(ps[0]))
    await ps[1].kill()
    return cluster.node(SERVER, "ps-spare")


@pytest.mark.parametrize("cluster", [{"reunion_seconds": 1.0}], indirect=True, ids=["soon"])
async def test_a_disk_that_is_not_mounted_holds_the_job(cluster: Cluster, look_often: None) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    await commit(cluster, job_id, ps[0], 2)
    away = cluster.directory / "unmounted"
    spare = await lose_a_server(cluster, job_id, ps, lambda root: root.rename(away))
    held = await cluster.event(job_id, "held: the checkpoint of version 2 was written and is not there now")
    assert "mount or restore" in held.event.message
    job = await cluster.job(job_id)
    assert (job.state, job.epoch) == (PLANNING, 1)
    assert "version 2 was written and is not there now" in job.waits[0].what
    # Asked to go on, it has nothing to go back to: it never starts from the seed.
    await cluster.jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id))
    assert (await cluster.job(job_id)).state == PLANNING
    away.rename(root_of(ps[0]))
    assert (await spare.plan_of(2)).start_version == 2


@pytest.mark.parametrize("cluster", [{"reunion_seconds": 1.0}], indirect=True, ids=["soon"])
async def test_a_newest_checkpoint_that_is_gone_is_given_up_by_a_person_alone(
    cluster: Cluster, look_often: None
) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    await commit(cluster, job_id, ps[0], 1)
    await commit(cluster, job_id, ps[0], 2)
    spare = await lose_a_server(cluster, job_id, ps, lambda root: shutil.rmtree(root / "step-00000002"))
    held = await cluster.event(job_id, "held: the checkpoint of version 2 was written")
    assert f"`gradstream resume {job_id}` to go back to version 1" in held.event.message
    await cluster.jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id))
    assert (await spare.plan_of(2)).start_version == 1
    await cluster.event(job_id, "goes back to version 1")


async def test_a_restarted_coordinator_does_not_begin_from_the_seed_either(cluster: Cluster, look_often: None) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    await commit(cluster, job_id, ps[0], 2)
    await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    shutil.rmtree(root_of(ps[0]))
    for node in cluster.nodes:
        await node.die()
    cluster.nodes.clear()
    await cluster.restart()
    await cluster.jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id))
    ps = [cluster.node(SERVER, f"ps-{number}") for number in range(2)]
    cluster.node(coordinator_pb2.NODE_KIND_WORKER, "worker-0")
    await cluster.event(job_id, "held: the checkpoint of version 2 was written and is not there now")
    assert (await cluster.job(job_id)).epoch == 1


# --- a directory that must be shared is proved to be ------------------------------------------------------------------


def other_disk(node: FakeNode, directory: Path) -> None:
    """Give a node a disk of its own under the very path."""
    session: Any = node.session
    real = session._check_storage

    async def check(asked: coordinator_pb2.StorageCheck) -> None:
        own = coordinator_pb2.StorageCheck()
        own.CopyFrom(asked)
        own.directory = str(directory)
        await real(own)

    session._check_storage = check


def leftovers(cluster: Cluster) -> list[Path]:
    return list((cluster.directory / "runs").rglob(".shared-*"))


async def test_a_server_with_a_disk_of_its_own_holds_the_job_by_name(cluster: Cluster, look_often: None) -> None:
    own = cluster.directory / "own-disk"
    own.mkdir()
    job_id = await cluster.submit()
    servers = [cluster.node(SERVER, f"ps-{number}") for number in range(2)]
    other_disk(servers[1], own)
    cluster.node(coordinator_pb2.NODE_KIND_WORKER, "worker-0")
    held = await cluster.event(job_id, "held: parameter server ps-1 does not see in ")
    assert "what the coordinator wrote there; let run_root be one directory" in held.event.message
    job = await cluster.job(job_id)
    assert (job.state, job.epoch) == (PLANNING, 0)
    assert "parameter server ps-1 does not see" in job.waits[0].what
    assert list(own.iterdir()) == []
    # Once it is mounted the job goes on by itself.
    del servers[1].session._check_storage  # type: ignore[attr-defined]
    await servers[1].plan_of(1)
    # The server that saw the directory may still have been writing when the other's answer ended the first check.
    async with asyncio.timeout(30):
        while leftovers(cluster):  # noqa: ASYNC110 - files that another process removes
            await asyncio.sleep(0.01)


async def test_a_server_that_does_not_write_where_the_coordinator_reads_is_named(
    cluster: Cluster, look_often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees what the coordinator wrote, and its own goes elsewhere: a mount that copies on write."""
    from gradstream.core.storage import shared_storage

    real = shared_storage.write

    def write(directory: str, check_id: str, who: str) -> None:
        if who != "node-0":
            real(directory, check_id, who)

    monkeypatch.setattr(shared_storage, "write", write)
    job_id = await cluster.submit()
    for number in range(2):
        cluster.node(SERVER, f"ps-{number}")
    cluster.node(coordinator_pb2.NODE_KIND_WORKER, "worker-0")
    held = await cluster.event(job_id, "held: the coordinator does not see in ")
    # Which of the two is node-0 depends on who registered first.
    assert held.event.message.count("what parameter server ps-") == 1


async def test_whether_a_directory_is_shared_can_be_asked_without_a_job(cluster: Cluster) -> None:
    servers = [cluster.node(SERVER, f"ps-{number}") for number in range(2)]
    for server in servers:
        await asyncio.wait_for(server.session.registered.wait(), 30)
    directory = cluster.directory / "shared" / "runs"
    request = jobs_pb2.CheckStorageRequest(directory=str(directory))
    async with asyncio.timeout(30):
        while (found := await cluster.jobs.CheckStorage(request)).num_servers < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (found.problem, found.directory) == ("", str(directory))
    assert list(directory.iterdir()) == []
    other_disk(servers[0], cluster.directory / "nowhere")
    found = await cluster.jobs.CheckStorage(request)
    assert found.problem.startswith("parameter server ps-0 does not see")
