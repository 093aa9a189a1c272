"""Writes the result of a fine-tuning as peft's adapter directory or as a Hugging Face model directory.

A directory appears complete or not at all. At most one of the model's tensors is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gradstream.core.checkpoint.manifest import WEIGHT
from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.checkpoint.weights_files import Buffer, WeightsFile, weights_files, write_weights
from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.model.constants import exported_constants
from gradstream.core.model.lora import ADAPTER, adapted_module, factors, merged_weight, peft_config
from gradstream.core.model.model import build
from gradstream.core.pretrained.base import BaseReader
from gradstream.core.pretrained.export import EXPORT_FILE_BYTES, huggingface_weights, write_config, write_huggingface
from gradstream.core.pretrained.tokenizer import write_generation_config, write_tokenizer
from gradstream.core.recipe.fine_tuning import Base, FineTuning, LoraConfig
from gradstream.core.storage import files
from gradstream.core.storage.tensor_files import TensorSpec, bytes_of
from gradstream.services.fine_tuning.export.card import CardFacts, DataFacts, Score, model_card

__all__ = ["CardFacts", "DataFacts", "Score", "export_adapter", "export_merged", "model_card"]

README_NAME = "README.md"
PEFT_PREFIX = "base_model.model."
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def export_adapter(checkpoint_directory: str, destination: Path, card: str, chat: bool = False) -> None:
    """Write the adapter of a LoRA job's checkpoint as a directory that peft's `PeftModel.from_pretrained` loads.

    The directory has adapter_config.json, adapter_model.safetensors (fp32), the base's tokenizer files and
    generation_config.json, and `card` as README.md. `chat`: the adapter was trained on conversations, so transformers
    must know the token that ends a reply. Raises ConfigError when the checkpoint is not of a LoRA job, and
    CheckpointError when it is damaged, when the base no longer has a tokenizer, and when `destination` is not empty.
    """
    adapter = _Adapter(checkpoint_directory)
    with files.whole_directory(destination) as temporary:
        adapter.config.save_pretrained(str(temporary))
        tensors = {f"{PEFT_PREFIX}{name.replace(f'.{ADAPTER}.', '.')}": adapter.read(name) for name in adapter.names}
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        write_tokenizer(adapter.base, temporary)
        write_generation_config(adapter.base, temporary, chat)
        (temporary / README_NAME).write_text(card, encoding="utf-8")


def export_merged(
    checkpoint_directory: str, destination: Path, card: str, chat: bool = False, weights: bool = True
) -> list[WeightsFile]:
    """Write the result of a fine-tuning as a Hugging Face model directory.

    The directory has the weights, `card` as README.md, the base's tokenizer files and generation_config.json. `chat`:
    as for `export_adapter`. Returns the files of the weights; without `weights` they are not written, and each is made
    when it is read.

    For a LoRA job the weights are base and adapter merged. W + scaling * B @ A is computed in fp32 and stored in the
    base's dtype of W, so a bf16 base gives a bf16 model that is rounded once. Tensors without an adapter equal the
    base's bit for bit. For a full fine-tuning the weights are the checkpoint's own, in fp32.

    Raises CheckpointError when the checkpoint or the base is damaged or missing, or when `destination` is not empty;
    ConfigError when the checkpoint is not of a fine-tuning.
    """
    with files.whole_directory(destination) as temporary:
        if _fine_tuning(checkpoint_directory, CheckpointReader(checkpoint_directory)).method == "lora":
            adapter = _Adapter(checkpoint_directory)
            reader = BaseReader(adapter.base)
            made = _merged_weights(reader, adapter)
            _write_config(adapter.base, reader.config, temporary)
            write_tokenizer(adapter.base, temporary)
            write_generation_config(adapter.base, temporary, chat)
        else:
            made = huggingface_weights(write_huggingface(checkpoint_directory, temporary, weights=False, chat=chat))
        if weights:
            write_weights(made, temporary)
        (temporary / README_NAME).write_text(card, encoding="utf-8")
    return made


def _fine_tuning(directory: str, reader: CheckpointReader) -> FineTuning:
    fine_tuning = reader.manifest.fine_tuning
    if fine_tuning is None:
        raise ConfigError(f"checkpoint {directory} is not of a fine-tuning; `gradstream ckpt export` exports it")
    return fine_tuning


class _Adapter:
    """The adapter in a checkpoint, with peft's config for it."""

    def __init__(self, directory: str):
        self._reader = CheckpointReader(directory)
        fine_tuning = _fine_tuning(directory, self._reader)
        if fine_tuning.lora is None:
            raise ConfigError(
                f"checkpoint {directory} is of a full fine-tuning, which has no adapter; export it merged"
            )
        self.base: Base = fine_tuning.base
        self.lora: LoraConfig = fine_tuning.lora
        self.names = [entry.name for entry in self._reader.manifest.tensors]
        self.modules = {module for name in self.names if (module := adapted_module(name)) is not None}
        self._model = build(self._reader.manifest.architecture, "meta")
        self.config: Any = peft_config(self.lora, self._model)
        self.config.base_model_name_or_path = self.base.path
        self.config.inference_mode = True
        self.config.init_lora_weights = True
        self.config.target_modules = _shortest(self.modules, [name for name, _ in self._model.named_modules()])

    def read(self, name: str) -> torch.Tensor:
        shape = self._reader.shape(name)
        return torch.from_numpy(self._reader.read(WEIGHT, name, 0, math.prod(shape))).reshape(shape)

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the base with its adapter's product added, if it has one."""
        module = name.removesuffix(".weight")
        if module == name or module not in self.modules:
            return weight
        a, b = (self.read(factor) for factor in factors(module))
        merged: torch.Tensor = merged_weight(weight, a, b, self.lora, self._model.get_submodule(module))
        return merged


def _shortest(modules: set[str], every: Sequence[str]) -> list[str]:
    """Shorten the modules' names to their last parts, as people write them, if these match no other module."""
    ends = {name.rsplit(".", 1)[-1] for name in modules}
    meant = {name for name in every if name.rsplit(".", 1)[-1] in ends}
    return sorted(ends if meant == modules else modules)


def _merged_weights(reader: BaseReader, adapter: _Adapter) -> list[WeightsFile]:
    """The files of the merged weights, made while they are read, one tensor at a time."""
    unknown = adapter.modules - {name.removesuffix(".weight") for name in reader.names()}
    if unknown:
        raise CheckpointError(
            f"the base has no weight for the adapter of '{min(unknown)}'; they do not belong together"
        )

    known = set(reader.names())
    constants = {name: values for name, values in exported_constants(reader.config).items() if name not in known}

    def read(name: str) -> Iterator[Buffer]:
        if name in constants:
            yield bytes_of(constants[name])
        else:
            yield tensor_bytes(adapter.merged(name, reader.tensor(name)))

    specs = [TensorSpec(name, DTYPE_NAMES[reader.dtype(name)], reader.shape(name)) for name in reader.names()]
    specs += [TensorSpec(name, "F32", values.shape) for name, values in constants.items()]
    return weights_files(specs, read, EXPORT_FILE_BYTES)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, copied only when the tensor is not contiguous."""
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def _write_config(base: Base, config: dict[str, Any], destination: Path) -> None:
    if base.kind == "checkpoint":
        write_config(CheckpointReader(base.path), destination)
        return
    (destination / "config.json").write_text(json.dumps(config, indent=1))
