"""What a worker reports of its round, and which slots it computes in it."""

from __future__ import annotations

from support.micro import micro_plan

from gradstream.worker.attempts import next_slots
from gradstream.worker.held_slots import HeldSlots, RoundSlots
from gradstream.worker.round_report import RoundReport


def test_a_report_has_the_slot_its_steps_and_their_time() -> None:
    now = [0.0]
    report = RoundReport(lambda: now[0])
    assert report.message() is None
    report.begin(4)
    for place, at in ((0, 10.0), (1, 12.0), (2, 13.0)):
        now[0] = at
        report.begin_step(3, place)
    message = report.message()
    assert message is not None
    assert (message.version, message.slot, message.num_done, message.inner_step_seconds) == (4, 3, 2, 1.5)
    # A step that hangs makes the forecast worse.
    now[0] = 20.0
    assert report.message().inner_step_seconds == 7.0  # type: ignore[union-attr]
    report.end_slot(3)
    message = report.message()
    assert message is not None
    assert (message.HasField("slot"), list(message.computed), message.inner_step_seconds) == (False, [3], 1.5)
    # Another slot, which goes on from the disk, and is abandoned. Until it has done a step the last slot's time counts.
    report.begin_step(1, 5)
    assert report.message().inner_step_seconds == 1.5  # type: ignore[union-attr]
    now[0] = 23.0
    report.begin_step(1, 6)
    assert report.message().inner_step_seconds == 3.0  # type: ignore[union-attr]
    report.leave_slot()
    message = report.message()
    assert message is not None
    assert (message.HasField("slot"), list(message.computed)) == (False, [3])
    report.begin(5)
    assert list(report.message().computed) == []  # type: ignore[union-attr]
    report.begin(None)
    assert report.message() is None


def test_rounds_of_one_step_have_a_time_too() -> None:
    now = [1.0]
    report = RoundReport(lambda: now[0])
    report.begin(0)
    report.begin_step(0, 0)
    now[0] = 3.0
    report.end_slot(0)
    assert report.message().inner_step_seconds == 2.0  # type: ignore[union-attr]


def test_a_rounds_slots_count_for_that_round_alone() -> None:
    held = HeldSlots()
    held.take(1, [0, 2])
    held.take_round(RoundSlots(5, (3, 0), (3,)))
    assert list(held.to_compute(5)) == [3, 0]
    assert (held.drops(5, 2), held.drops(5, 3), list(held.copies(5))) == (True, False, [3])
    assert list(held.to_compute(6)) == [0, 2]
    assert (held.drops(6, 2), held.drops(6, 1), list(held.copies(6))) == (False, False, [])
    # A lease table does not end it; without one a slot that went elsewhere is computed to its end.
    held.take(2, [1])
    assert list(held.to_compute(5)) == [3, 0]
    assert not held.drops(4, 2)


def test_a_worker_trains_the_rounds_slots_and_validates_those_it_holds() -> None:
    sections = {"local": {"steps": 1}, "validation": {"interval_steps": 1, "num_samples": 8}}
    plan = micro_plan(sections=sections, num_slots=4)
    done: set[tuple[int, bool]] = set()
    order = []
    while (found := next_slots(plan, 0, [0, 1], [2, 0], done)) is not None:
        (slot,), validate = found
        order.append((slot, validate))
        done.add((slot, validate))
    assert order == [(2, False), (0, True), (0, False), (1, True)]
    assert next_slots(plan, 0, [0, 1], [], done) is None
    assert next_slots(plan, plan.last_version, [0], [0], set()) == ((0,), True)
