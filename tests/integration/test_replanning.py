"""Servers join a running real job and leave it: no step is lost, and no bit changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cluster import Cluster, wait_until
from support.tiny import tiny_recipe

from gradstream.client import Event, Step
from gradstream.core.errors import ConfigError


@pytest.mark.timeout(180)
def test_servers_come_and_go_without_a_lost_step(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    # No checkpoints but those of the orders and the last one.
    recipe = tiny_recipe(
        tiny_data,
        tmp_path / "runs",
        training={"num_steps": 60},
        checkpoint={"interval_steps": 0, "keep": 5},
        codec={"push": "int8", "pull": "delta-int8"},
    )
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    job_id = cluster.client.submit(recipe).job_id
    cluster.finish(job_id)
    reference = cluster.final_digest(job_id)

    job_id = cluster.client.submit(recipe).job_id
    cluster.wait_for(job_id, lambda job: job.version > 2, "begin")
    with pytest.raises(ConfigError, match=r"nothing would change: .* \(server-0, server-1\)"):
        cluster.client.replan(job_id)
    # The job rests until the newcomer is there.
    cluster.client.pause(job_id)
    cluster.wait_for(job_id, lambda job: job.state == "paused", "pause")
    cluster.start_servers("server-2")
    wait_until(lambda: "server-2" in [node.name for node in cluster.client.nodes()], "server-2 to register", 30)
    cluster.client.resume(job_id)
    told = cluster.client.replan(job_id).reason
    assert told.startswith("replanning at step ")
    assert told.endswith(": 2 → 3 servers (server-2 in)")
    cluster.wait_for(job_id, lambda job: job.epoch == 2, "be replanned")
    assert "(server-0 out)" in cluster.client.replan(job_id, without=["server-0"]).reason
    cluster.wait_for(job_id, lambda job: job.epoch == 3, "be replanned")
    # Nothing of the job is at server-0 any more.
    cluster.terminate("server-0")
    assert cluster.finish(job_id).epoch == 3
    assert cluster.final_digest(job_id) == reference
    history = list(cluster.client.watch(job_id, follow=False))
    steps = [item.step for item in history if isinstance(item, Step)]
    assert steps == list(range(60)), "each step was computed once"
    assert not [item for item in history if isinstance(item, Event) and "recomputed" in item.message]
