"""Replanning: idle servers join a running job at its next boundary, others leave it, and no step is lost."""

from __future__ import annotations

import grpc
import pytest
from coordinator_fakes import SERVER, WORKER, Cluster, FakeNode, report_checkpoint, step_report

from gradstream.coordinator.jobs.decisions import Ending, JobSight, judge_end, judge_replan
from gradstream.core.errors import ConfigError, GradstreamError, PlanError
from gradstream.core.recipe.rounds import Rounds
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.proto.v1 import jobs_pb2, plan_pb2

RUNNING, PLANNING, STOPPED = jobs_pb2.JOB_STATE_RUNNING, jobs_pb2.JOB_STATE_PLANNING, jobs_pb2.JOB_STATE_STOPPED


@pytest.mark.parametrize(
    ("version", "halted", "checkpoints", "worker", "settled", "ending"),
    [
        (2, None, set(), True, True, Ending.GO_ON),  # the boundary is still to come
        (2, 2, set(), True, True, Ending.GO_ON),  # its checkpoint is on its way
        (2, 2, {2}, True, True, Ending.REPLAN),
        (2, 2, {2}, True, False, Ending.GO_ON),  # the leader has decided a step that is not known yet
        (3, 2, {2}, True, True, Ending.SNAPSHOT),  # a step was under way
        (3, 2, {2, 3}, True, True, Ending.REPLAN),
        (2, None, set(), False, True, Ending.SNAPSHOT),  # nobody finishes the step
        (2, None, {2}, False, True, Ending.REPLAN),
        (0, None, set(), False, True, Ending.REPLAN),  # nothing was computed
        (4, None, {4}, True, True, Ending.GO_ON),  # the last validation pass is on its way
    ],
)
def test_when_a_job_is_replanned(
    version: int, halted: int | None, checkpoints: set[int], worker: bool, settled: bool, ending: Ending
) -> None:
    sight = JobSight("replan", RUNNING, version, Rounds(4), halted, checkpoints, False, worker, settled=settled)
    assert judge_end(sight)[0] is ending


def test_what_a_new_plan_changes_is_told() -> None:
    assert judge_replan(["a", "b"], ["a", "b", "c"], 31) == (True, "replanning at step 31: 2 → 3 servers (c in)")
    assert judge_replan(["a", "b"], ["a"], 5) == (True, "replanning at step 5: 2 → 1 server (b out)")
    assert judge_replan(["a", "b"], ["a", "c"], 5)[1] == "replanning at step 5: 2 → 2 servers (c in; b out)"
    changes, reason = judge_replan(["a", "b"], ["b", "a"], 5)
    assert not changes
    assert "nothing would change" in reason
    assert "a, b" in reason


async def replan(cluster: Cluster, job_id: str, *without: str) -> jobs_pb2.Job:
    return (await cluster.jobs.ReplanJob(jobs_pb2.ReplanJobRequest(job_id=job_id, without=without))).job


async def refused(cluster: Cluster, job_id: str, *without: str) -> GradstreamError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await replan(cluster, job_id, *without)
    return error_from_rpc(caught.value, "coordinator")


async def at_version_1(cluster: Cluster, servers: int = 2) -> tuple[str, list[FakeNode], FakeNode]:
    job_id = await cluster.submit()
    ps = [cluster.node(SERVER, f"ps-{number}") for number in range(servers)]
    for server in ps:
        await cluster.event(job_id, f"{server.identity.name} is here")
    worker = cluster.node(WORKER, "worker-0")
    await worker.slots(2)
    await cluster.stub.ReportStep(step_report(job_id, 0))
    return job_id, ps, worker


async def to_the_boundary(cluster: Cluster, job_id: str, leader: FakeNode) -> None:
    """The step under way is committed, and its checkpoint written."""
    await leader.until(lambda: any(d.HasField("boundary") for d in leader.directives))
    await cluster.stub.ReportStep(step_report(job_id, 1, halted=True))
    await report_checkpoint(leader, 2)


async def test_an_idle_server_comes_in_at_the_boundary(cluster: Cluster) -> None:
    job_id, ps, worker = await at_version_1(cluster)
    nothing = await refused(cluster, job_id)
    assert isinstance(nothing, ConfigError)
    assert "nothing would change" in str(nothing)
    spare = cluster.node(SERVER, "ps-spare")
    await cluster.event(job_id, "ps-spare is here")
    job = await replan(cluster, job_id)
    assert (job.state, job.reason) == (RUNNING, "replanning at step 2: 2 → 3 servers (ps-spare in)")
    assert "the end of step 1, to replan there" in [wait.what for wait in job.waits]
    await to_the_boundary(cluster, job_id, ps[0])
    for node in (*ps, spare, worker):
        plan = await node.plan_of(2)
        assert (plan.start_version, [server.name for server in plan.servers]) == (2, ["ps-0", "ps-1", "ps-spare"])
    await worker.slots(2)
    job = await cluster.job(job_id)
    assert (job.state, job.epoch, job.version, job.num_tokens) == (RUNNING, 2, 2, 64)
    messages = [
        item.event.message
        async for item in cluster.jobs.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id, kinds=["event"]))
    ]
    assert not [message for message in messages if "recomputed" in message]
    assert "planning: a new plan starts from version 2" in messages


