"""Who computes which slot in the rest of a round: what moves, what is copied, and what stays."""

from __future__ import annotations

import random
from typing import Any

import pytest

from gradstream.core.plan.round_work import RoundWorker, Share, reasons_text, share_round

STEPS = [10] * 4


def worker(name: str, *slots: int, **more: Any) -> RoundWorker:
    """A worker that holds `slots`, and computes them unless `told` names others. A step takes it a second."""
    told = more.pop("told", None)
    more = {"inner_step_seconds": 1.0, **more}
    return RoundWorker(name, name, slots if told is None else told, told is not None, slots, **more)


def shared(*workers: RoundWorker, missing: Any = range(4), steps: Any = STEPS) -> tuple[dict[str, Any], list[str]]:
    shares, reasons = share_round(steps, missing, workers)
    return {
        name: (*share.slots, *(("copies", *share.copies) if share.copies else ())) for name, share in shares.items()
    }, reasons


def test_an_even_round_stays_as_the_lease_table_has_it() -> None:
    one, two = worker("a", 0, 2, slot=0, num_done=5), worker("b", 1, 3, slot=1, num_done=4)
    assert shared(one, two) == ({"a": (0, 2), "b": (1, 3)}, [])
    # At the end of the round nobody takes what another one is about to finish.
    one, two = worker("a", 0, 2, computed=(0, 2)), worker("b", 1, 3, computed=(1,), slot=3, num_done=8)
    assert shared(one, two) == ({"a": (), "b": (3,)}, [])


def test_a_slot_that_is_complete_or_on_its_way_is_computed_by_nobody() -> None:
    one = worker("a", 0, 1, 2, 3, computed=(1,), slot=2)
    assert shared(one, missing=[1, 2, 3])[0] == {"a": (2, 3)}
    # Even if a worker computes it right now: it abandons the slot.
    assert shared(worker("a", 0, 1, slot=0), missing=[1])[0] == {"a": (1,)}


def test_a_slot_moves_to_an_idle_worker_and_only_its_end_counts() -> None:
    busy = worker("a", 0, 1, 2, 3, computed=(0,), slot=1, num_done=5)
    shares, reasons = shared(busy, worker("b", 0), missing=[1, 2, 3])
    assert shares == {"a": (1, 3), "b": (2,)}
    assert reasons == ["slot 2 goes from a to b: computed in about 10 s, not 25 s"]
    # A worker three times as slow would be done with it after the others: it stays.
    assert shared(busy, worker("b", 0, inner_step_seconds=3.0), missing=[1, 2, 3]) == ({"a": (1, 2, 3), "b": ()}, [])


def test_what_moved_stays_moved() -> None:
    told = worker("a", 0, 1, told=(0,), slot=0, num_done=6)
    # Its share is as good as any other; nothing goes back.
    assert shared(told, worker("b", told=(1,)), missing=[0, 1]) == ({"a": (0,), "b": (1,)}, [])
    assert shared(told, worker("b", told=(1,), slot=1), missing=[0, 1]) == ({"a": (0,), "b": (1,)}, [])


def test_what_went_to_a_worker_that_died_returns_to_the_holder() -> None:
    assert shared(worker("a", 0, 1, told=(0,), slot=0), missing=[0, 1])[0] == {"a": (0, 1)}


def test_an_idle_worker_copies_the_slot_that_is_done_last() -> None:
    slow = worker("slow", 0, slot=0, num_done=3, inner_step_seconds=4.0)
    late = worker("late", 1, slot=1, num_done=1, inner_step_seconds=2.0)
    idle = worker("idle", 2, computed=(2,))
    shares, reasons = shared(slow, late, idle, missing=[0, 1])
    assert shares == {"slow": (0, "copies", 0), "late": (1,), "idle": (0, "copies", 0)}
    assert reasons == ["idle computes a copy of slot 0: in about 10 s, while slow needs 28 s more"]
    # Told so, it goes on, although the holder's forecast is better meanwhile; a slot has two copies at most.
    better = worker("slow", 0, slot=0, num_done=6, inner_step_seconds=3.0)
    begun = worker("idle", 2, told=(0,), computed=(2,), slot=0, num_done=1)
    more = worker("more", 3, computed=(3,))
    shares, reasons = shared(better, begun, more, missing=[0])
    assert (shares["slow"], shares["idle"], shares["more"]) == ((0, "copies", 0), (0, "copies", 0), ())
    assert reasons == []
    # The one that is done first ends it for both.
    done = worker("idle", 2, told=(0,), computed=(2, 0))
    assert shared(better, done, missing=[0])[0] == {"slow": (), "idle": ()}


@pytest.mark.parametrize(
    ("num_done", "pace", "kept", "copied"),
    [(0, 1.9, {}, True), (0, 1.09, {}, False), (8, 4.0, {}, False), (8, 4.0, {0: 6}, True), (9, 30.0, {}, True)],
)
def test_a_copy_must_win_by_a_margin(num_done: int, pace: float, kept: dict[int, int], copied: bool) -> None:
    """The last case hangs: what an inner step takes is at least what the one under way has taken."""
    slow = worker("slow", 0, slot=0, num_done=num_done, inner_step_seconds=pace)
    shares, reasons = shared(slow, worker("idle", 1, computed=(1,), kept=kept), missing=[0])
    assert bool(shares["idle"]) == bool(reasons) == copied


