"""The pipeline's part of a plan and the predicted costs, as pure functions."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coordinator_fakes import PATIENCE_SECONDS, SERVER, WORKER, make_recipe
from pydantic import ValidationError

from gradstream.coordinator.jobs.decisions import missing_nodes
from gradstream.coordinator.planning.forecast import Forecast, forecast
from gradstream.coordinator.planning.inventory import Inventory
from gradstream.coordinator.planning.needs import NodeOffer, stage_need, worker_bytes
from gradstream.coordinator.planning.pipeline_planner import (
    Pipeline,
    num_microbatches,
    plan_pipeline,
    segments_of_stages,
)
from gradstream.coordinator.planning.planner import NextEpoch, make_plan
from gradstream.core.errors import ConfigError, PlanError, ProtocolError
from gradstream.core.model.profile import SegmentProfile
from gradstream.core.pipeline.schedule import SPLIT
from gradstream.core.plan.fragments import Tensor
from gradstream.core.plan.plan import Plan
from gradstream.core.plan.sizes import encoded_bytes
from gradstream.core.recipe.recipe import PipelineConfig, Recipe
from gradstream.proto.v1 import jobs_pb2

# An embedding, eight layers and a head that has the embedding's table: 16 k parameters each.
NUM_LAYERS = 8
WIDE = 128 * 128
TENSORS = [
    Tensor("table", (128, 128), True, 0, "embedding", NUM_LAYERS + 1),
    *(Tensor(f"layer.{unit}", (128, 128), True, unit) for unit in range(1, NUM_LAYERS + 1)),
]
ACTIVATIONS = 10_000


def profiles(seconds: float = 1.0, activation_bytes: int = ACTIVATIONS, **more: Any) -> list[SegmentProfile]:
    """Layers of `seconds` forward and twice that backward; embedding and head cost next to nothing."""

    def segment(name: str, unit: int, seconds: float) -> SegmentProfile:
        values: dict[str, Any] = {"working_bytes": 0, "measured": True, **more}
        return SegmentProfile(
            name,
            (unit,),
            WIDE,
            seconds,
            2 * seconds,
            1.1 * seconds,
            1.1 * seconds,
            activation_bytes,
            output_elements=1000,
            **values,
        )

    layers = [segment(f"layers.{unit - 1}", unit, seconds) for unit in range(1, NUM_LAYERS + 1)]
    return [segment("embedding", 0, 0.01), *layers, segment("head", NUM_LAYERS + 1, 0.01)]


def recipe_of(tmp_path: Path, training: dict[str, Any] | None = None, **pipeline: Any) -> Recipe:
    tree = make_recipe(tmp_path).model_dump()
    tree["training"] |= {"num_slots": 4, "global_batch": 16, "microbatch": 1} | (training or {})
    tree["validation"]["num_samples"] = tree["training"]["num_slots"]
    tree["pipeline"] |= {"stages": 2, **pipeline}
    return Recipe.model_validate(tree)


def workers(*memories: int) -> list[NodeOffer]:
    return [NodeOffer(f"w-{n}.00", f"w-{n}", f"host:{n}", memory) for n, memory in enumerate(memories)]


def segment_bytes(recipe: Recipe, num_segments: int = 1) -> int:
    return num_segments * worker_bytes(recipe, WIDE)


def planned(
    recipe: Recipe, offers: list[NodeOffer], found: list[SegmentProfile] | None = None
) -> tuple[Pipeline, dict[str, str]]:
    return plan_pipeline(recipe, TENSORS, found if found is not None else profiles(), offers)


def test_equal_layers_are_cut_in_the_middle(tmp_path: Path) -> None:
    made, reasons = planned(recipe_of(tmp_path, schedule="1f1b"), workers(0, 0, 0, 0))
    assert (made.stage_ends, made.num_chunks, made.schedule) == ((5, 10), 1, "1f1b")
    assert re.match(
        r"stages: 2, in 2 replicas of 2 workers, cut after layers.3; stage \d on w-\d is the slowest with 12 s a "
        r"microbatch, 1.00 times the mean; a worker needs 1.5 MiB, 1.5 MiB by its place",
        reasons["stages"],
    )
    assert reasons["schedule"].startswith("schedule: 1f1b as pipeline.schedule says, it takes ")
    assert reasons["schedule"].endswith(" for 8 microbatches a run")


def test_a_slow_worker_gets_a_smaller_stage(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, schedule="1f1b")

    def cut(*flops: float) -> tuple[int, str]:
        offers = [replace(offer, flops_per_second=speed) for offer, speed in zip(workers(0, 0), flops, strict=True)]
        made, reasons = planned(recipe, offers)
        return min(made.stage_ends[0] - 1, NUM_LAYERS + 1 - made.stage_ends[0]), reasons["stages"]

    layers, reason = cut(3e10, 1e10)
    assert layers == 2, "a third of what the other one has"
    assert "speeds by place 1, 0.33" in reason or "speeds by place 0.33, 1" in reason
    assert cut(1e10, 0.9e10)[0] == NUM_LAYERS / 2, "what a moment's measurement cannot tell makes no difference"
    assert cut(1e10, 0.0)[0] == NUM_LAYERS / 2, "one that did not measure counts as fast"


def test_the_table_counts_in_both_of_its_segments(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, schedule="1f1b")
    made, _ = planned(recipe, workers(0, 0))
    # Place 0 holds two microbatches at once, place 1 one.
    assert made.worker_bytes == tuple(segment_bytes(recipe, 5) + live * 5 * ACTIVATIONS for live in (2, 1))


def test_memory_is_that_of_a_replica_that_is_alone(tmp_path: Path) -> None:
    """gpipe holds every microbatch of a run: all 16 of the step, once the other replicas are gone."""
    recipe = recipe_of(tmp_path, schedule="gpipe")
    made, reasons = planned(recipe, workers(*[0] * 8))
    assert made.worker_bytes == tuple(segment_bytes(recipe, 5) + 16 * 5 * ACTIVATIONS for _ in range(2))
    assert " for 4 microbatches a run" in reasons["schedule"]


def test_a_small_worker_gets_the_place_that_fits_it(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, schedule="1f1b")
    small = segment_bytes(recipe, 3) + 3 * ACTIVATIONS
    made, _ = planned(recipe, workers(small, 0))
    assert [[worker.name for worker in group] for group in made.groups] == [["w-1"], ["w-0"]]
    assert made.stage_ends == (7, 10)
    assert made.worker_bytes[1] <= small < made.worker_bytes[0]
    # Whoever is least of a group decides for it.
    assert planned(recipe, workers(small, 0, 0, small))[0].stage_ends == (7, 10)
    assert planned(recipe, workers(small, 0, 0, 0))[0].stage_ends == (7, 10)


def test_the_smallest_go_first_where_that_is_faster(tmp_path: Path) -> None:
    """The head alone takes half of the time: it goes with the small worker's place, which is then the last."""
    recipe = recipe_of(tmp_path, schedule="gpipe")
    found = profiles()
    found[0] = SegmentProfile("embedding", (0,), WIDE, 8.0, 16.0, 8.0, 8.0, 0, 0, 1000, True)
    small = segment_bytes(recipe, 1)
    made, _ = planned(recipe, workers(0, small), found)
    assert [[worker.name for worker in group] for group in made.groups] == [["w-1"], ["w-0"]]
    assert made.stage_ends == (1, 10)


