"""Whether a job can start from a checkpoint of another one: pure functions over the recipe and the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from gradstream.core.checkpoint.manifest import CheckpointManifest
from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.plan.fragments import Tensor
from gradstream.core.recipe.local import LocalConfig
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.recipe.start_from import StartFrom


def started_from(recipe: Recipe, start: StartFrom, directory: str, manifest: CheckpointManifest) -> Recipe:
    """The recipe with its start resolved: the checkpoint in `directory`, by its hash.

    Raises ConfigError for an optimizer of another kind and for moments that the checkpoint does not have,
    CheckpointError when the recipe names another hash.
    """
    kind = manifest.recipe.get("optimizer", {}).get("kind", "adamw")
    if start.optimizer and kind != recipe.optimizer.kind:
        raise ConfigError(
            f"start_from.optimizer: {start.weights} was trained with {kind}, and optimizer.kind is "
            f"{recipe.optimizer.kind}; leave start_from.optimizer out, or set optimizer.kind={kind}"
        )
    before = manifest.local
    if start.optimizer and before is not None and not _has_moments(before) and _has_moments(recipe.local):
        raise ConfigError(
            f"start_from.optimizer: {start.weights} has no moments, because local.inner_state "
            f"{before.inner_state} keeps none with the servers; leave start_from.optimizer out"
        )
    if start.state_sha256 not in (None, manifest.state_sha256):
        raise CheckpointError(
            f"start_from: the checkpoint {directory} is not the one that the recipe names; leave out "
            f"start_from.state_sha256 and start_from.checkpoint to start from it all the same"
        )
    resolved = start.model_copy(update={"checkpoint": directory, "state_sha256": manifest.state_sha256})
    return recipe.model_copy(update={"start_from": resolved})


def _has_moments(local: LocalConfig | None) -> bool:
    """Whether the servers of a job keep the optimizer's moments between commits, and so in checkpoints."""
    return local is None or local.inner_state == "shared" or local.after > 0


def state_note(recipe: Recipe, start: StartFrom, manifest: CheckpointManifest) -> str:
    """What becomes of the optimizer's state where only one of two jobs has local steps; "" where both or neither has.

    `recipe` is that of the new job, `manifest` is of the checkpoint that it starts from.
    """
    before, local = manifest.local, recipe.local
    if (before is None) == (local is None):
        return ""
    if local is None:
        moments = "goes on with its moments" if start.optimizer else "begins with moments of zero"
        return f"starts from {start.weights}, a job with local steps: {moments}, and has no outer momentum"
    if not start.optimizer:
        moments = "the moments begin with zeros"
    elif not _has_moments(local):
        first = "each" if local.inner_state == "reset" else "the first"
        moments = (
            f"its moments are not used, because local.inner_state {local.inner_state} begins {first} round with zeros"
        )
    elif local.after:
        moments = f"the first {local.after} steps, before the first round, go on with its moments"
    else:
        moments = "the first round begins with its moments"
    return f"starts from {start.weights}, a job without local steps: {moments}; the outer momentum begins with zeros"


def check_fit(start: StartFrom, model: Sequence[Tensor], manifest: CheckpointManifest) -> None:
    """Raise ConfigError that names the first tensor in which a model and a checkpoint differ."""
    for here, there in zip_longest(model, [entry.tensor() for entry in manifest.tensors]):
        if here is None or there is None or (here.name, here.shape) != (there.name, there.shape):
            raise ConfigError(
                f"start_from: {start.weights} is of another model than the recipe's; the first tensor that differs is "
                f"{_described(there)} there and {_described(here)} here; take over its model.config"
            )


def _described(tensor: Tensor | None) -> str:
    return f"{tensor.name} {list(tensor.shape)}" if tensor is not None else "missing"
