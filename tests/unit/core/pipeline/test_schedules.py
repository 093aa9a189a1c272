"""Pipeline schedules: torch's tables, the validation of tables, and their cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

from gradstream.core.errors import ConfigError
from gradstream.core.pipeline.schedule import SCHEDULES, Action, Op, Schedule, make_schedule, unavailable
from gradstream.core.pipeline.simulation import Costs, choose_schedule, ideal_bubble, simulate
from gradstream.core.pipeline.validation import validate

TORCH_NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved-1f1b": "Interleaved1F1B",
    "zero-bubble": "InterleavedZeroBubble",
}
ACTION = r"(\d+)([FBIW])(\d+)"
COMPUTE = {Op.FORWARD: 1.0, Op.BACKWARD: 2.0, Op.BACKWARD_INPUT: 1.0, Op.BACKWARD_WEIGHT: 1.0}


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """Of all schedules that exist."""
    name = draw(st.sampled_from(SCHEDULES))
    num_workers, num_chunks = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    num_microbatches = draw(st.integers(1, 14))
    if unavailable(name, num_workers, num_microbatches, num_chunks):
        name, num_chunks = "1f1b" if name == "interleaved-1f1b" else name, 1
    return name, num_workers, num_microbatches, num_chunks


def torch_rows(name: str, num_workers: int, num_microbatches: int, num_chunks: int) -> list[list[str]]:
    """Torch's table without idle time and without what is not computation."""
    stages = num_chunks if num_chunks > 1 else None
    rows = get_schedule_ops(TORCH_NAMES[name], num_workers, num_microbatches, stages)
    return [[str(action) for action in row if action is not None and action.is_compute_op] for row in rows]


