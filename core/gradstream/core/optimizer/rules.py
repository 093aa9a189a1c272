"""Which rule updates a tensor, and the moments that the rule keeps. Pure functions of the recipe, without torch."""

from __future__ import annotations

from gradstream.core.recipe.recipe import OptimizerConfig, Recipe

MOMENTS_OF = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""The arrays, each as large as the weights, that a rule keeps, by the rule's name. torch uses the same names."""


def moments_of(optimizer: OptimizerConfig) -> tuple[str, ...]:
    """The moments that the recipe's rule keeps of a tensor."""
    if optimizer.kind == "sgd" and not optimizer.momentum:
        return ()
    return MOMENTS_OF[optimizer.kind]


def server_moments(recipe: Recipe) -> tuple[str, ...]:
    """The moments that servers hold: those of their rule, unless every step is an inner step of the slots.

    Then servers hold the moments that slots share.
    """
    local = recipe.local
    if local is None or local.after:
        return MOMENTS_OF[recipe.optimizer.kind]
    return moments_of(recipe.optimizer) if local.inner_state == "shared" else ()
