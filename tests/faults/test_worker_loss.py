"""A worker dies in the middle of a step: the survivor computes its slots at the same version; no bit changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster
from support.tiny import tiny_recipe

from gradstream.client import Event
from gradstream.coordinator.cli.pictures.series import Mark, MarkKind, XAxis, series_of


def undisturbed_digest(cluster: Cluster, data: Path, run_root: Path, **sections: Any) -> str:
    job = cluster.client.submit(tiny_recipe(data, run_root, name="undisturbed", **sections))
    cluster.finish(job.job_id)
    return cluster.final_digest(job.job_id)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("kill@step=3,slot=1", id="before-its-slot"),
        # The tiny model has 44 bundles on two servers: half of the slot was pushed and acknowledged.
        pytest.param("kill@step=3,slot=1,acknowledged=20", id="half-of-a-slot-pushed"),
    ],
)
def test_killed_worker_changes_no_bit(cluster: Cluster, tiny_data: Path, tmp_path: Path, fault: str) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    # Slots are dealt in turns, oldest worker first: worker-1 gets slots 1 and 3, and the fault is for slot 1.
    cluster.start_workers("worker-0")
    reference = undisturbed_digest(cluster, tiny_data, tmp_path / "runs")
    cluster.start_workers("worker-1", faults=fault)
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", name="disturbed", cluster={"min_workers": 2, "min_servers": 2})
    job = cluster.client.submit(recipe)
    assert cluster.wait_dead("worker-1") == -9
    # Another worker may join while the job goes on.
    cluster.start_workers("worker-2")
    cluster.finish(job.job_id)
    messages = [item.message for item in cluster.client.watch(job.job_id, follow=False) if hasattr(item, "message")]
    assert any("slots 1, 3 lost their worker" in message for message in messages), messages
    rows = list(cluster.client.metrics(job.job_id))
    events = [item for item in cluster.client.watch(job.job_id, follow=False) if isinstance(item, Event)]
    assert Mark(MarkKind.GONE, 3) in series_of(cluster.client.job(job.job_id), rows, events, XAxis.steps).marks
    # The survivor took over at the same version: no new plan, no step walked twice.
    assert cluster.client.job(job.job_id).epoch == 1
    assert cluster.final_digest(job.job_id) == reference


@pytest.mark.timeout(240)
def test_workers_that_hang_or_fail_are_benched_and_change_no_bit(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """One heartbeats and computes nothing any more, one runs out of memory: the job goes on with the third."""
    cluster.start_coordinator("stall_seconds=1.5", "stall_factor=5", "bench_seconds=600")
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    reference = undisturbed_digest(cluster, tiny_data, tmp_path / "runs")
    # Slots are dealt in turns: worker-1 gets slot 1, worker-2 slot 2.
    cluster.start_workers("worker-1", faults="hang@step=3,slot=1")
    cluster.start_workers("worker-2", faults="fail@step=2,slot=2")
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", name="disturbed", cluster={"min_workers": 3, "min_servers": 2})
    job = cluster.client.submit(recipe)
    cluster.finish(job.job_id)
    messages = [item.message for item in cluster.client.watch(job.job_id, follow=False) if hasattr(item, "message")]
    failed = "worker worker-2 is benched for this job: MemoryError: out of memory in slot 2 of step 2"
    assert failed in messages, messages
    # By then worker-1 may have got slot 2 as well.
    hung = re.compile(r"worker worker-1 is benched: no progress on slots? 1\b")
    assert any(hung.search(message) for message in messages), messages
    ended = cluster.client.job(job.job_id)
    assert (ended.epoch, set(ended.slot_holders)) == (1, set())
    assert cluster.final_digest(job.job_id) == reference


@pytest.mark.timeout(240)
def test_a_slow_worker_gets_fewer_slots_and_no_bit_changes(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    training = {"num_steps": 30}
    reference = undisturbed_digest(cluster, tiny_data, tmp_path / "runs", training=training)
    cluster.start_workers("worker-1", faults="slow@milliseconds=300")
    recipe = tiny_recipe(
        tiny_data, tmp_path / "runs", name="slow", training=training, cluster={"min_workers": 2, "min_servers": 2}
    )
    job = cluster.client.submit(recipe)
    cluster.finish(job.job_id)
    messages = [item.message for item in cluster.client.watch(job.job_id, follow=False) if hasattr(item, "message")]
    moved = [message for message in messages if "uneven, by how long a slot takes each worker" in message]
    assert len(moved) == 1, messages
    worker_1 = moved[0].partition("worker-1: ")[2]
    assert len(worker_1.split(",")) == 1, moved
    ended = cluster.client.job(job.job_id)
    assert ended.step_breakdown is not None
    assert ended.step_breakdown.slowest_worker == "worker-1"
    assert ended.epoch == 1
    assert cluster.final_digest(job.job_id) == reference