def table_of(text: str, name: str = "custom") -> Schedule:
    """A schedule from its table in torch's notation: what `Schedule.to_csv` writes."""
    rows = tuple(
        tuple(Action(int(stage), Op(op), int(microbatch)) for stage, op, microbatch in re.findall(ACTION, line))
        for line in text.splitlines()
    )
    actions = [action for row in rows for action in row]
    num_stages = 1 + max(action.stage for action in actions)
    return Schedule(name, 1 + max(action.microbatch for action in actions), num_stages // len(rows), rows)


def equal_costs(schedule: Schedule, latency: float = 0.0) -> Costs:
    return Costs([COMPUTE] * schedule.num_stages, latency)


# --- torch's tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", range(1, 7))
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize(
    ("name", "num_chunks"),
    [("gpipe", 1), ("1f1b", 1), *((name, v) for name in ("interleaved-1f1b", "zero-bubble") for v in (2, 3, 4))],
)
def test_tables_are_torchs(name: str, num_workers: int, num_microbatches: int, num_chunks: int) -> None:
    arguments = (name, num_workers, num_microbatches, num_chunks)
    if unavailable(*arguments):
        with pytest.raises(ValueError, match="rounds"):
            torch_rows(*arguments)
        return
    schedule = make_schedule(*arguments)
    if name == "1f1b" and num_microbatches < num_workers:
        with pytest.raises(ValueError, match="greater than or equal to the number of stages"):
            torch_rows(*arguments)
        return
    ours = [[str(action) for action in row] for row in schedule.rows]
    theirs = torch_rows(*arguments)
    if name == "1f1b":
        # Its last row begins with microbatch 1 and ends with one that does not exist.
        assert [action for action in theirs.pop() if "F" in action] == [
            f"{num_workers - 1}F{number + 1}" for number in range(num_microbatches)
        ]
        assert ours.pop()[:2] == [f"{num_workers - 1}F0", f"{num_workers - 1}B0"]
    assert ours == theirs


@pytest.mark.parametrize(
    ("name", "num_chunks"), [("gpipe", 1), ("eager-1f1b", 1), ("zero-bubble", 1), ("zero-bubble", 2)]
)
def test_torchs_runtime_loads_our_tables(name: str, num_chunks: int, tmp_path: Path) -> None:
    schedule = make_schedule(name, 3, 6, num_chunks)
    path = tmp_path / "schedule.csv"
    path.write_text(schedule.to_csv())
    stage: Any = mock.create_autospec(PipelineStage, instance=True)
    stage.group_rank, stage.group_size, stage.submod = 0, 3, None
    stage.num_stages = schedule.num_stages
    runtime = _PipelineScheduleRuntime([stage] * num_chunks, 6)
    runtime._load_csv(str(path))
    assert [[str(action) for action in runtime.pipeline_order[rank]] for rank in range(3)] == [
        [str(action) for action in row] for row in schedule.rows
    ]


# --- validity ---------------------------------------------------------------------------------------------------------


@given(shape=shapes())
def test_every_schedule_is_valid_and_holds_what_it_must(shape: tuple[str, int, int, int]) -> None:
    name, num_workers, num_microbatches, num_chunks = shape
    schedule = make_schedule(*shape)
    bounds = validate(schedule)
    assert table_of(schedule.to_csv(), name) == schedule
    behind = [num_workers - 1 - worker for worker in range(num_workers)]
    if num_chunks == 1:
        expected = {
            "gpipe": [num_microbatches] * num_workers,
            "1f1b": [min(num_microbatches, hops + 1) for hops in behind],
            "eager-1f1b": [min(num_microbatches, 2 * hops + 1) for hops in behind],
            # Weights' passes that are put off keep their activations: as many on every worker as on the first.
            "zero-bubble": [min(num_microbatches, num_workers)] * num_workers,
        }
        assert list(bounds.live_activations) == expected[name]
    else:
        assert max(bounds.live_activations) <= num_chunks * num_microbatches


def test_a_table_worked_out_by_hand() -> None:
    schedule = make_schedule("1f1b", 3, 4)
    assert schedule.to_csv() == (
        "0F0,0F1,0F2,0B0,0F3,0B1,0B2,0B3\n1F0,1F1,1B0,1F2,1B1,1F3,1B2,1B3\n2F0,2B0,2F1,2B1,2F2,2B2,2F3,2B3\n"
    )
    bounds = validate(schedule)
    assert bounds.live_activations == (3, 2, 1)
    # All three activations of the first worker's start can wait at the second, and two gradients' activations at the
    # last; the first worker gets one gradient at a time, as its next forward is needed for the one after.
    assert bounds.waiting_messages[1] == 3


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("0F0,0B0\n1F0", "1B0 is missing"),
        ("0F0,0B0,0B0\n1F0,1B0", "0B0 is there twice"),
        ("0F0,1F0,0B0\n1B0", "1F0 is in the row of worker 0, which does not have its stage"),
        ("0B0,0F0\n1F0,1B0", "worker 0 waits for ever at 0B0, which needs 0F0 and 1B0"),
        ("0F0,0F1,0B1,0B0\n1F0,1B0,1F1,1B1", ""),
        ("0F0,0B1,0F1,0B0\n1F0,1B0,1F1,1B1", "worker 0 waits for ever at 0B1, which needs 0F1 and 1B1"),
        ("0F0,0I0,0W0\n1F0,1B0", "1B0 is there twice, or beside the other kind of backward"),
        ("0F0,0W0,0I0", "worker 0 waits for ever at 0W0, which needs 0I0"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(table: str, reason: str) -> None:
    if not reason:
        validate(table_of(table))
        return
    with pytest.raises(ConfigError, match=reason) as caught:
        validate(table_of(table))
    assert "\n" not in str(caught.value)


@given(shape=shapes(), data=st.data())
def test_a_table_that_lost_or_doubled_an_action_is_refused(
    shape: tuple[str, int, int, int], data: st.DataObject
) -> None:
    schedule = make_schedule(*shape)
    worker = data.draw(st.integers(0, schedule.num_workers - 1))
    row = schedule.rows[worker]
    place = data.draw(st.integers(0, len(row) - 1))
    changed = row[:place] + row[place + 1 :] if data.draw(st.booleans()) else (*row, row[place])
    rows = (*schedule.rows[:worker], changed, *schedule.rows[worker + 1 :])
    with pytest.raises(ConfigError):
        validate(Schedule(schedule.name, schedule.num_microbatches, schedule.num_chunks, rows))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("1b1f", 2, 4, 1), "schedule '1b1f' is not known; there are gpipe"),
        (("gpipe", 0, 4, 1), "must each be at least 1"),
        (("1f1b", 2, 4, 2), "schedule 1f1b has one chunk a worker, not 2"),
        (("interleaved-1f1b", 2, 4, 1), "needs at least 2 chunks a worker; with one it is eager-1f1b"),
        (("interleaved-1f1b", 4, 9, 2), "9 microbatches cannot go in 2 equal rounds .* use a multiple of 4"),
    ],
)
def test_schedules_that_do_not_exist(arguments: tuple[str, int, int, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_schedule(*arguments)


# --- time -------------------------------------------------------------------------------------------------------------


@given(shape=shapes(), latency=st.floats(0.0, 2.0), input_first=st.booleans(), data=st.data())
def test_nothing_begins_before_what_it_needs(
    shape: tuple[str, int, int, int], latency: float, input_first: bool, data: st.DataObject
) -> None:
    schedule = make_schedule(*shape)
    seconds = st.floats(0.01, 3.0)
    compute = [{op: data.draw(seconds) for op in Op} for _ in range(schedule.num_stages)]
    costs = Costs(compute, latency, input_first)
    found = simulate(schedule, costs)
    ends = {
        action: (worker, begin + costs.until_given(action))
        for worker, row in enumerate(schedule.rows)
        for action, begin in zip(row, found.begins[worker], strict=True)
    }
    for worker, row in enumerate(schedule.rows):
        free = 0.0
        for action, begin in zip(row, found.begins[worker], strict=True):
            assert begin >= free
            free = begin + costs.of(action)
            for item in schedule.needs(action):
                other, end = ends[item]
                assert begin >= end + (latency if other != worker else 0.0)
        assert free <= found.makespan
    busiest = max(sum(costs.of(action) for action in row) for row in schedule.rows)
    assert busiest <= found.makespan * (1 + 1e-9)
    assert -1e-9 <= found.bubble < 1


@given(num_workers=st.integers(1, 6), num_microbatches=st.integers(1, 16))
def test_bubbles_of_stages_that_take_equally_long(num_workers: int, num_microbatches: int) -> None:
    ideal = ideal_bubble(num_workers, num_microbatches)
    for name in ("gpipe", "eager-1f1b"):
        schedule = make_schedule(name, num_workers, num_microbatches)
        assert simulate(schedule, equal_costs(schedule)).bubble == pytest.approx(ideal)
    plain = make_schedule("1f1b", num_workers, num_microbatches)
    assert simulate(plain, equal_costs(plain)).bubble == pytest.approx(ideal)
    split = make_schedule("zero-bubble", num_workers, num_microbatches)
    bubble = simulate(split, equal_costs(split)).bubble
    assert bubble <= ideal + 1e-9
    if num_microbatches >= num_workers > 1:
        # P - 1 of F + I - W instead of F + B: a third of it where all three take equally long (Qi et al. 2024).
        assert bubble == pytest.approx((num_workers - 1) / (3 * num_microbatches + num_workers - 1))


@given(num_workers=st.integers(2, 6), num_microbatches=st.integers(1, 16))
def test_gradients_that_are_given_before_the_weights_shorten_the_bubble(
    num_workers: int, num_microbatches: int
) -> None:
    """The pipeline empties by the time of an input gradient a stage, instead of a whole backward pass."""
    for name in ("gpipe", "1f1b", "eager-1f1b"):
        schedule = make_schedule(name, num_workers, num_microbatches)
        found = simulate(schedule, Costs([COMPUTE] * num_workers, input_first=True))
        busy, waits = 3 * num_microbatches, 2 * (num_workers - 1)
        assert found.makespan == pytest.approx(busy + waits)
        assert found.bubble == pytest.approx(waits / (busy + waits))
    split = make_schedule("zero-bubble", num_workers, num_microbatches)
    with_it, without = (simulate(split, Costs([COMPUTE] * num_workers, input_first=first)) for first in (True, False))
    assert with_it == without


def test_chunks_shorten_the_bubble_and_early_forwards_hide_latency() -> None:
    plain = make_schedule("1f1b", 4, 16)
    interleaved = make_schedule("interleaved-1f1b", 4, 16, 2)
    halves = {op: seconds / 2 for op, seconds in COMPUTE.items()}
    bubble = simulate(interleaved, Costs([halves] * 8)).bubble
    assert bubble == pytest.approx(3 / (2 * 16 + 3))
    assert bubble < simulate(plain, equal_costs(plain)).bubble
    eager = make_schedule("eager-1f1b", 4, 16)
    assert simulate(eager, equal_costs(eager, 0.5)).makespan < simulate(plain, equal_costs(plain, 0.5)).makespan


# --- auto -------------------------------------------------------------------------------------------------------------


def test_the_choice_is_the_fastest_that_fits() -> None:
    costs = Costs([COMPUTE] * 4)
    schedule, reason = choose_schedule(4, 8, costs, [8] * 4)
    assert schedule.name == "zero-bubble"
    assert reason.startswith("zero-bubble takes 27 s; ")
    assert "1f1b 33 s" in reason
    # Without room for the activations of weights' passes that are put off:
    schedule, reason = choose_schedule(4, 8, costs, [4, 3, 2, 1])
    assert schedule.name == "1f1b"
    assert reason.endswith("not enough memory for gpipe, eager-1f1b, zero-bubble")
    with pytest.raises(ConfigError, match="worker 3 holds the activations of 0 microbatches"):
        choose_schedule(4, 8, costs, [4, 3, 2, 0])


def test_no_choice_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="9 microbatches cannot go in 2 equal rounds"):
        choose_schedule(4, 9, Costs([COMPUTE] * 8), [99] * 4, num_chunks=2)


def test_between_equals_the_choice_holds_less() -> None:
    costs = Costs([{Op.FORWARD: 1.0, Op.BACKWARD: 2.0, Op.BACKWARD_INPUT: 2.0, Op.BACKWARD_WEIGHT: 0.0}] * 2)
    schedule, _ = choose_schedule(2, 4, costs, [4, 4])
    assert schedule.name == "1f1b"


def test_actions_read_like_torchs() -> None:
    assert str(Action(2, Op.BACKWARD_INPUT, 7)) == "2I7"
