"""Silence is not loss: live state is given up when it is proved lost, or when a stated time has passed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from coordinator_fakes import SERVER, TIMING, WORKER, Cluster, FakeNode, make_recipe, step_report

from gradstream.coordinator.jobs.plan_making import MadePlan, make_plan
from gradstream.coordinator.nodes.membership import Membership
from gradstream.coordinator.nodes.reunion import Reunion, Verdict, judge_servers, refuses_connections
from gradstream.core.plan.plan import Plan
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

RUNNING = jobs_pb2.JOB_STATE_RUNNING


@pytest.fixture
async def three(tmp_path: Path, transformers_imported: None) -> AsyncIterator[Cluster]:
    """A cluster whose job is content with one of its three servers, and whose state is waited for for long."""
    cluster = Cluster(tmp_path, replace(TIMING, reunion_seconds=30.0))
    await cluster.start()
    yield cluster
    await cluster.stop()


async def run_job(cluster: Cluster) -> tuple[str, list[FakeNode], FakeNode]:
    """A job on three servers and a worker, at version 1 without a checkpoint; one server is enough for a plan."""
    nodes = [cluster.node(SERVER, f"ps-{number}") for number in range(3)]
    worker = cluster.node(WORKER, "w")
    await asyncio.gather(*(node.session.registered.wait() for node in (*nodes, worker)))
    while len(cluster.coordinator.controller.members.everyone_present()) < 4:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    recipe = make_recipe(cluster.directory)
    recipe = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"min_servers": 1})})
    request = jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json())
    job_id = (await cluster.jobs.SubmitJob(request)).job.job_id
    assert len((await worker.plan_of(1)).servers) == 3
    await worker.slots(2)
    await cluster.stub.ReportStep(step_report(job_id, 0))
    return job_id, nodes, worker


async def unchanged(cluster: Cluster, job_id: str) -> None:
    job = await cluster.job(job_id)
    assert (job.state, job.epoch, job.version) == (RUNNING, 1, 1)


async def test_servers_that_were_cut_off_come_back_one_by_one(three: Cluster) -> None:
    job_id, servers, worker = await run_job(three)
    for server in servers:
        await server.kill()
    # Longer than lease and grace.
    await asyncio.sleep(TIMING.lease_seconds + TIMING.server_grace_seconds + 0.5)
    job = await three.job(job_id)
    assert [wait.what for wait in job.waits] == [
        f"parameter server ps-{number} to come back (silent; the job waits for its state as long as no server can be "
        f"reached)"
        for number in range(3)
    ]
    await servers[0].reconnect(three.address)
    await asyncio.sleep(TIMING.server_grace_seconds + 0.1)
    job = await three.job(job_id)
    assert [wait.what for wait in job.waits] == [
        f"parameter server ps-{number} to come back (silent; the job waits for its state, 30 s at most)"
        for number in (1, 2)
    ]
    for server in servers[1:]:
        await server.reconnect(three.address)
    async with asyncio.timeout(30):
        # Their streams open a moment after they have registered.
        while (await three.job(job_id)).waits:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await unchanged(three, job_id)
    assert worker.plan is not None
    assert worker.plan.epoch == 1


async def test_a_restarted_coordinator_waits_for_servers_that_take_their_time(three: Cluster) -> None:
    job_id, servers, worker = await run_job(three)
    await three.restart()
    await servers[0].reconnect(three.address)
    await asyncio.sleep(TIMING.adopt_grace_seconds + 0.5)
    for node in (*servers[1:], worker):
        await node.reconnect(three.address)
    await unchanged(three, job_id)


async def test_servers_that_come_back_while_a_plan_is_made_keep_the_old_one(
    tmp_path: Path, transformers_imported: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(tmp_path, replace(TIMING, reunion_seconds=0.5))
    await cluster.start()
    job_id, servers, worker = await run_job(cluster)
    planning, go_on = asyncio.Event(), asyncio.Event()

    async def slow(*given: object) -> MadePlan:
        made = await make_plan(*given)  # type: ignore[arg-type]
        planning.set()
        await go_on.wait()
        return made

    monkeypatch.setattr("gradstream.coordinator.jobs.plan_making.make_plan", slow)
    for server in servers[1:]:
        await server.kill()
    await cluster.event(job_id, "was silent for too long")
    await planning.wait()
    for server in servers[1:]:
        await server.reconnect(cluster.address)
    go_on.set()
    await cluster.event(job_id, "its servers came back with all of their state")
    await unchanged(cluster, job_id)
    assert worker.plan is not None
    assert worker.plan.epoch == 1
    await cluster.stop()


async def test_a_newcomer_gets_the_name_of_a_silent_server_once_that_is_known_to_be_gone(three: Cluster) -> None:
    job_id, servers, worker = await run_job(three)
    await servers[1].kill()
    newcomer = three.node(SERVER, "ps-1")
    while not (refused := three.coordinator.controller.members.refused()):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert "is silent and may still hold its state" in refused[0].reason
    await servers[1].reconnect(three.address)
    await unchanged(three, job_id)
    # Its process ends while the newcomer still asks.
    await servers[1].die()
    plan = await worker.plan_of(2)
    assert plan.server_index(servers[1].node_id) is None
    await asyncio.wait_for(newcomer.session.registered.wait(), 30)


# --- the decision, with a clock moved by hand ------------------------------------------------------------------------


class Servers:
    """A plan's servers a, b, c, and another one that it does not name."""

    def __init__(self, plan: Plan) -> None:
        self.members = Membership(lease_seconds=1e9)
        self.requests = {
            name: coordinator_pb2.RegisterRequest(
                kind=SERVER, name=name, incarnation="1", held=[coordinator_pb2.HeldJob(job_id=plan.job_id, epoch=1)]
            )
            for name in ("a", "b", "c", "spare")
        }
        self.plan = replace(
            plan,
            servers=[replace(plan.servers[0], name=name, node_id=self.come(name, 0.0)) for name in ("a", "b", "c")],
        )
        self.reunion = Reunion(reunion_seconds=30.0)

    def come(self, name: str, now: float) -> str:
        node = self.members.register(self.requests[name], now, 0)
        self.members.open_session(node.node_id)
        return node.node_id

    def go(self, *names: str) -> None:
        for name in names:
            node = self.members.named(SERVER, name)
            assert node is not None
            self.members.close_session(node.node_id, node.session)

    def verdict(self, now: float) -> Verdict:
        return judge_servers(self.reunion.look(self.plan, 1, self.members, now))[0]


