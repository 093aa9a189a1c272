"""The cluster against plain PyTorch: the same recipe in one process, written here in the usual way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.cluster import running
from support.tiny import LLAMA, tiny_recipe

from gradstream.client import Step, Validation
from gradstream.core.data.manifest import parse_manifest
from gradstream.core.data.sampler import SlotSampler
from gradstream.core.model.model import build, initial_weights
from gradstream.core.recipe.recipe import Recipe

NUM_STEPS = 50


def load_tokens(data: Path, file: str) -> torch.Tensor:
    return torch.frombuffer(bytearray((data / file).read_bytes()), dtype=torch.uint16).long()


def train_reference(recipe: Recipe, data: Path) -> list[float]:
    """Mean training loss of every step: gradients of the slots added in order, clip_grad_norm_, torch's AdamW."""
    torch.set_num_threads(1)
    manifest = parse_manifest((data / "manifest.json").read_bytes())
    training = recipe.training
    model = build(recipe.model.config)
    with torch.no_grad():
        for name, tensor in initial_weights(recipe.model.config, recipe.seed):
            model.get_parameter(name).copy_(tensor)
    samplers = [
        SlotSampler(manifest, "train", slot, training.num_slots, training.sequence_length, recipe.seed)
        for slot in range(training.num_slots)
    ]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    config = recipe.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=config.betas,
        eps=config.eps,
    )
    losses = []
    for step in range(training.num_steps):
        num_tokens, loss_sum = 0, 0.0
        for sampler in samplers:
            for address in sampler.samples(step, training.slot_batch):
                tokens = load_tokens(data, address.file)
                begin = address.window * training.sequence_length
                sample = tokens[begin : begin + training.sequence_length + 1][None]
                logits = model(input_ids=sample[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sample[:, 1:].flatten(), reduction="sum")
                loss.backward()
                loss_sum += loss.item()
                num_tokens += training.sequence_length
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(num_tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = reference_rate(step, training.num_steps, config.learning_rate, recipe.schedule.warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum / num_tokens)
    return losses


def reference_rate(step: int, num_steps: int, peak: float, warmup_steps: int) -> float:
    """Warm-up, then cosine to a tenth."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    share = (step - warmup_steps) / (num_steps - 1 - warmup_steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share)))


@pytest.mark.timeout(180)
def test_loss_curve_equals_plain_pytorch(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tiny_data,
        tmp_path / "runs",
        name="reference",
        # A low clip norm, so that clipping takes part.
        optimizer={"clip_norm": 0.5},
        schedule={"warmup_steps": 10},
        training={"num_steps": NUM_STEPS},
        checkpoint={"interval_steps": 0},
        cluster={"min_workers": 2, "min_servers": 2},
    )
    with running(tmp_path / "cluster") as cluster:
        cluster.start_coordinator()
        cluster.start_servers("server-0", "server-1")
        cluster.start_workers("worker-0", "worker-1")
        job = cluster.client.submit(recipe)
        cluster.finish(job.job_id)
        items = list(cluster.client.watch(job.job_id, follow=False))
    losses = {item.step: item.loss for item in items if isinstance(item, Step)}
    expected = train_reference(recipe, tiny_data)
    assert sorted(losses) == list(range(NUM_STEPS))
    worst = max(abs(losses[step] - loss) / loss for step, loss in enumerate(expected))
    print(f"largest relative difference over {NUM_STEPS} steps: {worst:.2e}")
    assert worst <= 1e-6
    # It learned something, so the comparison was not between two flat lines.
    validations = [item.loss for item in items if isinstance(item, Validation)]
    assert expected[-1] < expected[0] - 0.5
    assert validations[-1] < validations[0] - 0.5
    assert recipe.model.config == LLAMA
