"""What people read of a job with local steps counts inner steps; versions and the ledger count rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from coordinator_fakes import (
    SERVER,
    WORKER,
    Cluster,
    make_manifest,
    make_recipe,
    report_checkpoint,
    report_validation,
    step_report,
)

from gradstream.coordinator.jobs import stalls
from gradstream.coordinator.jobs.active import ActiveJob, Pace
from gradstream.coordinator.jobs.decisions import Ending, JobSight, judge_end, judge_skips, order_text
from gradstream.coordinator.jobs.more_steps import with_more_steps
from gradstream.coordinator.jobs.plan_making import recomputed
from gradstream.coordinator.jobs.starting import started_from, state_note
from gradstream.coordinator.state.state import JobRecord, StepTotals
from gradstream.coordinator.telemetry.step_times import Parts, WorkerParts, advise
from gradstream.coordinator.timing import judge_wait
from gradstream.core.checkpoint.manifest import CheckpointManifest
from gradstream.core.errors import ConfigError
from gradstream.core.recipe.learning_rate import learning_rate, rate_of_step
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.recipe.rounds import Rounds
from gradstream.core.recipe.start_from import StartFrom
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

RUNNING, PAUSED = jobs_pb2.JOB_STATE_RUNNING, jobs_pb2.JOB_STATE_PAUSED
ROUNDS = Rounds(2400, 30)
LATE = Rounds(100, 30, 10)
"""Ten ordinary steps, then rounds."""


def local_recipe(directory: Path, local: dict[str, Any], **training: Any) -> Recipe:
    return Recipe.model_validate(make_recipe(directory, **training).model_dump() | {"local": local})


# --- decisions --------------------------------------------------------------------------------------------------------


def sight(desired: str, version: int, halted: int | None = None, **more: Any) -> JobSight:
    state = more.pop("state", RUNNING)
    return JobSight(
        desired, state, version, more.pop("rounds", ROUNDS), halted, more.pop("saved", ()), True, True, **more
    )


def test_a_job_ends_after_its_last_round() -> None:
    assert judge_end(sight("run", 79, saved={79}))[0] is Ending.GO_ON
    assert judge_end(sight("run", 80, saved={80})) == (Ending.FINISH, "all 2400 steps are done")
    assert judge_end(sight("run", 30, saved={30}))[0] is Ending.GO_ON
    assert judge_end(sight("stop", 12, 12, saved={12}))[1] == "stopped at version 12 (step 360), with a checkpoint"
    assert judge_end(sight("pause", 12, 12))[1] == "paused at version 12 (step 360)"


def test_an_order_takes_effect_at_the_end_of_the_round() -> None:
    assert order_text(sight("pause", 11)) == "pausing at the end of round 12; a checkpoint follows"
    said = order_text(sight("stop", 11, seconds_to_commit=40.4))
    assert said == "stopping at the end of round 12, in about 40 s; a checkpoint follows"
    said = order_text(sight("pause", 9, rounds=LATE, seconds_to_commit=40.0))
    assert said == "pausing at the end of step 9; a checkpoint follows"
    assert order_text(sight("pause", 12, 12)) == "pausing at version 12 (step 360); its checkpoint is written"


def test_skipped_rounds_end_a_job(tmp_path: Path) -> None:
    recipe = local_recipe(tmp_path, {"steps": 2})
    last = coordinator_pb2.ReportStepRequest(epoch=1, step=1, skipped=True, consecutive_skips=2)
    assert judge_skips(StepTotals(last=last), 1, recipe).startswith("2 rounds in a row up to round 2 had a loss")


def test_recomputed_steps_are_counted() -> None:
    assert recomputed(5, 2, ROUNDS) == "steps 60 to 149 are recomputed, to the same bits"
    assert recomputed(4, 2, Rounds(9)) == "steps 2 to 3 are recomputed, to the same bits"


def test_a_late_round_is_called_so() -> None:
    assert judge_wait(200.0, 60.0, "round") == (True, "no progress for 200 s; a round usually takes 60 s")


# --- rates ------------------------------------------------------------------------------------------------------------


def report(step: int, seconds: float, num_tokens: int = 10) -> coordinator_pb2.ReportStepRequest:
    values = {"num_tokens": num_tokens, "pushed_bytes": 7, "unix_ms": int(1000 * seconds)}
    return coordinator_pb2.ReportStepRequest(step=step, **values)


def test_the_pace_counts_inner_steps() -> None:
    pace = Pace()
    for version, seconds in ((9, 0), (10, 30), (11, 60)):
        pace.add(report(version, seconds, 300), seconds)
    assert pace.per_second(60.0, LATE) == (1.0, 10.0, 14 / 60)
    pace = Pace()
    for version, seconds in ((8, 0), (9, 2), (10, 32)):
        pace.add(report(version, seconds), seconds)
    assert pace.per_second(32.0, LATE)[0] == 31 / 32


def test_the_round_under_way_is_expected_to_take_as_long_as_its_steps(tmp_path: Path) -> None:
    recipe = local_recipe(tmp_path, {"steps": 30, "after": 10}, num_steps=100)
    record = JobRecord("a-1", "a", recipe.model_dump_json(), "{}", str(tmp_path), submitted_unix_ms=5)
    active = ActiveJob(record, recipe, make_manifest())
    assert stalls.step_seconds(active) is stalls.seconds_to_commit(active, 9.0) is None
    for version, seconds in ((8, 10.0), (9, 12.0)):
        active.pace.add(report(version, seconds), seconds)
    active.totals = StepTotals(version=9)
    assert stalls.step_seconds(active) == 2.0
    active.totals = StepTotals(version=10)
    assert stalls.step_seconds(active) == 60.0
    assert stalls.seconds_to_commit(active, 30.0) == 42.0
    assert stalls.seconds_to_commit(active, 500.0) == 0.0
    # A worker that hangs is found as fast as in ordinary steps: its progress counter moves within a round.
    active.holders = ["a", "a"]
    assert stalls.slot_seconds(active) == 1.0


def test_advice_on_a_slow_link_names_the_steps_of_a_round(tmp_path: Path) -> None:
    recipe = local_recipe(tmp_path, {"steps": 2})
    slow = WorkerParts("worker-0", Parts(compute=1.0, send=9.0), 1, 1.0, 1.0)
    said = advise([slow], recipe.codec, 2, recipe.local)[1]
    assert said == "the network sets the pace: more local.steps than 2 make exchanges rarer"
    fast = WorkerParts("worker-0", Parts(compute=1.0), 1, 1.0, 1.0)
    assert "(up to 2 share a round)" in advise([fast], recipe.codec, 2, recipe.local)[1]


# --- more steps -------------------------------------------------------------------------------------------------------


def test_more_steps_are_whole_rounds_and_the_rate_follows_inner_steps(tmp_path: Path) -> None:
    recipe = local_recipe(tmp_path, {"steps": 3, "after": 1}, num_steps=7)
    extended, line = with_more_steps("a-1", recipe, 3, 13)
    assert [(part.until_version, part.num_steps) for part in extended.training.earlier] == [(7, 7)]
    assert line.startswith("goes on from version 3 (step 7) to 13 steps in all (7 before)")
    expected = [learning_rate(step, 7 if step < 7 else 13, recipe.optimizer, recipe.schedule) for step in range(13)]
    assert [rate_of_step(extended, step) for step in range(13)] == expected
    assert parse_recipe(extended.model_dump_json()) == extended
    # Steps 2, 4, 6 and so on fall into these rounds; version 3 was the last one.
    assert [version for version in range(9) if extended.validates(version)] == [0, 2, 3, 4, 5]


def test_a_number_that_is_no_whole_rounds_gets_one_line(tmp_path: Path) -> None:
    recipe = local_recipe(tmp_path, {"steps": 3, "after": 1}, num_steps=7)
    with pytest.raises(ConfigError) as caught:
        with_more_steps("a-1", recipe, 3, 12)
    assert str(caught.value) == (
        "job a-1 has local steps, and --steps 12 is not local.after 1 plus whole rounds of local.steps 3; use 10 or 13"
    )
    with pytest.raises(ConfigError, match="has done 7 steps; --steps 7 is the number in all"):
        with_more_steps("a-1", recipe, 3, 7)


# --- a start from another job -----------------------------------------------------------------------------------------


def start_note(here: Recipe, there: Recipe, optimizer: bool) -> str:
    manifest = CheckpointManifest.model_construct(recipe=there.model_dump(mode="json"), state_sha256="0" * 64)
    start = StartFrom(weights="job:b-1", optimizer=optimizer)
    started_from(here, start, "/b-1", manifest)
    return state_note(here, start, manifest)


def test_what_becomes_of_the_moments_is_said(tmp_path: Path) -> None:
    plain = make_recipe(tmp_path)
    shared, reset, after = (
        local_recipe(tmp_path, {"steps": 1, **more})
        for more in ({}, {"inner_state": "reset"}, {"inner_state": "reset", "after": 2})
    )
    assert start_note(plain, plain, True) == start_note(shared, reset, False) == ""
    to_rounds = "starts from job:b-1, a job without local steps: {}; the outer momentum begins with zeros"
    assert start_note(shared, plain, True) == to_rounds.format("the first round begins with its moments")
    assert start_note(shared, plain, False) == to_rounds.format("the moments begin with zeros")
    assert "its moments are not used, because local.inner_state reset" in start_note(reset, plain, True)
    assert "the first 2 steps, before the first round, go on with its moments" in start_note(after, plain, True)
    to_steps = "starts from job:b-1, a job with local steps: {}, and has no outer momentum"
    assert start_note(plain, shared, True) == to_steps.format("goes on with its moments")
    assert start_note(plain, shared, False) == to_steps.format("begins with moments of zero")
    for here in (plain, shared, after):
        with pytest.raises(ConfigError, match=r"job:b-1 has no moments, because local\.inner_state reset keeps none"):
            start_note(here, reset, True)
    assert start_note(reset, reset, True) == ""


# --- a coordinator ----------------------------------------------------------------------------------------------------


async def test_status_ledger_and_metrics_count_inner_steps(cluster: Cluster) -> None:
    recipe = local_recipe(cluster.directory, {"steps": 3, "after": 1}, num_steps=7)
    job_id = (await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json()))).job.job_id
    ps, (worker,) = await cluster.running(job_id)
    await worker.slots(2)
    # An ordinary step has no more samples than the batch, a round three times as many.
    with pytest.raises(grpc.aio.AioRpcError, match="contradicts the recipe"):
        await cluster.stub.ReportStep(step_report(job_id, 0, num_samples=12))
    await cluster.stub.ReportStep(step_report(job_id, 0))
    await cluster.stub.ReportStep(step_report(job_id, 1, num_tokens=96, num_samples=12, unix_ms=3000))
    job = await cluster.job(job_id)
    assert (job.version, job.step, job.num_steps, job.num_tokens) == (2, 4, 7, 128)
    assert job.eta_seconds == 3.0  # at a step a second
    job = (await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))).job
    assert job.reason.startswith("pausing at the end of round 2, in about ")
    await cluster.jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id))
    await cluster.event(job_id, "resumed")
    with pytest.raises(grpc.aio.AioRpcError, match="contradicts the recipe"):
        await cluster.stub.ReportStep(step_report(job_id, 3))
    await cluster.stub.ReportStep(
        step_report(job_id, 2, num_tokens=96, num_samples=12, unix_ms=6000, skipped=True, consecutive_skips=1)
    )
    await cluster.event(job_id, "round 2 was skipped")
    for version in (0, 2, 3):
        await report_validation(ps[0], job_id, version)
    await report_checkpoint(ps[0], 3)
    written = await cluster.watch(job_id, lambda item: item.HasField("checkpoint"))
    assert (written.checkpoint.version, written.checkpoint.step) == (3, 7)
    await cluster.event(job_id, "finished: all 7 steps are done")
    found = await cluster.watch(job_id, lambda item: item.validation.version == 2)
    assert found.validation.step == 4
    found = await cluster.watch(job_id, lambda item: item.step.step == 1)
    assert (found.step.first_step, found.step.num_steps) == (1, 3)

    async def rows(**more: Any) -> list[tuple[int, ...]]:
        pages = cluster.jobs.GetMetrics(jobs_pb2.GetMetricsRequest(job_id=job_id, **more))
        return [(row.step, row.version, row.num_steps, row.num_tokens) async for page in pages for row in page.rows]

    assert await rows() == [(0, 0, 1, 32), (1, 1, 3, 128), (4, 2, 3, 224), (7, 3, 0, 224)]
    assert await rows(first_step=2) == [(4, 2, 3, 224), (7, 3, 0, 224)]
    assert await rows(every=3, first_step=1) == [(1, 1, 3, 128), (4, 2, 3, 224), (7, 3, 0, 224)]


async def test_slot_steps_are_decided_once_and_a_slow_worker_holds_the_slot_of_few_steps(cluster: Cluster) -> None:
    recipe = local_recipe(cluster.directory, {"steps": 4, "slot_steps": "auto"}, num_steps=8)
    recipe = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"min_workers": 2})})
    request = jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json(), request_id="once")
    job_id = (await cluster.jobs.SubmitJob(request)).job.job_id
    for name in ("ps-0", "ps-1"):
        cluster.node(SERVER, name)
    slow = cluster.node(WORKER, "slow", flops_per_second=1e9)
    fast = cluster.node(WORKER, "fast", flops_per_second=2e9)
    assert (await slow.plan_of(1)).rounds.slot_lengths == (4, 2)
    assert (await fast.slots(1), await slow.slots(1)) == ([0], [1])
    await cluster.event(job_id, "slot steps: 4, 2 inner steps of at most 4 a round; fast has 1.00 of the highest speed")
    # A report has no more samples than the slots' steps: 6 of 2 samples each.
    with pytest.raises(grpc.aio.AioRpcError, match="contradicts the recipe"):
        await cluster.stub.ReportStep(step_report(job_id, 0, num_samples=13))
    await cluster.stub.ReportStep(step_report(job_id, 0, num_samples=12))
    await cluster.restart()
    stored = parse_recipe((await cluster.job(job_id)).recipe_json)
    assert stored.rounds.slot_lengths == (4, 2)
    # It is the recipe that was submitted, also for a client that submits it again.
    assert (await cluster.jobs.SubmitJob(request)).job.job_id == job_id
