"""Makes the coordinator's recipe of a job from a person's fine-tuning recipe, as a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradstream.core.data.manifest import Manifest
from gradstream.core.data.sampler import samples_by_slot
from gradstream.core.errors import DataError
from gradstream.core.model import check, model
from gradstream.core.recipe.fine_tuning import Base, FineTuning
from gradstream.core.recipe.fine_tuning_recipe import LEARNING_RATES, FineTuningRecipe
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.local import whole_rounds
from gradstream.core.recipe.recipe import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    TrainingConfig,
    ValidationConfig,
)

VALIDATION_PASSES = 10
KEPT_CHECKPOINTS = 3


def fit_length(asked: FineTuningRecipe, model_config: Mapping[str, Any]) -> FineTuningRecipe:
    """Return the recipe with its rows' length, which follows from the base if the recipe gives none.

    Raises ConfigError when transformers does not know the config, or when a given length exceeds the model's context.
    """
    longest = check.positions(model.load_config(model_config))
    length = asked.training.row_length(longest[1] if longest is not None else None)
    check.check_positions(longest, length, model_config.get("model_type"))
    return asked.model_copy(update={"training": asked.training.model_copy(update={"sequence_length": length})})


def make_recipe(
    asked: FineTuningRecipe, base: Base, model_config: Mapping[str, Any], manifest: Manifest, data_path: str
) -> Recipe:
    """Make the recipe of the job.

    `manifest` is the manifest of the rows in `data_path`, `model_config` the base's config.json. Raises DataError when
    there are too few rows for the slots, ConfigError when the recipe does not fit the base.
    """
    slots, length = asked.training.num_slots, asked.training.row_length()
    num_rows = sum(_rows_by_slot(asked, manifest, "train"))
    num_steps = asked.count_steps(num_rows)
    # All held-out rows: a slot with fewer rows than another uses those that it has.
    num_validation = slots * max(_rows_by_slot(asked, manifest, "validation"))
    if manifest.row_length != length:
        raise DataError(f"the rows in {data_path} have {manifest.row_length} tokens, not {length}; prepare them again")
    return _assemble(asked, base, model_config, data_path, num_steps, num_validation)


def check_recipe(asked: FineTuningRecipe, base: Base | None, model_config: Mapping[str, Any]) -> None:
    """Check a recipe before its data is prepared. Raises ConfigError."""
    if base is None:
        _training(asked, 1)
    else:
        num_steps = whole_rounds(1, asked.local) if asked.local is not None else 1
        _assemble(asked, base, model_config, "data", num_steps, asked.training.num_slots)


def _rows_by_slot(asked: FineTuningRecipe, manifest: Manifest, split: str) -> list[int]:
    """Compute the number of rows that each slot draws from. Raises DataError when a slot has none."""
    slots = asked.training.num_slots
    rows = samples_by_slot(manifest, split, slots, manifest.row_length)
    if min(rows) == 0:
        more = (
            "give more examples"
            if split == "train"
            else "give more examples, raise data.validation_fraction or name a data.validation_path"
        )
        what = "to train on" if split == "train" else "held out"
        raise DataError(
            f"the examples {what} make {sum(rows)} rows of {manifest.row_length} tokens, which do not give each of "
            f"{slots} slots one; {more}, or lower training.num_slots or training.sequence_length"
        )
    return rows


def _assemble(
    asked: FineTuningRecipe,
    base: Base,
    model_config: Mapping[str, Any],
    data_path: str,
    num_steps: int,
    num_validation: int,
) -> Recipe:
    interval = asked.validation.interval_steps or max(1, num_steps // VALIDATION_PASSES)
    optimizer = asked.optimizer.model_dump()
    optimizer["learning_rate"] = asked.optimizer.learning_rate or LEARNING_RATES[asked.method]
    sections = {
        "model": ModelConfig(config=dict(model_config)),
        "training": _training(asked, num_steps),
        "optimizer": OptimizerConfig(**optimizer),
        "schedule": asked.schedule,
        "codec": asked.codec,
        "data": DataConfig(path=data_path),
        "validation": ValidationConfig(interval_steps=interval, num_samples=num_validation),
        # The coordinator also keeps the best checkpoint.
        "checkpoint": CheckpointConfig(interval_steps=interval, keep=KEPT_CHECKPOINTS),
        "pipeline": asked.pipeline,
        "cluster": asked.cluster,
        "fine_tuning": FineTuning(
            base=base,
            method=asked.method,
            lora=asked.lora if asked.method == "lora" else None,
            held=asked.held,
            patience=asked.validation.patience,
        ),
    }
    tree = {name: section.model_dump() for name, section in sections.items()}
    if asked.local is not None:
        tree["local"] = asked.local.model_dump()
    head = asked.model_dump(include={"name", "description", "seed", "run_root"})
    return parse_recipe({**head, **tree}, origin="the fine-tuning recipe")


def _training(asked: FineTuningRecipe, num_steps: int) -> TrainingConfig:
    """Make the job's training section. Raises ConfigError when the batch cannot be divided."""
    tree = asked.training.model_dump(exclude={"num_epochs"}) | {"num_steps": num_steps}
    tree["sequence_length"] = asked.training.row_length()
    shape = {"name": asked.name, "model": {"config": {}}, "training": tree, "data": {"path": "data"}}
    shape["validation"] = {"num_samples": asked.training.num_slots}
    return parse_recipe(shape, origin="the fine-tuning recipe").training
