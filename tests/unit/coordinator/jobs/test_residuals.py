"""Checkpoints and residuals of slots: a wait names the slot, a lost worker's are given up, no wait is endless."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc
import grpc.aio
import pytest
from coordinator_fakes import Cluster, FakeNode, make_recipe, report_checkpoint, step_report

from gradstream.core.checkpoint.manifest import CheckpointManifest, directory_of, read_manifest
from gradstream.core.checkpoint.residual_files import residual_file_name
from gradstream.core.errors import ProtocolError
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.core.storage import files
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2


async def submit(cluster: Cluster, push: str = "topk") -> str:
    recipe = make_recipe(cluster.directory).model_dump(mode="json")
    recipe["codec"]["push"] = push
    text = type(make_recipe(cluster.directory)).model_validate(recipe).model_dump_json()
    return (await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=text))).job.job_id


def residual(node: FakeNode, job_id: str, slot: int, version: int = 2, **more: Any) -> Any:
    """Write a real file, as small as can be, and the report of it."""
    assert node.plan is not None
    directory = directory_of(node.plan.checkpoint_root, version)
    data = f"residual {slot}".encode()
    name = residual_file_name(node.plan.epoch, slot, node.node_id)
    files.make_directory(directory)
    files.write_atomic(files.join(directory, name), lambda stream: stream.write(data))
    values = {"file": name, "num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **more}
    return coordinator_pb2.ReportResidualRequest(
        job_id=job_id, epoch=node.plan.epoch, version=version, slot=slot, **values
    )


def taken_over(node: FakeNode, job_id: str, slot: int, version: int) -> Any:
    assert node.plan is not None
    return coordinator_pb2.ReportResidualRequest(job_id=job_id, epoch=node.plan.epoch, version=version, slot=slot)


async def at_version_2(cluster: Cluster, job_id: str, workers: int) -> tuple[list[FakeNode], list[FakeNode]]:
    """Two steps done, and both servers' files of the checkpoint there."""
    ps, ws = await cluster.running(job_id, workers=workers)
    for worker in ws:
        await worker.slots(2 // workers)
    for step in (0, 1):
        await cluster.stub.ReportStep(step_report(job_id, step))
    await report_checkpoint(ps[0], 2)
    return ps, ws


async def manifest_of(cluster: Cluster, job_id: str, version: int = 2) -> CheckpointManifest:
    item = await cluster.watch(job_id, lambda item: item.checkpoint.version == version)
    return read_manifest(item.checkpoint.path)


async def test_the_manifest_waits_for_every_slot(cluster: Cluster) -> None:
    job_id = await submit(cluster)
    _, (worker,) = await at_version_2(cluster, job_id, 1)
    assert not (await cluster.jobs.ListCheckpoints(jobs_pb2.ListCheckpointsRequest(job_id=job_id))).checkpoints
    for _ in range(2):  # said twice, counts once
        await worker.stub.ReportResidual(residual(worker, job_id, 0))
    assert not (await cluster.jobs.ListCheckpoints(jobs_pb2.ListCheckpointsRequest(job_id=job_id))).checkpoints
    await worker.stub.ReportResidual(residual(worker, job_id, 1))
    manifest = await manifest_of(cluster, job_id)
    assert [entry.slot for entry in manifest.residuals] == [0, 1]
    assert manifest.num_bytes == sum(entry.num_bytes for entry in (*manifest.files, *manifest.residuals))
    directory = directory_of(worker.plan.checkpoint_root, 2) if worker.plan else ""
    assert {entry.file for entry in manifest.residuals} < set(files.list_names(directory))
    # A report that comes again when all is written changes nothing.
    await worker.stub.ReportResidual(residual(worker, job_id, 1))
    assert await manifest_of(cluster, job_id) == manifest


async def test_a_halt_waits_for_residuals_and_says_for_whom(cluster: Cluster) -> None:
    job_id = await submit(cluster)
    ps, (worker,) = await cluster.running(job_id)
    await worker.slots(2)
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id))
    await cluster.stub.ReportStep(step_report(job_id, 0, halted=True))
    await worker.slots(0)  # the slots are free, the worker still owes what it keeps of them
    await report_checkpoint(ps[0], 1)
    job = await cluster.job(job_id)
    assert [(wait.what, wait.whom) for wait in job.waits] == [("the checkpoint of version 1", "worker-0")]
    for slot in (1, 0):
        await worker.stub.ReportResidual(residual(worker, job_id, slot, version=1))
    assert [entry.slot for entry in (await manifest_of(cluster, job_id, 1)).residuals] == [0, 1]
    await cluster.event(job_id, "stopped at version 1, with a checkpoint")


