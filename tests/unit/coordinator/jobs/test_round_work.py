"""The coordinator gives workers other slots for a round, by heartbeats, until the round is over."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from coordinator_fakes import (
    PATIENCE_SECONDS,
    SERVER,
    WORKER,
    Cluster,
    FakeNode,
    make_manifest,
    make_recipe,
    step_report,
)

from gradstream.coordinator.jobs import stalls
from gradstream.coordinator.jobs.active import ActiveJob, GivenWork
from gradstream.coordinator.jobs.round_work import shares_rounds
from gradstream.coordinator.nodes.membership import Membership
from gradstream.coordinator.state.state import JobRecord, StepTotals
from gradstream.core.job_states import PAUSED, RUNNING
from gradstream.core.recipe.recipe import Recipe
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

STEPS = 10


def local_recipe(directory: Path, **sections: Any) -> Recipe:
    tree = make_recipe(directory, num_steps=4 * STEPS).model_dump() | {"local": {"steps": STEPS}} | sections
    tree["cluster"]["min_workers"] = 2
    return Recipe.model_validate(tree)


def accumulates(job_id: str, version: int, *missing: int) -> coordinator_pb2.Activity:
    return coordinator_pb2.Activity(job_id=job_id, phase="accumulating", step=version, missing_slots=missing)


def computes(job_id: str, version: int, slot: int | None, num_done: int = 0, **more: Any) -> coordinator_pb2.Activity:
    progress = coordinator_pb2.RoundProgress(version=version, slot=slot, num_done=num_done, **more)
    return coordinator_pb2.Activity(job_id=job_id, phase="computing", step=version, round=progress)


def work_of(node: FakeNode) -> tuple[int, list[int], list[int]] | None:
    """The last round's work that a node got: version, slots, copies."""
    found = [item.work for item in node.directives if item.HasField("work")]
    return (found[-1].version, list(found[-1].slots), list(found[-1].copies)) if found else None


async def until_seen(cluster: Cluster, *nodes: FakeNode) -> None:
    """Wait until the coordinator has heartbeats with these nodes' activities.

    The servers' come last: without them nothing is decided, and a worker that seems to lack the version loses its slot.
    """
    wanted = {node.node_id: node.activity for node in nodes}
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            found = (await cluster.jobs.ListNodes(jobs_pb2.ListNodesRequest())).nodes
            if all(wanted.get(node.node_id, node.activity) == node.activity for node in found):
                return
            await asyncio.sleep(0.02)


async def until_work(node: FakeNode, version: int, slots: list[int], copies: list[int] | None = None) -> None:
    await node.until(lambda: work_of(node) == (version, slots, copies or []))


async def test_a_slow_slot_is_copied_and_ends_for_both_with_the_first(cluster: Cluster) -> None:
    recipe = local_recipe(cluster.directory)
    job_id = (await cluster.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json()))).job.job_id
    servers = [cluster.node(SERVER, name) for name in ("ps-0", "ps-1")]
    slow = cluster.node(WORKER, "slow")
    await slow.session.registered.wait()
    fast = cluster.node(WORKER, "fast")
    assert (await slow.slots(1), await fast.slots(1)) == ([0], [1])
    slow.activity = computes(job_id, 0, 0, 2, inner_step_seconds=5.0)
    fast.activity = computes(job_id, 0, None, computed=[1], inner_step_seconds=0.5)
    await until_seen(cluster, slow, fast)
    for server in servers:
        server.activity = accumulates(job_id, 0, 0, 1)
    line = "round 1: fast computes a copy of slot 0: in about 5 s, while slow needs 40 s more"
    await cluster.event(job_id, line)
    await until_work(fast, 0, [0], [0])
    await until_work(slow, 0, [0], [0])
    assert line in (await cluster.job(job_id)).decisions
    # One server has all of the slot, the other one has not yet.
    fast.activity = computes(job_id, 0, 0, 9, computed=[1], inner_step_seconds=0.5)
    servers[0].activity = accumulates(job_id, 0, 1)
    await until_work(slow, 0, [0], [0])
    servers[1].activity = accumulates(job_id, 0)
    await until_work(slow, 0, [])
    await until_work(fast, 0, [])

    # In the next round both begin with what they hold. A worker that dies leaves what it has computed.
    await cluster.stub.ReportStep(step_report(job_id, 0, num_samples=40, num_tokens=320))
    slow.activity = computes(job_id, 1, 0, 1, inner_step_seconds=1.0)
    fast.activity = computes(job_id, 1, 1, 1, inner_step_seconds=1.0)
    await until_seen(cluster, slow, fast)
    for server in servers:
        server.activity = accumulates(job_id, 1, 0)
    await until_work(fast, 1, [])  # its slot is complete: another one computed it
    await fast.die()
    await slow.slots(2)
    await until_work(slow, 1, [0])
    # A worker that registers again is told in any case: it may follow what an earlier coordinator told it.
    told = len(slow.directives)
    await slow.reconnect(cluster.address)
    await slow.until(lambda: any(item.HasField("work") for item in slow.directives[told:]))
    assert work_of(slow) == (1, [0], [])


