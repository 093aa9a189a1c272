"""Draws docs/images/loss.png: the losses of a tiny model that was paused, and lost a worker and a server.

.venv/bin/python docs/images/draw_loss.py    # starts a cluster on this machine; a few minutes
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support.cluster import Cluster, running
from support.tiny import prepare_tiny_data, tiny_recipe

from gradstream.client import Step
from gradstream.coordinator.cli import main as gradstream


def main() -> None:
    """Run the job, disturb it, and have `gradstream plot` draw."""
    with tempfile.TemporaryDirectory() as temporary, running(Path(temporary) / "cluster") as cluster:
        directory = Path(temporary)
        cluster.start_coordinator()
        cluster.start_servers("server-0", "server-1")
        cluster.start_workers("worker-0", "worker-1")
        recipe = tiny_recipe(
            prepare_tiny_data(directory),
            directory / "runs",
            training={"num_steps": 400},
            validation={"interval_steps": 40, "num_samples": 8},
            checkpoint={"interval_steps": 50, "keep": 3},
            cluster={"min_workers": 1, "min_servers": 2},
        )
        job_id = cluster.client.submit(recipe).job_id
        reach(cluster, job_id, 100)
        cluster.client.pause(job_id)
        cluster.wait_for(job_id, lambda job: job.state == "paused", "pause")
        cluster.client.resume(job_id)
        reach(cluster, job_id, 180)
        cluster.kill("worker-1")
        reach(cluster, job_id, 260)
        cluster.kill("server-1")
        cluster.start_servers("server-2")
        cluster.finish(job_id)
        gradstream(["plot", job_id, "-c", cluster.address, "--to", str(Path(__file__).with_name("loss.png"))])


def reach(cluster: Cluster, job_id: str, step: int) -> None:
    """Wait until a step is committed."""
    for item in cluster.client.watch(job_id, kinds=["step"]):
        if isinstance(item, Step) and item.step >= step:
            return


if __name__ == "__main__":
    main()
