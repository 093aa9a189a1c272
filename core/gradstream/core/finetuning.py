"""What a recipe says of fine-tuning: the base it starts from, and what of the model is trained.

The fine-tuning service writes this section; a person writes a `FineTuningRecipe` (gradstream.core.finetuning_recipe).
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from gradstream.core.data import Digest, FileName
from gradstream.core.section import NonNegative, Positive, Section


class LoraConfig(Section):
    """Low-rank adapters (Hu et al., "LoRA", 2021), as peft makes them: W + scaling * B @ A, of which A and B are
    trained."""

    rank: Positive = Field(default=8, description="rank of each adapter")
    alpha: float = Field(default=16.0, gt=0, description="an adapter's product is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on an adapter's input")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        default="all-linear",
        description="ends of the names of the modules that get an adapter; all-linear: all but the head",
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead (Kalajdzievski, rsLoRA, 2023)")

    @property
    def scaling(self) -> float:
        """What an adapter's product is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class BaseFile(Section):
    """One file of a base that holds weights."""

    file: FileName
    num_bytes: NonNegative
    sha256: Digest


class Base(Section):
    """A pretrained model as it was found and verified: its files' hashes are its identity."""

    kind: Literal["huggingface", "checkpoint"]
    path: str = Field(description="its directory, on any fsspec path")
    title: str = Field(description="how a person named it")
    files: tuple[BaseFile, ...]
    sha256: Digest = Field(description="over the files' hashes and the model config")


class FineTuning(Section):
    """How the job differs from one that begins from a seed."""

    base: Base
    method: Literal["lora", "full"]
    lora: LoraConfig | None = None
    held: Literal["fp32", "bf16", "int8"] = Field(
        default="bf16", description="how workers hold the frozen base; what a module computes with is made of it"
    )
    patience: NonNegative = Field(
        default=0, description="validation passes without a new best after which the job ends; 0: never"
    )

    @model_validator(mode="after")
    def _consistent(self) -> FineTuning:
        if (self.method == "lora") != (self.lora is not None):
            raise ValueError("lora belongs to method lora, and to no other")
        return self
