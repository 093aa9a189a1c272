"""Rounds with a quorum: which slots count, the same on every server, and the bits of those slots alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch
from support.shards import (
    FRAGMENTS,
    SLOT_SAMPLES,
    SLOT_TOKENS,
    Cluster,
    gradient,
    make_plan,
    same,
    serving,
    until,
)

from gradstream.core.errors import ProtocolError
from gradstream.core.plan.plan import Plan
from gradstream.core.plan.recorded import RecordedSlots
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.quorum import Count, SlotLeader, decide_slots

TOTALS = {"slot_tokens": 4 * SLOT_TOKENS, "slot_samples": 4 * SLOT_SAMPLES}
"""Of a slot in a round of 4 inner steps."""
FOREVER = 3600.0


def plan_of(num_servers: int = 1, grace_seconds: float = 0.0, after: int = 0, **changes: Any) -> Plan:
    """A plan of 3 rounds for 3 slots, of which 2 are the quorum."""
    local = {"steps": 4, "after": after, "moments": "fp32", "quorum": 2, "grace_seconds": grace_seconds}
    return make_plan(num_servers, local=local, training={"num_steps": after + 12}, **changes)


def keys_of(cluster: Cluster, slot: int, version: int = 0, server: int | None = None) -> list[tuple[int, int]]:
    """The keys of a slot's contributions, of one server or of all."""
    keys = [key for key in cluster.all_keys(version) if key[0] == slot]
    return [key for key in keys if server in (None, cluster.plan.bundle(key[1]).server)]


async def push(cluster: Cluster, slot: int, version: int = 0, server: int | None = None) -> set[int]:
    """Push a slot's contributions to a round; return the results."""
    responses = await cluster.push(keys_of(cluster, slot, version, server), version, **TOTALS)
    return {response.result for response in responses}


# -- the decision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "whole_at", "expected"),
    [
        (100.0, {}, Count()),
        (100.0, {2: 10.0}, Count()),
        (14.9, {2: 10.0, 0: 5.0}, Count((), 15.0)),
        (15.0, {2: 10.0, 0: 5.0}, Count((0, 2))),
        (14.0, {2: 10.0, 0: 5.0, 3: 13.0}, Count((), 15.0)),
        (15.1, {2: 10.0, 0: 5.0, 3: 13.0}, Count((0, 2, 3))),
        (10.0, dict.fromkeys(range(4), 10.0), Count((0, 1, 2, 3))),
    ],
    ids=["no slot", "no quorum", "grace", "grace over", "a late slot in grace", "and counted", "all at once"],
)
def test_which_slots_count(now: float, whole_at: dict[int, float], expected: Count) -> None:
    assert decide_slots(now, whole_at, num_slots=4, quorum=2, grace_seconds=5.0)[0] == expected


def test_the_reason_names_the_late_slots() -> None:
    _, reason = decide_slots(20.0, {0: 5.0, 2: 10.0}, num_slots=4, quorum=2, grace_seconds=5.0)
    assert reason == "slots 1, 3 not whole 5 s after 2 others"


# -- the leader --------------------------------------------------------------------------------------------------------


def report(server: int, *slots: int, step: int = 0) -> pb.CompleteSlotsRequest:
    return pb.CompleteSlotsRequest(job_id="job", epoch=5, step=step, server=server, slots=slots)


def leader_of(plan: Plan, clock: Callable[[], float] = lambda: 0.0) -> SlotLeader:
    assert plan.recipe.local is not None
    return SlotLeader(plan, plan.recipe.local, clock)


async def test_a_slot_counts_that_is_whole_on_every_server() -> None:
    leader = leader_of(plan_of(2))
    waiting = [asyncio.create_task(leader.complete(each)) for each in (report(0, 0), report(0, 0, 1, 2), report(1, 2))]
    await asyncio.sleep(0)  # one turn: all wait
    assert not any(task.done() for task in waiting)
    waiting[0].cancel()  # another report has taken its place
    assert await leader.complete(report(1, 1, 2)) == (1, 2)
    assert [await task for task in waiting[1:]] == [(1, 2)] * 2
    assert await leader.complete(report(1, 0, 1, 2)) == (1, 2), "slot 0 came too late"


async def test_the_leader_decides_when_the_grace_is_over() -> None:
    leader = leader_of(plan_of(1, grace_seconds=0.01), asyncio.get_running_loop().time)
    assert await leader.complete(report(0, 0, 2)) == (0, 2)


