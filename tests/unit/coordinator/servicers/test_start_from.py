"""A job that starts from another one's checkpoint: what is resolved, kept and refused at submission."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from coordinator_fakes import Cluster, FakeNode, make_recipe, report_checkpoint, report_validation, step_report

from gradstream.core.errors import CheckpointError, ConfigError, GradstreamError
from gradstream.core.recipe.loading import absolute_paths, parse_recipe
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.proto.v1 import jobs_pb2


async def submit(cluster: Cluster, start_from: Any, request_id: str = "", **changes: Any) -> jobs_pb2.Job:
    tree = make_recipe(cluster.directory).model_dump() | {"start_from": start_from} | changes
    request = jobs_pb2.SubmitJobRequest(recipe_json=parse_recipe(tree).model_dump_json(), request_id=request_id)
    return (await cluster.jobs.SubmitJob(request)).job


async def refused(cluster: Cluster, start_from: Any, **changes: Any) -> GradstreamError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await submit(cluster, start_from, **changes)
    return error_from_rpc(caught.value, "coordinator")


async def to_version(cluster: Cluster, job_id: str, leader: FakeNode, first: int, end: int, epoch: int = 1) -> None:
    for step in range(first, end):
        await cluster.stub.ReportStep(step_report(job_id, step, epoch=epoch))
    for version in range(first, end + 1, 2):
        await report_validation(leader, job_id, version, epoch=epoch)
        if version:
            await report_checkpoint(leader, version)
            await cluster.watch(job_id, lambda item, version=version: item.checkpoint.version == version)  # type: ignore[misc]


async def test_a_job_starts_from_another_ones_checkpoint(cluster: Cluster) -> None:
    first = await cluster.submit()
    assert "has no checkpoint yet" in str(await refused(cluster, f"job:{first}"))
    ps, (worker,) = await cluster.running(first)
    await to_version(cluster, first, ps[0], 0, 4)
    await cluster.event(first, "finished: all 4 steps")
    root = Path((await cluster.job(first)).run_directory) / "checkpoints"
    # --- what does not fit is refused, and leaves nothing
    assert "no job 'tiny-7'; did you mean 'tiny-1'?" in str(await refused(cluster, "job:tiny-7"))
    unknown = await refused(cluster, f"job:{first}@3")
    assert isinstance(unknown, CheckpointError)
    assert "has no checkpoint of version 3; it has versions 2, 4" in str(unknown)
    model = make_recipe(cluster.directory).model_dump()["model"]
    model["config"]["intermediate_size"] = 48
    differs = await refused(cluster, f"job:{first}", model=model)
    assert isinstance(differs, ConfigError)
    assert "the first tensor that differs is model.layers.0.mlp.gate_proj.weight [32, 16] there and" in str(differs)
    sgd = await refused(cluster, {"weights": f"job:{first}", "optimizer": True}, optimizer={"kind": "sgd"})
    assert "was trained with adamw, and optimizer.kind is sgd" in str(sgd)
    # --- the version is resolved, and the same request gives the same job
    job = await submit(cluster, f"job:{first}@2", request_id="one")
    start = parse_recipe(job.recipe_json).start_from
    assert start is not None
    assert start.checkpoint == str(root / "step-00000002")
    assert (start.weights, start.title) == (f"job:{first}@2", f"job:{first}@2")
    assert (await submit(cluster, f"job:{first}@2", request_id="one")).job_id == job.job_id
    await cluster.event(job.job_id, f"start: from job:{first}@2")
    await worker.until(lambda: worker.plan is not None and worker.plan.job_id == job.job_id)
    assert worker.plan is not None
    assert (worker.plan.start_version, worker.plan.checkpoint_path) == (0, "")
    # --- its recipe as stored is another job from the same bits
    again = await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=job.recipe_json))
    assert parse_recipe(again.job.recipe_json).start_from == start
    other = start.model_copy(update={"state_sha256": "0" * 64}).model_dump()
    assert "is not the one that the recipe names" in str(await refused(cluster, other))


async def test_retention_keeps_the_checkpoint_that_a_queued_job_starts_from(cluster: Cluster) -> None:
    first = await cluster.submit(num_steps=8)
    ps, _ = await cluster.running(first)
    await to_version(cluster, first, ps[0], 0, 2)
    waiting = await submit(cluster, f"job:{first}")
    await to_version(cluster, first, ps[0], 2, 8)
    await cluster.event(first, "finished: all 8 steps")
    root = Path((await cluster.job(first)).run_directory) / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000006", "step-00000008"]
    assert (await cluster.job(waiting.job_id)).state != jobs_pb2.JOB_STATE_FAILED


@pytest.mark.parametrize(
    ("start_from", "line"),
    [
        ("job:", "is not of the form job:ID or job:ID@VERSION"),
        ("job:a-1@last", "is not of the form job:ID or job:ID@VERSION"),
        (" ", "start_from.weights is empty"),
        ({"weights": "job:a-1", "optimiser": True}, "did you mean 'optimizer'"),
    ],
)
def test_what_no_start_can_be_is_refused(tmp_path: Path, start_from: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(make_recipe(tmp_path).model_dump() | {"start_from": start_from})
    assert line in str(caught.value)


def test_a_directory_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = make_recipe(tmp_path).model_dump()
    resolved = absolute_paths(parse_recipe(tree | {"start_from": "step-00000002"})).start_from
    assert resolved is not None
    assert resolved.weights == str(tmp_path / "step-00000002")
    job = absolute_paths(parse_recipe(tree | {"start_from": "job:a-1@2"})).start_from
    assert job is not None
    assert (job.weights, job.job) == ("job:a-1@2", ("a-1", 2))
