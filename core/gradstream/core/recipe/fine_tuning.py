"""A recipe's section for fine-tuning: the base, the method and the adapters.

The fine-tuning service writes this section; a person writes a `FineTuningRecipe`
(gradstream.core.recipe.fine_tuning_recipe).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gradstream.core.data.manifest import Digest, FileName
from gradstream.core.recipe.section import NonNegative, Positive, Section

KEY, OLD_KEY = "fine_tuning", "finetuning"
"""The section's key in a recipe, and its old key, which recipes in older checkpoints and state directories have."""
ALL_LINEAR: Literal["all-linear"] = "all-linear"
PEFT_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "use_rslora": "rslora"}
"""Keys of peft's LoraConfig that have another name here. Both names are accepted."""
PEFT_SETTINGS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "task_type": ("CAUSAL_LM",),
    "peft_type": ("LORA",),
    "fan_in_fan_out": (True, False),
    "inference_mode": (True, False),
    "init_lora_weights": (True,),
    "modules_to_save": (),
    "exclude_modules": (),
    "layers_to_transform": (),
    "layers_pattern": (),
    "rank_pattern": (),
    "alpha_pattern": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "layer_replication": (),
    "use_dora": (),
    "use_qalora": (),
    "lora_bias": (),
    "base_model_name_or_path": (),
    "revision": (),
    "megatron_config": (),
    "loftq_config": (),
    "eva_config": (),
    "corda_config": (),
    "lora_ga_config": (),
    "velora_config": (),
    "alora_invocation_tokens": (),
    "monteclora_config": (),
    "runtime_config": (),
    "use_bdlora": (),
    "arrow_config": (),
    "kasa_config": (),
    "ensure_weight_tying": (),
}
"""Keys of peft's LoraConfig that have no counterpart here, with their neutral values. None, false and empty values are
neutral too."""
PEFT_NOTES = ("peft_version", "auto_mapping", "megatron_core", "qalora_group_size")
"""Keys in peft's adapter_config.json that do not change the adapter."""
_INSTEAD = {
    "bias": "adapters train no biases; use bias: none, or method: full",
    "modules_to_save": "only adapters are trained; leave it out, or use method: full",
    "task_type": "only CAUSAL_LM is trained",
    "base_model_name_or_path": "the base is the recipe's base_model",
    "exclude_modules": "name the others in lora.target_modules",
    "layers_to_transform": "name the layers' modules in lora.target_modules, such as layers.0.self_attn.q_proj",
}
MODULE_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*")


def with_new_key(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's JSON with the section moved from `OLD_KEY` to `KEY`, if need be."""
    if OLD_KEY not in recipe or KEY in recipe:
        return recipe
    return {KEY if name == OLD_KEY else name: section for name, section in recipe.items()}


class LoraConfig(Section):
    """Low-rank adapters (Hu et al., "LoRA", 2021), as in peft: W + scaling * B @ A, where A and B are trained.

    Keys of peft's LoraConfig that mean the same are accepted too.
    """

    rank: Positive = Field(default=8, description="rank of each adapter")
    alpha: float = Field(default=16.0, gt=0, description="an adapter's product is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on an adapter's input")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        default=ALL_LINEAR,
        description="one or several ends of the names of the modules that get an adapter; all-linear: all but the head",
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead (Kalajdzievski, rsLoRA, 2023)")

    @model_validator(mode="before")
    @classmethod
    def _from_peft(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        found = {}
        for key, value in tree.items():
            name = PEFT_NAMES.get(key, key)
            if name in found or (name != key and name in tree):
                raise ValueError(f"lora.{key} and lora.{name} say the same; give one of them")
            if key in PEFT_NOTES:
                continue
            if key not in PEFT_SETTINGS:
                found[name] = value
            elif value and value not in PEFT_SETTINGS[key]:
                raise ValueError(f"lora.{key} {value!r} is not supported: {_INSTEAD.get(key, 'leave it out')}")
        return found

    @field_validator("target_modules", mode="before")
    @classmethod
    def _as_names(cls, targets: Any) -> Any:
        if isinstance(targets, str):
            targets = [targets]
        if isinstance(targets, set | frozenset):
            targets = sorted(targets)
        if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
            raise ValueError(
                f"lora.target_modules is {targets!r}; list ends of the names of modules, such as [q_proj, v_proj], or "
                f"leave it out for {ALL_LINEAR}"
            )
        if not targets:
            raise ValueError(f"lora.target_modules is empty; leave it out for {ALL_LINEAR}, or name modules")
        if list(targets) == [ALL_LINEAR]:
            return ALL_LINEAR
        for target in targets:
            if target == ALL_LINEAR:
                raise ValueError(f"lora.target_modules: {ALL_LINEAR} stands alone; leave the other names out")
            if not MODULE_NAME.fullmatch(target):
                raise ValueError(
                    f"lora.target_modules: {target!r} is not the end of a module's name; regular expressions are not "
                    f"read: list the ends instead, such as [q_proj, v_proj], or [layers.0.self_attn.q_proj] for one "
                    f"layer"
                )
        return tuple(targets)

    @property
    def scaling(self) -> float:
        """The factor of an adapter's product."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class BaseFile(Section):
    """One file of a base's weights."""

    file: FileName = Field(description="its name in the base's directory")
    num_bytes: NonNegative = Field(description="its size")
    sha256: Digest = Field(description="its hash")


class TokenizerFiles(Section):
    """The small files of a base's tokenizer and templates, as they were when the base was verified."""

    directory: str = Field(description="their directory, on any fsspec path")
    sha256: dict[str, Digest] = Field(description="hash of each file by its name; a file without one did not exist")


class Base(Section):
    """A pretrained model whose files were verified. The hashes of its files are its identity."""

    kind: Literal["huggingface", "checkpoint"] = Field(description="a Hugging Face directory, or a checkpoint of a job")
    path: str = Field(description="its directory, on any fsspec path")
    title: str = Field(description="how a person named it")
    files: tuple[BaseFile, ...] = Field(description="the files that hold its weights")
    sha256: Digest = Field(description="over the files' hashes and the model config")
    tokenizer: TokenizerFiles | None = Field(
        default=None, description="tokenizer, templates and ends of text; none: not recorded"
    )

    @property
    def tokenizer_key(self) -> str:
        """A key that is unique to the base's tokenizer."""
        told = self.tokenizer.model_dump_json() if self.tokenizer is not None else f"{self.sha256} {self.path}"
        return hashlib.sha256(told.encode(errors="replace")).hexdigest()


class FineTuning(Section):
    """The settings of a fine-tuning job, which starts from a base instead of a seed."""

    base: Base
    method: Literal["lora", "full"] = Field(description="adapters, or all weights")
    lora: LoraConfig | None = Field(default=None, description="with method lora")
    held: Literal["fp32", "bf16", "int8"] = Field(
        default="bf16", description="how workers hold the frozen base; a module's weights are decoded from it"
    )
    patience: NonNegative = Field(
        default=0, description="validation passes without a new best after which the job ends; 0: never"
    )

    @model_validator(mode="after")
    def _consistent(self) -> FineTuning:
        if (self.method == "lora") != (self.lora is not None):
            raise ValueError("lora belongs to method lora, and to no other")
        return self
