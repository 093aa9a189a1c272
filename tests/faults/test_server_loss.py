"""A server dies between the decision on a step and the publication of its version."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cluster import Cluster
from support.tiny import tiny_recipe

KILLED_AT = 5


@pytest.mark.timeout(300)
def test_a_server_killed_between_decision_and_publication(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    """The version that was decided appears nowhere: it is due for a checkpoint, of which others may have written their
    files, and there is none. The steps since the last checkpoint are computed again, to the same bits. The victim is
    the leader, then another server."""
    cluster.start_coordinator()
    cluster.start_servers("server-0")
    cluster.start_servers("server-1")
    cluster.start_workers("worker-0", "worker-1")

    def recipe(name: str) -> str:
        changes = {"training": {"num_steps": 10}, "checkpoint": {"interval_steps": 2, "keep": 9}}
        needs = {"min_workers": 2, "min_servers": 2}
        made = tiny_recipe(tiny_data, tmp_path / "runs", name=name, cluster=needs, **changes)
        return cluster.client.submit(made).job_id

    reference = recipe("undisturbed")
    undisturbed = cluster.finish(reference)
    digest = cluster.final_digest(reference)
    losses = _losses(cluster, reference)

    for victim, survivor in (("server-0", "server-1"), ("server-1", "server-0")):
        cluster.kill("server-0", "server-1")
        # The first to register leads.
        for name in ("server-0", "server-1"):
            fault = f"kill@step={KILLED_AT},decided=1" if name == victim else ""
            cluster.start_servers(name, faults=fault)
        job_id = recipe(f"without-{victim}")
        assert cluster.wait_dead(victim) == -9
        cluster.start_servers(victim)
        finished = cluster.finish(job_id)
        messages = [item.message for item in cluster.client.watch(job_id, follow=False) if hasattr(item, "message")]
        plans = [message for message in messages if message.startswith("epoch ")]
        assert f"led by {min(victim, survivor)}" in plans[0]
        assert len(plans) == 2, plans
        assert f"start: from the checkpoint of version {KILLED_AT - 1}" in plans[1], plans[1]
        assert cluster.final_digest(job_id) == digest
        assert (finished.num_tokens, finished.num_samples) == (undisturbed.num_tokens, undisturbed.num_samples)
        # Whatever was reported of a step, under either plan, is the same.
        found = _losses(cluster, job_id)
        assert sorted(set(found)) == sorted(losses)


def _losses(cluster: Cluster, job_id: str) -> list[tuple[int, float]]:
    return [(item.step, item.loss) for item in cluster.client.watch(job_id, follow=False) if hasattr(item, "grad_norm")]
