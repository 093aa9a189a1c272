"""The learning rate as a pure function of the recipe and the step."""

from __future__ import annotations

import math

from gradstream.core.recipe.recipe import LearningRateScheduleConfig, OptimizerConfig, Recipe


def learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig, schedule: LearningRateScheduleConfig) -> float:
    """The learning rate of step `step` of `num_steps`, both counted from 0.

    Linear warm-up over `warmup_steps`, then: cosine to `min_ratio` (Loshchilov and Hutter, 2016); WSD, constant and a
    linear decay to `min_ratio` over the last `decay_steps` (Hu et al., "MiniCPM", 2024); or constant.
    """
    peak = optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        span = max(1, num_steps - 1 - schedule.warmup_steps)
        share = min(1.0, (step - schedule.warmup_steps) / span)
        return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * (1 + math.cos(math.pi * share)) / 2)
    if schedule.kind == "wsd" and schedule.decay_steps:
        share = max(0.0, (step - (num_steps - 1 - schedule.decay_steps)) / schedule.decay_steps)
        return peak * (1 - (1 - schedule.min_ratio) * min(1.0, share))
    return peak


def rate_of_step(recipe: Recipe, step: int) -> float:
    """The learning rate of a step under a recipe. A step that was computed before the job got another number of steps
    keeps the schedule of its time."""
    return learning_rate(step, recipe.training.schedule_steps(step), recipe.optimizer, recipe.schedule)
