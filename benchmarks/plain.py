"""The reference of bench-parity: one process of plain PyTorch in fp32. Not a benchmark by itself.

It trains a recipe without gradstream's codecs, servers, workers or slots: one model, the whole global batch in one
forward and backward pass, torch's own clipping and AdamW. Only the initial weights, the samples and the learning rates
come from gradstream, because they must be the same on both sides.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn

from gradstream.core.data.manifest import Manifest, parse_manifest
from gradstream.core.model.model import build, initial_weights
from gradstream.core.recipe.learning_rate import learning_rate
from gradstream.core.recipe.recipe import OptimizerConfig, Recipe
from gradstream.worker.samples.data import SlotReader, Split


def initial_model(recipe: Recipe, rounded_start: bool = False) -> nn.Module:
    """Make the recipe's model with gradstream's initial weights, rounded to bf16 with `rounded_start`."""
    model = build(recipe.model.config)
    weights = dict(initial_weights(recipe.model.config, recipe.seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name].bfloat16() if rounded_start else weights[name])
    return model


def adamw(model: nn.Module, config: OptimizerConfig, fused: bool = False) -> torch.optim.AdamW:
    """Make torch's AdamW with the recipe's settings: weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=fused)


def train_plain(recipe: Recipe, rounded_start: bool = False) -> dict[int, float]:
    """Train; return the validation loss in nats a token by version: the first, every interval, the last.

    With `rounded_start` only the initial weights are rounded to bf16.
    """
    training, optimizer_config = recipe.training, recipe.optimizer
    torch.set_num_threads(training.num_threads)
    model = initial_model(recipe, rounded_start)
    optimizer = adamw(model, optimizer_config)
    with ExitStack() as stack:
        manifest = parse_manifest((Path(recipe.data.path) / "manifest.json").read_text(encoding="utf-8"))
        batch = _samples(recipe, manifest, "train", stack)
        held_out_BT = _samples(recipe, manifest, "validation", stack)(0)
        losses = {0: _evaluate(model, held_out_BT)}
        for step in range(training.num_steps):
            model.train()
            _loss(model, batch(step)).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), optimizer_config.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, training.num_steps, optimizer_config, recipe.schedule)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            version = step + 1
            if version % recipe.validation.interval_steps == 0 or version == training.num_steps:
                losses[version] = _evaluate(model, held_out_BT)
    return losses


def _samples(recipe: Recipe, manifest: Manifest, split: Split, stack: ExitStack) -> Callable[[int], torch.Tensor]:
    """Make a function from a step to its samples over all slots, (B, T + 1). Validation samples are always the same."""
    num_slots = recipe.training.num_slots
    readers = [
        SlotReader(manifest, recipe.data.path, "", slot, num_slots, recipe.training.sequence_length, recipe.seed, split)
        for slot in range(num_slots)
    ]
    for reader in readers:
        asyncio.run(reader.prepare())
        stack.callback(reader.close)

    def read(step: int) -> torch.Tensor:
        if split == "train":
            parts = [reader.batch(step, recipe.training.slot_batch).tokens for reader in readers]
        else:
            parts = [reader.validation_batch(recipe.validation.num_samples // num_slots).tokens for reader in readers]
        return torch.from_numpy(np.concatenate(parts))

    return read


@torch.no_grad()
def _evaluate(model: nn.Module, tokens_BT: torch.Tensor) -> float:
    model.eval()
    return float(_loss(model, tokens_BT))


def _loss(model: nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Compute the mean loss over the target tokens."""
    logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