def test_a_worker_that_is_too_small_is_left_out(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    made, reasons = planned(recipe, workers(0, 100, 0, 0))
    assert [len(group) for group in made.groups] == [1, 1]
    assert "in 1 replica of 2 workers" in reasons["stages"]
    assert reasons["stages"].endswith("; 2 more workers stay idle")


def test_what_does_not_fit_names_worker_stage_and_missing_bytes(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, schedule="1f1b")
    need, offered = segment_bytes(recipe, 5) + 5 * ACTIVATIONS, segment_bytes(recipe, 4)
    with pytest.raises(PlanError) as caught:
        planned(recipe, workers(offered, offered))
    found = re.fullmatch(
        r"worker (w-\d) needs ([\d,]+) bytes for stage (\d) \(\w.* to .*\) but offers ([\d,]+) \(([\d,]+) missing\); "
        r"the smallest change: pipeline.stages=auto and 2 more workers of 1.1 MiB",
        str(caught.value),
    )
    assert found is not None, str(caught.value)
    numbers = [int(number.replace(",", "")) for number in found.groups()[1:]]
    assert numbers[0] - numbers[2] == numbers[3]
    assert numbers[2] == offered
    assert numbers[0] >= need
    # The largest workers are named: with those of the others nothing would be won.
    with pytest.raises(PlanError, match=f"worker w-[23] .* offers {offered:,} "):
        planned(recipe, workers(100, 100, offered, offered))


@pytest.mark.parametrize(
    ("pipeline", "count", "message"),
    [
        ({"stages": 4}, 1, "pipeline.stages 4 needs 4 workers, 1 is live; start 3 more with `gradstream serve worker`"),
        ({"stages": 4, "chunks": 2}, 1, r"pipeline.stages 4 \(2 a worker\) needs 2 workers, 1 is live; start 1 more"),
        ({"stages": "auto"}, 0, "pipeline.stages auto needs 1 worker, none is live"),
    ],
)
def test_too_few_workers(tmp_path: Path, pipeline: dict[str, Any], count: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned(recipe_of(tmp_path, **pipeline), workers(*[0] * count))


def test_what_can_never_be_is_the_recipes_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pipeline.stages 12 is more than the model's 10 segments .* at most 10"):
        planned(recipe_of(tmp_path, stages=12), workers(*[0] * 12))
    with pytest.raises(ValidationError, match="schedule 1f1b has one chunk a worker, not 2"):
        recipe_of(tmp_path, stages=4, chunks=2, schedule="1f1b")
    # Two replicas have nine microbatches each, which are no equal rounds of two.
    recipe = recipe_of(tmp_path, {"num_slots": 6, "global_batch": 18, "microbatch": 1}, stages=4, chunks=2)
    with pytest.raises(ConfigError, match="9 microbatches cannot go in 4 equal rounds"):
        planned(recipe, workers(0, 0))


def test_chunks_share_a_workers_memory(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, stages=4, chunks=2)
    made, reasons = planned(recipe, workers(0, 0))
    assert (len(made.stage_ends), made.num_chunks, len(made.worker_bytes)) == (4, 2, 2)
    assert made.schedule in ("interleaved-1f1b", "zero-bubble")
    assert reasons["stages"].startswith("stages: 4, 2 a worker, in 1 replica of 2 workers")
    enough = planned(recipe, workers(*[2 * max(made.worker_bytes)] * 2))[0]
    assert all(need <= 2 * max(made.worker_bytes) for need in enough.worker_bytes)
    with pytest.raises(
        PlanError, match=r"worker w-\d needs .* missing\).*; each of a worker's 2 stages is offered an equal share"
    ):
        planned(recipe, workers(segment_bytes(recipe, 3), segment_bytes(recipe, 3)))


def test_auto_takes_the_fewest_stages_that_fit(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, stages="auto", schedule="1f1b")
    made, reasons = planned(recipe, workers(0, 0, 0, 0))
    assert (made.stage_ends, len(made.groups[0])) == ((10,), 4)  # one stage, also a pipeline
    assert reasons["stages"].startswith(
        "stages: 1, the fewest that fit the workers' memory, in 4 replicas of 1 worker;"
    )
    room = segment_bytes(recipe, 6)
    made, _ = planned(recipe, workers(*[room] * 4))
    assert (len(made.stage_ends), len(made.groups[0])) == (2, 2)
    # Three stages would use all three, but the fewest that fit come first.
    made, reasons = planned(recipe, workers(*[room] * 3))
    assert (len(made.stage_ends), reasons["stages"].endswith("; 1 more worker stays idle")) == (2, True)
    # One that holds everything does not make the others idle.
    assert len(planned(recipe, workers(0, room, room, room))[0].stage_ends) == 2
    with pytest.raises(PlanError, match="for stage"):
        planned(recipe, workers(*[segment_bytes(recipe, 2)] * 3))


def test_recomputation_needs_one_layer_more(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, schedule="1f1b")
    plain = planned(recipe, workers(0, 0))[0].worker_bytes
    more = planned(recipe, workers(0, 0), profiles(working_bytes=777))[0].worker_bytes
    assert [b - a for a, b in zip(plain, more, strict=True)] == [777, 777]
    room = max(plain) + 776
    assert planned(recipe, workers(room, room))[0].worker_bytes == plain
    with pytest.raises(PlanError, match=r"missing.*; 777 B are reserved to recompute a layer"):
        planned(recipe, workers(plain[1], plain[1]), profiles(working_bytes=777))


def test_a_split_backward_pass_keeps_what_is_recomputed(tmp_path: Path) -> None:
    once = [
        planned(recipe_of(tmp_path, {"recompute": recompute}, schedule="zero-bubble"), workers(0, 0), profiles(**more))
        for recompute, more in ((False, {}), (True, {"working_bytes": 777}))
    ]
    plain, more = (pipeline.worker_bytes for pipeline, _ in once)
    # For each of 5 segments and 2 microbatches under way, and once more for a layer that computes.
    assert [b - a for a, b in zip(plain, more, strict=True)] == [777 * (2 * 5 + 1)] * 2
    free, reasons = planned(recipe_of(tmp_path, {"recompute": True}), workers(0, 0), profiles(working_bytes=777))
    assert free.schedule not in SPLIT
    assert "; zero-bubble would keep the recomputed activations" in reasons["schedule"]


def test_auto_schedules_by_time_and_memory(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    free, reasons = planned(recipe, workers(0, 0))
    assert "gpipe" in reasons["schedule"]
    tight, reasons = planned(recipe, workers(*[segment_bytes(recipe, 5) + 2 * 5 * ACTIVATIONS] * 2))
    assert "not enough memory for gpipe" in reasons["schedule"]
    assert max(tight.worker_bytes) <= segment_bytes(recipe, 5) + 2 * 5 * ACTIVATIONS
    assert free.stage_ends == tight.stage_ends
    assert "are estimates" in planned(recipe, workers(0, 0), profiles(measured=False))[1]["stages"]


def test_microbatches_are_those_of_the_longest_run(tmp_path: Path) -> None:
    training = recipe_of(tmp_path).training
    assert [num_microbatches(training, replicas) for replicas in (1, 2, 3, 4, 9)] == [16, 8, 8, 4, 4]


# --- in a plan --------------------------------------------------------------------------------------------------------


def plan(recipe: Recipe, offers: list[NodeOffer], num_servers: int = 2) -> tuple[Plan, dict[str, str]]:
    servers = [NodeOffer(f"ps-{n}.00", f"ps-{n}", f"host:{n + 1}", 0) for n in range(num_servers)]
    found = profiles() if recipe.pipeline.stages != 1 else None
    model = Inventory(tuple(TENSORS), "Llama", 0)
    return make_plan(NextEpoch("j", 1, None, "/c"), recipe, None, model, servers, offers, found)


def test_a_plan_with_stages_reads_back(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    made, reasons = plan(recipe, workers(0, 0))
    assert Plan.from_proto(made.to_proto()) == made
    assert set(reasons) == {"servers", "placement", "memory", "start", "stages", "schedule"}
    assert [stage_need(made, place) for place in range(2)] == list(made.worker_bytes)
    assert segments_of_stages(made.stage_ends, profiles()) == [range(5), range(5, 10)]
    message = made.to_proto()
    message.worker_bytes.append(1)
    with pytest.raises(ProtocolError, match="memory needs of 3 workers, but a replica has 2"):
        Plan.from_proto(message)


def test_without_a_pipeline_nothing_changes(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, stages=1)
    made, reasons = plan(recipe, workers(0))
    assert (made.stage_ends, made.pipeline_schedule, made.worker_bytes) == ((), "", ())
    assert stage_need(made) == worker_bytes(recipe, made.num_parameters)
    assert set(reasons) == {"servers", "placement", "memory", "start"}


def test_a_job_waits_for_the_workers_of_a_replica(tmp_path: Path) -> None:
    assert missing_nodes(recipe_of(tmp_path, stages=4), 2, 3, need_workers=True) == [
        ("4 workers, 3 are live", "a worker to register")
    ]
    assert missing_nodes(recipe_of(tmp_path, stages="auto"), 2, 1, need_workers=True) == []
    assert PipelineConfig(stages=4, chunks=2).min_workers == 2


# --- the forecast -----------------------------------------------------------------------------------------------------


def told(recipe: Recipe, offers: list[NodeOffer], link: float = 1e12, num_servers: int = 2) -> Forecast:
    made, reasons = plan(recipe, offers, num_servers)
    return forecast(made, reasons, profiles(), [], offers, link, latency_seconds=0.0)


def test_a_forecast_of_a_pipeline(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, schedule="gpipe", activations="int8")
    found = told(recipe, workers(0, 0, 0, 0), num_servers=1)
    assert (found.num_replicas, found.num_microbatches, found.schedule) == (2, 8, "gpipe")
    assert [stage.segments for stage in found.stages][1] == (*(f"layers.{n}" for n in range(4, 8)), "head")
    assert [(place.place, place.workers) for place in found.places] == [(0, ("w-0", "w-1")), (1, ("w-2", "w-3"))]
    # 8 microbatches through 2 stages of 4.01 s forward. A backward pass takes 8.02 s in one part (first stage) and
    # 2 x 4.411 s in two; for the second part of the last one nobody waits.
    seconds = 9 * 4.01 + (2 * 8 - 1) * 4.411 + 8.02
    assert found.compute_seconds == pytest.approx(seconds)
    assert found.bubble == pytest.approx(1 - 8 * (2 * 4.01 + 8.02 + 8.822) / (2 * seconds), abs=1e-3)
    whole = told(recipe_of(tmp_path, {"recompute": True}, schedule="gpipe"), workers(0, 0, 0, 0), num_servers=1)
    assert whole.compute_seconds == pytest.approx(9 * 12.03)
    assert whole.bubble == pytest.approx(1 / 9, abs=1e-3)
    assert found.exposed_seconds == pytest.approx(0)
    by_kind: dict[str, int] = {}
    for link in found.links:
        by_kind[link.kind] = by_kind.get(link.kind, 0) + link.step_bytes
    # Two slots a worker, and the table's two parts.
    assert by_kind["push"] == 2 * 10 * encoded_bytes("int8", (WIDE,))
    assert by_kind["pull"] == 10 * encoded_bytes("int8", (WIDE,))
    assert by_kind["activations"] == by_kind["gradients"] == 8 * encoded_bytes("int8", (1000,))
    assert found.to_dict()["places"][0]["need_bytes"] == found.places[0].need_bytes


def test_a_slow_link_shows(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, stages=1)
    fast, slow = (told(recipe, workers(0, 0), link=link) for link in (1e12, 1e4))
    assert fast.compute_seconds == slow.compute_seconds == pytest.approx(8 * 24.06)
    assert fast.step_seconds == pytest.approx(fast.compute_seconds)
    assert slow.exposed_seconds is not None
    assert slow.exposed_seconds > 0
    # The table's codec is int8 too, so a worker pulls 9 tensors of one byte and a scale a block.
    assert slow.pull_seconds == pytest.approx(8 * 9 * encoded_bytes("int8", (WIDE,)) / 1e4)
    assert (fast.bubble, fast.stages[0].num_parameters) == (pytest.approx(0), 9 * WIDE)
    assert {link.kind for link in fast.links} == {"push", "pull"}


def with_rounds(recipe: Recipe, **local: Any) -> Recipe:
    tree = recipe.model_dump()
    tree["training"]["num_steps"] = 30
    tree["local"] = {"steps": 10, "moments": "fp32", **local}
    return Recipe.model_validate(tree)


def test_rounds_compute_one_slot_at_a_time(tmp_path: Path) -> None:
    recipe = with_rounds(recipe_of(tmp_path, schedule="gpipe"))
    made, reasons = planned(recipe, workers(0, 0))
    assert reasons["schedule"].endswith(" for 4 microbatches a run")
    # gpipe holds the four microbatches of a slot. The table's gradient is held as it was received and as it is sent.
    assert made.worker_bytes == tuple(segment_bytes(recipe, 5) + 4 * 5 * ACTIVATIONS + 2 * 4 * WIDE for _ in range(2))
    late = planned(with_rounds(recipe_of(tmp_path, schedule="gpipe"), after=10), workers(0, 0))[0]
    assert late.worker_bytes[0] == made.worker_bytes[0] + 12 * 5 * ACTIVATIONS, "ordinary steps compute all slots"


def test_a_forecast_of_rounds_in_a_pipeline(tmp_path: Path) -> None:
    recipe = with_rounds(recipe_of(tmp_path, schedule="gpipe", activations="int8"))
    found = told(recipe, workers(0, 0, 0, 0), num_servers=1)
    assert (found.num_microbatches, found.round_steps) == (4, 10)
    # As in the forecast of a step, but each of a replica's two slots fills the pipeline in each inner step.
    seconds = 5 * 4.01 + (2 * 4 - 1) * 4.411 + 8.02
    assert found.compute_seconds == pytest.approx(10 * 2 * seconds)
    by_kind: dict[tuple[str, str], int] = {}
    for link in found.links:
        key = (link.kind, link.receiver if link.kind == "pull" else link.sender)
        by_kind[key] = by_kind.get(key, 0) + link.step_bytes
    weights, moments = encoded_bytes("int8", (WIDE,)), 2 * encoded_bytes("fp32", (WIDE,))
    first, second = "worker in place 0", "worker in place 1"
    # Five tensors are the first worker's, with the table, which the second worker pulls, too.
    assert by_kind["push", first] == 2 * 5 * (weights + moments)
    assert by_kind["push", second] == 2 * 4 * (weights + moments)
    assert by_kind["pull", first] == by_kind["pull", second] == 5 * (weights + moments)
    assert by_kind["activations", "stage 0"] == 10 * 2 * 4 * encoded_bytes("int8", (1000,))
    assert by_kind["tied gradients", first] == by_kind["tied gradients", second] == 10 * 2 * 4 * WIDE


def test_rounds_are_advised_for_a_pipeline_on_a_slow_link(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, schedule="gpipe")
    codec = recipe.codec.model_copy(update={"push": "int4", "pull": "delta-int4"})
    rounds = told(with_rounds(recipe.model_copy(update={"codec": codec}), moments={}), workers(0, 0), link=1e3)
    options = [option for option in told(recipe, workers(0, 0), link=1e3).options if option.inner_state != "reset"]
    (found,) = [option for option in options if (option.steps, option.push) == (10, "int4")]
    assert found.utilisation == pytest.approx(rounds.utilisation)
    assert found.worker_step_bytes == pytest.approx(rounds.worker_step_bytes)


def test_rounds_whose_schedule_has_no_ordinary_steps_get_no_advice(tmp_path: Path) -> None:
    """Five microbatches of a slot go through the chunks of three workers, ten of two slots do not."""
    slots = {"num_slots": 2, "global_batch": 10}
    recipe = with_rounds(recipe_of(tmp_path, slots, schedule="interleaved-1f1b", stages=6, chunks=2))
    found = told(recipe, workers(0, 0, 0), link=1e3)
    assert found.round_steps == 10
    assert (found.options, found.advice) == ((), "")


def test_a_model_without_a_profile_has_no_times(tmp_path: Path) -> None:
    made, reasons = plan(recipe_of(tmp_path, stages=1), workers(0))
    found = forecast(made, reasons, None, [], workers(0), 1e9)
    assert (found.step_seconds, found.bubble, found.stages) == (None, None, ())
    assert found.places[0].need_bytes == stage_need(made)


# --- in a coordinator -------------------------------------------------------------------------------------------------


async def test_a_coordinator_plans_stages_and_keeps_what_they_need(cluster: Any) -> None:
    recipe = make_recipe(cluster.directory)
    recipe = recipe.model_copy(update={"pipeline": PipelineConfig(stages=2, schedule="1f1b")})
    response = await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json()))
    job_id = response.job.job_id
    for number in range(2):
        cluster.node(SERVER, f"ps-{number}")
    first = cluster.node(WORKER, "worker-0")
    # One worker makes no replica: the job waits for another, and says so.
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if any(wait.what == "2 workers, 1 is live" for wait in (await cluster.job(job_id)).waits):
                break
            await asyncio.sleep(0.05)
    cluster.node(WORKER, "worker-1")
    message = (await cluster.event(job_id, "stages: 2, in 1 replica of 2 workers")).event.message
    assert "schedule: 1f1b as pipeline.schedule says" in message
    plan = await first.plan_of(1)
    assert (plan.num_stages, plan.pipeline_schedule, len(plan.worker_bytes)) == (2, "1f1b", 2)
    assert all(stage_need(plan, place) < worker_bytes(recipe, 2 * plan.num_parameters) for place in range(2))
    await cluster.restart()
    stored = cluster.coordinator.controller.active.plan
    assert stored.worker_bytes == plan.worker_bytes
