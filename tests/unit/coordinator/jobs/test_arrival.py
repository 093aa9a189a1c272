"""Reports that must arrive do: after refusals for a passing reason, and from a server that is told to end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import grpc.aio
import pytest
from coordinator_fakes import SERVER, WORKER, Cluster, FakeNode, report_checkpoint, step_report

from gradstream.core import log
from gradstream.core.errors import (
    AccessError,
    BusyError,
    CheckpointError,
    CredentialsError,
    GradstreamError,
    ProtocolError,
    UnreachableError,
)
from gradstream.core.node.session import NodeIdentity, SessionSettings
from gradstream.core.rpc.channel import UNARY_TIMEOUT_SECONDS
from gradstream.core.rpc.errors import error_from_rpc, is_passing
from gradstream.proto.v1 import jobs_pb2
from gradstream.services.parameter_server import checkpointing
from gradstream.services.parameter_server.server import ParameterServer

PASSING = [
    BusyError("512 calls are under way"),
    CredentialsError("the token has expired"),
    AccessError("this role may not"),
    UnreachableError("the state cannot be written; is its disk full?"),
    GradstreamError("a fault without a name"),
]


def reports_of(cluster: Cluster) -> Any:
    """The coordinator's Reports."""
    follow_up: Any = cluster.coordinator.controller.after_reconcile[0]
    return follow_up.__self__


def refuse_once(cluster: Cluster, kind: str, error: GradstreamError) -> list[object]:
    """Have the coordinator refuse the first report of a kind; return the list of those that it got."""
    reports, seen = reports_of(cluster), []
    real = getattr(reports, kind)

    async def take(report: object) -> None:
        seen.append(report)
        if len(seen) == 1:
            raise error
        await real(report)

    setattr(reports, kind, take)
    return seen


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
async def test_a_report_that_is_refused_for_a_passing_reason_is_sent_again(
    cluster: Cluster, error: GradstreamError
) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    seen = refuse_once(cluster, "step", error)
    for step in range(2):
        report = step_report(job_id, step)
        await ps[0].session.deliver(partial(ps[0].stub.ReportStep, report, timeout=UNARY_TIMEOUT_SECONDS))
    assert (await cluster.job(job_id)).version == 2
    assert len(seen) == 3