async def test_a_server_goes_out_and_stays_out(cluster: Cluster) -> None:
    job_id, ps, _ = await at_version_1(cluster, 3)
    unknown = await refused(cluster, job_id, "ps-7")
    assert "there is no parameter server 'ps-7'" in str(unknown)
    few = await refused(cluster, job_id, "ps-0", "ps-1")
    assert isinstance(few, PlanError)
    assert "2 parameter servers, 1 is live" in str(few)
    assert (await cluster.job(job_id)).state == RUNNING
    job = await replan(cluster, job_id, "ps-2")
    assert job.reason == "replanning at step 2: 3 → 2 servers (ps-2 out)"
    await to_the_boundary(cluster, job_id, ps[0])
    await ps[2].released()
    assert [server.name for server in (await ps[0].plan_of(2)).servers] == ["ps-0", "ps-1"]
    # It may go now; a loss later does not bring it in again, and the order to replan does.
    await ps[1].die()
    await cluster.event(job_id, "going back to the last checkpoint")
    assert (await cluster.job(job_id)).waits[0].what == "2 parameter servers, 1 is live"


async def test_an_order_to_replan_survives_a_restart_and_gives_way_to_a_stop(cluster: Cluster) -> None:
    job_id, ps, worker = await at_version_1(cluster)
    spare = cluster.node(SERVER, "ps-spare")
    await cluster.event(job_id, "ps-spare is here")
    await replan(cluster, job_id)
    await cluster.restart()
    for node in (*ps, spare, worker):
        await node.reconnect(cluster.address)
    assert (await cluster.job(job_id)).reason.startswith("replanning at step 2")
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id))
    assert (await cluster.job(job_id)).reason == "stopping at the end of step 1; a checkpoint follows"
    assert "about to stop" in str(await refused(cluster, job_id))
    await to_the_boundary(cluster, job_id, ps[0])
    await cluster.event(job_id, "stopped at version 2")
    assert (await cluster.job(job_id)).state == STOPPED
    assert "is stopped; only a running job can be replanned" in str(await refused(cluster, job_id))


async def test_a_coordinator_that_restarts_while_it_replans_goes_on(cluster: Cluster) -> None:
    job_id, ps, worker = await at_version_1(cluster)
    spare = cluster.node(SERVER, "ps-spare")
    await cluster.event(job_id, "ps-spare is here")
    await replan(cluster, job_id)
    await worker.kill()  # so that the boundary is followed by planning alone
    await cluster.stub.ReportStep(step_report(job_id, 1, halted=True))
    await report_checkpoint(ps[0], 2)
    await cluster.restart()
    for node in (*ps, spare, worker):
        await node.reconnect(cluster.address)
    assert (await spare.plan_of(2)).start_version == 2
    assert (await cluster.job(job_id)).version == 2


# --- a job of an older release ----------------------------------------------------------------------------------------


async def test_a_job_whose_servers_added_in_fp32_goes_on_and_says_that_its_bits_change(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stored plan does not say how servers add: that of an older release."""
    job_id, ps, _ = await at_version_1(cluster)
    state = cluster.coordinator.controller.state
    load = state.load_plan

    def of_older_release(job_id: str, epoch: int) -> bytes | None:
        stored = load(job_id, epoch)
        assert stored is not None
        plan = plan_pb2.Plan.FromString(stored)
        plan.ClearField("sum_form")
        return plan.SerializeToString()

    spare = cluster.node(SERVER, "ps-spare")
    await cluster.event(job_id, "ps-spare is here")
    with monkeypatch.context() as patches:
        patches.setattr(state, "load_plan", of_older_release)
        await replan(cluster, job_id)
        await to_the_boundary(cluster, job_id, ps[0])
        await spare.plan_of(2)
        told = await cluster.event(job_id, "add gradients in fixed point")
    assert told.event.kind == "plan"
    assert told.event.message.startswith("from version 2 on servers add gradients in fixed point")
    history = [item async for item in cluster.jobs.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id))]
    assert sum("fixed point" in item.event.message for item in history) == 1
