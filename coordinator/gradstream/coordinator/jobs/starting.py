"""Whether a job can start from a checkpoint of another one: pure functions over the recipe and the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from gradstream.core.checkpoint.manifest import CheckpointManifest
from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.plan.fragments import Tensor
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.recipe.start_from import StartFrom


def started_from(recipe: Recipe, start: StartFrom, directory: str, manifest: CheckpointManifest) -> Recipe:
    """The recipe with its start resolved: the checkpoint in `directory`, by its hash.

    Raises ConfigError for an optimizer of another kind, CheckpointError when the recipe names another hash.
    """
    kind = manifest.recipe.get("optimizer", {}).get("kind", "adamw")
    if start.optimizer and kind != recipe.optimizer.kind:
        raise ConfigError(
            f"start_from.optimizer: {start.weights} was trained with {kind}, and optimizer.kind is "
            f"{recipe.optimizer.kind}; leave start_from.optimizer out, or set optimizer.kind={kind}"
        )
    if start.state_sha256 not in (None, manifest.state_sha256):
        raise CheckpointError(
            f"start_from: the checkpoint {directory} is not the one that the recipe names; leave out "
            f"start_from.state_sha256 and start_from.checkpoint to start from it all the same"
        )
    resolved = start.model_copy(update={"checkpoint": directory, "state_sha256": manifest.state_sha256})
    return recipe.model_copy(update={"start_from": resolved})


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
