"""Pausing, stopping, resuming and checkpointing a real job: ordinary transitions that change no bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.tiny import tiny_recipe

from gradstream.client import Event, Job
from gradstream.coordinator.cli import main
from gradstream.coordinator.cli.pictures.series import Mark, MarkKind, XAxis, series_of
from gradstream.core.errors import ConfigError
from gradstream.core.recipe.recipe import Recipe


def submit_and_reach(cluster: Cluster, recipe: Recipe, step: int) -> Job:
    """Submit a job and watch it until a step is committed."""
    job = cluster.client.submit(recipe)
    for item in cluster.client.watch(job.job_id):
        if getattr(item, "step", -1) >= step:
            break
    return job


def check_metrics(cluster: Cluster, job_id: str, directory: Path) -> None:
    """Every step of a job that was stopped and resumed is in its metrics once, and its picture marks the resumption."""
    rows = list(cluster.client.metrics(job_id))
    assert [row.step for row in rows] == list(range(25))
    assert [row.step for row in rows if row.validation_loss is not None] == list(range(0, 25, 3))
    assert [row.num_tokens for row in rows[:-1]] == [(step + 1) * 8 * 32 for step in range(24)]
    (resumed_at,) = [after.step for before, after in pairwise(rows[:-1]) if after.epoch != before.epoch]
    # All weights are pulled by the one worker, and every slot pushes a gradient of all of them.
    num_bytes = 4 * cluster.client.job(job_id).num_parameters
    assert {(row.pushed_bytes, row.pulled_bytes) for row in rows[1:-1]} == {(4 * num_bytes, num_bytes)}
    assert [row.step for row in rows if row.step_time is None] == [0, resumed_at, 24]
    assert rows[0].learning_rate is not None
    assert rows[-2].grad_norm is not None

    events = [item for item in cluster.client.watch(job_id, follow=False, kinds=["event"]) if isinstance(item, Event)]
    marks = series_of(cluster.client.job(job_id), rows, events, XAxis.steps).marks
    assert Mark(MarkKind.RESUMED, resumed_at) in marks
    picture = directory / "loss.png"
    assert main(["plot", job_id, "-c", cluster.address, "--to", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(180)
def test_pause_and_stop_change_no_bit(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    # Far fewer checkpoints than steps, so that those of pause and stop are seen to be their own.
    recipe = tiny_recipe(
        tiny_data, tmp_path / "runs", training={"num_steps": 24}, checkpoint={"interval_steps": 0, "keep": 5}
    )
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    job = cluster.client.submit(recipe)
    cluster.finish(job.job_id)
    reference = cluster.final_digest(job.job_id)

    job = submit_and_reach(cluster, recipe, 5)
    cluster.client.pause(job.job_id)
    paused = cluster.wait_for(job.job_id, lambda job: job.state == "paused", "pause")
    assert 5 < paused.version < 24
    assert paused.slot_holders == ("",) * 4
    # Where the worker was not at hand when the pause was asked for, the servers' checkpoint comes first.
    resume = [f"`gradstream resume {paused.job_id}`"]
    cluster.wait_for(job.job_id, lambda job: [wait.what for wait in job.waits] == resume, "its checkpoint")
    cluster.client.resume(job.job_id)
    finished = cluster.finish(job.job_id)
    assert finished.epoch == 1, "a pause keeps the servers' state; nothing is loaded again"
    assert cluster.final_digest(job.job_id) == reference

    job = submit_and_reach(cluster, recipe, 5)
    made = cluster.client.checkpoint(job.job_id)
    assert 5 < made.version < 24
    finished = cluster.finish(job.job_id)
    assert finished.epoch == 1
    assert [checkpoint.version for checkpoint in cluster.client.checkpoints(job.job_id)] == [made.version, 24]
    assert cluster.final_digest(job.job_id) == reference
    with pytest.raises(ConfigError, match="is finished; only a running job can be asked for a checkpoint"):
        cluster.client.checkpoint(job.job_id)

    job = submit_and_reach(cluster, recipe, 5)
    cluster.client.stop(job.job_id)
    stopped = cluster.wait_job(job.job_id)
    assert stopped.state == "stopped"
    assert [checkpoint.version for checkpoint in cluster.client.checkpoints(job.job_id)] == [stopped.version]
    cluster.client.resume(job.job_id)
    finished = cluster.finish(job.job_id)
    assert finished.epoch == 2
    assert cluster.final_digest(job.job_id) == reference
    assert finished.num_tokens == 24 * 8 * 32
    check_metrics(cluster, job.job_id, tmp_path)
    # Nothing was left over that would frighten whoever reads the logs.
    for server in ("server-0", "server-1"):
        assert "never retrieved" not in cluster.log(server)
