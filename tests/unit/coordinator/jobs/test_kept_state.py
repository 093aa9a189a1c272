"""State that servers hold and no checkpoint has yet is kept, however a job comes to rest or ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coordinator_fakes import (
    SERVER,
    TIMING,
    WORKER,
    Cluster,
    FakeNode,
    make_recipe,
    report_checkpoint,
    step_report,
)

from gradstream.coordinator.jobs.plan_making import MadePlan
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

PAUSED, PLANNING, RUNNING = jobs_pb2.JOB_STATE_PAUSED, jobs_pb2.JOB_STATE_PLANNING, jobs_pb2.JOB_STATE_RUNNING


async def _await(call: Any) -> Any:
    return await call


async def asked(server: FakeNode, version: int) -> None:
    """Wait until a server was asked for a checkpoint of the version that it holds."""
    await server.until(lambda: any(d.HasField("snapshot") and d.snapshot.version == version for d in server.directives))


async def fail(worker: FakeNode, job_id: str, message: str) -> None:
    await worker.stub.ReportFailure(
        coordinator_pb2.ReportFailureRequest(job_id=job_id, epoch=1, node_id=worker.node_id, message=message)
    )


async def at_version_1(cluster: Cluster) -> tuple[str, list[FakeNode], FakeNode]:
    job_id = await cluster.submit()
    servers, (worker,) = await cluster.running(job_id)
    await worker.slots(2)
    await cluster.stub.ReportStep(step_report(job_id, 0))
    return job_id, servers, worker


# --- orders while servers are silent ----------------------------------------------------------------------------------


@pytest.fixture
async def hasty(tmp_path: Path, transformers_imported: None) -> AsyncIterator[Cluster]:
    """A cluster that waits for silent servers for a second."""
    cluster = Cluster(tmp_path, replace(TIMING, reunion_seconds=1.0))
    await cluster.start()
    yield cluster
    await cluster.stop()


@pytest.mark.parametrize("order", ["stop", "pause"])
async def test_an_order_during_planning_waits_for_servers_on_their_way_back(
    hasty: Cluster, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    planning = asyncio.Event()

    async def endless(*given: object) -> MadePlan:
        planning.set()
        await asyncio.Event().wait()
        raise AssertionError

    recipe = make_recipe(hasty.directory)
    recipe = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"min_servers": 1})})
    servers = [hasty.node(SERVER, f"ps-{number}") for number in range(3)]
    worker = hasty.node(WORKER, "w")
    while len(hasty.coordinator.controller.members.everyone_present()) < 4:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    request = jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json())
    job_id = (await hasty.jobs.SubmitJob(request)).job.job_id
    await worker.slots(2)
    await hasty.stub.ReportStep(step_report(job_id, 0))
    monkeypatch.setattr("gradstream.coordinator.jobs.plan_making.make_plan", endless)
    for server in servers[1:]:
        await server.kill()
    left = await hasty.event(job_id, "was silent for too long")
    await planning.wait()
    # One is back, and the other is waited for again.
    await servers[1].reconnect(hasty.address)
    await hasty.event(job_id, "parameter server ps-1 is here", left.cursor)
    if order == "stop":
        given = (await hasty.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id))).job
    else:
        given = (await hasty.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))).job
    assert given.state == PLANNING
    assert any(wait.what.startswith("parameter server ps-2 to come back") for wait in given.waits)
    assert any("gives it up" in wait.what for wait in given.waits) == (order == "stop")
    await servers[2].reconnect(hasty.address)
    await hasty.event(job_id, "its servers came back with all of their state")
    await servers[0].until(lambda: any(d.HasField("boundary") for d in servers[0].directives))
    await hasty.stub.ReportStep(step_report(job_id, 1, halted=True))
    await report_checkpoint(servers[0], 2)
    await hasty.event(job_id, "stopped at version 2, with a checkpoint" if order == "stop" else "paused at version 2")


async def test_a_stop_waits_for_steps_that_were_taken_while_everyone_was_cut_off(cluster: Cluster) -> None:
    """What is known here is that nothing was computed; the servers know better."""
    job_id = await cluster.submit()
    servers, (worker,) = await cluster.running(job_id)
    await worker.slots(2)
    for node in (*servers, worker):
        await node.kill()
    await cluster.event(job_id, "none, ")
    job = (await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id))).job
    assert job.state == RUNNING
    for server in servers:
        server.activity = coordinator_pb2.Activity(job_id=job_id, phase="accumulating", step=3)
        await server.reconnect(cluster.address)
    while len(cluster.coordinator.controller.members.everyone_present()) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(3 * TIMING.tick_seconds)
    assert (await cluster.job(job_id)).state == RUNNING
    for step in range(3):
        await cluster.stub.ReportStep(step_report(job_id, step))
    await asked(servers[1], 3)
    await report_checkpoint(servers[0], 3)
    await cluster.event(job_id, "stopped at version 3, with a checkpoint; no worker was live to finish the step")


# --- nobody computes --------------------------------------------------------------------------------------------------


async def test_a_pause_without_workers_has_a_checkpoint(cluster: Cluster) -> None:
    """People pause a job before they take its servers away."""
    job_id, servers, worker = await at_version_1(cluster)
    await worker.die()
    await cluster.event(job_id, "none, ")
    await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    await asked(servers[1], 1)
    waits = [(wait.what, wait.whom) for wait in (await cluster.job(job_id)).waits]
    assert waits == [("the checkpoint of version 1", "ps-0, ps-1"), (f"`gradstream resume {job_id}`", "a person")]
    await report_checkpoint(servers[0], 1)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 1)
    job = await cluster.job(job_id)
    assert (job.state, [wait.what for wait in job.waits]) == (PAUSED, [f"`gradstream resume {job_id}`"])


async def test_a_checkpoint_without_workers_is_of_the_version_at_hand(cluster: Cluster) -> None:
    job_id, servers, worker = await at_version_1(cluster)
    await worker.die()
    await cluster.event(job_id, "none, ")
    request = jobs_pb2.CheckpointJobRequest(job_id=job_id)
    waiting = asyncio.create_task(_await(cluster.jobs.CheckpointJob(request)))
    await asked(servers[1], 1)
    # A pause meanwhile takes nothing from it.
    await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    await report_checkpoint(servers[0], 1)
    assert (await asyncio.wait_for(waiting, 30)).checkpoint.version == 1
    # There is one now.
    await cluster.jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id))
    assert (await asyncio.wait_for(_await(cluster.jobs.CheckpointJob(request)), 30)).checkpoint.version == 1


async def test_a_checkpoint_that_a_pause_writes_is_the_one_asked_for(cluster: Cluster) -> None:
    job_id, servers, _ = await at_version_1(cluster)
    waiting = asyncio.create_task(_await(cluster.jobs.CheckpointJob(jobs_pb2.CheckpointJobRequest(job_id=job_id))))
    await servers[0].until(lambda: any(d.HasField("boundary") for d in servers[0].directives))
    await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    await cluster.stub.ReportStep(step_report(job_id, 1, halted=True))
    await cluster.event(job_id, "paused at version 2")
    await report_checkpoint(servers[0], 2)
    assert (await asyncio.wait_for(waiting, 30)).checkpoint.version == 2


async def test_a_stop_does_not_wait_for_workers_that_hang(tmp_path: Path, transformers_imported: None) -> None:
    cluster = Cluster(tmp_path, replace(TIMING, first_slot_seconds=0.5))
    await cluster.start()
    job_id, servers, worker = await at_version_1(cluster)
    for server in servers:
        server.activity = coordinator_pb2.Activity(job_id=job_id, phase="accumulating", step=1, missing_slots=[0, 1])
    worker.activity = coordinator_pb2.Activity(job_id=job_id, phase="computing", step=1)
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id))
    await asked(servers[1], 1)
    await report_checkpoint(servers[0], 1)
    await cluster.event(job_id, "stopped at version 1, with a checkpoint")
    await cluster.stop()


async def test_a_stop_at_once_says_what_is_left(cluster: Cluster) -> None:
    job_id, servers, _ = await at_version_1(cluster)
    await report_checkpoint(servers[0], 1)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 1)
    await cluster.stub.ReportStep(step_report(job_id, 1))
    job = (await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id, now=True))).job
    assert job.reason == "stopped at once at version 2; its last checkpoint is of version 1"


# --- nobody can compute -----------------------------------------------------------------------------------------------


async def test_a_job_that_fails_of_its_workers_has_a_checkpoint(cluster: Cluster) -> None:
    job_id, servers, worker = await at_version_1(cluster)
    await fail(worker, job_id, "out of memory")
    await asked(servers[1], 1)
    job = await cluster.job(job_id)
    assert job.state == RUNNING
    assert ("the checkpoint of version 1", "ps-0, ps-1") in [(wait.what, wait.whom) for wait in job.waits]
    await report_checkpoint(servers[0], 1)
    await cluster.event(job_id, "failed: worker worker-0: out of memory")
    await servers[1].released()
    # A person mends the worker, and the job goes on from there.
    await cluster.jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id))
    assert (await servers[0].plan_of(2)).start_version == 1


async def test_a_job_that_is_about_to_fail_goes_on_with_a_worker_that_comes(cluster: Cluster) -> None:
    job_id, servers, worker = await at_version_1(cluster)
    await fail(worker, job_id, "out of memory")
    await asked(servers[1], 1)
    other = cluster.node(WORKER, "other")
    assert await other.slots(2) == [0, 1]
    await report_checkpoint(servers[0], 1)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 1)
    assert (await cluster.job(job_id)).state == RUNNING


async def test_a_paused_job_does_not_fail_of_a_worker(cluster: Cluster) -> None:
    job_id, servers, worker = await at_version_1(cluster)
    await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    await cluster.stub.ReportStep(step_report(job_id, 1, halted=True))
    await worker.slots(0)
    await fail(worker, job_id, "out of memory")
    await report_checkpoint(servers[0], 2)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 2)
    assert (await cluster.job(job_id)).state == PAUSED
    await cluster.jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id))
    await worker.until(lambda: job_id in worker.holds)
    assert await worker.slots(2) == [0, 1]
