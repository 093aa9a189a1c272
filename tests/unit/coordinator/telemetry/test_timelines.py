"""Timelines: each worker's last ones are kept, on bounded disk and over crashes; invalid ones are refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from support.pipelines import simulated_timelines, stage_costs, timeline_message

from gradstream.coordinator.servicers.views import Views, read_stored_job
from gradstream.coordinator.telemetry import timelines
from gradstream.coordinator.telemetry.timelines import NUM_VERSIONS, TimelineFiles, check_timeline
from gradstream.core.errors import ProtocolError
from gradstream.core.pipeline.schedule import make_schedule
from gradstream.core.pipeline.simulation import ideal_bubble, simulate
from gradstream.core.recipe.recipe import PipelineConfig
from gradstream.core.recipe.rounds import Rounds
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.core.telemetry.timeline import MAX_SPANS
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, plan_pb2


def report(version: int = 0, num_spans: int = 2, **more: Any) -> coordinator_pb2.ReportTimelineRequest:
    spans = [
        coordinator_pb2.Span(
            kind=coordinator_pb2.SPAN_KIND_SEND, begin_unix_us=1_700_000_000_000_000 + number, duration_us=5, slot=1
        )
        for number in range(num_spans)
    ]
    values = {"job_id": "tiny-1", "epoch": 1, "node_id": "n", "communication_us": 10, "hidden_us": 4, **more}
    return coordinator_pb2.ReportTimelineRequest(version=version, spans=spans, **values)


def entry(version: int, worker: str = "worker-0", **more: Any) -> jobs_pb2.GetTimelineResponse:
    return jobs_pb2.GetTimelineResponse(worker=worker, timeline=report(version, **more))


def kept(directory: Path) -> list[tuple[str, int]]:
    """Worker and version of what a newly started coordinator finds."""
    found = [timelines._record_at(*place) for place in TimelineFiles(directory).index()]
    return [(record.worker, record.timeline.version) for record in found if record is not None]


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_keeps_the_last_versions_of_each_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timelines, "FILE_BYTES", 1000)
    files = TimelineFiles(tmp_path / "timeline")
    assert files.share is None
    for version in range(3 * NUM_VERSIONS):
        files.append(entry(version))
        if version < 5:  # a worker that left long ago keeps its last ones
            files.append(entry(version, "worker-1", hidden_us=10))
    newest = [("worker-0", version) for version in range(2 * NUM_VERSIONS, 3 * NUM_VERSIONS)]
    assert kept(tmp_path / "timeline") == [("worker-1", version) for version in range(5)] + newest
    share = (4 * NUM_VERSIONS + 10 * 5) / (10 * NUM_VERSIONS + 10 * 5)
    assert files.share == pytest.approx(share)
    # One started anew says the same.
    again = TimelineFiles(tmp_path / "timeline")
    again.load()
    assert again.share == pytest.approx(share)


def test_files_that_are_outlived_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timelines, "FILE_BYTES", 1000)
    files = TimelineFiles(tmp_path / "timeline")
    sizes = []
    for version in range(6 * NUM_VERSIONS):
        files.append(entry(version))
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "timeline").iterdir()))
    record_bytes = sizes[0]
    # Never less than what is kept, never more than one file beyond it.
    assert sizes[-1] >= NUM_VERSIONS * record_bytes
    assert max(sizes) <= (NUM_VERSIONS + 2) * (record_bytes + 8) + 1000


def test_disk_is_bounded_however_many_workers_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timelines, "FILE_BYTES", 2000)
    monkeypatch.setattr(timelines, "MAX_BYTES", 20_000)
    files = TimelineFiles(tmp_path / "timeline")
    for number in range(1000):
        files.append(entry(1, f"worker-{number}"))
        assert sum(path.stat().st_size for path in (tmp_path / "timeline").iterdir()) < 23_000
    assert kept(tmp_path / "timeline")[-1] == ("worker-999", 1)


def test_a_record_cut_short_costs_only_itself(tmp_path: Path) -> None:
    directory = tmp_path / "timeline"
    files = TimelineFiles(directory)
    for version in range(3):
        files.append(entry(version))
    [file] = directory.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert kept(directory) == [("worker-0", 0), ("worker-0", 1)]
    again = TimelineFiles(directory)
    again.append(entry(3))
    again.append(entry(4))
    assert [version for _, version in kept(directory)] == [0, 1, 3, 4]
    # A flipped bit ends its file and no other.
    damaged = bytearray(file.read_bytes())
    damaged[20] ^= 1
    file.write_bytes(damaged)
    assert [version for _, version in kept(directory)] == [3, 4]
    # A length that lies allocates nothing.
    file.write_bytes(b"\xff" * 64)
    assert [version for _, version in kept(directory)] == [3, 4]


def test_what_others_put_beside_the_segments_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "notes.records").write_bytes(b"not ours")
    TimelineFiles(tmp_path).append(entry(0))
    TimelineFiles(tmp_path).append(entry(1))
    assert kept(tmp_path) == [("worker-0", 0), ("worker-0", 1)]


def test_a_disk_that_refuses_costs_timelines_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "timeline").write_text("in the way")
    files = TimelineFiles(tmp_path / "timeline")
    files.append(entry(0))
    assert files.share == pytest.approx(0.4)
    assert kept(tmp_path / "timeline") == []
    (tmp_path / "timeline").unlink()
    files.append(entry(1))
    assert kept(tmp_path / "timeline") == [("worker-0", 1)]


# --- the bubble of a pipeline -----------------------------------------------------------------------------------------


def run_of(version: int, epoch: int = 1, num_workers: int = 4) -> list[jobs_pb2.GetTimelineResponse]:
    """The timelines of a replica that took 8 microbatches of two slots through its stages."""
    schedule = make_schedule("1f1b", num_workers, 8)
    found = simulated_timelines(schedule, stage_costs(schedule, latency_us=100), (0, 1), version=version, epoch=epoch)
    return [timeline_message(timeline) for timeline in found]


def bubble_of(num_workers: int = 4) -> float:
    schedule = make_schedule("1f1b", num_workers, 8)
    return simulate(schedule, stage_costs(schedule, latency_us=100)).bubble


def test_bubble_is_that_of_the_last_versions_that_are_whole(tmp_path: Path) -> None:
    files = TimelineFiles(tmp_path / "timeline")
    for version in range(6):
        for record in run_of(version):
            # Of version 1 the last worker's timeline is lost: without it nothing can be said of the run.
            if (record.worker, version) != ("worker-3", 1):
                files.append(record)
        assert (files.bubble is not None) == (version >= timelines.NUM_OPEN_VERSIONS)
    assert files.bubble is not None
    assert files.bubble.measured == pytest.approx(bubble_of(), abs=1e-3)
    assert files.bubble.ideal == pytest.approx(ideal_bubble(4, 8))
    # One started anew says the same.
    again = TimelineFiles(tmp_path / "timeline")
    again.load()
    assert again.bubble == files.bubble
    # Another epoch may have another number of stages.
    for version in range(2, 2 + 2 * NUM_VERSIONS):
        for record in run_of(version, epoch=2, num_workers=2):
            files.append(record)
    assert files.bubble.measured == pytest.approx(bubble_of(2), abs=1e-3)
    assert files.bubble.ideal == pytest.approx(ideal_bubble(2, 8))


def test_timelines_that_cross_each_other_count(tmp_path: Path) -> None:
    files = TimelineFiles(tmp_path / "timeline")
    records = [run_of(version) for version in range(4)]
    for version in range(3):
        late = records[version - 1][-1:] if version else []
        for record in (*records[version][:1], *late, *records[version][1:-1]):
            files.append(record)
    assert files.bubble is not None
    assert files.bubble.measured == pytest.approx(bubble_of(), abs=1e-3)


def test_passes_of_a_version_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timelines, "MAX_OPEN_PASSES", 4 * 16)
    files = TimelineFiles(tmp_path / "timeline")
    crowd = [entry(0, f"worker-{number}") for number in range(4, 40)]
    for record in crowd:
        record.CopyFrom(jobs_pb2.GetTimelineResponse(worker=record.worker, timeline=run_of(1)[0].timeline))
    for record in (*run_of(0), *run_of(1)[:1], *crowd, *run_of(1)[1:], *run_of(2)):
        files.append(record)
        held = [sum(len(kept.spans) for kept in open_) for open_ in files._pipeline._open.values()]
        assert max(held) <= 4 * 16
    assert files.bubble is not None
    assert files.bubble.measured == pytest.approx(bubble_of(), abs=1e-3)
    before = files.bubble
    # Version 1 is beyond the bound: it is not measured, and nothing else is harmed.
    for record in (*run_of(3), *run_of(4)):
        files.append(record)
    assert files.bubble == before


async def test_a_pipeline_is_shown_with_its_bubble(cluster: Any) -> None:
    job_id = await cluster.submit(num_steps=10)
    await cluster.running(job_id)
    assert not (await cluster.job(job_id)).HasField("pipeline")
    active = cluster.coordinator.controller.active
    plan = plan_pb2.Plan()
    plan.CopyFrom(active.plan_message)
    plan.stage_ends.extend([1, 2, 3, 4])
    plan.num_chunks, plan.pipeline_schedule = 2, "interleaved-1f1b"
    active.plan_message = plan
    shown = (await cluster.job(job_id)).pipeline
    assert (shown.num_stages, shown.num_workers, shown.schedule) == (4, 2, "interleaved-1f1b")
    assert not shown.HasField("bubble")
    assert not shown.HasField("ideal_bubble")
    schedule = make_schedule("interleaved-1f1b", 2, 8, 2)
    for version in range(3):
        for timeline in simulated_timelines(schedule, stage_costs(schedule), (0, 1), version=version):
            message = timeline_message(timeline)
            cluster.coordinator.controller.timelines.take(active.record, message.worker, message.timeline)
    assert len(await collected(cluster, job_id)) == 6
    shown = (await cluster.job(job_id)).pipeline
    assert shown.bubble == pytest.approx(simulate(schedule, stage_costs(schedule)).bubble)
    assert shown.ideal_bubble == pytest.approx(ideal_bubble(2, 8))
    # A job that has ended is shown as it ran last.
    record = cluster.coordinator._state.get_job(job_id)
    recipe = active.recipe.model_copy(update={"pipeline": PipelineConfig(stages=4, chunks=2)})
    views = Views(cluster.coordinator.controller)
    cluster.coordinator._state.store_job(record, plan=plan.SerializeToString())
    state = cluster.coordinator._state
    assert read_stored_job(state, replace(record, recipe_json=recipe.model_dump_json())).plan == plan
    assert read_stored_job(state, record).plan is None
    assert views._pipeline(job_id, plan) == shown


# --- what a node says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (report(version=5), "version 5"),
        (report(num_spans=MAX_SPANS + 1), "4097 spans"),
        (report(communication_us=10, hidden_us=11), "hid 11 of 10 us"),
        (report(communication_us=1 << 60, hidden_us=0), "of communication"),
    ],
)
def test_refuses_what_no_worker_recorded(wrong: coordinator_pb2.ReportTimelineRequest, text: str) -> None:
    check_timeline(report(version=4, num_spans=MAX_SPANS), Rounds(4))
    with pytest.raises(ProtocolError, match=text):
        check_timeline(wrong, Rounds(4))


@pytest.mark.parametrize(
    "span",
    [
        coordinator_pb2.Span(begin_unix_us=1),
        coordinator_pb2.Span(kind=99, begin_unix_us=1),  # type: ignore[arg-type]
        coordinator_pb2.Span(kind=coordinator_pb2.SPAN_KIND_SEND, begin_unix_us=1 << 63),
        coordinator_pb2.Span(kind=coordinator_pb2.SPAN_KIND_SEND, begin_unix_us=1, duration_us=1 << 63),
    ],
)
def test_refuses_spans_that_mean_nothing(span: coordinator_pb2.Span) -> None:
    wrong = report()
    wrong.spans.append(span)
    with pytest.raises(ProtocolError, match="cannot be right: it has a span"):
        check_timeline(wrong, Rounds(4))


async def collected(cluster: Any, job_id: str) -> list[tuple[str, int]]:
    call = cluster.jobs.GetTimeline(jobs_pb2.GetTimelineRequest(job_id=job_id))
    return [(answer.worker, answer.timeline.version) async for answer in call]


async def test_from_report_to_trace_over_a_restart(cluster: Any) -> None:
    job_id = await cluster.submit()
    servers, [worker] = await cluster.running(job_id)
    assert not (await cluster.job(job_id)).HasField("hidden_share")
    with pytest.raises(grpc.aio.AioRpcError) as none_yet:
        await collected(cluster, job_id)
    assert "no timeline of job tiny-1 yet" in str(error_from_rpc(none_yet.value, "it"))

    def mine(version: int, **more: Any) -> coordinator_pb2.ReportTimelineRequest:
        return report(version, **{"job_id": job_id, "node_id": worker.node_id, **more})

    for version, hidden_us in enumerate((4, 6, 8)):
        await worker.stub.ReportTimeline(mine(version, hidden_us=hidden_us))
    assert await collected(cluster, "") == [("worker-0", version) for version in range(3)]
    assert (await cluster.job(job_id)).hidden_share == pytest.approx(18 / 30)

    for wrong, text in [
        (mine(0, job_id="other"), "no job 'other'"),
        (mine(0, epoch=2), "1 epochs"),
        (mine(0, node_id="stranger"), "'stranger', which is no worker"),
        (mine(0, node_id=servers[0].node_id), "no worker"),
        (mine(5), "4 steps"),
    ]:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await worker.stub.ReportTimeline(wrong)
        error = error_from_rpc(refused.value, "it")
        assert isinstance(error, ProtocolError)
        assert text in str(error)
    assert len(await collected(cluster, job_id)) == 3

    await cluster.restart()
    assert await collected(cluster, job_id) == [("worker-0", version) for version in range(3)]
    assert (await cluster.job(job_id)).hidden_share == pytest.approx(18 / 30)


async def test_what_waits_for_the_disk_is_bounded(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = await cluster.submit()
    _, [worker] = await cluster.running(job_id)
    some = report(1, job_id=job_id, node_id=worker.node_id)
    monkeypatch.setattr(timelines, "MAX_PENDING_BYTES", some.ByteSize())
    controller = cluster.coordinator.controller
    record = cluster.coordinator._state.get_job(job_id)
    # Three at once, before the thread's answer can come back to the loop: the second and the third find no room.
    for version in (1, 2, 3):
        controller.timelines.take(record, "worker-0", report(version, job_id=job_id, node_id=worker.node_id))
    assert await collected(cluster, job_id) == [("worker-0", 1)]
    # It was read behind the write, so there is room again.
    controller.timelines.take(record, "worker-0", report(4, job_id=job_id, node_id=worker.node_id))
    assert await collected(cluster, job_id) == [("worker-0", 1), ("worker-0", 4)]


# --- memory of servers ------------------------------------------------------------------------------------------------


async def test_memory_of_servers_is_shown_beside_what_was_predicted(cluster: Any) -> None:
    job_id = await cluster.submit()
    servers, _ = await cluster.running(job_id)
    plan = servers[0].plan
    assert list((await cluster.job(job_id)).server_memory) == []
    servers[1].activity.CopyFrom(
        coordinator_pb2.Activity(job_id=job_id, state_bytes=1000, early_bytes=10, num_parameters=50)
    )
    servers[1].session.heartbeat_soon()
    async with asyncio.timeout(15):
        while True:
            shown = list((await cluster.job(job_id)).server_memory)
            if shown:
                break
            await asyncio.sleep(0.01)
    # The one that has loaded nothing yet is left out.
    [memory] = shown
    index = plan.server_index(servers[1].node_id)
    elements = sum(fragment.num_elements for fragment in plan.fragments_of(index))
    assert (memory.name, memory.state_bytes, memory.early_bytes, memory.num_parameters) == ("ps-1", 1000, 10, 50)
    # fp32 master, two moments, the sum's two digits and the reference; the published difference, int8 or bf16.
    assert 25 * elements < memory.predicted_state_bytes < 26 * elements
    assert memory.most_early_bytes > 0
