"""A stage's worker dies in the middle of a slot: it is named, the slot is computed again, and no bit changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster
from support.tiny import tiny_recipe

from gradstream.client import Event
from gradstream.core.recipe.recipe import Recipe


def recipe_of(data: Path, run_root: Path, name: str, num_workers: int, **pipeline: Any) -> Recipe:
    return tiny_recipe(
        data,
        run_root,
        name=name,
        codec={"push": "int8", "pull": "delta-int8"},
        pipeline={"stages": 2, "schedule": "1f1b", **pipeline},
        cluster={"min_workers": num_workers},
    )


def start(cluster: Cluster, num_workers: int, faults: dict[str, str] | None = None) -> None:
    """One after the other, so that the first ones get the first places."""
    for number in range(num_workers):
        cluster.start_workers(f"worker-{number}", faults=(faults or {}).get(f"worker-{number}", ""))


def undisturbed(cluster: Cluster, data: Path, run_root: Path) -> str:
    """The final digest with one worker that has all stages."""
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("reference")
    job = cluster.client.submit(recipe_of(data, run_root, "undisturbed", 1, stages="auto"))
    cluster.finish(job.job_id)
    cluster.terminate("reference")
    return cluster.final_digest(job.job_id)


def events(cluster: Cluster, job_id: str) -> list[str]:
    return [item.message for item in cluster.client.watch(job_id, follow=False) if isinstance(item, Event)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("victim", "witness", "fault"),
    [
        pytest.param("worker-1", "worker-0", "kill@step=3,slot=1,sent=1", id="last-stage"),
        pytest.param("worker-0", "worker-1", "kill@step=3,slot=1,sent=1", id="first-stage"),
        # All of its part of slot 0 was pushed: what the others have of it stays of use.
        pytest.param("worker-1", "worker-0", "kill@step=3,slot=0,acknowledged=3", id="while-it-pushes"),
    ],
)
def test_a_neighbour_that_dies_mid_slot_is_named_and_its_slot_computed_again(
    cluster: Cluster, tiny_data: Path, tmp_path: Path, victim: str, witness: str, fault: str
) -> None:
    reference = undisturbed(cluster, tiny_data, tmp_path / "runs")
    start(cluster, 3, {victim: fault})  # worker-2 is idle until it takes the dead one's place
    job = cluster.client.submit(recipe_of(tiny_data, tmp_path / "runs", "disturbed", 3))
    assert cluster.wait_dead(victim) == -9
    cluster.finish(job.job_id)
    assert cluster.client.job(job.job_id).epoch == 1
    assert cluster.final_digest(job.job_id) == reference
    named = [
        line for line in cluster.log(witness).splitlines() if "neighbour" in line and f"worker {victim} at" in line
    ]
    assert named, cluster.log(witness)
    told = events(cluster, job.job_id)
    assert any(message.startswith(f"worker {victim} is gone") for message in told), told
    other = f"{witness} → worker-2" if witness == "worker-0" else f"worker-2 → {witness}"
    assert any("1 formed" in message and other in message for message in told), told


@pytest.mark.timeout(300)
def test_without_a_spare_worker_the_job_says_what_it_waits_for(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    reference = undisturbed(cluster, tiny_data, tmp_path / "runs")
    start(cluster, 2, {"worker-1": "kill@step=2,slot=0,sent=1"})
    job = cluster.client.submit(recipe_of(tiny_data, tmp_path / "runs", "disturbed", 2, schedule="zero-bubble"))
    assert cluster.wait_dead("worker-1") == -9
    cluster.wait_for(
        job.job_id,
        lambda job: any("1 of 2 workers, 1 more worker needed" in wait.what for wait in job.waits),
        "say that it lacks a worker",
    )
    cluster.start_workers("worker-2")
    cluster.finish(job.job_id)
    assert cluster.final_digest(job.job_id) == reference


@pytest.mark.timeout(300)
def test_two_replicas_lose_a_member_each_and_one_replica_goes_on(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    reference = undisturbed(cluster, tiny_data, tmp_path / "runs")
    # Places are dealt in turn: worker-0 and worker-1 make the first replica. One that has to change its place loads
    # other stages.
    faults = {"worker-1": "kill@step=2,slot=0,sent=1", "worker-3": "kill@step=2,slot=1,sent=1"}
    start(cluster, 4, faults)
    job = cluster.client.submit(recipe_of(tiny_data, tmp_path / "runs", "disturbed", 4))
    assert cluster.wait_dead("worker-1") == -9
    assert cluster.wait_dead("worker-3") == -9
    cluster.finish(job.job_id)
    assert cluster.final_digest(job.job_id) == reference


@pytest.mark.timeout(300)
def test_a_pipeline_rests_and_goes_on_and_outlives_its_coordinator(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    reference = undisturbed(cluster, tiny_data, tmp_path / "runs")
    start(cluster, 2)
    job = cluster.client.submit(recipe_of(tiny_data, tmp_path / "runs", "disturbed", 2))
    cluster.client.pause(job.job_id)
    cluster.wait_for(job.job_id, lambda job: job.state == "paused", "pause")
    cluster.kill("coordinator")
    cluster.start_coordinator()
    cluster.client.resume(job.job_id)
    cluster.finish(job.job_id)
    assert cluster.final_digest(job.job_id) == reference


@pytest.mark.timeout(300)
def test_a_job_without_a_whole_replica_can_be_stopped(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0")
    start(cluster, 2, {"worker-1": "kill@step=2,slot=0,sent=1"})
    job = cluster.client.submit(recipe_of(tiny_data, tmp_path / "runs", "stopped", 2))
    assert cluster.wait_dead("worker-1") == -9
    cluster.wait_for(job.job_id, lambda job: any("a replica for slots" in w.what for w in job.waits), "lack a worker")
    cluster.client.stop(job.job_id)
    assert cluster.wait_job(job.job_id).state == "stopped"
