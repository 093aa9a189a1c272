"""Invariant 1 for fine-tuning: the bits of the adapters depend on recipe, seed, base and data alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster
from support.fine_tuning import random_rows, tuning_recipe, write_base, write_rows
from support.tiny import GPT2, LLAMA

from gradstream.client import Event, Validation
from gradstream.core.data.manifest import NO_TARGET


@pytest.mark.timeout(600)
def test_same_bits_on_any_number_of_workers_servers_and_stages(cluster: Cluster, tmp_path: Path) -> None:
    """GPT-2 has a tied embedding, dropout of its own and linear modules the other way round."""
    configs = {"llama": {**LLAMA, "num_hidden_layers": 3}, "gpt2": {**GPT2, "n_layer": 3}}
    bases = {model: write_base(tmp_path / model, config) for model, config in configs.items()}
    # Held-out rows that the slots cannot share evenly: all of them count nevertheless.
    data = write_rows(tmp_path / "data", num_validation=7)
    num_targets = sum(int((rows[1] != NO_TARGET).sum()) for rows in random_rows(7, seed=2))
    digests: dict[str, dict[str, str]] = {model: {} for model in configs}

    def tune(model: str, name: str, num_workers: int, num_servers: int = 1, local: Any = None, **pipeline: Any) -> None:
        recipe = tuning_recipe(
            bases[model],
            data,
            tmp_path / "runs",
            name=f"{model}-{name}",
            codec={"push": "bf16", "pull": "delta-int8"},
            fine_tuning={"held": "int8", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "rslora": True}},
            training={"recompute": name == "recomputed", "num_steps": 4},
            pipeline=pipeline,
            local=local,
            cluster={"min_workers": num_workers, "min_servers": num_servers},
        )
        job = cluster.client.submit(recipe)
        cluster.finish(job.job_id, 60.0)
        digests.setdefault(f"{model} in rounds" if local else model, {})[name] = cluster.final_digest(job.job_id)
        items = cluster.client.watch(job.job_id, follow=False)
        assert {item.num_tokens for item in items if isinstance(item, Validation)} == {num_targets}

    cluster.start_coordinator()
    cluster.start_servers("server-0")
    cluster.start_workers("worker-0")
    rounds = {"steps": 2}
    for model in configs:
        tune(model, "one", 1)
    tune("llama", "one", 1, local=rounds)
    cluster.start_workers("worker-1")
    cluster.start_servers("server-1", "server-2")
    tune("llama", "two-on-three", 2, 3)
    tune("llama", "recomputed", 2, 3, stages=2, schedule="1f1b")
    tune("llama", "two-on-three", 2, 3, local=rounds)
    tune("llama", "recomputed", 2, 3, local=rounds, stages=2)
    for model in configs:
        tune(model, "zero-bubble", 2, 3, stages=2, schedule="zero-bubble")
    cluster.start_workers("worker-2", "worker-3")
    # The last stage has the head alone, which has no adapter.
    for model in configs:
        tune(model, "four-stages", 4, 3, stages=4)
    for found in digests.values():
        assert len(set(found.values())) == 1, digests
    assert len(digests["llama in rounds"]) == 3


def test_the_best_version_is_kept_and_ends_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """A rate so high that the loss only gets worse: the job ends after its patience, the best version is still there
    although only one checkpoint is kept."""
    base, data = write_base(tmp_path / "base"), write_rows(tmp_path / "data")
    recipe = tuning_recipe(
        base,
        data,
        tmp_path / "runs",
        training={"num_steps": 40},
        optimizer={"learning_rate": 0.3},
        checkpoint={"keep": 1},
        fine_tuning={"patience": 3},
    )
    cluster.start_coordinator()
    cluster.start_servers("server-0")
    cluster.start_workers("worker-0")
    job = cluster.finish(cluster.client.submit(recipe).job_id, 60.0)
    assert "ended early at version" in job.reason
    assert job.version < 40
    items = list(cluster.client.watch(job.job_id, follow=False))
    events = [item.message for item in items if isinstance(item, Event)]
    losses = {item.version: item.loss for item in items if isinstance(item, Validation)}
    best = min((loss, version) for version, loss in losses.items() if version)[1]
    versions = [checkpoint.version for checkpoint in cluster.client.checkpoints(job.job_id)]
    assert best in versions
    assert len(versions) <= 3, "the best one, the newest, and one that may have been under way"
    assert any("removed version" in event for event in events)
