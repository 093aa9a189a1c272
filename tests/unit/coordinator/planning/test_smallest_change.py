"""The smallest change with which a model has a layout, and plans of large models on paper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from coordinator_fakes import make_recipe
from hypothesis import given
from hypothesis import strategies as st

from gradstream.coordinator.planning.fitting import NO_LIMIT, Fitter, segment_costs
from gradstream.coordinator.planning.inventory import Inventory
from gradstream.coordinator.planning.needs import NodeOffer, server_bytes, worker_bytes
from gradstream.coordinator.planning.pipeline_planner import Pipeline, plan_pipeline
from gradstream.coordinator.planning.planner import NextEpoch, make_plan
from gradstream.coordinator.planning.smallest_change import recomputed, smaller_microbatch, smallest_change
from gradstream.coordinator.planning.stages import StageOffer, cut_stages
from gradstream.core.errors import ConfigError, PlanError
from gradstream.core.model import profile
from gradstream.core.model.model import inventory
from gradstream.core.model.profile import SegmentProfile, Workload, profile_segments
from gradstream.core.pipeline.schedule import SCHEDULES, make_schedule, num_live
from gradstream.core.pipeline.validation import live_activations
from gradstream.core.plan.fragments import Tensor
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.loading import load_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.wire.stream_limits import more_than_usual_bytes, traffic

RECIPES = Path(__file__).parents[4] / "recipes"
GIB = 1 << 30

# --- small models -----------------------------------------------------------------------------------------------------

NUM_LAYERS = 6
WIDE = 128 * 128
TENSORS = [Tensor(f"tensor.{unit}", (128, 128), True, unit) for unit in range(NUM_LAYERS + 2)]


def profiles(activation_bytes: int = 1 << 20) -> list[SegmentProfile]:
    names = ["embedding", *(f"layers.{n}" for n in range(NUM_LAYERS)), "head"]
    return [
        SegmentProfile(name, (unit,), WIDE, 1.0, 2.0, 1.0, 1.0, activation_bytes, 0, 4096, True)
        for unit, name in enumerate(names)
    ]


def recipe_of(tmp_path: Path, training: dict[str, Any] | None = None, **pipeline: Any) -> Recipe:
    tree = make_recipe(tmp_path).model_dump()
    tree["training"] |= {"num_slots": 4, "global_batch": 32, "microbatch": 4} | (training or {})
    tree["validation"]["num_samples"] = tree["training"]["num_slots"]
    tree["pipeline"] |= {"stages": "auto", "schedule": "1f1b", **pipeline}
    return Recipe.model_validate(tree)


def change(recipe: Recipe, *mebibytes: float, activation_bytes: int = 1 << 20) -> str:
    told = smallest_change(recipe, TENSORS, profiles(activation_bytes), [int(m * (1 << 20)) for m in mebibytes])
    assert told.startswith("the smallest change: ")
    return told.removeprefix("the smallest change: ")


# A segment takes 0.28 MiB for weights, gradients and contributions, and 1 MiB a microbatch of four samples for
# activations, of which a layer that recomputes keeps 16 KiB.
def test_settings_of_the_layout_come_first(tmp_path: Path) -> None:
    assert change(recipe_of(tmp_path, schedule="gpipe"), *[9.0] * 4) == "pipeline.schedule=auto"
    assert change(recipe_of(tmp_path, stages=2), *[0.9] * 4, activation_bytes=1024) == (
        "pipeline.stages=auto, with 3 stages a replica"
    )


def test_then_the_largest_microbatch_that_fits_then_recomputation(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    assert change(recipe, 6.0, 6.0) == "training.microbatch=2 instead of 4"
    assert change(recipe, 3.4, 3.4) == "training.microbatch=1 instead of 4"
    assert change(recipe_of(tmp_path, {"microbatch": 1}), 12.0, 12.0, activation_bytes=2 << 20) == (
        "training.recompute=true"
    )
    assert change(recipe, 2.5, 2.5) == "training.microbatch=2 instead of 4 and training.recompute=true"


def test_then_workers_then_memory(tmp_path: Path) -> None:
    lean = recipe_of(tmp_path, {"microbatch": 1, "recompute": True})
    assert change(lean, 1.5, activation_bytes=1024) == "1 more worker of 1.5 MiB"
    assert change(lean, 1.0, activation_bytes=1024) == "2 more workers of 1.0 MiB"
    assert change(lean, 0.25, activation_bytes=1024) == "workers of 2.3 MiB instead of 256.0 KiB"
    assert change(recipe_of(tmp_path), 1.5) == (
        "training.microbatch=1 instead of 4 and training.recompute=true and 2 more workers of 1.5 MiB"
    )


def test_a_worker_of_unknown_memory_has_no_size(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"microbatch": 1, "recompute": True}, stages=2)
    told = smallest_change(recipe, TENSORS, profiles(1024), [NO_LIMIT, 100])
    assert told == "the smallest change: pipeline.stages=auto, with 1 stage a replica"
    chunks = recipe_of(tmp_path, {"microbatch": 1, "recompute": True}, stages=4, chunks=2, schedule="auto")
    assert smallest_change(chunks, TENSORS, profiles(1024), [NO_LIMIT, 100]) == "the smallest change: 1 more worker"


def test_a_worker_needs_no_more_for_more_slots(tmp_path: Path) -> None:
    def need(num_slots: int, push: str = "int8") -> int:
        recipe = recipe_of(tmp_path, {"num_slots": num_slots, "global_batch": 4 * num_slots}, stages=1, schedule="auto")
        codec = recipe.codec.model_copy(update={"push": push, "pull": "delta-int8"})
        return worker_bytes(recipe.model_copy(update={"codec": codec}), 1_100_000_000)

    assert need(1) < need(2) == need(200) < 19 * GIB
    # A slot's residual is state: before a step, and after it.
    assert need(200, "sign") - need(100, "sign") == 100 * 2 * 4 * 1_100_000_000


def test_an_error_of_the_plan_names_the_change(tmp_path: Path) -> None:
    offers = [NodeOffer(f"w-{n}", f"w-{n}", "", 6 << 20) for n in range(2)]
    with pytest.raises(PlanError, match=r"missing\); the smallest change: training.microbatch=2 instead of 4$"):
        plan_pipeline(recipe_of(tmp_path), TENSORS, profiles(), offers)


def test_the_change_makes_a_plan_possible(tmp_path: Path) -> None:
    offers = [NodeOffer(f"w-{n}", f"w-{n}", "", 6 << 20) for n in range(2)]
    found = [smaller_microbatch(each, 2, 4) for each in profiles()]
    made, _ = plan_pipeline(recipe_of(tmp_path, {"microbatch": 2}), TENSORS, found, offers)
    assert max(made.worker_bytes) <= 6 << 20


def test_estimates_of_other_settings() -> None:
    found = profiles()
    half = smaller_microbatch(found[1], 2, 4)
    assert (half.forward_seconds, half.activation_bytes, half.output_elements) == (0.5, 1 << 19, 2048)
    again = recomputed(found)
    assert [again[0], again[-1]] == [found[0], found[-1]]
    assert (again[1].activation_bytes, again[1].working_bytes) == (4 * 4096, 1 << 20)
    assert (again[1].backward_seconds, again[1].forward_seconds) == (3.0, 1.0)


# --- what fits --------------------------------------------------------------------------------------------------------


def test_live_microbatches_are_those_of_the_tables() -> None:
    for name in set(SCHEDULES) - {"interleaved-1f1b"}:
        for size in range(1, 7):
            for run in range(1, 20):
                live = live_activations(make_schedule(name, size, run))
                assert live == tuple(num_live(name, size, run, worker) for worker in range(size)), (name, size, run)


@given(data=st.data())
def test_what_fits_is_what_can_be_cut(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    recipe = recipe_of(tmp_path_factory.getbasetemp(), {"microbatch": 4})
    sizes = data.draw(st.lists(st.integers(0, 1 << 20), min_size=8, max_size=8))
    found = [replace(each, activation_bytes=size) for each, size in zip(profiles(), sizes, strict=True)]
    costs = segment_costs(recipe, TENSORS, found)
    memories = data.draw(st.lists(st.integers(1 << 17, 1 << 23) | st.just(NO_LIMIT), min_size=1, max_size=8))
    offers = [
        StageOffer(f"w-{n}", 1.0, 0 if memory == NO_LIMIT else memory, num_live("1f1b", len(memories), 8, n))
        for n, memory in enumerate(memories)
    ]
    try:
        cut_stages(costs, offers)
        possible = True
    except ConfigError:
        possible = False
    assert Fitter(recipe, costs, found).fits(memories) == possible


# --- large models on paper --------------------------------------------------------------------------------------------


class Paper(NamedTuple):
    """A large model: its tensors, and its segments' profiles, estimated as for any machine."""

    recipe: Recipe
    model: Inventory
    profiles: list[SegmentProfile]

    def plan(self, num_slots: int, gibibytes: int, **training: Any) -> tuple[Pipeline, dict[str, str]]:
        changed = self.recipe.training.model_copy(update={"num_slots": num_slots, **training})
        recipe = self.recipe.model_copy(update={"training": changed})
        offers = [NodeOffer(f"w-{n:03d}", f"w-{n:03d}", "", gibibytes * GIB) for n in range(512)]
        return plan_pipeline(recipe, self.model.tensors, self.profiles, offers)


