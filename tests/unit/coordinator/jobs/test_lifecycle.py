"""A job's transitions over real gRPC, with scripted nodes that speak the protocol."""

from __future__ import annotations

import asyncio
import math
import os
import signal
from pathlib import Path

import grpc
import grpc.aio
import pytest
from coordinator_fakes import (
    SERVER,
    TIMING,
    WORKER,
    Cluster,
    FakeNode,
    make_recipe,
    report_checkpoint,
    report_validation,
    step_report,
    write_checkpoint,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gradstream.coordinator.server import Coordinator, serve
from gradstream.core.errors import CheckpointError, ConfigError, DataError, GradstreamError, ProtocolError
from gradstream.core.rpc.channel import open_channel
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

FINISHED, FAILED, STOPPED, PAUSED, RUNNING, QUEUED = (
    jobs_pb2.JOB_STATE_FINISHED,
    jobs_pb2.JOB_STATE_FAILED,
    jobs_pb2.JOB_STATE_STOPPED,
    jobs_pb2.JOB_STATE_PAUSED,
    jobs_pb2.JOB_STATE_RUNNING,
    jobs_pb2.JOB_STATE_QUEUED,
)


def of_rpc(caught: pytest.ExceptionInfo[grpc.aio.AioRpcError]) -> GradstreamError:
    return error_from_rpc(caught.value, "coordinator")


async def finish(
    cluster: Cluster, leader: FakeNode, worker: FakeNode, job_id: str, first: int = 0, epoch: int = 1
) -> None:
    for step in range(first, 4):
        await cluster.stub.ReportStep(step_report(job_id, step, epoch))
    await report_checkpoint(leader, 4)
    await report_validation(worker, job_id, 4, epoch)


async def test_happy_path_to_finished(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    assert job_id == "tiny-1"
    await cluster.event(job_id, "planning")
    job = await cluster.job(job_id)
    assert [(wait.what, wait.whom) for wait in job.waits] == [
        ("2 parameter servers, none is live", "a parameter server to register"),
        ("1 worker, none is live", "a worker to register"),
    ]
    ps, (worker,) = await cluster.running(job_id)
    assert ps[0].plan == ps[1].plan == worker.plan
    assert await worker.slots(2) == [0, 1]
    await report_validation(worker, job_id, 0)
    for step in range(4):
        await cluster.stub.ReportStep(step_report(job_id, step))
        if step == 1:
            await report_checkpoint(ps[0], 2)
            await report_validation(worker, job_id, 2)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 2)
    job = await cluster.job(job_id)
    assert job.state == RUNNING
    assert [wait.what for wait in job.waits] == [
        "the checkpoint of version 4",
        "the last validation pass, slots 0, 1",
    ]
    assert [wait.whom for wait in job.waits] == ["ps-0, ps-1", "worker-0"]
    assert worker.plan is not None
    assert job.num_parameters == worker.plan.num_parameters > 0
    assert list(job.slot_holders) == ["worker-0", "worker-0"]
    assert job.tokens_per_second > 0
    assert any("2 servers" in line for line in job.decisions)
    await report_checkpoint(ps[0], 4)
    await report_validation(worker, job_id, 4)
    await cluster.event(job_id, "finished")
    for node in (*ps, worker):
        await node.released()
    job = await cluster.job()
    assert (job.state, job.version, job.num_tokens, job.num_samples) == (FINISHED, 4, 128, 16)
    assert job.validation_loss == job.initial_validation_loss == 33 / 16
    assert not job.waits
    assert job.ended_unix_ms
    listing = await cluster.jobs.ListCheckpoints(jobs_pb2.ListCheckpointsRequest(job_id=job_id))
    assert [checkpoint.version for checkpoint in listing.checkpoints] == [2, 4]
    # The stream of an ended job ends by itself.
    watched = [item async for item in cluster.jobs.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id, follow=True))]
    assert [item.step.step for item in watched if item.HasField("step")] == [0, 1, 2, 3]
    assert [item.validation.version for item in watched if item.HasField("validation")] == [0, 2, 4]
    assert [item.cursor for item in watched] == sorted({item.cursor for item in watched})


