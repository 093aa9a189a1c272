"""Removal of jobs: what goes, what stays, and which jobs are refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from coordinator_fakes import Cluster, make_recipe, report_checkpoint, report_validation, step_report

from gradstream.coordinator.jobs.removal import judge_removal, put_back, remove_files, set_aside, survey
from gradstream.coordinator.state.state import JobRecord
from gradstream.core.errors import ConfigError, GradstreamError
from gradstream.core.recipe.fine_tuning import OLD_KEY
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.proto.v1 import jobs_pb2

FINISHED, PAUSED, QUEUED = jobs_pb2.JOB_STATE_FINISHED, jobs_pb2.JOB_STATE_PAUSED, jobs_pb2.JOB_STATE_QUEUED


def record(job_id: str, state: jobs_pb2.JobState.ValueType, start: str = "", **recipe: object) -> JobRecord:
    tree = {"start_from": {"weights": "x", "checkpoint": start} if start else None, **recipe}
    return JobRecord(job_id, "a", json.dumps(tree), "{}", f"/runs/{job_id}", 1, state=state)


def test_which_jobs_may_go() -> None:
    ended = record("a-1", FINISHED)
    needs_it = "/runs/a-1/checkpoints/step-00000002"
    assert judge_removal(ended, [ended, record("a-2", QUEUED)], ())[0]
    assert judge_removal(ended, [record("a-2", FINISHED, needs_it)], ())[0]
    for job, others, pinned, why in (
        (record("a-1", PAUSED), [], (), "is paused; stop it first: gradstream stop a-1"),
        (ended, [record("a-2", QUEUED, needs_it)], (), "has the checkpoint of version 2 that job a-2 starts from"),
        (ended, [], {4}, "has a checkpoint, of version 4, that is being read"),
        (record("a-1", FINISHED, fine_tuning={"base": {}}), [], (), "is a fine-tuning's"),
        (record("a-1", FINISHED, **{OLD_KEY: {"base": {}}}), [], (), "is a fine-tuning's"),
    ):
        may_go, reason = judge_removal(job, others, pinned)
        assert not may_go
        assert why in reason


def test_files_that_are_not_the_clusters_stay(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_bytes(b"12345")
    (tmp_path / "export").mkdir()
    before = survey(str(tmp_path))
    assert (before.num_bytes, before.versions, before.left) == (5, (2,), ("export",))
    set_aside(str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()
    put_back(str(tmp_path))
    assert survey(str(tmp_path)) == before
    # A removal that was cut off goes on.
    set_aside(str(tmp_path))
    set_aside(str(tmp_path))
    assert survey(str(tmp_path)).num_bytes == 5
    remove_files(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    (tmp_path / "export").rmdir()
    remove_files(str(tmp_path))
    assert not tmp_path.exists()
    assert survey(str(tmp_path)).versions == ()


async def remove(cluster: Cluster, job_id: str, dry_run: bool = False) -> jobs_pb2.RemoveJobResponse:
    return await cluster.jobs.RemoveJob(jobs_pb2.RemoveJobRequest(job_id=job_id, dry_run=dry_run))


async def refused(cluster: Cluster, job_id: str) -> GradstreamError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await remove(cluster, job_id)
    return error_from_rpc(caught.value, "coordinator")


async def hold(cluster: Cluster, job_id: str) -> Any:
    call = cluster.jobs.HoldCheckpoint(jobs_pb2.HoldCheckpointRequest(job_id=job_id))
    await call.read()
    return call


async def test_a_job_is_removed_with_all_that_was_stored_of_it(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    assert "stop it first: gradstream stop tiny-1" in str(await refused(cluster, job_id))
    for step in range(4):
        await cluster.stub.ReportStep(step_report(job_id, step))
    for version in (0, 2, 4):
        await report_validation(ps[0], job_id, version)
    await report_checkpoint(ps[0], 4)
    await cluster.event(job_id, "finished: all 4 steps")
    run = Path((await cluster.job(job_id)).run_directory)
    # --- a reader, and a job that starts from it, keep it
    call = await hold(cluster, job_id)
    assert "that is being read" in str(await refused(cluster, job_id))
    call.cancel()
    for _ in range(3000):
        if not cluster.coordinator.controller.pins.of(str(run / "checkpoints")):
            break
        await asyncio.sleep(0.01)
    tree = make_recipe(cluster.directory).model_dump() | {"name": "warm", "start_from": f"job:{job_id}"}
    recipe = type(make_recipe(cluster.directory)).model_validate(tree).model_dump_json()
    warm = (await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=recipe))).job.job_id
    assert f"job {warm} starts from" in str(await refused(cluster, job_id))
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=warm, now=True))
    # --- a dry run tells, the removal does
    (run / "export").mkdir()
    told = await remove(cluster, job_id, dry_run=True)
    assert (list(told.versions), list(told.left)) == ([4], ["export"])
    assert told.num_bytes > 1000
    assert (await cluster.job(job_id)).state == FINISHED
    assert await remove(cluster, job_id) == told
    assert [path.name for path in run.iterdir()] == ["export"]
    assert isinstance(await refused(cluster, job_id), ConfigError)
    state = cluster.coordinator.controller.state
    assert [job.job_id for job in state.list_jobs()] == [warm]
    assert not state.read_history(job_id, 0, 10)
    assert not state.validations(job_id)
    assert state.step_totals(job_id, 1, 0).num_steps == 0
    # The directory of its export is in the way of its id.
    assert await cluster.submit() == "tiny-2"
