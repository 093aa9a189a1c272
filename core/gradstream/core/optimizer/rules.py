"""The registry of update rules: which rule updates a tensor, and what it keeps. Without torch.

To add a rule, write a class that extends Rule, and enter it here under the name that `optimizer.kind` gives it.
"""

from __future__ import annotations

from collections.abc import Sequence

from gradstream.core.optimizer.adamw import AdamW
from gradstream.core.optimizer.muon import Muon
from gradstream.core.optimizer.rule import STEP_COUNT, Rule, Updated
from gradstream.core.optimizer.sgd import SGD
from gradstream.core.recipe.recipe import OptimizerConfig, Recipe

RULES: dict[str, tuple[type[Rule], ...]] = {"adamw": (AdamW,), "sgd": (SGD,), "muon": (Muon, AdamW)}
"""The rules of each `optimizer.kind`. The first that takes a tensor updates it; the last takes all."""


def rule_of(optimizer: OptimizerConfig, tensor: Updated) -> type[Rule]:
    """The rule that updates a tensor."""
    return next(rule for rule in RULES[optimizer.kind] if rule.takes(tensor))


def moments_of(optimizer: OptimizerConfig, tensor: Updated) -> tuple[str, ...]:
    """The moments that the tensor's rule keeps of it."""
    return rule_of(optimizer, tensor).moments(optimizer)


def max_moments(optimizer: OptimizerConfig) -> int:
    """The most moments that any rule of the recipe keeps of a tensor."""
    return max(len(rule.moments(optimizer)) for rule in RULES[optimizer.kind])


def shared_moments(recipe: Recipe, tensor: Updated) -> tuple[str, ...]:
    """The moments of a tensor that slots share in the rounds of a job with local steps."""
    local = recipe.local
    if local is None or local.inner_state != "shared":
        return ()
    return tuple(name for name in moments_of(recipe.optimizer, tensor) if local.moments.codec(name) != "none")


def moment_codecs(recipe: Recipe, tensor: Updated) -> tuple[str, ...]:
    """The codecs in which the shared moments of a tensor are sent."""
    local = recipe.local
    return () if local is None else tuple(local.moments.codec(name) for name in shared_moments(recipe, tensor))


def every_moment_codecs(recipe: Recipe) -> list[tuple[str, ...]]:
    """What `moment_codecs` returns, for the tensors of each of the recipe's rules."""
    local = recipe.local
    if local is None or local.inner_state != "shared":
        return [()]
    moments = [rule.moments(recipe.optimizer) for rule in RULES[recipe.optimizer.kind]]
    return [tuple(codec for name in each if (codec := local.moments.codec(name)) != "none") for each in moments]


def kept_arrays(recipe: Recipe, tensor: Updated) -> tuple[str, ...]:
    """The arrays of a tensor that a slot keeps from round to round (local.inner_state: keep), with AdamW's count."""
    if recipe.local is None or recipe.local.inner_state != "keep":
        return ()
    rule = rule_of(recipe.optimizer, tensor)
    moments = rule.moments(recipe.optimizer)
    return tuple(name for name in rule.arrays if name in moments or name == STEP_COUNT)


def server_moments(recipe: Recipe, tensor: Updated) -> tuple[str, ...]:
    """The moments of a tensor that servers hold.

    They are its rule's arrays, or only those that slots share if all steps are inner steps of the slots.
    """
    if recipe.local is None or recipe.local.after:
        return tuple(name for name in rule_of(recipe.optimizer, tensor).arrays if name != STEP_COUNT)
    return shared_moments(recipe, tensor)


def all_moments(optimizer: OptimizerConfig) -> tuple[str, ...]:
    """The moments that any rule of the recipe keeps."""
    return tuple(dict.fromkeys(name for rule in RULES[optimizer.kind] for name in rule.moments(optimizer)))


def whole_tensors(optimizer: OptimizerConfig, tensors: Sequence[Updated]) -> frozenset[int]:
    """The numbers of the tensors that their rules update only as a whole, so that one server must hold each of them."""
    return frozenset(number for number, tensor in enumerate(tensors) if rule_of(optimizer, tensor).whole)