@pytest.fixture(scope="module")
def paper() -> Any:
    made: dict[str, Paper] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "_flops_per_second", lambda workload: 1e12)

        def of(name: str) -> Paper:
            if name not in made:
                recipe = load_recipe(RECIPES / f"dense-{name}.yaml")
                config = recipe.model.config
                model = Inventory(tuple(inventory(config)), "LlamaForCausalLM", 0)
                made[name] = Paper(recipe, model, profile_segments(config, Workload.of(recipe.training)))
            return made[name]

        yield of


def layout(made: Pipeline) -> tuple[int, int, str]:
    """(stages, replicas, schedule)."""
    return len(made.stage_ends), len(made.groups[0]), made.schedule


def fits(made: Pipeline, gibibytes: int) -> bool:
    return all(need <= gibibytes * GIB for need in made.worker_bytes)


@pytest.mark.parametrize("num_slots", [64, 512])
@pytest.mark.parametrize(
    ("name", "gibibytes", "expected"),
    [("8b", 80, (2, 256, "1f1b")), ("70b", 80, (22, 23, "1f1b")), ("405b", 128, (118, 4, "1f1b"))],
)
def test_plans_of_large_models(
    paper: Any, name: str, gibibytes: int, expected: tuple[int, int, str], num_slots: int
) -> None:
    """On 512 workers. Memory does not grow with the number of slots."""
    made, reasons = paper(name).plan(num_slots, gibibytes)
    assert layout(made) == expected
    assert fits(made, gibibytes)
    idle = f"; {expected[1] - 64} replicas hold no slot, as training.num_slots is 64"
    assert (idle in reasons["stages"]) == (expected[1] > num_slots)


