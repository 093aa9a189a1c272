"""Network cuts that last longer than every lease: nothing is computed twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.cluster import Cluster, wait_until
from support.proxy import Proxy, free_port
from support.tiny import tiny_recipe

from gradstream.client import Job

TIMING = (
    "heartbeat_seconds=0.2",
    "lease_seconds=1.5",
    "server_grace_seconds=0.5",
    "reunion_seconds=30",
    "unreachable_seconds=1.5",
    "bench_seconds=3",
    "tick_seconds=0.05",
)
CUT_SECONDS = 4.0
"""Longer than lease, grace and two probes of a silent server."""


class Cuts:
    """A cluster of two servers and two workers, every connection of which runs through a proxy."""

    def __init__(self, cluster: Cluster, stack: ExitStack):
        self.cluster = cluster
        cluster.start_coordinator(*TIMING)
        self.to_coordinator: dict[str, Proxy] = {}
        self.to_server: dict[str, Proxy] = {}
        for name in ("server-0", "server-1"):
            listen = f"127.0.0.1:{free_port()}"
            self.to_server[name] = self._proxy(stack, listen)
            self.to_coordinator[name] = self._proxy(stack, cluster.address)
            cluster.start_server_behind(name, self.to_coordinator[name].address, listen, self.to_server[name].address)
        for name in ("worker-0", "worker-1"):
            self.to_coordinator[name] = self._proxy(stack, cluster.address)
            cluster.start_workers(name, coordinator=self.to_coordinator[name].address)

    @staticmethod
    def _proxy(stack: ExitStack, target: str) -> Proxy:
        proxy = Proxy(target)
        stack.callback(proxy.close)
        return proxy


@pytest.fixture
def cuts(cluster: Cluster) -> Iterator[Cuts]:
    with ExitStack() as stack:
        yield Cuts(cluster, stack)


def advance(cluster: Cluster, job: Job, what: str) -> None:
    """Wait for ten more steps."""
    version = cluster.client.job(job.job_id).version
    cluster.wait_for(job.job_id, lambda seen: seen.version >= version + 10, f"go on {what}")


def alive(cluster: Cluster, *names: str) -> bool:
    return all(node.alive for node in cluster.client.nodes() if node.name in names)


@pytest.mark.timeout(300)
def test_cuts_longer_than_every_lease_recompute_nothing(cuts: Cuts, tiny_data: Path, tmp_path: Path) -> None:
    cluster = cuts.cluster
    recipe = tiny_recipe(
        tiny_data,
        tmp_path / "runs",
        training={"num_steps": 100_000},
        checkpoint={"interval_steps": 0},
        validation={"interval_steps": 0},
        cluster={"min_workers": 2, "min_servers": 1, "fragment_bytes": 4096},
    )
    job = cluster.client.submit(recipe)
    advance(cluster, job, "at all")
    # --- the servers from the coordinator: steps go on, their reports come later
    for name in ("server-0", "server-1"):
        cuts.to_coordinator[name].cut()
    wait_until(lambda: not alive(cluster, "server-0") and not alive(cluster, "server-1"), "the servers' leases", 30)
    begin = time.monotonic()
    waits = cluster.wait_for(job.job_id, lambda seen: len(seen.waits) == 2, "wait for its servers").waits
    assert all("silent; the job waits for its state" in wait.what for wait in waits), waits
    before = cluster.client.job(job.job_id).version
    wait_until(lambda: time.monotonic() > begin + CUT_SECONDS, "the cut to be long enough", 30)
    # One by one.
    cuts.to_coordinator["server-0"].heal()
    wait_until(lambda: alive(cluster, "server-0"), "server-0", 30)
    cuts.to_coordinator["server-1"].heal()
    wait_until(lambda: alive(cluster, "server-1"), "server-1", 30)
    cluster.wait_for(job.job_id, lambda seen: seen.version > before + 10, "tell of steps made meanwhile")
    # --- one server from one worker: its slots move, and come back
    cuts.to_server["server-1"].shut_out([cluster.processes["worker-1"].pid])
    cluster.wait_for(job.job_id, lambda seen: set(seen.slot_holders) == {"worker-0"}, "move the slots")
    decisions = " ".join(cluster.client.job(job.job_id).decisions)
    assert "worker worker-1 is benched: cannot reach parameter server server-1" in decisions
    advance(cluster, job, "with one worker")
    cuts.to_server["server-1"].heal()
    cluster.wait_for(job.job_id, lambda seen: "worker-1" in seen.slot_holders, "take worker-1 up again")
    advance(cluster, job, "with both workers")
    # --- the coordinator from everyone
    for proxy in cuts.to_coordinator.values():
        proxy.cut()
    names = tuple(cuts.to_coordinator)
    wait_until(lambda: not any(alive(cluster, name) for name in names), "all leases to run out", 30)
    begin = time.monotonic()
    before = cluster.client.job(job.job_id).version
    wait_until(lambda: time.monotonic() > begin + CUT_SECONDS, "the cut to be long enough", 30)
    for proxy in cuts.to_coordinator.values():
        proxy.heal()
    cluster.wait_for(job.job_id, lambda seen: seen.version > before + 10, "tell of steps made meanwhile")
    wait_until(lambda: alive(cluster, *names), "all nodes", 30)
    advance(cluster, job, "with everyone")
    # --- nobody computes any more: a stop still keeps what the servers hold
    cluster.kill("worker-0", "worker-1")
    cluster.wait_for(job.job_id, lambda seen: not any(seen.slot_holders), "notice")
    version = cluster.client.job(job.job_id).version
    cluster.client.stop(job.job_id)
    ended = cluster.wait_job(job.job_id)
    assert ended.state == "stopped"
    assert "with a checkpoint" in ended.reason
    assert ended.version >= version
    assert [checkpoint.version for checkpoint in cluster.client.checkpoints(job.job_id)] == [ended.version]
    # --- every step was recorded once, under the first plan
    steps = [item for item in cluster.client.watch(job.job_id, follow=False) if hasattr(item, "grad_norm")]
    assert [step.step for step in steps] == list(range(ended.version))
    assert {step.epoch for step in steps} == {ended.epoch} == {1}