def active_job(directory: Path, **sections: Any) -> ActiveJob:
    recipe = local_recipe(directory, **sections)
    record = JobRecord("a-1", "a", recipe.model_dump_json(), "{}", str(directory), submitted_unix_ms=5, state=RUNNING)
    active = ActiveJob(record, recipe, make_manifest())
    active.holders = ["a", "b"]
    return active


class _Plan:
    """As much of a plan as the question needs."""

    has_pipeline = False
    servers = ()


def test_what_a_workers_identity_shapes_is_not_shared(tmp_path: Path) -> None:
    job = active_job(tmp_path, local={"steps": STEPS, "after": 10}, codec={"push": "int8", "pull": "delta-int8"})
    assert not shares_rounds(job), "it has no plan"
    job.plan = _Plan()  # type: ignore[assignment]
    assert not shares_rounds(job), "an ordinary step"
    job.totals = StepTotals(version=10)
    assert shares_rounds(job)
    job.record = JobRecord("a-1", "a", "", "{}", "", submitted_unix_ms=5, state=PAUSED)
    assert not shares_rounds(job)
    job = active_job(tmp_path, codec={"push": "sparse", "pull": "delta-int2", "embedding": "int2"})
    job.plan = _Plan()  # type: ignore[assignment]
    assert not shares_rounds(job), "a slot's residual lives on its worker"


def test_a_worker_answers_for_what_it_was_told_to_compute(tmp_path: Path) -> None:
    """Else it is benched for a slot that another one was given."""
    job = active_job(tmp_path)
    members = Membership(1.0, 10.0)
    for number, name in enumerate(("a", "b")):
        node = members.register(coordinator_pb2.RegisterRequest(kind=WORKER, name=name, incarnation=name), 0.0, number)
        assert members.open_session(node.node_id)
    server = members.register(coordinator_pb2.RegisterRequest(kind=SERVER, name="s", incarnation="s"), 0.0, 3)
    members.open_session(server.node_id)
    server.activity = accumulates("a-1", 0, 0, 1)
    job.holders = [node.node_id for node in members.present(WORKER)]
    plan = _Plan()
    plan.servers = (server,)  # type: ignore[assignment]
    job.plan = plan  # type: ignore[assignment]

    def sights() -> dict[str, tuple[int, ...]]:
        return {sight.title: sight.slots for sight in stalls.worker_sights(job, members, 1.0)}

    assert sights() == {"worker a": (0,), "worker b": (1,)}
    job.work = {job.holders[0]: GivenWork(1, 0, 0, (), ()), job.holders[1]: GivenWork(1, 0, 0, (1, 0), ())}
    assert sights() == {"worker a": (), "worker b": (1, 0)}
    # What it was told for a round that is over counts no longer.
    job.totals = StepTotals(version=1)
    server.activity = accumulates("a-1", 1, 0, 1)
    assert sights() == {"worker a": (0,), "worker b": (1,)}