@pytest.mark.parametrize("num_slots", [64, 512])
def test_the_largest_model_names_what_it_lacks(paper: Any, num_slots: int) -> None:
    with pytest.raises(PlanError) as caught:
        paper("405b").plan(num_slots, 80)
    assert str(caught.value).endswith("; the smallest change: workers of 124.5 GiB instead of 80.0 GiB")
    assert fits(paper("405b").plan(num_slots, 125)[0], 125)


# --- in a plan --------------------------------------------------------------------------------------------------------


def test_a_model_without_a_pipeline_learns_of_one(tmp_path: Path) -> None:
    """Of the servers' memory, too, at the same time."""
    recipe = recipe_of(tmp_path, stages=1, schedule="auto")
    offers = [NodeOffer(f"w-{n}", f"w-{n}", "", 9 << 17) for n in range(4)]
    model, at = Inventory(tuple(TENSORS), "Llama", 0), NextEpoch("j", 1, None, "/c")

    def refusal(server_bytes: int) -> str:
        servers = [NodeOffer("ps-0", "ps-0", "", server_bytes)]
        with pytest.raises(PlanError) as caught:
            make_plan(at, recipe, None, model, servers, offers, profiles(1024))
        return str(caught.value)

    assert refusal(0).startswith("worker w-0 needs 2.3 MiB for weights and gradients but offers 1.1 MiB")
    assert refusal(0).endswith("; the smallest change: pipeline.stages=auto, with 3 stages a replica")
    assert refusal(1 << 10).startswith("parameter server ps-0 needs ")
    assert refusal(1 << 10).endswith(f"; and {refusal(0)}")


def test_servers_without_room_for_streams_name_the_number_of_slots(tmp_path: Path) -> None:
    model = Inventory(tuple(Tensor(f"layer.{unit}", (4096, 4096), True, unit) for unit in range(4)), "Llama", 0)
    at = NextEpoch("j", 1, None, "/c")

    def planned(num_slots: int, memory: int) -> Plan:
        training = {"num_slots": num_slots, "global_batch": 768, "microbatch": 1}
        recipe = recipe_of(tmp_path, training, stages=1, schedule="auto")
        recipe = recipe.model_copy(
            update={"cluster": recipe.cluster.model_copy(update={"fragment_bytes": 4 << 20})},
        )
        servers = [NodeOffer(f"ps-{n}", f"ps-{n}", "", memory) for n in range(2)]
        return make_plan(at, recipe, None, model, servers, [])[0]

    made = planned(384, 0)
    shard = server_bytes(made.recipe, made.fragments_of(0), made.tensors).most
    memory = shard + more_than_usual_bytes(384, traffic(made)[0])
    with pytest.raises(PlanError, match=r"; the smallest change: training.num_slots=384 instead of 768$"):
        planned(768, memory)
    assert planned(384, memory).num_slots == 384
    with pytest.raises(PlanError, match=r"; the smallest change: training.num_slots=128 instead of 768$"):
        planned(768, shard)
    assert planned(128, shard).num_slots == 128