async def test_a_failure_is_reported_until_it_is_taken(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    seen = refuse_once(cluster, "failure", BusyError("512 calls are under way"))
    await ps[0].session.report_failure(job_id, 1, OSError("no space left"))
    assert len(seen) == 2


async def test_a_report_that_is_wrong_is_sent_once(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    seen = refuse_once(cluster, "step", ProtocolError("this is no step of the job"))
    await ps[0].session.deliver(partial(ps[0].stub.ReportStep, step_report(job_id, 0)))
    assert len(seen) == 1


def test_which_refusals_pass() -> None:
    assert all(map(is_passing, PASSING))
    assert not any(map(is_passing, (ProtocolError(""), CheckpointError(""))))


# --- a checkpoint that is asked for -----------------------------------------------------------------------------------


def boundaries(node: FakeNode) -> int:
    return sum(directive.HasField("boundary") for directive in node.directives)


async def test_a_checkpoint_that_is_asked_for_comes_however_often_the_leader_reconnects(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    asked = asyncio.create_task(_await(cluster.jobs.CheckpointJob(jobs_pb2.CheckpointJobRequest(job_id=job_id))))
    await ps[0].until(lambda: boundaries(ps[0]) == 1)
    # The request may have been lost with the stream.
    await ps[0].reconnect(cluster.address)
    await ps[0].until(lambda: boundaries(ps[0]) == 2)
    await cluster.stub.ReportStep(step_report(job_id, 0))
    await report_checkpoint(ps[0], 1)
    answer = await asyncio.wait_for(asked, 30)
    assert answer.checkpoint.version == 1
    assert boundaries(ps[0]) == 2


async def test_a_checkpoint_that_is_asked_for_without_a_worker_comes_with_the_worker(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await worker.kill()
    await cluster.event(job_id, "none, ")
    asked = asyncio.create_task(_await(cluster.jobs.CheckpointJob(jobs_pb2.CheckpointJobRequest(job_id=job_id))))
    await asyncio.sleep(0)
    cluster.node(WORKER, "worker-1")
    await ps[0].until(lambda: boundaries(ps[0]) == 1)
    asked.cancel()
    with suppress(asyncio.CancelledError):
        await asked


async def test_who_waits_for_a_checkpoint_of_a_job_that_rests_is_told(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    _, (worker,) = await cluster.running(job_id)
    await worker.kill()
    await cluster.event(job_id, "none, ")
    asked = asyncio.create_task(_await(cluster.jobs.CheckpointJob(jobs_pb2.CheckpointJobRequest(job_id=job_id))))
    await asyncio.sleep(0.1)  # the call is on its way
    await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(asked, 30)
    error = error_from_rpc(caught.value, "coordinator")
    assert isinstance(error, CheckpointError)
    assert "is paused before its next step" in str(error)


async def _await(call: Any) -> Any:
    return await call


# --- a server that is told to end -------------------------------------------------------------------------------------


@asynccontextmanager
async def real_server(cluster: Cluster, grace_seconds: float) -> AsyncIterator[tuple[ParameterServer, Any]]:
    """A parameter server that holds its shard of a running job; beside it a scripted one and a scripted worker."""
    identity = NodeIdentity(SERVER, "ps-real", "127.0.0.1:1", 1 << 30, "cpu")
    server = ParameterServer(
        SessionSettings(cluster.address, log.LogBuffer(), grace_seconds=grace_seconds), identity, 1
    )
    running = asyncio.create_task(server.run())
    try:
        cluster.node(SERVER, "ps-0")
        cluster.node(WORKER, "worker-0")
        async with asyncio.timeout(60):
            while server.shard is None or server.shard.version < 0:  # noqa: ASYNC110 (it loads in a thread)
                await asyncio.sleep(0.01)
        yield server, running
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Shards are written once the event returned is set."""
    real, go_on = checkpointing.write_shard, threading.Event()

    def writing(*arguments: Any) -> Any:
        go_on.wait(60)
        return real(*arguments)

    monkeypatch.setattr(checkpointing, "write_shard", writing)
    return go_on


def begin_checkpoint(server: ParameterServer, version: int) -> None:
    """As the shard does after a commit."""
    shard = server.shard
    assert shard is not None
    shard.checkpoints.begin(version, 0)


def taken_files(cluster: Cluster, job_id: str) -> list[int]:
    return [report.version for report in cluster.coordinator.controller.state.checkpoint_files(job_id, 1)]


async def test_a_server_that_is_told_to_end_finishes_its_checkpoint_and_its_reports(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await cluster.submit()
    go_on = slow_disk(monkeypatch)
    async with real_server(cluster, 60) as (server, running):
        begin_checkpoint(server, 2)
        seen = refuse_once(cluster, "step", BusyError("512 calls are under way"))
        for step in range(2):
            await server._step_reports.put(step_report(job_id, step))
        server.session.leave()
        server.session.leave()  # SIGTERM twice
        await _until(lambda: len(seen) == 3)
        assert not running.done(), "its checkpoint is still being written"
        node = cluster.coordinator.controller.members.get(server.session.node_id)
        assert node is not None
        assert node.present, "it still counts"
        go_on.set()
        await asyncio.wait_for(running, 30)
    assert taken_files(cluster, job_id) == [2]
    assert (await cluster.job(job_id)).version == 2


async def test_a_server_that_is_told_to_end_does_so_when_its_grace_is_over(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await cluster.submit()
    go_on = slow_disk(monkeypatch)
    try:
        async with real_server(cluster, 0.2) as (server, running):
            begin_checkpoint(server, 2)
            server.session.leave()
            await asyncio.wait_for(running, 30)
    finally:
        go_on.set()
    assert taken_files(cluster, job_id) == []


async def test_a_server_that_failed_does_not_come_back_with_its_state(cluster: Cluster) -> None:
    """A coordinator that was restarted before it had another plan must not go on with a shard that is broken."""
    job_id = await cluster.submit()
    async with real_server(cluster, 60) as (server, _):
        assert [held.job_id for held in server._held()] == [job_id]
        assert server.shard is not None

        async def breaks() -> None:
            raise RuntimeError("half of an update")

        server.shard._spawn(breaks())
        await cluster.event(job_id, "parameter server ps-real cannot go on: RuntimeError: half of an update")
        assert (await cluster.job(job_id)).state == jobs_pb2.JOB_STATE_PLANNING
        assert server._held() == []


async def test_a_coordinator_that_is_told_to_end_finishes_the_manifest(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradstream.coordinator.jobs import reports

    real, began, go_on = reports.write_manifest, threading.Event(), threading.Event()

    def writing(*arguments: Any) -> Any:
        began.set()
        go_on.wait(60)
        return real(*arguments)

    monkeypatch.setattr(reports, "write_manifest", writing)
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    for step in range(2):
        await cluster.stub.ReportStep(step_report(job_id, step))
    await report_checkpoint(ps[0], 2)
    assert await asyncio.to_thread(began.wait, 30)
    state = cluster.coordinator.controller.state
    known: list[list[int]] = []
    close = state.close

    def closing() -> None:
        known.append(state.checkpoint_versions(job_id))
        close()

    monkeypatch.setattr(state, "close", closing)
    stopping = asyncio.create_task(cluster.restart())
    await asyncio.sleep(0.1)
    go_on.set()
    await asyncio.wait_for(stopping, 30)
    assert known == [[2]]


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (of another task)
            await asyncio.sleep(0.01)


# --- servers that are restarted under the names of silent ones -----------------------------------------------------


@pytest.mark.parametrize("cluster", [{"reunion_seconds": 1.0}], indirect=True, ids=["soon"])
async def test_newcomers_get_the_names_of_servers_that_stay_silent(cluster: Cluster) -> None:
    """All machines of the servers are gone and answer nothing, not even with a refusal; others take their names. They
    are not let in at once, but they are company: the old state is given up after the time that was said."""
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    for step in range(2):
        await cluster.stub.ReportStep(step_report(job_id, step))
    await report_checkpoint(ps[0], 2)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 2)
    for node in cluster.nodes:
        await node.kill()
    cluster.nodes.clear()
    await cluster.restart()
    newcomers = [cluster.node(SERVER, f"ps-{number}") for number in range(2)]
    cluster.node(WORKER, "worker-0")
    assert (await newcomers[0].plan_of(2)).start_version == 2
