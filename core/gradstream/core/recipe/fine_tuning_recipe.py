"""Fine-tuning recipes, which people write. The fine-tuning service makes a `Recipe` of one.

The service needs the base and the data for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from gradstream.core.recipe.defaults import FINE_TUNING, SEQUENCE_LENGTH, check_batch, fit_batch
from gradstream.core.recipe.files import absolute_path, load_tree
from gradstream.core.recipe.fine_tuning import LoraConfig
from gradstream.core.recipe.loading import load_recipe, validated
from gradstream.core.recipe.local import LocalConfig, check_local, whole_rounds
from gradstream.core.recipe.recipe import (
    ClusterConfig,
    CodecConfig,
    LearningRateScheduleConfig,
    OptimizerConfig,
    PipelineConfig,
    Recipe,
    check_sections,
)
from gradstream.core.recipe.section import NonNegative, Positive, Section, derived

DEFAULT_EPOCHS = 3.0
FEW_STEPS = 20
"""Number of steps below which a model learns almost nothing."""
MORE_STEPS = "raise training.num_epochs, or lower training.global_batch or training.sequence_length"
LEARNING_RATES = {"lora": 2e-4, "full": 2e-5}
"""Default learning rate of each method. LoRA needs about ten times the rate of full fine-tuning (Biderman et al., "LoRA
Learns Less and Forgets Less", 2024)."""


class ExamplesConfig(Section):
    """The task's data: JSONL or Parquet rows, or plain text."""

    path: str = Field(description="a file, a directory or a glob on any fsspec path: .jsonl, .parquet or text")
    validation_path: str | None = Field(
        default=None, description="held-out rows", json_schema_extra=derived("validation_fraction of the rows of path")
    )
    validation_fraction: float = Field(default=0.1, gt=0, lt=1, description="share of rows held out, by their content")
    format: Literal["auto", "prompt-completion", "chat", "text"] = Field(
        default="auto", description="auto: by the fields of the first row that has any of those below"
    )
    prompt_field: str = Field(default="prompt", description="prompt-completion: the field with the prompt")
    completion_field: str = Field(default="completion", description="prompt-completion: the field that is trained on")
    messages_field: str = Field(default="messages", description="chat: the field of the conversation")
    text_field: str = Field(default="text", description="text: the field that is trained on as a whole")
    bad_rows: Literal["fail", "skip"] = Field(default="fail", description="what happens when a row cannot be used")
    too_long: Literal["fail", "skip", "truncate"] = Field(
        default="fail", description="what happens to an example longer than training.sequence_length"
    )
    packing: bool = Field(default=True, description="pack several examples into a row; attention does not cross them")


class FineTuningTraining(Section):
    """The batch and the length of the training. Give either num_steps or num_epochs."""

    num_steps: Positive | None = Field(
        default=None,
        description="optimizer updates",
        json_schema_extra=derived("num_epochs times the rows, over global_batch; with local, up to whole rounds"),
    )
    num_epochs: float | None = Field(
        default=None,
        gt=0,
        description="passes over the rows",
        json_schema_extra=derived("3 where num_steps is not given either"),
    )
    num_slots: Positive = Field(
        default=FINE_TUNING.num_slots,
        description="fixed parts of the global batch; where left out, as many of 2 as divide the batch",
    )
    global_batch: Positive = Field(default=FINE_TUNING.global_batch, description="rows a step, over all slots")
    microbatch: Positive = Field(
        default=FINE_TUNING.microbatch,
        description="rows that go through the model at once; where left out, as many of 4 as divide a slot's",
    )
    sequence_length: Positive | None = Field(
        default=None,
        description="tokens a row",
        json_schema_extra=derived("256, or the base's positions where these are fewer"),
    )
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="fp32, or bf16 autocast")
    recompute: bool = Field(default=False, description="recompute activations in the backward pass to save memory")
    num_threads: Positive = Field(default=1, description="threads that a worker on a CPU computes with")

    @model_validator(mode="before")
    @classmethod
    def _fit(cls, tree: Any) -> Any:
        return {**tree, **fit_batch(tree, FINE_TUNING)} if isinstance(tree, Mapping) else tree

    @model_validator(mode="after")
    def _one_of_both(self) -> FineTuningTraining:
        check_batch(self.global_batch, self.num_slots, self.microbatch)
        if self.num_steps is not None and self.num_epochs is not None:
            raise ValueError("training.num_steps and training.num_epochs say the same; give one of them")
        return self

    def row_length(self, longest: int | None = None) -> int:
        """Number of tokens in a row, for a base whose longest sequence is `longest` tokens."""
        if self.sequence_length is not None:
            return self.sequence_length
        return SEQUENCE_LENGTH if longest is None else min(SEQUENCE_LENGTH, longest)

    def count_steps(self, num_rows: int) -> int:
        """Number of steps for `num_rows` rows in the training split."""
        if self.num_steps is not None:
            return self.num_steps
        epochs = self.num_epochs if self.num_epochs is not None else DEFAULT_EPOCHS
        return max(1, math.ceil(num_rows * epochs / self.global_batch))


