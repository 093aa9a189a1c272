"""A real job starts with the weights of another one, with its optimizer state or without: the same bits each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cluster import Cluster
from support.tiny import tiny_recipe


@pytest.mark.timeout(240)
def test_a_warm_start_gives_the_same_bits_each_time(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    # With differences, workers would hold the weights less exactly at the first job's end than at the start of another.
    codec = {"push": "int8", "pull": "fp32"}
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    first = cluster.client.submit(tiny_recipe(tiny_data, root, codec=codec)).job_id
    trained = cluster.finish(first)

    def run(start_from: object) -> tuple[str, float | None]:
        # Other fragments than the first job's: a checkpoint names slices.
        recipe = tiny_recipe(
            tiny_data, root, name="warm", codec=codec, start_from=start_from, cluster={"fragment_bytes": 2048}
        )
        job = cluster.finish(cluster.client.submit(recipe).job_id)
        return cluster.final_digest(job.job_id), job.initial_validation_loss

    warm, loss = run(f"job:{first}")
    assert loss == trained.validation_loss, "version 0 has the weights of the first job's last version"
    with_optimizer, loss = run({"weights": f"job:{first}", "optimizer": True})
    assert loss == trained.validation_loss
    assert with_optimizer != warm
    # From a directory, on another number of servers.
    cluster.terminate("server-1")
    assert run(str(root / first / "checkpoints" / "step-00000006")) == (warm, loss)
