"""The early end of a fine-tuning, and the version that is its result."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.recipe.early_stopping import best_version, stops_early


def test_the_best_version_has_the_lowest_loss_the_earlier_of_equal_ones() -> None:
    losses = {0: 1.0, 2: 3.0, 4: 2.0, 6: 2.0, 8: math.nan}
    assert best_version(losses) == 4, "the base itself, version 0, is no result"
    assert best_version(losses, {2, 6}) == 6
    assert best_version({0: 1.0}) is None
    assert best_version({2: math.inf}) is None


@pytest.mark.parametrize(
    ("losses", "patience", "best"),
    [
        ([3.0, 2.0, 1.0, 0.5], 1, None),
        ([3.0, 2.0, 2.5, 2.4], 2, 1),
        ([3.0, 2.0, 2.5, 1.9], 2, None),
        ([3.0, 3.5, 3.6], 2, 1),
        ([3.0, math.nan, math.nan], 2, None),
        ([3.0, 4.0, 4.0, 4.0], 0, None),
    ],
    ids=["falls", "two in a row", "a new best in time", "never below the base", "no version to keep", "no patience"],
)
def test_patience(losses: list[float], patience: int, best: int | None) -> None:
    assert stops_early(dict(enumerate(losses)), patience)[0] == best


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.integers(1, 4))
def test_later_passes_do_not_change_how_a_job_ends(losses: list[float], patience: int) -> None:
    endings = [stops_early(dict(enumerate(losses[:count])), patience) for count in range(1, len(losses) + 1)]
    decided = [ending for ending in endings if ending[0] is not None]
    assert all(ending == decided[0] for ending in decided)
    assert endings[len(endings) - len(decided) :] == decided, "once decided, decided"