async def test_reports_that_do_not_fit_are_refused() -> None:
    plan = replace(plan_of(1, after=1), recorded=(RecordedSlots(2, 3, (0, 1)),))
    leader = leader_of(plan)
    for step in (0, 2):  # an ordinary step, and a round whose slots are recorded
        leader.begin_step(step)
        with pytest.raises(ProtocolError, match="no quorum decides"):
            await leader.complete(report(0, 0, step=step))
    leader.begin_step(3)
    for wrong in (report(0, 0, step=1), report(0, 0, step=4), report(1, 0, step=3), report(0, 3, step=3)):
        with pytest.raises(ProtocolError):
            await leader.complete(wrong)
    waiting = asyncio.create_task(leader.complete(report(0, 0, step=3)))
    await asyncio.sleep(0)  # one turn: it waits
    leader.close(ProtocolError("the plan was replaced"))
    with pytest.raises(ProtocolError, match="replaced"):
        await waiting


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_servers", [1, 2])
async def test_a_round_is_committed_without_the_slot_that_is_not_whole(num_servers: int) -> None:
    plan = plan_of(num_servers)
    async with serving(plan) as cluster:
        before = await cluster.pull(0)
        # Slot 1 lacks one contribution on the last server.
        lacking = keys_of(cluster, 1, server=num_servers - 1)[-1]
        await cluster.push([key for key in keys_of(cluster, 1) if key != lacking], **TOTALS)
        assert await push(cluster, 2) == {pb.PUSH_RESULT_ACCEPTED}
        status = await cluster.status()
        assert [list(each.missing_slots) for each in status] == [[0]] * (num_servers - 1) + [[0, 1]]
        assert all(each.early_bytes for each in status), "nothing is added before it is decided"
        assert await push(cluster, 0) == {pb.PUSH_RESULT_ACCEPTED}
        after = await cluster.pull(1)
        (late,) = await cluster.push([lacking], **TOTALS)
        assert late.result == pb.PUSH_RESULT_STALE
        for fragment in FRAGMENTS:
            mean_N = (gradient(0, 0, fragment.index) + gradient(0, 2, fragment.index)) / (2 * TOTALS["slot_tokens"])
            torch.testing.assert_close(before[fragment.index] - after[fragment.index], mean_N, rtol=1e-4, atol=1e-6)
        await until(lambda: len(cluster.reports) == 1)
        assert (await cluster.status())[0].early_bytes == 0
        (told,) = cluster.reports
        assert list(told.slots) == [0, 2]
        assert (told.num_tokens, told.num_samples) == (2 * TOTALS["slot_tokens"], 2 * TOTALS["slot_samples"])
        assert told.loss == (10.0 + 12.0) / told.num_tokens


async def test_all_slots_are_committed_at_once_and_a_late_one_within_the_grace() -> None:
    async with serving(plan_of(2, grace_seconds=FOREVER)) as cluster:
        for slot in (2, 0):
            await push(cluster, slot)
        await push(cluster, 1, server=0)
        assert cluster.reports == []
        await push(cluster, 1, server=1)
        await until(lambda: len(cluster.reports) == 1)
        assert list(cluster.reports[0].slots) == [0, 1, 2]


async def test_a_replay_takes_the_recorded_slots_to_the_same_bits() -> None:
    """Also on another number of servers, and for ordinary steps before the rounds."""
    plan = plan_of(2, after=1)
    async with serving(plan) as cluster:
        await cluster.push(cluster.all_keys())  # an ordinary step has all slots
        await cluster.pull(1)
        for version, late in ((1, 0), (2, 2)):
            for slot in range(3):
                if slot != late:
                    await push(cluster, slot, version)
            found = await cluster.pull(version + 1)
        moments = await cluster.pull_moments(3)
        await until(lambda: len(cluster.reports) == 3)
        recorded = [tuple(report.slots) for report in cluster.reports]
        assert recorded == [(), (1, 2), (0, 1)]
    runs = (RecordedSlots(1, 2, (1, 2)), RecordedSlots(2, 3, (0, 1)))
    again = replace(plan_of(1, after=1), recorded=runs)
    assert Plan.from_proto(again.to_proto()).recorded == runs
    async with serving(again) as cluster:
        await cluster.push(cluster.all_keys())
        await cluster.pull(1)
        for version, late in ((1, 0), (2, 2)):
            assert await push(cluster, late, version) == {pb.PUSH_RESULT_STALE}
            for slot in (2, 1, 0):
                if slot != late:
                    assert (await cluster.status())[0].missing_slots
                    await push(cluster, slot, version)
            replayed = await cluster.pull(version + 1)
        assert same(replayed, found)
        assert all(same(values, moments[array]) for array, values in (await cluster.pull_moments(3)).items())
        # After the recorded rounds the quorum decides.
        await push(cluster, 0, 3)
        await push(cluster, 1, 3)
        await until(lambda: len(cluster.reports) == 4)
        assert [tuple(report.slots) for report in cluster.reports] == [*recorded, (0, 1)]


async def test_a_leader_without_a_quorum_decides_on_no_slots() -> None:
    async with serving(make_plan(1)) as cluster:
        with pytest.raises(grpc.aio.AioRpcError, match="decides on no slots"):
            await cluster.stubs[0].CompleteSlots(report(0, 0))


@pytest.mark.parametrize(
    "runs",
    [
        (RecordedSlots(1, 1, (0, 1)),),
        (RecordedSlots(1, 3, (0, 1)), RecordedSlots(2, 4, (0, 1))),
        (RecordedSlots(1, 3, ()),),
        (RecordedSlots(1, 3, (1, 0)),),
        (RecordedSlots(1, 3, (0, 3)),),
    ],
    ids=["no rounds", "rounds twice", "no slots", "slots out of order", "an unknown slot"],
)
def test_impossible_recorded_slots_are_refused(runs: tuple[RecordedSlots, ...]) -> None:
    with pytest.raises(ProtocolError, match="records impossible slots"):
        Plan.from_proto(replace(plan_of(), recorded=runs).to_proto())
