"""A job that rests or has ended goes on to another number of steps; what it has computed stays as it is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from coordinator_fakes import Cluster, FakeNode, make_recipe, report_checkpoint, report_validation, step_report

from gradstream.coordinator.jobs.more_steps import as_submitted, with_more_steps
from gradstream.core.errors import CheckpointError, ConfigError, GradstreamError
from gradstream.core.recipe.fine_tuning import FineTuning
from gradstream.core.recipe.learning_rate import learning_rate, rate_of_step
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.proto.v1 import jobs_pb2

QUEUED, RUNNING = jobs_pb2.JOB_STATE_QUEUED, jobs_pb2.JOB_STATE_RUNNING


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    made = make_recipe(tmp_path, num_steps=10)
    return made.model_copy(update={"schedule": made.schedule.model_copy(update={"warmup_steps": 2})})


def rates(recipe: Recipe, num_steps: int) -> list[float]:
    return [learning_rate(step, num_steps, recipe.optimizer, recipe.schedule) for step in range(30)]


def test_past_steps_keep_their_rates_and_later_ones_follow_the_longer_schedule(recipe: Recipe) -> None:
    extended, line = with_more_steps("a-1", recipe, 10, 20)
    assert [rate_of_step(extended, step) for step in range(20)] == rates(recipe, 10)[:10] + rates(recipe, 20)[10:20]
    assert line == (
        "goes on from version 10 to 20 steps in all (10 before); its learning rate follows the cosine schedule of 20 "
        "steps from here on (0.0001 at step 9, 0.000592 at step 10)"
    )
    # It reads back, and goes on once more, from a step in the middle.
    again, _ = with_more_steps("a-1", parse_recipe(extended.model_dump_json()), 15, 30)
    expected = rates(recipe, 10)[:10] + rates(recipe, 20)[10:15] + rates(recipe, 30)[15:]
    assert [rate_of_step(again, step) for step in range(30)] == expected
    assert as_submitted(again) == recipe
    assert again.training.submitted_num_steps == 10


@pytest.mark.parametrize(("first", "second"), [(10, 10), (10, 4), (4, 4), (10, 0)])
def test_an_extension_from_an_older_version_replaces_the_later_ones(recipe: Recipe, first: int, second: int) -> None:
    once, _ = with_more_steps("a-1", recipe, first, 20)
    again, _ = with_more_steps("a-1", once, second, 30)
    expected = rates(recipe, 10)[:second] + rates(recipe, 30)[second:]
    assert [rate_of_step(again, step) for step in range(30)] == expected
    assert as_submitted(again) == recipe
    assert parse_recipe(again.model_dump_json()) == again


def test_the_old_end_is_still_validated(recipe: Recipe) -> None:
    recipe = recipe.model_copy(update={"validation": recipe.validation.model_copy(update={"interval_steps": 4})})
    extended, _ = with_more_steps("a-1", recipe, 10, 14)
    assert [version for version in range(20) if extended.validates(version)] == [0, 4, 8, 10, 12, 14]
    paused, _ = with_more_steps("a-1", recipe, 5, 14)
    assert [version for version in range(20) if paused.validates(version)] == [0, 4, 8, 12, 14]


@pytest.mark.parametrize("earlier", [[(3, 10), (3, 12)], [(5, 10), (3, 12)], [(10, 10)]])
def test_parts_that_cannot_be_are_refused(recipe: Recipe, earlier: list[tuple[int, int]]) -> None:
    parts = [{"until_version": version, "num_steps": steps} for version, steps in earlier]
    tree = recipe.model_dump()
    tree["training"]["earlier"] = parts
    with pytest.raises(ConfigError, match=r"leave training\.earlier out"):
        parse_recipe(tree)


def test_steps_that_are_done_are_no_more_steps(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="has done 10 steps; --steps 10 is the number in all, so give more"):
        with_more_steps("a-1", recipe, 10, 10)


def test_a_fine_tuning_is_refused_with_what_to_do_instead(recipe: Recipe) -> None:
    tuned = recipe.model_copy(update={"fine_tuning": FineTuning.model_construct()})
    with pytest.raises(ConfigError, match=r"is a fine-tuning, whose steps follow from its examples; .* job:a-1"):
        with_more_steps("a-1", tuned, 10, 20)


# --- the order --------------------------------------------------------------------------------------------------------


async def resume(cluster: Cluster, job_id: str, num_steps: int | None) -> jobs_pb2.Job:
    return (await cluster.jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id, num_steps=num_steps))).job


async def refused(cluster: Cluster, job_id: str, num_steps: int | None) -> GradstreamError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await resume(cluster, job_id, num_steps)
    return error_from_rpc(caught.value, "coordinator")


async def steps(cluster: Cluster, job_id: str, leader: FakeNode, first: int, end: int, epoch: int = 1) -> None:
    """Commit steps, with the checkpoints and the validation passes that the recipe has."""
    for step in range(first, end):
        await cluster.stub.ReportStep(step_report(job_id, step, epoch=epoch))
    for version in range(first, end + 1):
        if version % 2 == 0:
            await report_validation(leader, job_id, version, epoch=epoch)
    await report_checkpoint(leader, end)


async def test_a_finished_job_goes_on_to_more_steps(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await steps(cluster, job_id, ps[0], 0, 4)
    await cluster.event(job_id, "finished: all 4 steps")
    assert "is finished; give it more steps with --steps" in str(await refused(cluster, job_id, None))
    assert "has done 4 steps" in str(await refused(cluster, job_id, 4))
    job = await resume(cluster, job_id, 6)
    assert (job.version, job.num_steps, job.ended_unix_ms) == (4, 6, 0)
    said = (
        "goes on from version 4 to 6 steps in all (4 before); its learning rate follows the cosine schedule of 6 steps"
    )
    await cluster.event(job_id, f"resumed with more steps: {said}")
    plan = await worker.plan_of(2)
    assert (plan.start_version, plan.last_version) == (4, 6)
    assert [(part.until_version, part.num_steps) for part in plan.recipe.training.earlier] == [(4, 4)]
    # A coordinator that restarts finds the longer job.
    await cluster.restart()
    for node in (*ps, worker):
        await node.reconnect(cluster.address)
    await steps(cluster, job_id, ps[0], 4, 6, epoch=2)
    await cluster.event(job_id, "finished: all 6 steps are done")
    job = await cluster.job(job_id)
    assert (job.num_tokens, job.num_samples, job.version) == (192, 24, 6)
    # What was computed before counts once, under its own epoch.
    rows = [
        row async for page in cluster.jobs.GetMetrics(jobs_pb2.GetMetricsRequest(job_id=job_id)) for row in page.rows
    ]
    assert [(row.step, row.epoch) for row in rows] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 0)]


async def test_a_paused_job_waits_for_its_checkpoint_before_it_gets_more_steps(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await worker.slots(2)
    assert "pause it first (`gradstream pause tiny-1`)" in str(await refused(cluster, job_id, 9))
    await cluster.stub.ReportStep(step_report(job_id, 0))
    await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    await cluster.stub.ReportStep(step_report(job_id, 1, halted=True))
    await cluster.event(job_id, "paused at version 2")
    waiting = asyncio.create_task(resume(cluster, job_id, 9))
    await report_checkpoint(ps[0], 2)
    job = await asyncio.wait_for(waiting, 30)
    assert job.num_steps == 9
    plan = await worker.plan_of(2)
    assert (plan.start_version, plan.last_version) == (2, 9)
    assert [(part.until_version, part.num_steps) for part in plan.recipe.training.earlier] == [(2, 4)]
    # The same order again has no further effect.
    assert (await resume(cluster, job_id, 9)).state == RUNNING


async def test_a_stopped_job_whose_checkpoint_is_gone_gets_no_more_steps(cluster: Cluster, tmp_path: Path) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    await steps(cluster, job_id, ps[0], 0, 2)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 2)
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id, now=True))
    directory = Path((await cluster.job(job_id)).run_directory) / "checkpoints"
    directory.rename(tmp_path / "elsewhere")
    error = await refused(cluster, job_id, 9)
    assert isinstance(error, CheckpointError)
    assert "the checkpoint of version 2 was written and is not there now" in str(error)
    (tmp_path / "elsewhere").rename(directory)
    assert (await resume(cluster, job_id, 9)).num_steps == 9


async def test_a_request_that_is_repeated_knows_its_job_with_more_steps(cluster: Cluster) -> None:
    recipe = make_recipe(cluster.directory).model_dump_json()
    request: Any = jobs_pb2.SubmitJobRequest(recipe_json=recipe, request_id="one")
    job_id = (await cluster.jobs.SubmitJob(request)).job.job_id
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id))
    await resume(cluster, job_id, 9)
    assert (await cluster.jobs.SubmitJob(request)).job.job_id == job_id


async def test_a_failed_job_goes_back_to_the_checkpoint_that_is_there(cluster: Cluster) -> None:
    job_id = await cluster.submit(max_consecutive_skips=1)
    ps, (worker,) = await cluster.running(job_id)
    await steps(cluster, job_id, ps[0], 0, 2)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 2)
    await cluster.stub.ReportStep(step_report(job_id, 2))
    await cluster.stub.ReportStep(step_report(job_id, 3, skipped=True, consecutive_skips=1))
    await cluster.event(job_id, "failed")
    assert "has done 2 steps" in str(await refused(cluster, job_id, 2))
    # Also to fewer steps than it had, since it has not done them.
    await resume(cluster, job_id, 3)
    plan = await worker.plan_of(2)
    assert (plan.start_version, plan.last_version) == (2, 3)
