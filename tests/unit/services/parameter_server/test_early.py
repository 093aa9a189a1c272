"""Early bundles: a worker receives bundles of a round's version while contributions to others are still missing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.shards import Cluster, make_plan, serving, until

from gradstream.worker.pull import ServerPull
from gradstream.worker.timeline import Timeline
from gradstream.worker.weights import Arrival, Inbox

PULLS = ["fp32", "delta-int4", "xor-bf16"]
BOUND_SECONDS = 20
OUTER = {"learning_rate": 0.8, "momentum": 0.5}


def plan_of(pull: str, **changes: Any) -> Any:
    return make_plan(1, pull=pull, local={"steps": 1, "outer": OUTER}, **changes)


class Worker:
    """A worker's pull from the only server. `keys` are the contributions to half of the bundles, and to the others."""

    def __init__(self, cluster: Cluster, held_version: int):
        plan = cluster.plan
        weights, moments = ({bundle.index: bundle for bundle in found} for found in (plan.bundles, plan.moment_bundles))
        self.num_received = 0
        self._received = asyncio.Condition()
        self._held_version = held_version
        self.pull = ServerPull(
            plan, plan.servers[0], weights, cluster.stubs[0], cluster.book, moments, Timeline(), self._count
        )
        self.version = asyncio.create_task(self.pull.version(held_version + 1, held_version, None))
        half = sorted([*weights, *moments])[::2]
        keys = cluster.all_keys(held_version)
        self.keys = [[key for key in keys if (key[1] in half) is first] for first in (True, False)]
        self.num_first = len(half)

    def _count(self) -> None:
        self.num_received += 1

    async def received(self, count: int) -> None:
        await until(lambda: self.num_received >= count)

    async def arrivals(self) -> dict[int, bytes]:
        """The payload of each bundle, by its index."""
        inbox = Inbox(await asyncio.wait_for(self.version, BOUND_SECONDS), "fp32")
        found: list[Arrival] = []
        inbox.put = found.append  # type: ignore[method-assign]
        assert await self.pull.receive(inbox) == sum(arrival.payload.nbytes for arrival in found)
        assert {arrival.header.version for arrival in found} == {inbox.version}
        assert len(found) == len({arrival.header.bundle for arrival in found})
        return {arrival.header.bundle: arrival.payload.tobytes() for arrival in found}


async def late(cluster: Cluster, version: int) -> dict[int, bytes]:
    """What a worker gets that asks once the version is published."""
    bundles = [bundle.index for bundle in (*cluster.plan.bundles, *cluster.plan.moment_bundles)]
    _, found = await cluster.arrivals(0, version, held_version=version - 1, bundles=bundles)
    return {header.bundle: payload.tobytes() for header, payload in found}


@pytest.mark.parametrize("pull", PULLS)
async def test_complete_bundles_come_before_the_others_are_sent(pull: str) -> None:
    async with serving(plan_of(pull)) as cluster:
        for version in (1, 2):
            worker = Worker(cluster, version - 1)
            await cluster.push(worker.keys[0], version - 1)
            await worker.received(worker.num_first)
            assert cluster.shards[0].version == version - 1, "the version is not decided"
            assert not worker.version.done()
            await cluster.push(worker.keys[1], version - 1)
            found = await worker.arrivals()
            assert found == await late(cluster, version)
            assert len(found) == len(cluster.plan.bundles) + len(cluster.plan.moment_bundles)
            worker.pull.cancel()


@pytest.mark.parametrize("pull", PULLS)
async def test_early_bundles_of_a_skipped_round_do_not_hold(pull: str) -> None:
    async with serving(plan_of(pull)) as cluster:
        worker = Worker(cluster, 0)
        await cluster.push(worker.keys[0], 0)
        await worker.received(worker.num_first)
        await cluster.push(worker.keys[1], 0, fill=float("nan"))
        found = await worker.arrivals()
        assert cluster.reports[-1].skipped
        assert found == await late(cluster, 1)
        worker.pull.cancel()


async def test_a_version_that_all_get_in_full_has_no_early_bundles() -> None:
    plan = plan_of("delta-int8", codec={"keyframe_versions": 1})
    async with serving(plan) as cluster:
        worker = Worker(cluster, 0)
        await cluster.push(cluster.all_keys(0), 0)
        found = await worker.arrivals()
        assert {len(found[bundle.index]) for bundle in plan.bundles} == {
            4 * bundle.num_elements for bundle in plan.bundles
        }
        worker.pull.cancel()


async def test_a_worker_without_the_version_before_gets_whole_bundles() -> None:
    async with serving(plan_of("delta-int4")) as cluster:
        worker = Worker(cluster, 0)
        await cluster.push(worker.keys[0], 0)
        await worker.received(worker.num_first)
        newcomer = asyncio.create_task(cluster.pull_one(0, 1))
        await cluster.push(worker.keys[1], 0)
        version, weights = await asyncio.wait_for(newcomer, BOUND_SECONDS)
        assert version == 1
        assert len(weights) == len(cluster.plan.fragments)
        await worker.arrivals()
        worker.pull.cancel()
