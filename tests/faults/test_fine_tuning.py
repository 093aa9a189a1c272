"""A fine-tuning through the same faults as any other job: the bits of its adapters do not change."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cluster import Cluster
from support.fine_tuning import tuning_recipe, write_base, write_rows

from gradstream.core.pretrained.base import find_base


@pytest.mark.timeout(300)
def test_killed_workers_and_a_killed_cluster_change_no_bit(cluster: Cluster, tmp_path: Path) -> None:
    base, data = write_base(tmp_path / "base"), write_rows(tmp_path / "data")
    before = find_base(str(base))[0].sha256

    def submit(name: str, num_workers: int) -> str:
        recipe = tuning_recipe(
            base,
            data,
            tmp_path / "runs",
            name=name,
            training={"num_steps": 8},
            cluster={"min_workers": num_workers},
            fine_tuning={"held": "bf16", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
        )
        return cluster.client.submit(recipe).job_id

    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    undisturbed = submit("undisturbed", 1)
    cluster.finish(undisturbed)
    reference = cluster.final_digest(undisturbed)
    # A worker dies within a slot.
    cluster.start_workers("worker-1", faults="kill@step=3,slot=1")
    disturbed = submit("disturbed", 2)
    assert cluster.wait_dead("worker-1") == -9
    cluster.finish(disturbed)
    assert cluster.final_digest(disturbed) == reference
    # Everything dies; another number of servers and workers goes on from the last checkpoint.
    cluster.start_workers("worker-2", faults="kill@step=5,slot=1")
    resumed = submit("resumed", 2)
    assert cluster.wait_dead("worker-2") == -9
    cluster.kill(*cluster.processes)
    cluster.start_coordinator()
    cluster.start_servers("server-2")
    cluster.start_workers("worker-3", "worker-4")
    cluster.finish(resumed)
    assert cluster.final_digest(resumed) == reference
    assert find_base(str(base))[0].sha256 == before
