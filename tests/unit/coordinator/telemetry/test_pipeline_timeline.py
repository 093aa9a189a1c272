"""The measured bubble against the simulator's, for schedules, slots, replicas and missing spans."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pipelines import BEGIN_US, simulated_timelines, stage_costs

from gradstream.coordinator.telemetry.pipeline_timeline import bubble, measure, newest, runs
from gradstream.core.pipeline.schedule import SCHEDULES, make_schedule, unavailable
from gradstream.core.pipeline.simulation import ideal_bubble, simulate
from gradstream.core.telemetry.timeline import PASSES, Span, SpanKind, Timeline

SHAPES = st.tuples(
    st.sampled_from(SCHEDULES), st.integers(2, 5), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2])
).filter(lambda shape: not unavailable(shape[0], shape[1], shape[2] * shape[3], shape[4]))


@settings(max_examples=60)
@given(shape=SHAPES, slower=st.lists(st.integers(1, 4), max_size=4), latency_us=st.integers(0, 3000))
def test_bubble_is_the_simulators(shape: tuple[str, int, int, int, int], slower: list[int], latency_us: int) -> None:
    name, num_workers, num_slots, each, num_chunks = shape
    schedule = make_schedule(name, num_workers, num_slots * each, num_chunks)
    costs = stage_costs(schedule, slower, latency_us)
    timelines = simulated_timelines(schedule, costs, range(num_slots))
    assert bubble(timelines) == pytest.approx(simulate(schedule, costs).bubble, abs=1e-9)
    # All slots are one run, with all of their microbatches.
    [run] = runs(reversed(timelines))
    assert run.workers == tuple(timeline.worker for timeline in timelines)
    assert run.slots == tuple(range(num_slots))
    assert run.num_microbatches == num_slots * each
    assert sum(map(len, run.passes)) == sum(map(len, schedule.rows))
    found = measure([run])
    assert found is not None
    assert found.ideal == pytest.approx(ideal_bubble(num_workers, num_slots * each))


def test_other_spans_do_not_matter() -> None:
    schedule = make_schedule("1f1b", 3, 6)
    timelines = simulated_timelines(schedule, stage_costs(schedule))
    before = bubble(timelines)
    noise = tuple(Span(kind, BEGIN_US - 10**6, 10**7, slot=9) for kind in SpanKind if kind not in PASSES)
    # Nor do passes that do not say of what they are.
    noise += (Span(SpanKind.FORWARD, BEGIN_US, 10**7), Span(SpanKind.BACKWARD, BEGIN_US, 10**7, slot=0, stage=0))
    assert bubble([replace(timeline, spans=timeline.spans + noise) for timeline in timelines]) == before
    assert bubble([replace(timeline, spans=noise) for timeline in timelines]) is None
    assert bubble([]) is None


def test_replicas_and_their_runs_are_told_apart() -> None:
    """Two replicas at once, whose clocks differ; the second one is given another slot after its first run."""
    first, second, third = (make_schedule("1f1b", 2, count) for count in (8, 4, 2))
    timelines = simulated_timelines(first, stage_costs(first), (0, 3), prefix="a")
    ahead_us = 86_400_000_000
    late = simulated_timelines(third, stage_costs(third), (1,), begin_us=BEGIN_US + ahead_us + 10**6, prefix="b")
    for timeline, more in zip(
        simulated_timelines(second, stage_costs(second), (2,), begin_us=BEGIN_US + ahead_us, prefix="b"),
        late,
        strict=True,
    ):
        timelines.append(replace(timeline, spans=timeline.spans + more.spans))
    found = runs(timelines)
    assert [(run.slots, run.workers, run.num_microbatches) for run in found] == [
        ((0, 3), ("a-0", "a-1"), 8),
        ((1,), ("b-0", "b-1"), 2),
        ((2,), ("b-0", "b-1"), 4),
    ]
    # Neither the second between the runs nor the day between the clocks is waiting. Equal stages: all sums are plain.
    times = [simulate(schedule, stage_costs(schedule)).makespan for schedule in (first, second, third)]
    busy_us = 2 * 6000 * (8 + 4 + 2)
    assert bubble(timelines) == pytest.approx(1 - busy_us / (2 * sum(times)))
    both = measure(found)
    assert both is not None
    assert both.measured == pytest.approx(both.ideal)


def test_a_worker_alone_has_runs_of_one_slot() -> None:
    schedule = make_schedule("1f1b", 1, 4)
    [timeline] = simulated_timelines(schedule, stage_costs(schedule), (0, 1))
    assert [(run.slots, run.num_microbatches) for run in runs([timeline])] == [((0,), 2), ((1,), 2)]
    assert bubble([timeline]) == 0.0


@pytest.mark.parametrize("ahead_us", [-50_000, -3000, 3000, 50_000])
def test_clocks_apart_change_the_bubble_by_no_more_than_they_differ(ahead_us: int) -> None:
    schedule = make_schedule("1f1b", 4, 8)
    timelines = simulated_timelines(schedule, stage_costs(schedule))
    true, [before] = bubble(timelines), runs(timelines)
    spans = tuple(span._replace(begin_us=span.begin_us + ahead_us) for span in timelines[1].spans)
    timelines[1] = replace(timelines[1], spans=spans)
    shown, [after] = bubble(timelines), runs(timelines)
    assert true is not None
    assert shown is not None
    assert abs(after.worker_us - before.worker_us) <= 4 * abs(ahead_us)
    assert 0 <= shown < 1
    # What no worker does: two passes at once.
    both = replace(timelines[0], spans=tuple(span._replace(begin_us=BEGIN_US) for span in timelines[0].spans))
    assert bubble([both, *timelines[1:]]) is not None
    everything = [
        replace(timeline, spans=tuple(span._replace(begin_us=BEGIN_US) for span in timeline.spans))
        for timeline in timelines
    ]
    assert bubble(everything) == 0.0


def changed(timelines: list[Timeline], what: str) -> list[Timeline]:
    """The timelines with something missing or doubled."""
    first, *rest = timelines
    if what == "a worker's timeline":
        return timelines[1:]
    if what == "a pass":
        return [replace(first, spans=first.spans[:-1]), *rest]
    if what == "all backward passes of a stage":
        return [replace(first, spans=tuple(span for span in first.spans if span.kind is SpanKind.FORWARD)), *rest]
    assert what == "nothing, but another computed it, too"
    return [*timelines, replace(first, worker="another")]


@pytest.mark.parametrize(
    "what",
    ["a worker's timeline", "a pass", "all backward passes of a stage", "nothing, but another computed it, too"],
)
@pytest.mark.parametrize("name", ["1f1b", "zero-bubble"])
def test_a_run_that_lacks_something_is_left_out(what: str, name: str) -> None:
    schedule = make_schedule(name, 3, 6)
    whole = simulated_timelines(schedule, stage_costs(schedule), (0, 1), version=4)
    broken = changed(simulated_timelines(schedule, stage_costs(schedule), (0, 1), version=5), what)
    assert runs(broken) == []
    assert [run.version for run in runs([*broken, *whole])] == [4]


def test_without_the_last_stage_only_its_number_tells() -> None:
    schedule = make_schedule("1f1b", 3, 6)
    timelines = simulated_timelines(schedule, stage_costs(schedule))[:-1]
    assert len(runs(timelines)) == 1
    assert runs(timelines, num_stages=3) == []


def test_the_first_stage_need_not_split_its_backward() -> None:
    schedule = make_schedule("zero-bubble", 2, 4)
    first, second = simulated_timelines(schedule, stage_costs(schedule))
    for kind in (SpanKind.BACKWARD_INPUT, SpanKind.BACKWARD_WEIGHT):
        spans = tuple(span for span in first.spans if span.kind is not kind)
        assert len(runs([replace(first, spans=spans), second])) == 1
    last = SpanKind.BACKWARD_WEIGHT
    spans = tuple(span._replace(kind=SpanKind.BACKWARD) for span in first.spans if span.kind is last)
    forwards = tuple(span for span in first.spans if span.kind is SpanKind.FORWARD)
    assert len(runs([replace(first, spans=forwards + spans), second])) == 1


def test_newest_has_all_slots_where_a_version_has() -> None:
    schedule = make_schedule("1f1b", 2, 4)

    def replica(prefix: str, version: int, slots: tuple[int, ...], epoch: int = 1) -> list[Timeline]:
        return simulated_timelines(schedule, stage_costs(schedule), slots, version=version, epoch=epoch, prefix=prefix)

    both = [
        replica("a", 5, (0, 1)), replica("b", 5, (2, 3)), replica("a", 6, (0, 1)), replica("b", 6, (2, 3)),
        replica("a", 7, (0, 1)),
    ]  # fmt: skip
    timelines = [timeline for found in both for timeline in found]
    assert [(run.version, run.slots) for run in newest(runs(timelines))] == [(6, (0, 1)), (6, (2, 3))]
    # After a rollback the later epoch is newer.
    timelines += [*replica("a", 3, (0, 1), epoch=2), *replica("b", 3, (2, 3), epoch=2)]
    assert {(run.epoch, run.version) for run in newest(runs(timelines))} == {(2, 3)}
    assert newest([]) == []
