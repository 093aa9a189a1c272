"""`codec: auto` on a real cluster: it measures, settles, says why, and every step's codec is on record."""

from __future__ import annotations

from pathlib import Path

from support.cluster import Cluster
from support.tiny import tiny_recipe

from gradstream.client import Step
from gradstream.services.parameter_server.autocodec import LADDER, TRIAL_STEPS


def test_auto_settles_and_says_why(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    num_steps = len(LADDER) * (TRIAL_STEPS + 1) + 4
    recipe = tiny_recipe(
        tiny_data,
        tmp_path / "runs",
        training={"num_steps": num_steps},
        codec={"push": "auto", "pull": "auto"},
        validation={"interval_steps": 0},
        checkpoint={"interval_steps": 0},
        cluster={"min_servers": 2, "min_workers": 2},
    )
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0", "worker-1")
    job = cluster.finish(cluster.client.submit(recipe).job_id)
    assert job.codecs.startswith("push ")
    assert "(auto: a step took: bf16 " in job.codecs
    assert "slowest link" in job.codecs
    assert job.codecs.split()[1].rstrip(",") in LADDER
    steps = [item for item in cluster.client.watch(job.job_id, follow=False) if isinstance(item, Step)]
    assert len(steps) == num_steps
    # bf16 was measured first, by as many steps as a trial has.
    assert len({step.pushed_bytes for step in steps[: TRIAL_STEPS + 1]}) == 1
    assert steps[-1].loss < steps[0].loss
