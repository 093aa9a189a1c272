"""The moments that slots keep: from round to round on one worker, and in the files of checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.micro import micro_plan

from gradstream.core.checkpoint.manifest import ResidualEntry
from gradstream.core.checkpoint.residual_files import read_residual, write_residual
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.loading import parse_recipe
from gradstream.worker.kept_moments import KeptMoments, Moments


def plan_of(after: int = 0, start_version: int = 0, **optimizer: Any) -> Plan:
    plan = micro_plan()
    tree = plan.recipe.model_dump()
    tree["local"] = {"steps": 2, "after": after, "inner_state": "keep"}
    tree["training"]["num_steps"] = after + 8
    tree["optimizer"] |= optimizer
    return replace(plan, recipe=parse_recipe(tree), start_version=start_version)


def moments_of(plan: Plan, seed: int = 0) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    return {
        number: {
            "exp_avg": torch.randn(tensor.num_elements, generator=generator),
            "exp_avg_sq": torch.rand(tensor.num_elements, generator=generator),
            "step": torch.tensor(6.0),
        }
        for number, tensor in enumerate(plan.tensors)
    }


def equal(left: Moments, right: Moments) -> bool:
    return left.keys() == right.keys() and all(
        left[number].keys() == right[number].keys()
        and all(torch.equal(array, right[number][name]) for name, array in left[number].items())
        for number in left
    )


def test_a_round_that_is_computed_again_begins_from_the_same_moments() -> None:
    plan = plan_of()
    kept = KeptMoments(plan)
    assert kept.at(0, 1) == {}
    first, second = moments_of(plan, 1), moments_of(plan, 2)
    kept.keep(0, 1, first)
    kept.keep(1, 1, second)
    kept.keep(1, 1, second)
    assert kept.at(1, 1) is first
    assert kept.at(2, 1) is second
    assert kept.at(0, 1) == {}, "moments of older versions are not held"


def test_a_round_that_is_not_finite_leaves_the_moments_as_they_were() -> None:
    plan = plan_of()
    kept = KeptMoments(plan)
    first, spoiled = moments_of(plan, 1), moments_of(plan, 2)
    spoiled[0]["exp_avg"][3] = float("nan")
    kept.keep(0, 0, first)
    kept.keep(1, 0, spoiled)
    assert kept.at(2, 0) is first


@pytest.mark.parametrize(
    ("after", "start_version", "version", "events"),
    [(0, 0, 0, []), (0, 0, 1, [(1, 0)]), (3, 0, 3, []), (3, 0, 4, [(4, 0)]), (0, 2, 2, []), (0, 2, 3, [(3, 0)])],
)
def test_a_slot_without_moments_begins_with_zeros_and_an_event_where_it_has_lost_some(
    after: int, start_version: int, version: int, events: list[tuple[int, int]]
) -> None:
    kept = KeptMoments(plan_of(after, start_version))
    found: list[tuple[int, int]] = []
    kept.on_fresh = lambda version, slot: found.append((version, slot))
    kept.settle(version, [0])
    kept.settle(version, [0])
    assert found == events
    assert kept.at(version, 0) == {}
    assert kept.snapshot(version) == {}, "zeros need no file"


def test_moments_of_slots_that_moved_away_are_dropped() -> None:
    plan = plan_of()
    kept = KeptMoments(plan)
    kept.keep(0, 0, moments_of(plan))
    kept.settle(1, [1])
    assert kept.snapshot(1).keys() == {0}, "its checkpoint may still need it"
    kept.settle(2, [1])
    assert kept.snapshot(1) == {}


def test_a_checkpoints_file_gives_the_moments_back(tmp_path: Path) -> None:
    plan = plan_of(start_version=4)
    assert len(plan.fragments) > len(plan.tensors), "tensors of several fragments take part"
    kept, loaded = KeptMoments(plan), KeptMoments(plan)
    moments = moments_of(plan)
    kept.keep(3, 1, moments)
    entry = write_residual(str(tmp_path), "slot-1.safetensors", plan, kept.snapshot(4)[1])
    states, reason = read_residual(str(tmp_path), ResidualEntry(**entry.model_dump(), slot=1), plan)
    assert reason == ""
    loaded.adopt(1, states)
    assert equal(loaded.at(4, 1), moments)


def test_a_file_of_a_job_that_keeps_nothing_does_not_fit(tmp_path: Path) -> None:
    plan = plan_of()
    entry = write_residual(str(tmp_path), "slot-0.safetensors", plan, {})
    states, reason = read_residual(str(tmp_path), ResidualEntry(**entry.model_dump(), slot=0), plan)
    assert states == {}
    assert "it has no exp_avg" in reason
