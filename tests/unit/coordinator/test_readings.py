"""The coordinator's metrics against what its state and its answers to people say, with scripted nodes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from coordinator_fakes import (
    SERVER,
    WORKER,
    Cluster,
    report_checkpoint,
    report_validation,
    step_report,
)

from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.readings import readings
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.core.metrics import table
from gradstream.core.metrics.definition import Metric
from gradstream.core.rpc import access
from gradstream.proto.v1 import coordinator_pb2, plan_pb2

Values = dict[tuple[str, ...], float]


def read(controller: Controller, num_queued: int = 0) -> dict[Metric, Values]:
    """All readings by metric and labels. Each has the labels that the table says, and comes once."""
    found: dict[Metric, Values] = {}
    for metric, value, labels in readings(controller, num_queued):
        assert len(labels) == len(metric.labels)
        assert access.COORDINATOR in metric.roles
        assert labels not in found.setdefault(metric, {})
        assert isinstance(value, int | float)
        found[metric][labels] = value
    return found


async def test_an_idle_coordinator_counts_nothing(tmp_path: Path) -> None:
    found = read(Controller(SqliteState(tmp_path)), num_queued=3)
    assert found[table.QUEUE_ITEMS] == {("queued_jobs",): 3, ("directives",): 0}
    assert set(found[table.NODES].values()) == {0}
    assert set(found[table.JOBS_ENDED].values()) == {0}
    assert found[table.STATE_UNWRITABLE] == {(): 0}
    assert table.JOB not in found


async def test_a_job_from_its_plan_to_its_end(cluster: Cluster) -> None:
    controller = cluster.coordinator.controller
    before = time.time()
    job_id = await cluster.submit()
    ps, ws = await cluster.running(job_id)
    await ws[0].slots(2)

    found = read(controller)
    assert found[table.JOB] == {(job_id, "running"): 1}
    assert found[table.JOB_SLOTS] == {(job_id, "held"): 2, (job_id, "free"): 0}
    assert found[table.JOB_PLANNED_STEPS] == {(job_id,): 4}
    assert found[table.JOB_EPOCH] == {(job_id,): 1}
    assert found[table.NODES][access.SERVER, "live"] == 2
    assert set(found[table.NODE_HEARTBEAT_AGE]) == {
        ("ps-0", access.SERVER),
        ("ps-1", access.SERVER),
        ("worker-0", access.WORKER),
    }
    assert found[table.NODE_MEMORY_LIMIT]["worker-0", access.WORKER] == 1 << 30
    assert table.JOB_STEPS not in found

    # Steps, of which one is skipped, one comes twice, and one has another codec.
    codec = plan_pb2.CODEC_INT8
    for report in (
        step_report(job_id, 0, push_codec=codec, pull_codec=plan_pb2.CODEC_BF16, pulled_bytes=40, grad_norm=3.0),
        step_report(job_id, 1, push_codec=codec, pull_codec=plan_pb2.CODEC_BF16, skipped=True, consecutive_skips=1),
        step_report(job_id, 1, push_codec=codec, pull_codec=plan_pb2.CODEC_BF16, skipped=True, consecutive_skips=1),
        step_report(job_id, 2, push_codec=plan_pb2.CODEC_FP32, loss=1.5, learning_rate=0.25),
    ):
        await cluster.stub.ReportStep(report)
    await report_validation(ws[0], job_id, 2)
    found = read(controller)
    job, own = await cluster.job(job_id), (job_id,)
    assert (
        found[table.JOB_STEPS][own]
        == found[table.JOB_COMMITS][own]
        == job.version
        == found[table.JOB_VERSION][own]
        == 3
    )
    assert found[table.JOB_TOKENS][own] == found[table.JOB_LEDGER_TOKENS][own] == job.num_tokens == 96
    assert found[table.JOB_SAMPLES][own] == job.num_samples == 12
    assert found[table.JOB_SKIPPED][own] == job.num_skipped == 1
    assert found[table.JOB_BYTES] == {
        (job_id, "push", "int8"): 200,
        (job_id, "push", "fp32"): 100,
        (job_id, "pull", "bf16"): 40,
        (job_id, "pull", "unspecified"): 0,
    }
    assert found[table.JOB_LOSS][own] == job.loss == 1.5
    assert found[table.JOB_LEARNING_RATE][own] == 0.25
    assert found[table.JOB_VALIDATION_LOSS][own] == job.validation_loss
    assert found[table.JOB_IDLE][own] < time.time() - before

    # A checkpoint, and the end. Counts of a job that has ended stay.
    await cluster.stub.ReportStep(step_report(job_id, 3))
    await report_checkpoint(ps[0], 4)
    written = (await cluster.watch(job_id, lambda item: item.HasField("checkpoint"))).checkpoint
    found = read(controller)
    assert found[table.JOB_CHECKPOINTS][own] == 1
    assert found[table.JOB_CHECKPOINT_BYTES][own] == written.num_bytes
    assert before <= found[table.JOB_CHECKPOINT_TIME][own] <= time.time()
    await report_validation(ws[0], job_id, 4)
    await cluster.event(job_id, "finished")
    found = read(controller)
    assert found[table.JOBS_ENDED] == {("finished",): 1, ("failed",): 0, ("stopped",): 0}
    assert table.JOB not in found
    assert found[table.JOB_STEPS][own] == 4


async def test_a_servers_memory_stands_beside_its_plan(cluster: Cluster) -> None:
    controller = cluster.coordinator.controller
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    ps[0].activity = coordinator_pb2.Activity(
        job_id=job_id, phase="accumulating", num_parameters=9, state_bytes=70, newcomer_bytes=20, early_bytes=5
    )
    ps[0].session.heartbeat_soon()
    async with asyncio.timeout(60):
        while table.SERVER_MEMORY not in (found := read(controller)):  # noqa: ASYNC110 (a heartbeat brings it)
            await asyncio.sleep(0.01)
    assert found[table.SERVER_MEMORY] == {("ps-0", "state"): 50, ("ps-0", "waiting"): 5, ("ps-0", "newcomer"): 20}
    active = controller.active
    assert active is not None
    assert active.plan is not None
    planned = active.predicted_bytes[active.plan.server_index(ps[0].node_id) or 0]
    assert found[table.SERVER_PLANNED]["ps-0", "state"] == planned.state > 0
    assert found[table.SERVER_PLANNED_PEAK] == {("ps-0",): planned.most}


async def test_losses_and_recoveries_are_counted(cluster: Cluster) -> None:
    controller = cluster.coordinator.controller
    job_id = await cluster.submit()
    ps, ws = await cluster.running(job_id)
    await cluster.stub.ReportStep(step_report(job_id, 0))
    ws[0].session.leave()
    await ws[0].task
    await ps[1].die()
    cluster.node(SERVER, "ps-2")
    cluster.node(WORKER, "worker-1")
    await ps[0].plan_of(2)
    await cluster.stub.ReportStep(step_report(job_id, 0, epoch=2))
    found, own = read(controller), (job_id,)
    assert found[table.RECOVERIES] == {("servers_back",): 0, ("rolled_back",): 1}
    # A worker that says that it leaves is not lost.
    assert found[table.NODES_LOST] == {(access.SERVER,): 1, (access.WORKER,): 0}
    assert found[table.NODES][access.WORKER, "gone"] == 1
    # The step was committed twice, and the trajectory has it once.
    assert found[table.JOB_STEPS][own] == 2
    assert found[table.JOB_VERSION][own] == 1
    assert found[table.JOB_TOKENS][own] == 2 * found[table.JOB_LEDGER_TOKENS][own]


async def test_a_refused_node_is_counted(cluster: Cluster) -> None:
    request = coordinator_pb2.RegisterRequest(kind=WORKER, name="old", version="0.0.1", incarnation="x", address="h:1")
    with pytest.raises(grpc.aio.AioRpcError):
        await cluster.stub.Register(request)
    assert read(cluster.coordinator.controller)[table.NODES][access.WORKER, "refused"] == 1


async def test_step_times_and_shares_come_from_the_workers_timelines(cluster: Cluster) -> None:
    controller = cluster.coordinator.controller
    job_id = await cluster.submit(num_steps=20)
    _, ws = await cluster.running(job_id)
    await ws[0].slots(2)
    for version in range(4):
        await ws[0].stub.ReportTimeline(_timeline(job_id, version, ws[0].node_id))
    await controller.timelines.load(controller.active.record)  # type: ignore[union-attr]
    async with asyncio.timeout(60):
        while table.JOB_PHASES not in (found := read(controller)):  # noqa: ASYNC110 (a thread reads it)
            await asyncio.sleep(0.01)
    phases = {labels[1]: value for labels, value in found[table.JOB_PHASES].items()}
    assert phases == pytest.approx(
        {"compute": 0.6, "weights": 0.1, "send": 0.1, "slots": 0.0, "servers": 0.15, "other": 0.05}
    )
    assert found[table.JOB_HIDDEN] == {(job_id,): 0.25}


def _timeline(job_id: str, version: int, node_id: str) -> Any:
    times = coordinator_pb2.StepTimes(
        period_us=1_000_000, compute_us=600_000, weights_us=100_000, send_us=100_000, rest_us=150_000, num_slots=2
    )
    return coordinator_pb2.ReportTimelineRequest(
        job_id=job_id,
        epoch=1,
        version=version,
        node_id=node_id,
        communication_us=400_000,
        hidden_us=100_000,
        times=times,
    )
