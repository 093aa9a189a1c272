"""Rounds of local steps in plain PyTorch and one process: AdamW inside, SGD outside. Moments are shared or kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from gradstream.core.recipe.learning_rate import rate_of_step
from gradstream.core.recipe.recipe import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")
Passes = Callable[[int, int], tuple[float, int]]
"""Runs the passes of (slot, step), whose gradients are of the sum of losses; returns that sum and the target tokens."""


def plain_losses(recipe: Recipe, parameters: Sequence[nn.Parameter], passes: Passes) -> list[float]:
    """Train the parameters by the recipe's rounds, whose numbers are sent in fp32; return each round's mean loss."""
    assert recipe.local is not None
    outer, length = recipe.local.outer, recipe.local.steps
    held = [parameter.detach().clone() for parameter in parameters]
    rule = torch.optim.SGD(held, outer.learning_rate, outer.momentum, nesterov=outer.nesterov and outer.momentum > 0)
    moments = [{name: torch.zeros_like(weight) for name in MOMENTS} for weight in held]
    kept = dict.fromkeys(range(recipe.training.num_slots), moments)
    losses = []
    for first in range(0, recipe.training.num_steps, length):
        loss_sum, num_tokens = 0.0, 0
        differences = [torch.zeros_like(weight) for weight in held]
        sums = [{name: torch.zeros_like(weight) for name in MOMENTS} for weight in held]
        for slot in range(recipe.training.num_slots):
            with torch.no_grad():
                for parameter, weight in zip(parameters, held, strict=True):
                    parameter.copy_(weight)
            begun = moments if recipe.local.inner_state == "shared" else kept[slot]
            optimizer, slot_loss, slot_tokens = _inner(recipe, parameters, begun, first, slot, passes)
            kept[slot] = [{name: optimizer.state[each][name].clone() for name in MOMENTS} for each in parameters]
            loss_sum, num_tokens = loss_sum + slot_loss, num_tokens + slot_tokens
            with torch.no_grad():
                for number, parameter in enumerate(parameters):
                    differences[number].add_(held[number] - parameter, alpha=slot_tokens)
                    for name in MOMENTS:
                        sums[number][name].add_(optimizer.state[parameter][name], alpha=slot_tokens)
        for weight, difference in zip(held, differences, strict=True):
            weight.grad = difference / num_tokens
        rule.step()
        moments = [{name: value / num_tokens for name, value in each.items()} for each in sums]
        losses.append(loss_sum / num_tokens)
    return losses


def _inner(
    recipe: Recipe,
    parameters: Sequence[nn.Parameter],
    moments: Sequence[dict[str, torch.Tensor]],
    first: int,
    slot: int,
    passes: Passes,
) -> tuple[torch.optim.AdamW, float, int]:
    """Take a slot's inner steps of the round from step `first`; return its optimizer, sum of losses and tokens."""
    assert recipe.local is not None
    config = recipe.optimizer
    decayed = [parameter for parameter in parameters if parameter.dim() >= 2]
    others = [parameter for parameter in parameters if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
    for parameter, state in zip(parameters, moments, strict=True):
        optimizer.state[parameter] = {name: value.clone() for name, value in state.items()}
        optimizer.state[parameter]["step"] = torch.tensor(float(first))
    loss_sum, num_tokens = 0.0, 0
    for step in range(first, first + recipe.local.steps):
        optimizer.zero_grad()
        found, count = passes(slot, step)
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.div_(count)
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate_of_step(recipe, step)
        optimizer.step()
        loss_sum, num_tokens = loss_sum + found, num_tokens + count
    return optimizer, loss_sum, num_tokens
