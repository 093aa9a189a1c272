"""`codec: auto` on a real cluster: it measures, settles, gives its reason, and records every step's codec."""

from __future__ import annotations

from pathlib import Path

from support.cluster import Cluster
from support.tiny import tiny_recipe

from gradstream.client import Step
from gradstream.services.parameter_server.autocodec import LADDER, TRIAL_STEPS


def test_auto_settles_and_says_why(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    # Links whose speed changes while it measures, as on a busy machine, are measured again.
    num_steps = 10 * len(LADDER) * (TRIAL_STEPS + 1)
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
    submitted = cluster.client.submit(recipe)
    job = cluster.wait_for(
        submitted.job_id, lambda job: "(auto: a step took: bf16 " in job.codecs or job.state.ended, "settle"
    )
    cluster.client.stop(job.job_id)
    cluster.wait_job(job.job_id)
    assert job.codecs.startswith("push ")
    assert "(auto: a step took: bf16 " in job.codecs
    assert "slowest link" in job.codecs
    assert job.codecs.split()[1].rstrip(",") in LADDER
    steps = [item for item in cluster.client.watch(job.job_id, follow=False) if isinstance(item, Step)]
    assert [step.step for step in steps] == list(range(len(steps)))
    assert len(steps) > TRIAL_STEPS
    # bf16 was measured first, by as many steps as a trial has.
    assert len({step.pushed_bytes for step in steps[: TRIAL_STEPS + 1]}) == 1
    assert steps[-1].loss < steps[0].loss