async def test_a_dead_workers_residual_is_lost_and_nothing_waits(cluster: Cluster) -> None:
    job_id = await submit(cluster)
    _, (one, two) = await at_version_2(cluster, job_id, 2)
    (mine,), (other,) = await one.slots(1), await two.slots(1)
    await one.stub.ReportResidual(residual(one, job_id, mine))
    await two.kill()
    # The slot has moved to one, who says so as soon as it has it: it has no residual of that slot.
    assert await one.slots(2) == [0, 1]
    assert not (await cluster.jobs.ListCheckpoints(jobs_pb2.ListCheckpointsRequest(job_id=job_id))).checkpoints
    await one.stub.ReportResidual(taken_over(one, job_id, other, 2))
    assert [entry.slot for entry in (await manifest_of(cluster, job_id)).residuals] == [mine]
    await cluster.event(job_id, f"version 2: the residuals of slot {other} were lost with their worker")


async def test_without_any_worker_left_a_checkpoint_is_complete_at_once(cluster: Cluster) -> None:
    job_id = await submit(cluster)
    _, (worker,) = await at_version_2(cluster, job_id, 1)
    await worker.stub.ReportResidual(residual(worker, job_id, 1))
    await worker.kill()
    assert [entry.slot for entry in (await manifest_of(cluster, job_id)).residuals] == [1]
    await cluster.event(job_id, "version 2: the residuals of slot 0 were lost with their worker")


async def test_a_slot_taken_over_at_a_later_version_is_waited_for_no_more(cluster: Cluster) -> None:
    job_id = await submit(cluster)
    _, (worker,) = await at_version_2(cluster, job_id, 1)
    await worker.stub.ReportResidual(taken_over(worker, job_id, 0, 1))  # of before: its file of version 2 may come
    await worker.stub.ReportResidual(residual(worker, job_id, 1))
    assert not (await cluster.jobs.ListCheckpoints(jobs_pb2.ListCheckpointsRequest(job_id=job_id))).checkpoints
    await worker.stub.ReportResidual(taken_over(worker, job_id, 0, 3))
    assert [entry.slot for entry in (await manifest_of(cluster, job_id)).residuals] == [1]


async def test_a_restarted_coordinator_remembers_residuals(cluster: Cluster) -> None:
    job_id = await submit(cluster)
    ps, (one, two) = await at_version_2(cluster, job_id, 2)
    (mine,), (other,) = await one.slots(1), await two.slots(1)
    await one.stub.ReportResidual(residual(one, job_id, mine))
    await cluster.restart()
    for node in (*ps, one, two):
        await node.reconnect(cluster.address)
    await cluster.event(job_id, "was restarted")
    await two.stub.ReportResidual(residual(two, job_id, other))
    assert [entry.slot for entry in (await manifest_of(cluster, job_id)).residuals] == [0, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"slot": 2},
        {"version": 0},
        {"version": 5},
        {"epoch": 2},
        {"job_id": "nobody-1"},
        {"file": "../manifest.json"},
        {"file": "manifest.json"},
        {"sha256": "0"},
        {"num_bytes": 2**63},
    ],
    ids=str,
)
async def test_reports_that_cannot_be_are_refused_in_one_line(cluster: Cluster, changes: dict[str, Any]) -> None:
    job_id = await submit(cluster)
    _, (worker,) = await cluster.running(job_id)
    report = residual(worker, job_id, 0)
    for key, value in changes.items():
        setattr(report, key, value)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.stub.ReportResidual(report)
    error = error_from_rpc(caught.value, "coordinator")
    assert isinstance(error, ProtocolError)
    assert "\n" not in str(error)


async def test_a_codec_without_residual_waits_for_none_and_takes_none(cluster: Cluster) -> None:
    job_id = await submit(cluster, "bf16")
    _, (worker,) = await at_version_2(cluster, job_id, 1)
    assert (await manifest_of(cluster, job_id)).residuals == ()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await worker.stub.ReportResidual(residual(worker, job_id, 0))
    assert "slots keep nothing there" in str(error_from_rpc(caught.value, "coordinator"))


async def test_a_residual_that_is_not_there_holds_the_checkpoint_with_its_cure(cluster: Cluster) -> None:
    job_id = await submit(cluster)
    _, (worker,) = await at_version_2(cluster, job_id, 1)
    await worker.stub.ReportResidual(residual(worker, job_id, 0))
    await worker.stub.ReportResidual(residual(worker, job_id, 1, num_bytes=1 << 40))
    held = await cluster.event(job_id, "the checkpoint of version 2 could not be written")
    assert "workers that see the coordinator's run_root" in held.event.message
