"""Leases: every slot has a holder while a worker lives, fairly, and as few slots as possible move."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.plan.leases import MAX_SHOWN, Replica, assign_slots, form_replicas, moved_workers, slots_text

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
        (["a", "a", "a", "a"], ["a", "b"], ["a", "a", "b", "b"], "slots 2, 3 moved to share the work evenly (2 live)"),
        (["a", "b"], ["a", "b", "c"], ["a", "b"], "all slots stay with their workers (3 live)"),
        (["a", "", "x"], ["a"], ["a", "a", "a"], "slot 1 was free; slot 2 lost its worker (1 live)"),
    ],
)
def test_examples_with_their_reasons(holders: list[str], workers: list[str], expected: list[str], reason: str) -> None:
    assert assign_slots(holders, workers) == (expected, reason)


def anyone(worker: str, place: int) -> bool:
    return True


CHAINS = st.lists(st.sampled_from(WORKERS), unique=True, max_size=len(WORKERS))


@given(before=CHAINS, workers=live, size=st.integers(1, 3))
def test_replicas_are_as_many_as_can_be_and_whole_ones_stay(before: list[str], workers: list[str], size: int) -> None:
    replicas = [Replica(1, tuple(before[at : at + size])) for at in range(0, len(before) - size + 1, size)]
    found, reason = form_replicas(replicas, workers, size, 2, anyone)
    assert len(found) == len(workers) // size
    members = [worker for replica in found for worker in replica.workers]
    assert len(set(members)) == len(members)
    assert set(members) <= set(workers)
    assert all(len(replica.workers) == size for replica in found)
    for replica in replicas:
        assert (replica in found) == set(workers).issuperset(replica.workers)
    assert form_replicas(found, workers, size, 3, anyone)[0] == found
    assert reason


def test_a_survivor_keeps_its_place_and_a_spare_worker_takes_the_open_one() -> None:
    found, reason = form_replicas([Replica(1, ("a", "b")), Replica(1, ("c", "d"))], ["b", "c", "d", "e"], 2, 2, anyone)
    assert found == [Replica(1, ("c", "d")), Replica(2, ("e", "b"))]
    assert reason == "replicas of 2 workers: 1 stays, 1 formed"
    # Without a spare one the survivors of two chains make one.
    found, reason = form_replicas([Replica(1, ("a", "b")), Replica(1, ("c", "d"))], ["b", "c"], 2, 2, anyone)
    assert found == [Replica(2, ("c", "b"))]
    found, reason = form_replicas([Replica(1, ("a", "b")), Replica(1, ("c", "d"))], ["b", "c", "e"], 2, 2, anyone)
    assert found == [Replica(2, ("e", "b"))] or found == [Replica(2, ("c", "b"))]
    assert reason == "replicas of 2 workers: 1 formed; 1 more stay idle"
    assert form_replicas([], ["a"], 3, 2, anyone) == ([], "no replica: 1 of 3 workers, 2 more workers needed")


def test_a_small_worker_gets_the_place_that_fits_it() -> None:
    def fits(worker: str, place: int) -> bool:
        return place == 1 or worker != "small"

    assert form_replicas([], ["small", "a"], 2, 1, fits)[0] == [Replica(1, ("a", "small"))]
    assert form_replicas([], ["small", "tiny"], 2, 1, lambda worker, place: place == 1) == (
        [],
        "no replica: 2 of 2 workers, their memory is too small",
    )


@pytest.mark.parametrize(
    ("holders", "seconds", "counts"),
    [
        ("aabb", {"a": 1.0, "b": 3.0}, {"a": 3, "b": 1}),
        ("aaab", {"a": 1.0, "b": 3.0}, {"a": 3, "b": 1}),
        ("aaab", {"a": 1.0, "b": 1.0}, {"a": 2, "b": 2}),
        ("aaab", {"a": 1.0, "b": 1.4}, {"a": 3, "b": 1}),  # as good as even, to within the notable
        ("aabb", {"a": 1.0, "b": 1.6}, {"a": 2, "b": 2}),
        ("aabb", {"a": 0.01, "b": 0.03}, {"a": 2, "b": 2}),  # what is gained is not worth moving slots for
        ("aabb", {"a": 1.0}, {"a": 2, "b": 2}),
        ("aaaabbbb", {"a": 1.0, "b": 100.0}, {"a": 7, "b": 1}),
        ("ab", {"a": 1.0, "b": 100.0}, {"a": 1, "b": 1}),
    ],
)
def test_slots_follow_measured_speed(holders: str, seconds: dict[str, float], counts: dict[str, int]) -> None:
    result, why = assign_slots(list(holders), ["a", "b"], seconds)
    assert {worker: result.count(worker) for worker in "ab"} == counts
    assert ("uneven, by how long a slot takes" in why) == (max(counts.values()) - min(counts.values()) > 1)
    assert assign_slots(result, ["a", "b"], seconds)[0] == result


@given(holders=holders, workers=st.lists(st.sampled_from(WORKERS), unique=True, min_size=1), data=st.data())
def test_measured_speed_never_makes_a_step_longer(holders: list[str], workers: list[str], data: st.DataObject) -> None:
    seconds = {worker: data.draw(st.floats(0.01, 100.0)) for worker in workers}
    result, _ = assign_slots(holders, workers, seconds)
    even, _ = assign_slots(holders, workers)
    longest = [max(each.count(worker) * seconds[worker] for worker in workers) for each in (result, even)]
    assert longest[0] <= max(1.15 * longest[1], longest[1] + 0.05)
    if len(holders) >= len(workers):
        assert all(result.count(worker) for worker in workers)
    assert assign_slots(result, workers, seconds)[0] == result


def test_only_workers_whose_slots_moved_hear_of_a_table() -> None:
    before = [f"worker-{number}" for number in range(1000)]
    live = [worker for number, worker in enumerate(before) if number % 10]
    after, _ = assign_slots(before, live)
    moved = moved_workers(before, after, [], [])
    # The hundred that died, and the hundred that took over their slots.
    assert len(moved) == 200
    assert moved_workers(after, after, [], []) == set()
    assert moved_workers(["", "a"], ["a", "a"], [], []) == {"a"}


def test_a_whole_replica_hears_of_its_slots_and_of_its_members() -> None:
    stays, broken = Replica(1, ("a", "b")), Replica(1, ("c", "d"))
    formed = Replica(2, ("c", "e"))
    assert moved_workers(["a", "c"], ["a", "c"], [stays, broken], [stays, formed]) == {"c", "d", "e"}
    assert moved_workers(["a", "c"], ["a", "a"], [stays, broken], [stays, broken]) == {"a", "b", "c", "d"}


def test_long_lists_of_slots_are_cut() -> None:
    assert slots_text([3]) == "slot 3"
    assert slots_text(range(MAX_SHOWN)).endswith("30, 31")
    assert slots_text(range(1000)).endswith(f"30, 31 and {1000 - MAX_SHOWN} more")


# -- slots of different numbers of inner steps -------------------------------------------------------------------------


def test_a_slot_of_few_steps_goes_to_the_slow_worker() -> None:
    assert assign_slots(["", ""], ["slow", "fast"], {"slow": 2.0, "fast": 1.0}, [30, 15])[0] == ["fast", "slow"]
    # A wrong table is put right, and a right one stays, also at speeds that differ a little from the planned ones.
    result, reason = assign_slots(["slow", "fast"], ["slow", "fast"], {"slow": 2.0, "fast": 1.0}, [30, 15])
    assert result == ["fast", "slow"]
    assert reason == ("slots 0, 1 moved to share the work evenly (2 live; slots of different numbers of inner steps)")
    for pace in (1.0, 1.8, 2.2):
        assert assign_slots(["fast", "slow"], ["slow", "fast"], {"slow": pace, "fast": 1.0}, [30, 15])[0] == [
            "fast",
            "slow",
        ]


@given(holders=holders, workers=live, data=st.data())
def test_slots_of_different_costs_are_all_held_and_then_stay(
    holders: list[str], workers: list[str], data: st.DataObject
) -> None:
    costs = data.draw(st.lists(st.integers(1, 30), min_size=len(holders), max_size=len(holders)))
    seconds = {worker: data.draw(st.floats(0.1, 10)) for worker in workers}
    result, _ = assign_slots(holders, workers, seconds, costs)
    assert len(result) == len(holders)
    assert set(result) <= set(workers)
    assert assign_slots(result, workers, seconds, costs)[0] == result
