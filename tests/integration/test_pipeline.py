"""Invariant 1 for pipelines: the final bits depend neither on the number of stages and replicas nor on the schedule."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster
from support.tiny import GPT2, LLAMA, tiny_recipe

SCHEDULES = ["gpipe", "eager-1f1b", "zero-bubble"]


def start(cluster: Cluster, num_workers: int, num_servers: int = 2) -> None:
    cluster.start_coordinator()
    cluster.start_servers(*(f"server-{number}" for number in range(num_servers)))
    cluster.start_workers(*(f"worker-{number}" for number in range(num_workers)))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_same_bits_for_any_number_of_stages_and_replicas(
    model: str, cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """GPT-2 has tied embeddings, whose gradient comes in two parts, and dropout."""
    config = {"llama": {**LLAMA, "num_hidden_layers": 3}, "gpt2": {**GPT2, "n_layer": 3}}[model]
    digests: dict[str, str] = {}
    losses: dict[str, float | None] = {}

    def train(name: str, num_workers: int, recompute: bool = False, **pipeline: Any) -> None:
        recipe = tiny_recipe(
            tiny_data,
            tmp_path / "runs",
            name=f"{model}-{name}",
            model={"config": config},
            training={"recompute": recompute},
            codec={"push": "int8", "pull": "delta-int8"},
            pipeline=pipeline,
            cluster={"min_workers": num_workers},
        )
        job = cluster.client.submit(recipe)
        losses[name] = cluster.finish(job.job_id, 60.0).loss
        digests[name] = cluster.final_digest(job.job_id)

    start(cluster, 1)
    train("one", 1, stages="auto")
    if model == "llama":
        train("none", 1, stages=1)
    cluster.start_workers("worker-1")
    train("two", 2, stages=2)
    for schedule in SCHEDULES:
        train(schedule, 2, stages=2, schedule=schedule)
    train("recomputed", 2, recompute=True, stages=2, schedule="1f1b")
    train("interleaved", 2, stages=4, chunks=2, schedule="interleaved-1f1b")
    cluster.start_workers("worker-2")
    train("three", 3, stages=3)
    cluster.start_workers("worker-3")
    train("two-by-two", 4, stages=2)
    assert len(set(digests.values())) == 1, digests
    assert len(set(losses.values())) == 1, losses


def test_a_stage_that_fits_no_worker_is_refused_before_anything_starts(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0")
    cluster.start_workers("small-0", "small-1", memory="300KiB")
    job = cluster.client.submit(tiny_recipe(tiny_data, tmp_path / "runs", pipeline={"stages": 2}))
    failed = cluster.wait_job(job.job_id)
    assert failed.state == "failed"
    needs = r"worker small-\d needs [\d,]+ bytes for stage \d .* but offers [\d,]+ \([\d,]+ missing\)"
    assert re.search(needs, failed.reason), failed.reason
    assert failed.epoch == 0, "there never was a plan"


@pytest.mark.parametrize("activations", ["bf16", "int8"])
def test_coarser_activations_train_as_well(activations: str, cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    start(cluster, 2, num_servers=1)
    found = []
    for kind in ("fp32", activations):
        recipe = tiny_recipe(tiny_data, tmp_path / "runs", pipeline={"stages": 2, "activations": kind})
        found.append(cluster.finish(cluster.client.submit(recipe).job_id, 60.0))
    exact, coarse = (job.validation_loss for job in found)
    assert exact is not None
    assert coarse is not None
    assert 0 < abs(exact - coarse) < 0.01


@pytest.mark.timeout(300)
def test_rounds_have_the_same_bits_for_any_number_of_stages(tiny_data: Path, cluster: Cluster, tmp_path: Path) -> None:
    """GPT-2 has dropout, and a tied table whose gradients are added after each inner step. A worker dies in a round."""

    def submit(name: str, num_workers: int, **pipeline: Any) -> str:
        recipe = tiny_recipe(
            tiny_data,
            tmp_path / "runs",
            name=f"rounds-{name}",
            model={"config": {**GPT2, "n_layer": 3}},
            training={"num_steps": 9, "num_slots": 2},
            codec={"push": "int8", "pull": "delta-int8"},
            optimizer={"clip_norm": 0.5},
            local={"steps": 4, "after": 1},
            pipeline=pipeline,
            cluster={"min_workers": num_workers},
        )
        return cluster.client.submit(recipe).job_id

    start(cluster, 3, num_servers=1)
    cluster.start_workers("mortal", faults="kill@step=7")
    two_by_two = submit("two-by-two", 4, stages=2)
    assert cluster.wait_dead("mortal") == -9
    num_tokens = cluster.finish(two_by_two, 60.0).num_tokens
    assert cluster.client.job(two_by_two).epoch == 1
    one = submit("one", 1, stages="auto")
    assert cluster.finish(one, 60.0).num_tokens == num_tokens
    assert cluster.final_digest(two_by_two) == cluster.final_digest(one)
