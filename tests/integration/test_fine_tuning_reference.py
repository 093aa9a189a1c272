"""Fine-tuning on the cluster against peft and torch in one process: the same base, adapters, rows and optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from support.cluster import Cluster, running
from support.fine_tuning import ROW_LENGTH, tuning_recipe, write_base, write_rows
from support.plain_rounds import plain_losses
from support.tiny import GPT2, LLAMA, NO_DROPOUT
from transformers import AutoModelForCausalLM

from gradstream.client import Step, Validation
from gradstream.core.data.manifest import NO_TARGET, parse_manifest
from gradstream.core.data.sampler import SlotSampler
from gradstream.core.model.model import initial_weights
from gradstream.core.recipe.recipe import Recipe

NUM_STEPS = 30


def examples_of(data: Path, file: str, window: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets) of each example of a row, as if it had never been packed."""
    row = np.fromfile(data / file, "<u4").reshape(-1, 3, ROW_LENGTH)[window].astype(np.int64)
    found = []
    for number in range(1, int(row[2].max()) + 1):
        inside = row[2] == number
        targets = np.where(row[1][inside] == NO_TARGET, -100, row[1][inside])
        found.append((torch.from_numpy(row[0][inside])[None], torch.from_numpy(targets)[None]))
    return found


def train_reference(recipe: Recipe, base: Path, data: Path) -> list[float]:
    """Mean training loss of every step or round, of examples that are computed one by one."""
    torch.set_num_threads(1)
    manifest = parse_manifest((data / "manifest.json").read_bytes())
    training, tuning = recipe.training, recipe.fine_tuning
    assert tuning is not None
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tuning.lora is not None:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=tuning.lora.rank, lora_alpha=int(tuning.lora.alpha), target_modules="all-linear"
        )
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, tensor in initial_weights(recipe.model.config, recipe.seed, lora=tuning.lora):
                model.get_parameter(f"base_model.model.{name}").copy_(tensor)
    model.train()
    samplers = [
        SlotSampler(manifest, "train", slot, training.num_slots, ROW_LENGTH, recipe.seed)
        for slot in range(training.num_slots)
    ]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.optimizer.learning_rate, betas=recipe.optimizer.betas, eps=1e-8, weight_decay=0.0
    )

    def passes(slot: int, step: int) -> tuple[float, int]:
        loss_sum, num_tokens = 0.0, 0
        for address in samplers[slot].samples(step, training.slot_batch):
            for inputs, targets in examples_of(data, address.file, address.window):
                logits = model(input_ids=inputs, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                loss.backward()
                loss_sum += loss.item()
                num_tokens += int((targets != -100).sum())
        return loss_sum, num_tokens

    if recipe.local is not None:
        return plain_losses(recipe, trained, passes)
    losses = []
    for step in range(training.num_steps):
        found = [passes(slot, step) for slot in range(training.num_slots)]
        num_tokens = sum(count for _, count in found)
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.div_(num_tokens)
        torch.nn.utils.clip_grad_norm_(trained, recipe.optimizer.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(math.fsum(loss_sum for loss_sum, _ in found) / num_tokens)
    return losses


@pytest.fixture(scope="module")
def two_of_each(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with two servers and two workers."""
    with running(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_coordinator()
        cluster.start_servers("server-0", "server-1")
        cluster.start_workers("worker-0", "worker-1")
        yield cluster


@pytest.mark.timeout(180)
@pytest.mark.parametrize("config", [LLAMA, {**GPT2, **NO_DROPOUT}], ids=["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_losses_equal_those_of_one_process(
    two_of_each: Cluster, tmp_path: Path, config: dict[str, Any], method: str
) -> None:
    base, data = write_base(tmp_path / "base", config), write_rows(tmp_path / "data")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    tuning = {} if method == "lora" else {"method": "full", "lora": None}
    recipe = tuning_recipe(
        base,
        data,
        tmp_path / "runs",
        training={"num_steps": NUM_STEPS},
        # A low clip norm, so that clipping takes part.
        optimizer={"clip_norm": 0.5, "learning_rate": 1e-2 if method == "lora" else 1e-3},
        checkpoint={"interval_steps": 0},
        validation={"interval_steps": 10},
        fine_tuning=tuning,
        cluster={"min_workers": 2, "min_servers": 2},
    )
    job = two_of_each.client.submit(recipe)
    two_of_each.finish(job.job_id)
    items = list(two_of_each.client.watch(job.job_id, follow=False))
    losses = {item.step: item.loss for item in items if isinstance(item, Step)}
    expected = train_reference(recipe, base, data)
    assert sorted(losses) == list(range(NUM_STEPS))
    worst = max(abs(losses[step] - loss) / loss for step, loss in enumerate(expected))
    print(f"{method}: largest relative difference over {NUM_STEPS} steps: {worst:.2e}")
    assert worst <= 1e-5
    assert expected[-1] < expected[0] - 0.3
    assert len([item for item in items if isinstance(item, Validation)]) == 4
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.timeout(180)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_rounds_equal_those_of_one_process(two_of_each: Cluster, tmp_path: Path, method: str) -> None:
    """Rows have unlike numbers of targets, so slots have unlike weights in the mean."""
    base, data = write_base(tmp_path / "base", LLAMA), write_rows(tmp_path / "data")
    recipe = tuning_recipe(
        base,
        data,
        tmp_path / "runs",
        training={"num_steps": 20},
        optimizer={"clip_norm": 0.5, "learning_rate": 1e-2 if method == "lora" else 1e-3},
        codec={"push": "fp32", "pull": "fp32"},
        checkpoint={"interval_steps": 0},
        validation={"interval_steps": 10},
        fine_tuning={} if method == "lora" else {"method": "full", "lora": None},
        local={"steps": 5, "moments": "fp32", "outer": {"learning_rate": 0.8, "momentum": 0.9}},
        cluster={"min_workers": 2, "min_servers": 2},
    )
    job = two_of_each.client.submit(recipe)
    two_of_each.finish(job.job_id)
    items = list(two_of_each.client.watch(job.job_id, follow=False))
    losses = [item.loss for item in items if isinstance(item, Step)]
    expected = train_reference(recipe, base, data)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < expected[0] - 0.1
    assert [item.version for item in items if isinstance(item, Validation)] == [0, 2, 4]