async def test_pause_resume_and_stop_with_a_checkpoint(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await worker.slots(2)
    # --- pause at the next boundary
    ordered = await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    assert ordered.job.reason == "pausing at the end of step 0; a checkpoint follows"
    await ps[0].until(lambda: any(d.WhichOneof("directive") == "boundary" for d in ps[0].directives))
    job = await cluster.job(job_id)
    assert job.state == RUNNING
    assert "the end of step 0, to pause there" in [wait.what for wait in job.waits]
    await cluster.stub.ReportStep(step_report(job_id, 0, halted=True))
    await worker.slots(0)
    assert (await cluster.job(job_id)).state == PAUSED
    # --- resume with the servers still holding
    number = worker.leases.number if worker.leases else 0
    resumed = await cluster.jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id))
    assert resumed.job.state == RUNNING
    assert resumed.job.reason == "resumed at step 1"
    await worker.slots(2)
    assert worker.leases is not None
    assert worker.leases.number > number
    assert (await cluster.job(job_id)).epoch == 1
    # --- stop waits for halt and checkpoint
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id))
    await cluster.stub.ReportStep(step_report(job_id, 1, halted=True))
    await worker.slots(0)
    # A step that was under way when the slots were taken away.
    await cluster.stub.ReportStep(step_report(job_id, 2))
    job = await cluster.job(job_id)
    assert job.state == RUNNING
    assert [wait.what for wait in job.waits] == ["the checkpoint of version 2"]
    await report_checkpoint(ps[0], 2)
    await cluster.event(job_id, "stopped")
    for node in (*ps, worker):
        await node.released()
    # --- resumed, it goes on from that checkpoint under a new epoch
    await cluster.jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id))
    plan = await worker.plan_of(2)
    assert (plan.start_version, plan.checkpoint_path.rsplit("/", 1)[-1]) == (2, "step-00000002")
    await finish(cluster, ps[0], worker, job_id, first=2, epoch=2)
    await cluster.event(job_id, "finished")
    assert (await cluster.job(job_id)).num_tokens == 128


async def test_a_job_without_workers_pauses_and_stops_at_once(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    _, (worker,) = await cluster.running(job_id)
    await worker.kill()
    await cluster.event(job_id, "none, ")
    paused = await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    assert paused.job.state == PAUSED
    stopped = await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id))
    assert stopped.job.state == STOPPED


async def test_jobs_wait_their_turn_and_stop_now_gives_it(cluster: Cluster) -> None:
    first, second = await cluster.submit(), await cluster.submit()
    await cluster.running(first)
    waiting = await cluster.job(second)
    assert waiting.state == QUEUED
    assert (waiting.waits[0].what, waiting.waits[0].whom) == ("its turn", "job tiny-1, which is running")
    stopped = await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=first, now=True))
    assert stopped.job.state == STOPPED
    await cluster.nodes[0].until(lambda: second in cluster.nodes[0].holds and first not in cluster.nodes[0].holds)
    listed = await cluster.jobs.ListJobs(jobs_pb2.ListJobsRequest())
    assert [job.job_id for job in listed.jobs] == [second, first]


