"""Sampled timelines: few enough for the coordinator, and comparable between workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.coordinator.telemetry.sampling import MAX_REPORTS_PER_SECOND, MAX_SPAN_WORKERS, decide_sampling
from gradstream.coordinator.telemetry.timelines import TimelineFiles, _record_at
from gradstream.core.telemetry.sampling import Sampling
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

ALL = Sampling()


def test_a_small_cluster_reports_everything() -> None:
    assert decide_sampling(ALL, 8, 64, 0.1)[0] == ALL
    assert decide_sampling(ALL, MAX_SPAN_WORKERS, 1000, None)[0] == ALL
    assert all(ALL.reports(version) and ALL.has_spans(version, [3]) for version in range(10))


@given(
    num_workers=st.integers(1, 2000),
    num_slots=st.integers(1, 4096),
    seconds=st.floats(0.001, 100.0),
    current=st.integers(0, 12).map(lambda power: Sampling(2**power)),
)
def test_reports_are_bounded_whatever_was_before(
    num_workers: int, num_slots: int, seconds: float, current: Sampling
) -> None:
    sampling, _ = decide_sampling(current, num_workers, num_slots, seconds)
    assert num_workers <= MAX_REPORTS_PER_SECOND * seconds * sampling.interval_versions
    # A second look changes nothing.
    assert decide_sampling(sampling, num_workers, num_slots, seconds)[0] == sampling


def test_the_interval_does_not_go_up_and_down_with_the_pace() -> None:
    wide = decide_sampling(ALL, 1000, 1000, 0.9)[0]
    assert wide.interval_versions == 16
    assert decide_sampling(wide, 1000, 1000, 1.1)[0] == wide
    assert decide_sampling(wide, 1000, 1000, 4.0)[0].interval_versions == 2


def test_of_many_workers_few_report_spans_and_each_has_its_turn() -> None:
    sampling, _ = decide_sampling(ALL, 1000, 1000, 1.0)
    versions = range(sampling.interval_versions * sampling.num_groups)
    seen: set[int] = set()
    for version in filter(sampling.reports, versions):
        workers = {slot for slot in range(1000) if sampling.has_spans(version, [slot])}
        assert len(workers) <= MAX_SPAN_WORKERS
        seen |= workers
    assert seen == set(range(1000))


def test_a_directive_with_zeros_reports_everything() -> None:
    assert Sampling.from_proto(coordinator_pb2.TimelineSampling()) == ALL


def test_reports_without_spans_count_in_step_times_and_are_not_shown(tmp_path: Path) -> None:
    def entry(version: int, num_spans: int) -> jobs_pb2.GetTimelineResponse:
        spans = [coordinator_pb2.Span(kind=coordinator_pb2.SPAN_KIND_SEND, begin_unix_us=1, duration_us=1)] * num_spans
        times = coordinator_pb2.StepTimes(period_us=10, compute_us=8, num_slots=1)
        report = coordinator_pb2.ReportTimelineRequest(
            job_id="tiny-1", epoch=1, node_id="n", version=version, spans=spans, times=times
        )
        return jobs_pb2.GetTimelineResponse(worker="worker-0", timeline=report)

    files = TimelineFiles(tmp_path)
    for version in range(8):
        files.append(entry(version, num_spans=version % 4 == 0))
    shown = [_record_at(*place) for place in files.index()]
    assert [record.timeline.version for record in shown if record is not None] == [0, 4]
    again = TimelineFiles(tmp_path)
    again.load()
    for loaded in (files, again):
        assert loaded.steps.measured.num_steps == 6
        assert loaded.steps.measured.workers[0].parts.compute == pytest.approx(8e-6)