class FineTuningOptimizer(OptimizerConfig):
    """The optimizer, with other defaults than for pretraining."""

    learning_rate: float | None = Field(  # type: ignore[assignment]
        default=None,
        gt=0,
        description="highest rate",
        json_schema_extra=derived("2e-4 with method lora, 2e-5 with full"),
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.999), description="adamw and muon: decay of both of AdamW's moments"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="on matrices only, not on norms and biases")


class FineTuningValidation(Section):
    """Validation passes, each with a checkpoint. The best version is the result."""

    interval_steps: Positive | None = Field(
        default=None, description="steps between passes", json_schema_extra=derived("a tenth of the steps")
    )
    patience: NonNegative = Field(default=0, description="passes without a new best after which the job ends; 0: never")
    num_exact_match: NonNegative = Field(
        default=32, description="held-out prompts completed before and after, to count exact matches"
    )


class FineTuningRecipe(Section):
    """A whole fine-tuning recipe."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="name of the job and of its adapter")
    description: str = Field(default="", description="for people")
    seed: NonNegative = Field(default=0, description="seed of adapters, rows and dropout")
    run_root: str = Field(default="runs", description="as in a training recipe")
    base_model: str = Field(
        description="a Hugging Face directory, a checkpoint's directory, job:ID (its current version) or job:ID@VERSION"
    )
    method: Literal["lora", "full"] = Field(default="lora", description="train adapters, or all weights")
    lora: LoraConfig = LoraConfig()
    held: Literal["fp32", "bf16", "int8"] = Field(
        default="bf16", description="lora only: how workers hold the frozen base"
    )
    data: ExamplesConfig
    training: FineTuningTraining = FineTuningTraining()
    optimizer: FineTuningOptimizer = FineTuningOptimizer()
    schedule: LearningRateScheduleConfig = LearningRateScheduleConfig(kind="cosine", warmup_steps=0, min_ratio=0.1)
    codec: CodecConfig = CodecConfig()
    validation: FineTuningValidation = FineTuningValidation()
    pipeline: PipelineConfig = PipelineConfig()
    local: LocalConfig | None = Field(default=None, description="as in a training recipe")
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _consistent(self) -> FineTuningRecipe:
        check_sections(self.run_root, self.pipeline, self.codec)
        if self.local is not None:
            check_local(self.local, self.training, self.optimizer, self.codec, self.pipeline)
            if self.local.quorum is not None:
                raise ValueError(
                    "local.quorum is for training recipes so far, because a fine-tuning has no replay; leave it out"
                )
        return self

    def count_steps(self, num_rows: int) -> int:
        """Number of steps for `num_rows` rows in the training split. Epochs are rounded up to whole rounds."""
        num_steps = self.training.count_steps(num_rows)
        if self.local is None or self.training.num_steps is not None:
            return num_steps
        return whole_rounds(num_steps, self.local)


def load_any_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe | FineTuningRecipe:
    """Read a recipe of either kind. A `base_model` marks a fine-tuning recipe. Raises ConfigError with one line."""
    overrides = list(overrides)
    is_fine_tuning = "base_model" in load_tree(path, overrides)
    return load_fine_tuning_recipe(path, overrides) if is_fine_tuning else load_recipe(path, overrides)


def load_fine_tuning_recipe(path: str | Path, overrides: Iterable[str] = ()) -> FineTuningRecipe:
    """Read a fine-tuning recipe with its bases (`base: other.yaml`), apply `key.sub=value` overrides and validate.

    Relative local paths are made absolute against the current directory. Raises ConfigError with one line.
    """
    return absolute_fine_tuning_paths(parse_fine_tuning_recipe(load_tree(path, overrides), origin=str(path)))


def parse_fine_tuning_recipe(tree: Mapping[str, Any] | str, origin: str = "recipe") -> FineTuningRecipe:
    """Validate a fine-tuning recipe given as a mapping or as JSON. Raises ConfigError with one line."""
    return validated(FineTuningRecipe, tree, origin)


def absolute_fine_tuning_paths(recipe: FineTuningRecipe) -> FineTuningRecipe:
    """The recipe with local relative paths made absolute; `job:ID` stays."""
    data = recipe.data.model_copy(
        update={
            "path": absolute_path(recipe.data.path),
            "validation_path": absolute_path(recipe.data.validation_path) if recipe.data.validation_path else None,
        }
    )
    return recipe.model_copy(
        update={
            "run_root": absolute_path(recipe.run_root),
            "base_model": absolute_path(recipe.base_model),
            "data": data,
        }
    )
