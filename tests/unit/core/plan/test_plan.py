"""The plan: bundles of matrices that are updated as a whole, and of the moments that slots share."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.shards import make_plan

from gradstream.core.errors import ProtocolError
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.local import LocalConfig

MUON = {"kind": "muon"}


def names(plan: Plan, bundle: int) -> list[str]:
    return [plan.tensors[fragment.tensor].name for fragment in plan.bundle(bundle).fragments]


@pytest.mark.parametrize("num_servers", [1, 2, 3])
def test_a_matrix_of_several_fragments_has_bundles_of_its_own_that_are_updated_together(num_servers: int) -> None:
    plan = make_plan(num_servers, optimizer=MUON)
    groups = [group for server in range(num_servers) for group in plan.update_groups_of(server)]
    assert sorted(bundle.index for group in groups for bundle in group) == list(range(len(plan.bundles)))
    for number in plan.whole_tensors:
        holders = [
            group for group in groups if any(each.tensor == number for bundle in group for each in bundle.fragments)
        ]
        assert len(holders) == 1
        elements = [each for bundle in holders[0] for each in bundle.fragments if each.tensor == number]
        assert sum(each.num_elements for each in elements) == plan.tensors[number].num_elements
        assert [each.begin for each in elements] == sorted(each.begin for each in elements)
    assert any(len(group) > 1 for group in groups), "a matrix has several bundles"
    adamw = make_plan(num_servers)
    assert all(len(group) == 1 for server in range(num_servers) for group in adamw.update_groups_of(server))


def test_moment_bundles_have_the_fragments_that_keep_the_moment() -> None:
    plan = make_plan(2, optimizer=MUON)
    plan = replace(plan, recipe=plan.recipe.model_copy(update={"local": LocalConfig(steps=3)}))
    found: dict[str, list[int]] = {}
    for bundle in plan.moment_bundles:
        assert plan.bundle(bundle.index) is bundle
        assert {plan.placement[fragment.index] for fragment in bundle.fragments} == {bundle.server}
        found.setdefault(bundle.array, []).extend(fragment.index for fragment in bundle.fragments)
    by_muon = [fragment.index for fragment in plan.fragments if fragment.tensor in plan.whole_tensors]
    rest = [fragment.index for fragment in plan.fragments if fragment.tensor not in plan.whole_tensors]
    assert {array: sorted(indices) for array, indices in found.items()} == {
        "momentum_buffer": by_muon,
        "exp_avg": rest,
        "exp_avg_sq": rest,
    }


def test_a_plan_that_splits_a_whole_matrix_is_refused() -> None:
    plan = make_plan(2, optimizer=MUON)
    assert Plan.from_proto(plan.to_proto()).whole_tensors == plan.whole_tensors
    fragment = next(each for each in plan.fragments if each.tensor in plan.whole_tensors and each.begin)
    placement = list(plan.placement)
    placement[fragment.index] = 1 - placement[fragment.index]
    with pytest.raises(ProtocolError, match="places a matrix on several servers"):
        Plan.from_proto(replace(plan, placement=tuple(placement)).to_proto())
