"""Which rule updates a tensor, and the moments that the rule keeps. Pure functions of the recipe, without torch."""

from __future__ import annotations

from gradstream.core.recipe.recipe import OptimizerConfig

MOMENTS_OF = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""The arrays, each as large as the weights, that a rule keeps, by the rule's name. torch uses the same names."""


def moments_of(optimizer: OptimizerConfig) -> tuple[str, ...]:
    """The moments that the recipe's rule keeps of a tensor."""
    if optimizer.kind == "sgd" and not optimizer.momentum:
        return ()
    return MOMENTS_OF[optimizer.kind]