@pytest.fixture
async def servers(cluster: Cluster) -> Servers:
    job_id = await cluster.submit()
    _, (worker,) = await cluster.running(job_id)
    assert worker.plan is not None
    return Servers(worker.plan)


async def test_how_long_silent_servers_are_waited_for(servers: Servers) -> None:
    assert servers.verdict(1) is Verdict.HOLD
    # One alone: as long as it says.
    servers.go("b")
    assert servers.verdict(10) is Verdict.WAIT
    assert servers.verdict(39.9) is Verdict.WAIT
    assert servers.verdict(40) is Verdict.LOST
    servers.come("b", 41)
    assert servers.verdict(41) is Verdict.HOLD
    # All: for ever, then as long as it says from the first return on.
    servers.go("a", "b", "c")
    assert servers.verdict(50) is Verdict.WAIT
    assert servers.verdict(5000) is Verdict.WAIT
    servers.come("a", 6000)
    assert servers.verdict(6000) is Verdict.WAIT
    servers.come("b", 6020)
    assert servers.verdict(6029) is Verdict.WAIT
    assert servers.verdict(6030) is Verdict.LOST
    servers.come("c", 6100)
    assert servers.verdict(6100) is Verdict.HOLD


async def test_a_return_is_waited_for_although_others_could_take_the_job(servers: Servers) -> None:
    servers.come("spare", 0)
    assert servers.verdict(1) is Verdict.HOLD
    servers.go("a", "b", "c")
    assert servers.verdict(10) is Verdict.WAIT
    assert servers.verdict(40) is Verdict.LOST
    # No plan was taken yet: the others get their time.
    servers.come("a", 100)
    assert servers.verdict(100) is Verdict.WAIT
    assert servers.verdict(129) is Verdict.WAIT
    assert servers.verdict(130) is Verdict.LOST


async def test_what_proves_a_loss(servers: Servers) -> None:
    assert servers.verdict(1) is Verdict.HOLD
    # --- it came back empty
    servers.go("b")
    del servers.requests["b"].held[:]
    servers.come("b", 2)
    assert servers.verdict(2) is Verdict.LOST
    servers.requests["b"].held.add(job_id=servers.plan.job_id, epoch=1)
    servers.go("b")
    servers.come("b", 3)
    assert servers.verdict(3) is Verdict.HOLD
    # --- its machine refuses connections, twice in a row
    servers.go("b")
    assert servers.verdict(4) is Verdict.WAIT
    absence = servers.reunion.absences[servers.plan.servers[1].node_id]
    for refused in (True, False, True):
        absence.heard(refused)
        assert servers.verdict(5) is Verdict.WAIT
    absence.heard(True)
    assert servers.verdict(5) is Verdict.LOST
    # --- it was restarted
    servers.requests["b"].incarnation = "2"
    servers.come("b", 6)
    assert servers.verdict(6) is Verdict.LOST


async def test_a_stall_of_our_own_is_nobodys_silence(servers: Servers) -> None:
    servers.go("b")
    assert servers.verdict(10) is Verdict.WAIT
    servers.reunion.forgive(100)
    assert servers.verdict(139) is Verdict.WAIT
    assert servers.verdict(140) is Verdict.LOST


async def test_a_refusal_is_told_from_silence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        address = f"127.0.0.1:{door.getsockname()[1]}"
        assert not await refuses_connections(address)
    assert await refuses_connections(address)
    assert not await refuses_connections("no-such-host.invalid:1")
    assert not await refuses_connections("127.0.0.1:99999")


def test_nodes_come_back_within_the_patience_for_them() -> None:
    """The longest that a node may take: gRPC's own backoff, then ours."""
    from gradstream.core.rpc.channel import CHANNEL_OPTIONS
    from gradstream.core.rpc.retry import Backoff

    reconnect = dict(CHANNEL_OPTIONS)["grpc.max_reconnect_backoff_ms"] / 1000
    backoff = Backoff(uniform=max)
    longest = max(backoff.next() for _ in range(30))
    from gradstream.coordinator.timing import Timing

    assert Timing().adopt_grace_seconds > 2 * (longest + reconnect)
    assert Timing().reunion_seconds >= 30
