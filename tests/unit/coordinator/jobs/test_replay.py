"""Rounds with a quorum: the slots that counted in ledger and history, and the rounds that are computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from coordinator_fakes import SERVER, WORKER, Cluster, make_recipe, report_checkpoint, report_validation, step_report

from gradstream.coordinator.jobs.commits import counted_line, counted_text
from gradstream.coordinator.jobs.replay import replayed
from gradstream.core.errors import ConfigError
from gradstream.core.plan.recorded import RecordedSlots, rounds_of, runs_of, slots_at
from gradstream.core.recipe.learning_rate import rate_of_step
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.recipe.rounds import Rounds
from gradstream.proto.v1 import jobs_pb2

ROUNDS = Rounds(40, 4)


def quorum_recipe(directory: Path, num_slots: int = 2, **training: Any) -> Recipe:
    """A recipe of rounds of 2 steps after one ordinary step, with a quorum of one slot."""
    sizes = {"num_steps": 9, "num_slots": num_slots, "global_batch": 2 * num_slots}
    tree = make_recipe(directory, **{**sizes, **training}).model_dump()
    return Recipe.model_validate(tree | {"local": {"steps": 2, "after": 1, "quorum": 1}})


# --- recorded slots ---------------------------------------------------------------------------------------------------


def test_rounds_with_the_same_slots_are_one_run() -> None:
    found = {3: (0, 1), 4: (0, 1), 5: (1,), 7: (1,), 8: (0, 1)}
    runs = runs_of(sorted(found.items()))
    expected = [(3, 5, (0, 1)), (5, 6, (1,)), (7, 8, (1,)), (8, 9, (0, 1))]
    assert list(runs) == [RecordedSlots(*run) for run in expected]
    assert rounds_of(runs) == found
    assert [slots_at(runs, version) for version in range(2, 10)] == [found.get(version) for version in range(2, 10)]


# --- a replay's recipe ------------------------------------------------------------------------------------------------


def test_a_replay_has_the_recipe_of_its_job(tmp_path: Path) -> None:
    recipe = quorum_recipe(tmp_path)
    again = replayed("a-1", recipe, 5)
    assert again.local is not None
    assert again.local.replay == "a-1"
    assert (again.cluster.min_servers, again.cluster.min_workers) == (1, 1)
    assert again.training == recipe.training


def test_a_replay_of_a_stopped_job_ends_there_at_the_same_rates(tmp_path: Path) -> None:
    recipe = quorum_recipe(tmp_path, num_steps=9)
    again = replayed("a-1", recipe, 3)
    assert (again.rounds.last_version, again.training.num_steps) == (3, 5)
    assert [rate_of_step(again, step) for step in range(5)] == [rate_of_step(recipe, step) for step in range(5)]
    assert parse_recipe(again.model_dump_json()) == again
    # Also of a replay that is replayed up to an earlier version.
    once_more = replayed("a-2", again, 2)
    assert [rate_of_step(once_more, step) for step in range(3)] == [rate_of_step(recipe, step) for step in range(3)]


def test_what_cannot_be_replayed_gets_one_line(tmp_path: Path) -> None:
    recipe = quorum_recipe(tmp_path)
    with pytest.raises(ConfigError, match=r"has no local\.quorum: .* nothing to replay; submit its recipe again"):
        replayed("a-1", make_recipe(tmp_path), 3)
    with pytest.raises(ConfigError, match="has committed no round yet; replay it once it has"):
        replayed("a-1", recipe, 1)


# --- what people read -------------------------------------------------------------------------------------------------


def test_an_event_says_which_slots_counted_when_they_change() -> None:
    def line(slots: list[int], before: list[int] | None) -> str:
        last = step_report("a-1", 6, slots=before) if before is not None else None
        return counted_line(step_report("a-1", 7, slots=slots), last, 4, ROUNDS)

    assert line([0, 1, 3], None) == "round 8 was committed with 3 of 4 slots, without slot 2"
    assert line([0, 3], [0, 1, 2, 3]) == "round 8 was committed with 2 of 4 slots, without slots 1, 2"
    assert line([0, 1, 2, 3], [0, 3]) == "round 8 was committed with all 4 slots"
    assert line([0, 3], [0, 3]) == line([0, 1, 2, 3], None) == line([0, 1, 2, 3], []) == line([], None) == ""


def test_status_says_which_slots_counted_in_the_last_rounds() -> None:
    def text(*rounds: list[int]) -> str:
        return counted_text([step_report("a-1", 5 + n, slots=slots) for n, slots in enumerate(rounds)], 4, ROUNDS)

    everyone = [0, 1, 2, 3]
    assert text() == text([], []) == ""
    assert text(everyone, everyone) == "slots: round 7 has all 4 slots; so had the last 2"
    assert text([0, 1, 3], everyone, [0, 3]) == (
        "slots: round 8 has 2 of 4 slots, without slots 1, 2; of the last 3, slot 1 counted in 2, slot 2 counted in 1"
    )


# --- a coordinator ----------------------------------------------------------------------------------------------------


async def test_rounds_are_computed_again_with_their_slots_and_a_replay_takes_them_all(cluster: Cluster) -> None:
    recipe = quorum_recipe(cluster.directory)
    job_id = (await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json()))).job.job_id
    ps, (worker,) = await cluster.running(job_id)
    first = await worker.plan_of(1)
    assert first.recorded == ()
    assert [first.counted_slots(version) for version in (0, 1)] == [(0, 1), None]
    replay = jobs_pb2.ReplayJobRequest(job_id=job_id)
    with pytest.raises(grpc.aio.AioRpcError, match="has committed no round yet"):
        await cluster.jobs.ReplayJob(replay)

    async def report(step: int, slots: list[int], epoch: int = 1, **more: Any) -> None:
        count = len(slots) or 2
        values = {"num_tokens": 32 * count, "num_samples": 4 * count, "slots": slots, **more}
        await cluster.stub.ReportStep(step_report(job_id, step, epoch, **values))

    await report(0, [], num_samples=4, num_tokens=32)
    for wrong in ([1, 0], [0, 0], [2], [0, 1, 2]):
        with pytest.raises(grpc.aio.AioRpcError, match="which the recipe does not allow"):
            await report(1, wrong)
    with pytest.raises(grpc.aio.AioRpcError, match="contradicts the recipe"):
        await report(1, [1], num_samples=5)
    await report(1, [1])
    await cluster.event(job_id, "round 1 was committed with 1 of 2 slots, without slot 0")
    await report_checkpoint(ps[0], 2)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 2)
    await report(2, [0])
    await report(3, [0, 1])
    job = await cluster.job(job_id)
    assert (job.version, job.num_tokens, job.num_samples) == (4, 160, 20)
    (line,) = [line for line in job.decisions if line.startswith("slots: ")]
    assert line == ("slots: round 3 has all 2 slots; of the last 3, slot 0 counted in 2, slot 1 counted in 2")
    (line,) = [line for line in job.decisions if line.startswith("bits: ")]
    assert line.startswith("bits: outside the exact class, because a round is committed with 1 of 2 slots")
    # --- a server is lost: the rounds since the checkpoint are computed again with their slots
    await ps[1].die()
    spare = cluster.node(SERVER, "ps-spare")
    plan = await spare.plan_of(2)
    assert (plan.start_version, plan.recorded) == (2, (RecordedSlots(2, 3, (0,)), RecordedSlots(3, 4, (0, 1))))
    await cluster.event(job_id, "steps 3 to 6 are recomputed, to the same bits")
    # --- and again, although the ledger of this epoch has only one of them
    await report(2, [0], epoch=2)
    await spare.die()
    spare = cluster.node(SERVER, "ps-other")
    plan = await spare.plan_of(3)
    assert plan.recorded == (RecordedSlots(2, 3, (0,)), RecordedSlots(3, 4, (0, 1)))
    for step, slots in ((2, [0]), (3, [0, 1]), (4, [1])):
        await report(step, slots, epoch=3)
    for version in (0, 2, 3, 4, 5):
        await report_validation(ps[0], job_id, version, epoch=3)
    await report_checkpoint(ps[0], 5)
    await cluster.event(job_id, "finished: all 9 steps are done")
    # --- a replay waits for exactly these slots
    request = jobs_pb2.ReplayJobRequest(job_id=job_id, request_id="once")
    again = (await cluster.jobs.ReplayJob(request)).job
    assert (await cluster.jobs.ReplayJob(request)).job.job_id == again.job_id == "tiny-2"
    late = cluster.node(WORKER, "late")
    plan = await late.plan_of(1)
    assert (plan.job_id, plan.start_version) == ("tiny-2", 0)
    assert [plan.counted_slots(version) for version in range(5)] == [(0, 1), (1,), (0,), (0, 1), (1,)]
    await cluster.event("tiny-2", f"bits: rounds 1 to 4 take the slots that the ledger of job {job_id} has")
    # --- and needs the ledger only for its first plan
    third = (await cluster.jobs.ReplayJob(replay)).job.job_id
    with pytest.raises(grpc.aio.AioRpcError, match=f"whose rounds job {third} will compute again"):
        await cluster.jobs.RemoveJob(jobs_pb2.RemoveJobRequest(job_id=job_id))
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=third, now=True))
    await cluster.jobs.RemoveJob(jobs_pb2.RemoveJobRequest(job_id=job_id))


async def test_a_replay_of_other_data_or_other_slots_is_refused(cluster: Cluster) -> None:
    recipe = quorum_recipe(cluster.directory)
    job_id = (await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json()))).job.job_id
    await cluster.running(job_id)
    for step in range(2):
        await cluster.stub.ReportStep(step_report(job_id, step))
    other = replayed(job_id, quorum_recipe(cluster.directory, num_slots=1), 2)
    request = jobs_pb2.SubmitJobRequest(recipe_json=other.model_dump_json())
    with pytest.raises(grpc.aio.AioRpcError, match=r"job tiny-1 has 2 slots, and training\.num_slots is 1"):
        await cluster.jobs.SubmitJob(request)
    manifest = cluster.directory / "data" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"end_of_text_id":0', '"end_of_text_id":1'))
    with pytest.raises(grpc.aio.AioRpcError, match="is another one than that of job tiny-1"):
        await cluster.jobs.ReplayJob(jobs_pb2.ReplayJobRequest(job_id=job_id))