def test_a_worker_that_comes_back_goes_on_from_its_disk() -> None:
    """Of two slots that wait it gets the one of which it has progress."""
    busy = worker("a", 0, 1, slot=0, num_done=2)
    back = worker("b", 2, 3, kept={3: 8}, begins_in=2.0)
    assert shared(busy, back)[0] == {"a": (0, 1), "b": (2, 3)}
    # While it loads, the other one takes more, but not that one.
    free = worker("a", 0, 1, computed=(0, 1))
    shares, _ = shared(free, back, missing=[2, 3])
    assert shares == {"a": (2,), "b": (3,)}
    # It is not given a copy before it has the version.
    slow = worker("a", 0, slot=0, inner_step_seconds=9.0)
    assert shared(slow, worker("b", 1, computed=(1,), begins_in=1.0), missing=[0])[0]["b"] == ()


def test_a_slot_that_moved_by_the_lease_table_is_finished_where_it_was_begun() -> None:
    gone = worker("a", 0, slot=1, num_done=8)
    shares, reasons = shared(gone, worker("b", 1), missing=[0, 1])
    assert (shares, reasons) == ({"a": (1,), "b": (0,)}, ["slot 0 goes from a to b: computed in about 10 s, not 12 s"])


def test_what_a_worker_is_about_to_abandon_is_computed_by_another() -> None:
    """It began the slot just before it was told not to."""
    late = worker("a", 0, 1, told=(0,), computed=(0,), slot=1, num_done=1)
    assert shared(late, worker("b", 2, 3, told=(1,)), missing=[1])[0] == {"a": (), "b": (1,)}


def test_a_worker_without_slots_gets_none() -> None:
    busy = worker("a", 0, 1, slot=0)
    assert shared(busy, worker("b", slot=2, num_done=9), missing=[0, 1, 2]) == ({"a": (0, 1), "b": (2,)}, [])


def test_without_a_known_speed_nothing_moves() -> None:
    first = [worker("a", 0, 1, inner_step_seconds=0.0, slot=0), worker("b", 2, inner_step_seconds=0.0, computed=(2,))]
    assert shared(*first, missing=[0, 1]) == ({"a": (0, 1), "b": ()}, [])
    # A newcomer counts as one like the others.
    known = worker("a", 0, 1, slot=0, num_done=1)
    assert shared(known, worker("b", 2, inner_step_seconds=0.0), missing=[0, 1])[0] == {"a": (0,), "b": (1,)}


def test_slots_of_few_inner_steps_count_less() -> None:
    shares, _ = shared(worker("a", 0, 1, slot=0), worker("b", 2, computed=(2,)), missing=[0, 1], steps=[10, 2, 10, 10])
    assert shares == {"a": (0,), "b": (1,)}


def test_every_open_slot_has_a_worker_whatever_happens() -> None:
    """Random rounds: an open slot that somebody holds is in a share, twice at most; none else is in any."""
    draws = random.Random(5)
    for _ in range(500):
        num_slots, names = draws.randint(1, 12), [f"w{number}" for number in range(draws.randint(1, 6))]
        holders = [draws.choice(names) for _ in range(num_slots)]
        missing = [slot for slot in range(num_slots) if draws.random() < 0.7]
        workers, begun = [], set()
        for name in names:
            holds = tuple(slot for slot in range(num_slots) if holders[slot] == name)
            computed = tuple(slot for slot in holds if draws.random() < 0.3)
            left = [slot for slot in range(num_slots) if slot not in computed and slot not in begun]
            told = tuple(draws.sample(range(num_slots), draws.randint(0, num_slots))) if draws.random() < 0.3 else None
            left = [slot for slot in left if told is None or slot in told]
            slot = draws.choice(left) if left and draws.random() < 0.7 else None
            begun.add(slot)
            pace = draws.choice([0.0, 0.5, 1.0, 5.0])
            more: dict[str, Any] = {"computed": computed, "slot": slot, "num_done": draws.randint(0, 9)}
            workers.append(worker(name, *holds, told=told, inner_step_seconds=pace, **more))
        shares, reasons = share_round([10] * num_slots, missing, workers)
        sent = {slot for each in workers for slot in each.computed}
        given = [slot for share in shares.values() for slot in share.slots]
        assert set(given) == set(missing) - sent
        assert all(len(set(share.slots)) == len(share.slots) for share in shares.values())
        # What the decision gives, it leaves as it is.
        again = [
            worker(each.node_id, *each.holds, told=shares[each.node_id].slots, computed=each.computed, slot=each.slot,
                   num_done=each.num_done, inner_step_seconds=each.inner_step_seconds)
            for each in workers
        ]  # fmt: skip
        assert share_round([10] * num_slots, missing, again)[1] == [], reasons


def test_a_line_names_some_of_many() -> None:
    assert reasons_text(["a", "b"]) == "a; b"
    assert reasons_text([str(number) for number in range(12)]) == "0; 1; 2; 3; 4; 5; 6; 7; and 4 more"
    assert Share().slots == ()
