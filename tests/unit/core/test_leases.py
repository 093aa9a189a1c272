"""Leases: every slot has a holder while a worker lives, fairly, and as few of them move as can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.leases import assign_slots

WORKERS = ["a", "b", "c", "d", "e"]
holders = st.lists(st.sampled_from(["", *WORKERS, "gone"]), max_size=24)
live = st.lists(st.sampled_from(WORKERS), min_size=1, max_size=5, unique=True)


@given(holders=holders, workers=live)
def test_every_slot_is_held_by_a_live_worker_and_shares_differ_by_at_most_one(
    holders: list[str], workers: list[str]
) -> None:
    result, _ = assign_slots(holders, workers)
    assert len(result) == len(holders)
    assert set(result) <= set(workers)
    counts = [result.count(worker) for worker in workers]
    assert max(counts) - min(counts) <= 1


@given(holders=holders, workers=live)
def test_as_few_slots_move_as_can_be(holders: list[str], workers: list[str]) -> None:
    result, _ = assign_slots(holders, workers)
    stayed = sum(before == after for before, after in zip(holders, result, strict=True))
    # The best any fair assignment can do: the larger shares go to those who hold most.
    base, extra = divmod(len(holders), len(workers))
    held = sorted((holders.count(worker) for worker in workers), reverse=True)
    best = sum(min(count, base + (rank < extra)) for rank, count in enumerate(held))
    assert stayed == best


@given(holders=holders, workers=live)
def test_it_is_deterministic_and_a_second_look_changes_nothing(holders: list[str], workers: list[str]) -> None:
    result, reason = assign_slots(holders, workers)
    assert assign_slots(holders, workers) == (result, reason)
    again, why = assign_slots(result, workers)
    assert again == result
    assert why.startswith("all slots stay")


@given(holders=holders)
def test_without_workers_every_slot_is_free(holders: list[str]) -> None:
    assert assign_slots(holders, []) == ([""] * len(holders), "no live worker")


@pytest.mark.parametrize(
    ("holders", "workers", "expected", "reason"),
    [
        (["", "", "", ""], ["a", "b"], ["a", "b", "a", "b"], "slots 0, 1, 2, 3 were free (2 live)"),
        (["a", "b", "a", "b"], ["b"], ["b", "b", "b", "b"], "slots 0, 2 lost their worker (1 live)"),
        (["a", "a", "a", "a"], ["a", "b"], ["a", "a", "b", "b"], "slots 2, 3 moved for balance (2 live)"),
        (["a", "b"], ["a", "b", "c"], ["a", "b"], "all slots stay with their workers (3 live)"),
        (["a", "", "x"], ["a"], ["a", "a", "a"], "slots 1 were free; slots 2 lost their worker (1 live)"),
    ],
)
def test_examples_with_their_reasons(holders: list[str], workers: list[str], expected: list[str], reason: str) -> None:
    assert assign_slots(holders, workers) == (expected, reason)
