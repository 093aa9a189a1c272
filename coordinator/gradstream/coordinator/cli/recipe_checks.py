"""Check a recipe on its author's machine, without a cluster.

The model is built on the meta device. Data and bases are checked if this machine can read them.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradstream.core.data.manifest import Manifest
    from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe
    from gradstream.core.recipe.recipe import Recipe


def with_data(recipe: Recipe) -> tuple[Recipe, Manifest | None]:
    """Complete a recipe with values from its data set; return both, None for a data set that is not here.

    Raises DataError when recipe and data set do not fit.
    """
    from gradstream.core.data.manifest import MANIFEST_NAME
    from gradstream.core.storage import files

    try:
        here = MANIFEST_NAME in files.list_names(recipe.data.path)
    except Exception:  # every fsspec backend raises its own kind; the cluster may still reach the path
        here = False
    if not here:
        return recipe, None
    # Imported here: without the data set no package of an extra is needed.
    from gradstream.coordinator.planning.planner import check_data
    from gradstream.coordinator.servicers.recipe_data import read_data_manifest
    from gradstream.core.model.check import with_ends

    manifest = read_data_manifest(recipe)
    check_data(recipe, manifest)
    return with_ends(recipe, manifest), manifest


def check_recipe(recipe: Recipe) -> list[str]:
    """Build a pretraining recipe's model and compare it with its data; return warnings.

    Raises ConfigError or DataError, as a coordinator would at submission.
    """
    from gradstream.coordinator.planning.inventory import check_model, special_tokens

    recipe, manifest = with_data(recipe)

    async def read_special() -> set[int]:
        return special_tokens(recipe, manifest) if manifest is not None else set()

    return asyncio.run(check_model(recipe, manifest, read_special))


def check_fine_tuning_recipe(asked: FineTuningRecipe) -> list[str]:
    """Compare a fine-tuning recipe with its base, if the base is here; return warnings.

    Raises ConfigError or CheckpointError, as the fine-tuning service would.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings concern only the small trial model
    from gradstream.core.model import check
    from gradstream.core.model.trial import ModelUse, describe
    from gradstream.core.pretrained.base import check_base
    from gradstream.core.storage import files

    warnings: list[str] = []
    if asked.training.num_steps is not None:
        warnings += check.learning_rate_schedule_warnings(asked.schedule, asked.training.num_steps)
    if asked.base_model.startswith("job:"):
        return [*warnings, f"base_model {asked.base_model} is a job's; the service checks it"]
    if files.is_local(asked.base_model) and not files.list_names(asked.base_model):
        return [*warnings, f"base_model {asked.base_model} is not on this machine; the service checks it"]
    config = check_base(asked.base_model)
    lora = asked.lora if asked.method == "lora" else None
    use = ModelUse(has_pipeline=asked.pipeline.stages != 1, packs_examples=True)
    # In this process, not in a child: the base's check has already imported transformers, the slowest part.
    found = describe(config, lora, use)
    if asked.training.sequence_length is not None:
        check.check_positions(found["positions"], asked.training.sequence_length, config.get("model_type"))
    return warnings
