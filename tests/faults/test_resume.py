"""All processes are killed; the job resumes from its last checkpoint with other numbers of workers and servers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster, wait_until
from support.tiny import tiny_recipe

CODECS = [{"push": "fp32", "pull": "fp32"}, {"push": "int8", "pull": "delta-int8", "keyframe_versions": 9}]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("codec", CODECS, ids=["fp32", "delta-int8"])
def test_kill_everything_and_resume_elsewhere(
    cluster: Cluster, tiny_data: Path, tmp_path: Path, codec: dict[str, Any]
) -> None:
    """Where workers pull differences, the reference is resumed as well."""
    training = {"num_steps": 24}
    seed = random.randrange(1 << 30)
    kill_at = random.Random(seed).randrange(3, 20)
    print(f"killing everything once step {kill_at} is committed (seed {seed})")
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0", "worker-1")
    needs_two = {"min_workers": 2, "min_servers": 2}
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", training=training, cluster=needs_two, codec=codec)
    job = cluster.client.submit(recipe)
    undisturbed = cluster.finish(job.job_id)
    reference = cluster.final_digest(job.job_id)

    job = cluster.client.submit(tiny_recipe(tiny_data, tmp_path / "runs", training=training, codec=codec))
    for item in cluster.client.watch(job.job_id):
        if getattr(item, "step", -1) >= kill_at:
            break
    cluster.kill(*cluster.processes)

    cluster.start_coordinator()
    assert cluster.client.job(job.job_id).state in ("running", "planning")
    cluster.start_servers("server-a", "server-b", "server-c")
    cluster.start_workers("worker-a")
    resumed = cluster.finish(job.job_id)
    assert cluster.final_digest(job.job_id) == reference
    assert resumed.epoch == 2
    # Tokens and samples are exact: what was walked twice counts once.
    assert (resumed.num_tokens, resumed.num_samples) == (undisturbed.num_tokens, undisturbed.num_samples)
    assert resumed.num_tokens == 24 * 8 * 32
    assert resumed.validation_loss == undisturbed.validation_loss


@pytest.mark.timeout(240)
def test_killed_server_walks_the_same_steps_again(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    training = {"num_steps": 16}
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    job = cluster.client.submit(tiny_recipe(tiny_data, tmp_path / "runs", training=training))
    cluster.finish(job.job_id)
    reference = cluster.final_digest(job.job_id)

    job = cluster.client.submit(tiny_recipe(tiny_data, tmp_path / "runs", training=training))
    for item in cluster.client.watch(job.job_id):
        if getattr(item, "step", -1) >= 5:
            break
    cluster.kill("server-1")
    finished = cluster.finish(job.job_id)
    assert finished.epoch == 2
    assert cluster.final_digest(job.job_id) == reference


@pytest.mark.timeout(240)
def test_steps_go_on_while_there_is_no_coordinator(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """The coordinator is not in the path of a step: while it is dead the servers themselves go from version to version,
    over checkpoints too that nobody takes the reports of."""
    training = {"num_steps": 100}
    recipe = tiny_recipe(tiny_data, tmp_path / "runs", training=training, checkpoint={"interval_steps": 5})
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    job = cluster.client.submit(recipe)
    for item in cluster.client.watch(job.job_id):
        if getattr(item, "step", -1) >= 5:
            break
    cluster.kill("coordinator")
    servers = ("server-0", "server-1")
    at_death = max(cluster.server_version(name, job.job_id) for name in servers)
    assert at_death < 60, "the job is too short for this test"
    wait_until(
        lambda: min(cluster.server_version(name, job.job_id) for name in servers) >= at_death + 25,
        "25 steps without a coordinator",
        90,
    )
    assert "coordinator" not in cluster.processes
    cluster.start_coordinator()
    finished = cluster.finish(job.job_id)
    # The same plan all along, and every step's report arrived, those made while it was away too.
    assert finished.epoch == 1
    steps = [item.step for item in cluster.client.watch(job.job_id, follow=False) if hasattr(item, "grad_norm")]
    assert steps == list(range(100))
    assert [checkpoint.version for checkpoint in cluster.client.checkpoints(job.job_id)][-1] == 100


@pytest.mark.timeout(240)
def test_too_little_memory_after_a_loss_is_a_wait_not_an_end(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    training = {"num_steps": 16}
    cluster.start_coordinator()
    # The job needs 1.9 MiB on one server, 0.94 MiB on each of two.
    cluster.start_servers("server-0", "server-1", memory="1.4MiB")
    cluster.start_workers("worker-0")
    needs_two = {"min_servers": 2}
    job = cluster.client.submit(tiny_recipe(tiny_data, tmp_path / "runs", training=training, cluster=needs_two))
    cluster.finish(job.job_id)
    reference = cluster.final_digest(job.job_id)

    job = cluster.client.submit(tiny_recipe(tiny_data, tmp_path / "runs", training=training))
    for item in cluster.client.watch(job.job_id):
        if getattr(item, "step", -1) >= 5:
            break
    cluster.kill("server-1")
    waiting = cluster.wait_for(
        job.job_id, lambda job: any("missing" in wait.what for wait in job.waits), "wait for memory"
    )
    assert waiting.state == "planning"
    cluster.start_servers("server-2", memory="1.4MiB")
    finished = cluster.finish(job.job_id)
    assert finished.epoch == 2
    assert cluster.final_digest(job.job_id) == reference
