"""Timelines and the memory of servers on a real cluster: the values shown are those measured and predicted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.cluster import Cluster, wait_until
from support.tiny import tiny_recipe

from gradstream.client import SpanKind
from gradstream.coordinator.cli import main


def test_timeline_of_a_job_outlives_it_and_its_coordinator(tiny_data: Path, tmp_path: Path, cluster: Cluster) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0", "worker-1")
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", cluster={"min_workers": 2, "min_servers": 2})
    job_id = cluster.client.submit(recipe).job_id
    cluster.finish(job_id)
    wait_until(
        lambda: all(node.activity.phase == "idle" for node in cluster.client.nodes()), "the nodes to be released", 30
    )
    timelines = sorted(cluster.client.timeline(job_id), key=lambda timeline: (timeline.worker, timeline.version))
    assert {timeline.worker for timeline in timelines} == {"worker-0", "worker-1"}
    share = sum(timeline.hidden_us for timeline in timelines) / sum(timeline.communication_us for timeline in timelines)
    assert 0 < share < 1
    assert cluster.client.job(job_id).hidden_share == pytest.approx(share)

    # --- what one version holds: every contribution and all of the weights, once
    one = [timeline for timeline in timelines if timeline.version == 3]
    assert one, [(timeline.worker, timeline.version) for timeline in timelines]
    computed = {span.slot for timeline in one for span in timeline.spans if span.kind is SpanKind.COMPUTE}
    validated = {span.slot for timeline in one for span in timeline.spans if span.kind is SpanKind.VALIDATE}
    if len(one) == 2:  # a report is dropped while the one before is under way; what there is must be right
        assert computed == validated == {0, 1, 2, 3}
    for timeline in one:
        by_kind = {kind: [span for span in timeline.spans if span.kind is kind] for kind in SpanKind}
        slots = {span.slot for span in by_kind[SpanKind.COMPUTE]}
        received = sorted(span.item or 0 for span in by_kind[SpanKind.RECEIVE])
        assert received == list(range(len(received)))
        assert sorted(span.item or 0 for span in by_kind[SpanKind.DECODE]) == received
        sent = [(span.slot, span.item) for span in by_kind[SpanKind.SEND]]
        assert sorted(sent) == sorted((slot, item) for slot in slots for item in received)
        # fp32 both ways: as many bytes up a slot as down.
        received_bytes = sum(span.num_bytes for span in by_kind[SpanKind.RECEIVE])
        assert received_bytes > 0
        for kind in (SpanKind.ENCODE, SpanKind.SEND):
            assert sum(span.num_bytes for span in by_kind[kind]) == len(slots) * received_bytes
        # The model computes or waits, never both.
        passes = sorted(
            (span.begin_us, span.begin_us + span.duration_us)
            for kind in (SpanKind.COMPUTE, SpanKind.VALIDATE)
            for span in by_kind[kind]
        )
        waits = [(span.begin_us, span.begin_us + span.duration_us) for span in by_kind[SpanKind.WAIT]]
        for begin, end in waits:
            assert all(end <= begin_pass or end_pass <= begin for begin_pass, end_pass in passes)
        assert 0 < timeline.hidden_us <= timeline.communication_us

    # --- after the end, and after a coordinator's death
    cluster.kill("coordinator")
    cluster.start_coordinator()
    again = cluster.client.timeline(job_id)
    assert sorted(again, key=lambda timeline: (timeline.worker, timeline.version)) == timelines
    assert cluster.client.job(job_id).hidden_share == pytest.approx(share)
    path = tmp_path / "trace.json"
    assert main(["trace", job_id, "-c", cluster.address, "--to", str(path)]) == 0
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X" and event["cat"] != "version"]
    assert len(spans) == sum(len(timeline.spans) for timeline in timelines)


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_servers_hold_what_the_plan_predicted(tiny_data: Path, tmp_path: Path, cluster: Cluster, codec: str) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    recipe = tiny_recipe(
        tiny_data,
        tmp_path / "runs",
        training={"num_steps": 100_000},
        codec={"push": codec, "pull": codec},
        cluster={"min_servers": 2},
        checkpoint={"interval_steps": 50_000},
        validation={"interval_steps": 0},
    )
    job_id = cluster.client.submit(recipe).job_id
    # Two steps, so that the optimizers have their moments, and a heartbeat of each server since.
    job = cluster.wait_for(job_id, lambda job: job.version > 2 and len(job.server_memory) == 2, "show its memory")
    assert sum(memory.num_parameters for memory in job.server_memory) == job.num_parameters
    for memory in job.server_memory:
        assert memory.state_bytes == memory.predicted_state_bytes
        assert memory.early_bytes <= memory.most_early_bytes
        # fp32 master, two moments, the two digits of the sum, and the published bundles.
        published = {"fp32": 4, "bf16": 2, "int8": 1 + 4 / 256}[codec]
        assert memory.state_bytes / memory.num_parameters == pytest.approx(20 + published, rel=0.02)
    cluster.client.stop(job_id, now=True)
    cluster.wait_job(job_id)
