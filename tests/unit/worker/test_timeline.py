"""The recorder of timelines: pieces of compute between waits, bounded, complete from several threads, and cheap."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gradstream.core.telemetry.timeline import MAX_SPANS, SpanKind
from gradstream.core.telemetry.timeline import Timeline as Reported
from gradstream.worker.timeline import RawSpan, Timeline, clock_ns, step_times


def reported(timeline: Timeline) -> Reported:
    return Reported.from_proto("worker", timeline.report(timeline.take(), "job", 2, 7, "node"))


def test_a_wait_cuts_compute_in_pieces() -> None:
    timeline = Timeline()
    with timeline.computing(SpanKind.COMPUTE, 3):
        with timeline.waiting():
            pass
        with timeline.waiting():
            pass
    spans = reported(timeline).spans
    assert [(span.kind, span.slot) for span in sorted(spans, key=lambda span: span.begin_us)] == [
        (SpanKind.COMPUTE, 3),
        (SpanKind.WAIT, 3),
    ] * 2 + [(SpanKind.COMPUTE, 3)]
    ends = [span.begin_us + span.duration_us for span in spans]
    # The pieces touch: what one ends with the next begins with, to the microsecond.
    assert sorted(ends)[:-1] == sorted(span.begin_us for span in spans)[1:]


def test_spans_are_recorded_when_what_they_show_fails() -> None:
    timeline = Timeline()
    with pytest.raises(KeyError), timeline.computing(SpanKind.VALIDATE, 0), timeline.waiting():
        raise KeyError
    with pytest.raises(KeyError), timeline.span(SpanKind.DECODE, item=5, num_bytes=8):
        raise KeyError
    kinds = [span.kind for span in reported(timeline).spans]
    assert kinds == [SpanKind.VALIDATE, SpanKind.WAIT, SpanKind.VALIDATE, SpanKind.DECODE]
    # What comes after is not taken for a piece of the pass that failed.
    with timeline.waiting():
        pass
    assert [(span.kind, span.slot) for span in reported(timeline).spans] == [(SpanKind.WAIT, None)]


def test_times_are_unix_times_and_the_share_is_reckoned() -> None:
    timeline = Timeline()
    begin_ns, before = clock_ns(), time.time()
    timeline.add(SpanKind.SEND, begin_ns, begin_ns + 4_000_000, 1, 2, 3)
    timeline.add(SpanKind.COMPUTE, begin_ns + 1_000_000, begin_ns + 2_000_000, 1)
    taken = timeline.take()
    message = timeline.report(taken, "job", 2, 7, "node")
    assert (message.job_id, message.epoch, message.version, message.node_id) == ("job", 2, 7, "node")
    # Rounded down at both ends, each microsecond is right to one.
    assert abs(message.communication_us - 4000) <= 1
    assert abs(message.hidden_us - 1000) <= 1
    assert abs(message.spans[0].begin_unix_us / 1e6 - before) < 1.0
    assert reported(timeline).spans == ()


def test_keeps_the_first_spans_of_a_version_and_no_more() -> None:
    timeline = Timeline()
    for number in range(MAX_SPANS + 10):
        timeline.add(SpanKind.ENCODE, number, number + 1, item=number)
    assert [span.item for span in reported(timeline).spans] == list(range(MAX_SPANS))
    timeline.add(SpanKind.ENCODE, 0, 1, item=1)
    assert len(timeline.take()) == 1


def test_threads_lose_nothing_to_each_other_or_to_take() -> None:
    timeline = Timeline()
    num_threads, num_spans = 4, 900  # together fewer than MAX_SPANS, so that nothing may be missing
    start = threading.Barrier(num_threads + 1)

    def record(thread: int) -> None:
        start.wait()
        for number in range(num_spans):
            timeline.add(SpanKind.DECODE, 0, 1, thread, number)

    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(record, thread) for thread in range(num_threads)]
        start.wait()
        taken = []
        while not all(future.done() for future in futures):
            taken += timeline.take()
    taken += timeline.take()
    assert sorted((slot, item) for _, _, _, slot, item, *_ in taken) == [
        (thread, number) for thread in range(num_threads) for number in range(num_spans)
    ]


def test_a_span_costs_less_than_two_microseconds() -> None:
    best = float("inf")
    for _ in range(20):
        timeline = Timeline()
        begin = time.perf_counter()
        for _ in range(1000):
            timeline.add(SpanKind.SEND, clock_ns(), clock_ns(), 1, 2, 3)
        best = min(best, (time.perf_counter() - begin) / 1000)
    assert best < 2e-6


def test_a_period_is_divided_by_what_the_worker_did() -> None:
    ms = 1_000_000
    spans: list[RawSpan] = [
        (SpanKind.WAIT, 10 * ms, 40 * ms, 2, None, 0, None, None),
        (SpanKind.COMPUTE, 40 * ms, 200 * ms, 2, None, 0, None, None),
        (SpanKind.ENCODE, 150 * ms, 151 * ms, 2, 0, 8, None, None),
        (SpanKind.SEND, 150 * ms, 260 * ms, 2, 0, 1000, None, None),
        (SpanKind.WAIT, 200 * ms, 300 * ms, None, None, 0, None, None),
    ]
    found = step_times(spans, 0, 300 * ms)
    assert found is not None
    assert (found.period_us, found.compute_us, found.weights_us) == (300_000, 160_000, 30_000)
    assert (found.send_us, found.rest_us, found.num_slots) == (60_000, 40_000, 1)
    assert found.push_bytes_per_second == pytest.approx(1000 / 0.110)
    assert list(step_times(spans, 0, 300 * ms, [1, 0]).server_us) == [0, 110_000]
    assert step_times([], 0, ms) is None
    assert step_times([*spans, (SpanKind.VALIDATE, 0, ms, 2, None, 0, None, None)], 0, 300 * ms) is None


def test_work_is_kept_where_there_are_too_many_spans() -> None:
    timeline = Timeline()
    for number in range(MAX_SPANS + 10):
        timeline.add(SpanKind.SEND, number, number + 1, item=number)
    timeline.add(SpanKind.COMPUTE, 0, 5, 1)
    assert timeline.take()[-1][0] is SpanKind.COMPUTE


def test_a_wait_for_an_acknowledgement_counts_as_sending() -> None:
    timeline = Timeline()
    with timeline.computing(SpanKind.COMPUTE, 2), timeline.waiting(bundle=5):
        pass
    (wait,) = (span for span in timeline.take() if span[0] is SpanKind.WAIT)
    assert (wait[3], wait[4]) == (2, 5)
    ms = 1_000_000
    spans: list[RawSpan] = [
        (SpanKind.COMPUTE, 0, 100 * ms, 2, None, 0, None, None),
        (SpanKind.WAIT, 100 * ms, 150 * ms, 2, 5, 0, None, None),
        (SpanKind.COMPUTE, 150 * ms, 200 * ms, 2, None, 0, None, None),
        (SpanKind.SEND, 150 * ms, 220 * ms, 2, 0, 1000, None, None),
    ]
    found = step_times(spans, 0, 300 * ms)
    assert found is not None
    assert (found.compute_us, found.weights_us, found.send_us, found.rest_us) == (150_000, 0, 70_000, 80_000)
