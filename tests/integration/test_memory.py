"""Nodes that load one plan after another hold the memory of one plan."""

from __future__ import annotations

import math
from pathlib import Path

import psutil
from support.cluster import Cluster, wait_until
from support.tiny import LLAMA, tiny_recipe

from gradstream.core.model.model import inventory

NUM_JOBS = 3


def test_memory_does_not_grow_from_plan_to_plan(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0")
    cluster.start_workers("worker-0")
    # 9.7 million parameters: 232 MB on the server, 39 MB and as much for gradients on the worker.
    model = {**LLAMA, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4}
    num_parameters = sum(math.prod(tensor.shape) for tensor in inventory(model))
    recipe = tiny_recipe(
        tiny_data,
        tmp_path / "runs",
        model={"config": model},
        training={"num_steps": 2},
        codec={"push": "int8", "pull": "delta-int8"},
        checkpoint={"interval_steps": 0, "keep": 1},
        validation={"interval_steps": 0},
        cluster={"fragment_bytes": 1 << 20},
    )
    nodes = {name: psutil.Process(cluster.processes[name].pid) for name in ("server-0", "worker-0")}
    held: dict[str, list[int]] = {name: [] for name in nodes}

    def idle() -> bool:
        return not any(node.activity.job_id for node in cluster.client.nodes())

    for _ in range(NUM_JOBS):
        cluster.finish(cluster.client.submit(recipe).job_id)
        wait_until(idle, "the job to be dropped", 30)
        for name, process in nodes.items():
            held[name].append(process.memory_info().rss)
    one_plan = {"server-0": 24 * num_parameters, "worker-0": 4 * num_parameters}
    for name, sizes in held.items():
        # The first job is a warm-up; of what each later one added, less than a half may stay.
        assert sizes[-1] - sizes[0] < (NUM_JOBS - 1) * one_plan[name] // 2, (name, sizes)