async def test_a_dead_workers_slots_move_at_once(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    _, (first, second) = await cluster.running(job_id, workers=2)
    await first.slots(1)
    await second.slots(1)
    start = asyncio.get_running_loop().time()
    await first.kill()
    assert await second.slots(2) == [0, 1]
    # Far sooner than the lease would have run out.
    assert asyncio.get_running_loop().time() - start < TIMING.lease_seconds / 2
    third = cluster.node(WORKER, "worker-2")
    await third.slots(1)
    assert (await cluster.job(job_id)).epoch == 1


async def test_a_worker_that_leaves_gives_its_slots_up(cluster: Cluster) -> None:
    await cluster.running(await cluster.submit(), workers=2)
    cluster.nodes[2].session.leave()
    assert await cluster.nodes[3].slots(2) == [0, 1]


async def test_a_worker_without_heartbeats_loses_its_lease(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    await cluster.running(job_id, workers=1)
    register = coordinator_pb2.RegisterRequest(
        kind=WORKER, name="mute", address="127.0.0.1:1", version="0.1.0", incarnation="x"
    )
    node_id = (await cluster.stub.Register(register)).node_id
    call = cluster.stub.Session()
    await call.write(coordinator_pb2.SessionRequest(node_id=node_id))
    await cluster.event(job_id, "worker mute is gone: no heartbeat")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.ABORTED


async def test_a_server_that_comes_back_with_its_state_costs_nothing(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await ps[1].reconnect(cluster.address)
    gone = await cluster.event(job_id, "parameter server ps-1 is gone")
    await cluster.event(job_id, "parameter server ps-1 is here", after=gone.cursor)
    await asyncio.sleep(TIMING.server_grace_seconds * 1.5)  # nothing may happen, which cannot be watched
    job = await cluster.job(job_id)
    assert (job.state, job.epoch) == (RUNNING, 1)
    assert worker.plan is not None
    assert worker.plan.epoch == 1


async def test_a_lost_server_leads_to_a_new_epoch_from_the_checkpoint(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    for step in range(2):
        await cluster.stub.ReportStep(step_report(job_id, step))
    await report_checkpoint(ps[0], 2)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 2)
    await cluster.stub.ReportStep(step_report(job_id, 2))
    await ps[1].die()
    lost = await cluster.event(job_id, "parameter server ps-1 is lost: its machine refuses connections")
    job = await cluster.job(job_id)
    assert job.state == jobs_pb2.JOB_STATE_PLANNING
    assert job.waits[0].what == "2 parameter servers, 1 is live"
    spare = cluster.node(SERVER, "ps-spare")
    plan = await spare.plan_of(2)
    assert plan.start_version == 2
    assert [server.name for server in plan.servers] == ["ps-0", "ps-spare"]
    await worker.plan_of(2)
    await cluster.event(job_id, "recomputed", after=lost.cursor)
    job = await cluster.job(job_id)
    assert (job.epoch, job.version, job.num_tokens) == (2, 2, 64)
    # A report of the old epoch that was under way does not count, nor does it hurt.
    await cluster.stub.ReportStep(step_report(job_id, 3, epoch=1))
    await cluster.stub.ReportFailure(
        coordinator_pb2.ReportFailureRequest(job_id=job_id, epoch=1, message="ps-1 does not answer")
    )
    assert (await cluster.job(job_id)).num_tokens == 64
    await finish(cluster, spare, worker, job_id, first=2, epoch=2)
    await cluster.event(job_id, "finished")
    job = await cluster.job(job_id)
    assert (job.num_tokens, job.num_samples, job.version) == (128, 16, 4)


async def test_a_server_started_anew_is_known_to_have_lost_its_state(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await ps[1].die()
    anew = cluster.node(SERVER, "ps-1")
    await cluster.event(job_id, "going back to the last checkpoint")
    plan = await worker.plan_of(2)
    assert plan.start_version == 0
    assert plan.server_index(anew.node_id) is not None


async def test_a_restarted_coordinator_adopts_what_runs(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, workers = await cluster.running(job_id, workers=2)
    for worker in workers:
        await worker.slots(1)
    before = workers[0].leases
    assert before is not None
    await cluster.stub.ReportStep(step_report(job_id, 0))
    await cluster.restart()
    job = await cluster.job(job_id)
    assert (job.state, job.version) == (RUNNING, 1)
    assert {wait.whom for wait in job.waits} == {"ps-0", "ps-1"}
    for node in (*ps, *workers):
        node.leases = None
        await node.reconnect(cluster.address)
    for worker in workers:
        await worker.slots(1)
        assert worker.leases is not None
        assert worker.leases.number >= before.number
        assert list(worker.leases.holders) == list(before.holders)
    # A report that the old coordinator had taken already, and the next one.
    await cluster.stub.ReportStep(step_report(job_id, 0))
    await cluster.stub.ReportStep(step_report(job_id, 1))
    job = await cluster.job(job_id)
    assert (job.epoch, job.version, job.num_tokens) == (1, 2, 64)
    assert all(node.holds == {job_id: 1} for node in cluster.nodes)


async def test_a_restarted_coordinator_plans_anew_without_the_state(
    tmp_path: Path, transformers_imported: None
) -> None:
    from dataclasses import replace

    cluster = Cluster(tmp_path, replace(TIMING, reunion_seconds=0.3))
    await cluster.start()
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await cluster.restart()
    await ps[0].reconnect(cluster.address)
    await worker.reconnect(cluster.address)
    await cluster.event(job_id, "parameter server ps-1 is lost: it was silent for too long")
    cluster.node(SERVER, "ps-9")
    assert [server.name for server in (await worker.plan_of(2)).servers] == ["ps-0", "ps-9"]
    await cluster.stop()


async def test_a_restart_between_the_last_file_and_the_manifest_loses_nothing(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    await cluster.stub.ReportStep(step_report(job_id, 0))
    # The manifest waits for the ledger, which lacks step 1.
    await report_checkpoint(ps[0], 2)
    await cluster.restart()
    for node in cluster.nodes:
        await node.reconnect(cluster.address)
    assert not (await cluster.jobs.ListCheckpoints(jobs_pb2.ListCheckpointsRequest())).checkpoints
    await cluster.stub.ReportStep(step_report(job_id, 1))
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 2)


async def test_a_node_holding_a_job_of_the_past_is_told_to_forget_it(cluster: Cluster) -> None:
    node = FakeNode(cluster.address, SERVER, "ps-0")
    node.holds["gone-1"] = 3
    cluster.nodes.append(node)
    await node.released()
    assert node.holds == {}


async def test_repeated_reports_count_once(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    for _ in range(3):
        await cluster.stub.ReportStep(step_report(job_id, 0))
        await cluster.stub.ReportStep(step_report(job_id, 1))
        await report_validation(worker, job_id, 0)
    reports = write_checkpoint(ps[0], 2)  # once: of a complete checkpoint the coordinator removes what is not its own
    for report in reports * 3:
        await ps[0].stub.ReportCheckpoint(report)
    await cluster.watch(job_id, lambda item: item.checkpoint.version == 2)
    for report in reports:
        await ps[0].stub.ReportCheckpoint(report)
    job = await cluster.job(job_id)
    assert (job.version, job.num_tokens, job.num_samples) == (2, 64, 8)
    request = jobs_pb2.WatchJobRequest(job_id=job_id)
    kinds = [item.WhichOneof("item") async for item in cluster.jobs.WatchJob(request)]
    assert (kinds.count("step"), kinds.count("validation"), kinds.count("checkpoint")) == (2, 1, 1)


async def test_a_run_of_skips_fails_the_job(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    await cluster.stub.ReportStep(step_report(job_id, 0, skipped=True, consecutive_skips=1, loss=math.nan))
    assert (await cluster.job(job_id)).num_skipped == 1
    await cluster.stub.ReportStep(step_report(job_id, 1, skipped=True, consecutive_skips=2, loss=math.nan))
    job = await cluster.job(job_id)
    assert job.state == FAILED
    assert "2 steps in a row up to step 1" in job.reason
    assert "lower optimizer.learning_rate" in job.reason
    await ps[0].released()


async def report_failure(node: FakeNode, job_id: str, message: str, epoch: int = 1) -> None:
    await node.stub.ReportFailure(
        coordinator_pb2.ReportFailureRequest(job_id=job_id, epoch=epoch, node_id=node.node_id, message=message)
    )


async def test_a_failed_worker_is_benched_and_the_job_fails_when_nobody_is_left(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    _, (first, second) = await cluster.running(job_id, workers=2)
    await first.slots(1)
    await report_failure(first, job_id, "out of\nmemory")
    assert await second.slots(2) == [0, 1]
    job = await cluster.job(job_id)
    assert (job.state, job.epoch) == (RUNNING, 1)
    assert "worker worker-0 is benched: out of memory" in " ".join(job.decisions)
    await report_failure(second, job_id, "disk full")
    job = await cluster.job(job_id)
    assert (job.state, job.reason) == (FAILED, "worker worker-0: out of memory; worker worker-1: disk full")


async def test_a_failed_server_is_benched_and_the_job_says_what_is_missing(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await report_failure(ps[1], job_id, "disk\nfull")
    job = await cluster.job(job_id)
    assert job.state == jobs_pb2.JOB_STATE_PLANNING
    assert [wait.what for wait in job.waits] == [
        "2 parameter servers, 1 is live",
        "parameter server ps-1, which is benched: disk full",
    ]
    spare = cluster.node(SERVER, "ps-2")
    assert [server.name for server in (await spare.plan_of(2)).servers] == ["ps-0", "ps-2"]
    await worker.plan_of(2)
    assert (await cluster.job(job_id)).state == RUNNING
    # What was said of an epoch that is over changes nothing.
    await report_failure(ps[0], job_id, "old", epoch=1)
    assert (await cluster.job(job_id)).epoch == 2
    for node in (ps[0], spare):
        await report_failure(node, job_id, "the checkpoint is damaged", epoch=2)
    job = await cluster.job(job_id)
    assert job.state == FAILED
    assert "parameter server ps-0, parameter server ps-2: the checkpoint is damaged" in job.reason


async def test_a_plan_that_cannot_be_made_fails_the_job(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    for number in range(2):
        cluster.node(SERVER, f"ps-{number}", memory_bytes=10_000)
    cluster.node(WORKER, "worker-0")
    await cluster.event(job_id, "failed")
    assert "parameter server ps-0 needs" in (await cluster.job(job_id)).reason


async def test_a_damaged_newest_manifest_fails_the_job_with_its_cure(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    directory = cluster.directory / "runs" / job_id / "checkpoints" / "step-00000002"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text("{")
    for number in range(2):
        cluster.node(SERVER, f"ps-{number}")
    cluster.node(WORKER, "worker-0")
    await cluster.event(job_id, "failed")
    assert f"remove {directory} to go back to an older one" in (await cluster.job(job_id)).reason


async def test_old_checkpoints_are_removed_and_the_last_is_exported(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, _ = await cluster.running(job_id)
    for version in range(1, 4):
        await cluster.stub.ReportStep(step_report(job_id, version - 1))
        await report_checkpoint(ps[0], version)
        await cluster.watch(job_id, lambda item, v=version: item.checkpoint.version == v)  # type: ignore[misc]
    await cluster.event(job_id, "removed version 1")
    listing = await cluster.jobs.ListCheckpoints(jobs_pb2.ListCheckpointsRequest(job_id=job_id))
    assert [checkpoint.version for checkpoint in listing.checkpoints] == [2, 3]
    received: dict[str, int] = {}
    async for piece in cluster.jobs.ExportCheckpoint(jobs_pb2.ExportCheckpointRequest(job_id=job_id)):
        received[piece.file] = received.get(piece.file, 0) + len(piece.payload)
        assert received[piece.file] <= piece.file_bytes
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(received)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in cluster.jobs.ExportCheckpoint(jobs_pb2.ExportCheckpointRequest(job_id=job_id, version=1)):
            pass
    assert isinstance(of_rpc(caught), CheckpointError)
    assert "it has versions 2, 3" in str(of_rpc(caught))


async def test_log_lines_come_to_the_jobs_history(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    register = coordinator_pb2.RegisterRequest(
        kind=WORKER, name="w", address="127.0.0.1:1", version="0.1.0", incarnation="x"
    )
    node_id = (await cluster.stub.Register(register)).node_id
    call = cluster.stub.Session()
    line = coordinator_pb2.LogLine(unix_ms=1, level="info", text="hello")
    await call.write(coordinator_pb2.SessionRequest(node_id=node_id, log=[line]))
    item = await cluster.watch(job_id, lambda item: item.HasField("log"))
    assert (item.log.node, item.log.line.text) == ("w", "hello")
    await call.done_writing()


async def test_data_shards_are_served_by_name_alone(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    request = coordinator_pb2.FetchDataShardRequest(job_id=job_id, file="train-00000.tokens")
    data = b"".join([piece.payload async for piece in cluster.stub.FetchDataShard(request)])
    assert data == (cluster.directory / "data" / "train-00000.tokens").read_bytes()
    request.file = "../state/coordinator.sqlite"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in cluster.stub.FetchDataShard(request):
            pass
    assert isinstance(of_rpc(caught), DataError)


async def test_refused_submissions_name_cause_and_cure(cluster: Cluster, tmp_path: Path) -> None:
    recipe = make_recipe(cluster.directory).model_copy(update={"run_root": str(tmp_path / "runs")})
    elsewhere = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": "/nowhere"})})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=elsewhere.model_dump_json()))
    assert isinstance(of_rpc(caught), DataError)
    assert "/nowhere" in str(of_rpc(caught))
    assert "gradstream data prepare" in str(of_rpc(caught))


async def test_an_unknown_job_is_answered_with_the_nearest(cluster: Cluster) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.job()
    assert "no job yet" in str(of_rpc(caught))
    await cluster.submit()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.job("tinny-1")
    assert isinstance(of_rpc(caught), ConfigError)
    assert "did you mean 'tiny-1'?" in str(of_rpc(caught))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"version": "9.9"}, ConfigError, "runs gradstream 9.9, the coordinator 0.1.0"),
        ({"kind": 0}, ProtocolError, "parameter server or a worker"),
        ({"name": "../x"}, ConfigError, "not a node name"),
        ({"kind": SERVER}, ConfigError, "not host:port"),
        ({"incarnation": ""}, ProtocolError, "incarnation"),
    ],
)
async def test_refused_registrations(
    cluster: Cluster, change: dict[str, object], error: type[GradstreamError], words: str
) -> None:
    values = {"kind": WORKER, "name": "w", "version": "0.1.0", "incarnation": "x", **change}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.stub.Register(coordinator_pb2.RegisterRequest(**values))  # type: ignore[arg-type]
    assert isinstance(of_rpc(caught), error)
    assert words in str(of_rpc(caught))


async def test_a_second_process_of_a_name_is_refused_while_the_first_heartbeats(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (first,) = await cluster.running(job_id)
    await first.slots(2)
    for kind, name in ((WORKER, "worker-0"), (SERVER, "ps-0")):
        second = cluster.node(kind, name)
        with pytest.raises(ConfigError, match=f"is live as '{name}' .*give each one a name of its own"):
            await asyncio.wait_for(asyncio.shield(second.task), 5)
        second.task = asyncio.create_task(asyncio.sleep(0))
    nodes = (await cluster.jobs.ListNodes(jobs_pb2.ListNodesRequest())).nodes
    assert [(node.node_id, node.alive) for node in nodes] == [(node.node_id, True) for node in (*ps, first)]
    assert (await cluster.job(job_id)).epoch == 1


async def test_reports_that_contradict_the_job_are_refused(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    await cluster.running(job_id)
    for report in (
        step_report("nobody-1", 0),
        step_report(job_id, 0, epoch=7),
        step_report(job_id, 99),
        step_report(job_id, 0, num_tokens=10**6),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.stub.ReportStep(report)
        assert isinstance(of_rpc(caught), ProtocolError)
    assert (await cluster.job(job_id)).version == 0


async def test_one_coordinator_a_state_directory(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        await Coordinator("127.0.0.1:0", cluster.directory / "state").start()


async def test_serve_writes_the_ready_file_is_healthy_and_stops_on_sigterm(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    task = asyncio.create_task(serve("127.0.0.1:0", tmp_path / "state", ready))
    async with asyncio.timeout(10):
        while not ready.exists():  # noqa: ASYNC110 (a file cannot be awaited)
            await asyncio.sleep(0.01)
    address = ready.read_text().strip()
    assert not address.endswith(":0")
    channel = open_channel(address)
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await channel.close()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 10)
    assert not ready.exists()


async def test_a_recipe_that_is_too_large_is_refused(cluster: Cluster) -> None:
    recipe = make_recipe(cluster.directory).model_copy(update={"description": "x" * 2_000_000})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json()))
    assert "more than the 1024 KiB" in str(of_rpc(caught))


async def test_paths_of_a_recipe_lie_where_the_cluster_allows(
    tmp_path: Path, transformers_imported: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTREAM_PATHS", f"{tmp_path}/data,{tmp_path}/runs")
    cluster = Cluster(tmp_path)
    await cluster.start()
    try:
        await cluster.submit()
        for change in ({"run_root": str(tmp_path / "state")}, {"run_root": f"{tmp_path}/runs/../state"}):
            recipe = make_recipe(tmp_path).model_copy(update=change)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json()))
            assert isinstance(of_rpc(caught), ConfigError)
            assert str(of_rpc(caught)).startswith("run_root ")
    finally:
        await cluster.stop()


async def test_a_list_that_is_longer_than_a_message_comes_in_pages(cluster: Cluster) -> None:
    """Every job with all that is known of it, its recipe too; a job that is new meanwhile changes no page."""
    recipe = make_recipe(cluster.directory).model_copy(update={"description": "x" * 900_000})
    request = jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json())
    submitted = [(await cluster.jobs.SubmitJob(request)).job.job_id for _ in range(7)]
    found: list[jobs_pb2.Job] = []
    asked = jobs_pb2.ListJobsRequest()
    sizes = []
    while True:
        page = await cluster.jobs.ListJobs(asked)
        found += page.jobs
        sizes.append(len(page.jobs))
        if not page.next_page_token:
            break
        asked.page_token = page.next_page_token
        await cluster.submit()
    assert sizes == [4, 3]
    assert [job.job_id for job in found] == submitted[::-1]
    assert all(job.recipe_json for job in found)
    with pytest.raises(grpc.aio.AioRpcError, match="there is no page after 'nowhere'"):
        await cluster.jobs.ListJobs(jobs_pb2.ListJobsRequest(page_token="nowhere"))
