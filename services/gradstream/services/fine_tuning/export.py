"""What came of a fine-tuning, as others read it: peft's adapter directory, or a Hugging Face model.

A directory is there whole or not at all. Nothing here holds more than one of the model's tensors in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from safetensors.torch import save_file

from gradstream.core import files
from gradstream.core.base_files import read_small
from gradstream.core.base_model import BaseReader
from gradstream.core.base_tokenizer import write_chat_template, write_tokenizer
from gradstream.core.checkpoint import EXPORT_FILE_BYTES, WEIGHT, CheckpointReader, write_config, write_huggingface
from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.finetuning import Base, FineTuning, LoraConfig
from gradstream.core.lora import ADAPTER, adapted_module, factors, peft_config
from gradstream.core.model import build
from gradstream.core.tensor_files import TensorSpec, write_tensors
from gradstream.services.fine_tuning.card import CardFacts, DataFacts, Score, model_card

__all__ = ["CardFacts", "DataFacts", "Score", "export_adapter", "export_merged", "model_card"]

README_NAME = "README.md"
PEFT_PREFIX = "base_model.model."
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def export_adapter(checkpoint_directory: str, destination: Path, card: str) -> None:
    """Write the adapter of a LoRA job's checkpoint as a directory that peft's `PeftModel.from_pretrained` loads.

    adapter_config.json, adapter_model.safetensors (fp32), the base's tokenizer files, and `card` as README.md. Raises
    ConfigError when the checkpoint is not of a LoRA job, and CheckpointError when it is damaged, when the base has no
    tokenizer any more, and when `destination` is not empty.
    """
    adapter = _Adapter(checkpoint_directory)
    with files.whole_directory(destination) as temporary:
        adapter.config.save_pretrained(str(temporary))
        tensors = {f"{PEFT_PREFIX}{name.replace(f'.{ADAPTER}.', '.')}": adapter.read(name) for name in adapter.names}
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        write_tokenizer(adapter.base, temporary)
        (temporary / README_NAME).write_text(card, encoding="utf-8")


def export_merged(checkpoint_directory: str, destination: Path, card: str) -> None:
    """Write the result of a fine-tuning as a Hugging Face model directory, with `card` as README.md.

    Of a LoRA job: base and adapter in one. W + scaling * B @ A is computed in fp32 and stored in the dtype that the
    base has W in, so a bf16 base gives a bf16 model that is rounded once; what has no adapter is the base's, bit for
    bit. Of a full fine-tuning: the checkpoint itself, fp32. Raises CheckpointError when checkpoint or base are damaged
    or gone, or when `destination` is not empty, and ConfigError for a checkpoint of no fine-tuning.
    """
    if _finetuning(checkpoint_directory, CheckpointReader(checkpoint_directory)).method == "lora":
        adapter = _Adapter(checkpoint_directory)
        reader = BaseReader(adapter.base)
        with files.whole_directory(destination) as temporary:
            _write_model(reader, adapter, temporary)
            _write_config(adapter.base, reader.config, temporary)
            write_tokenizer(adapter.base, temporary)
            (temporary / README_NAME).write_text(card, encoding="utf-8")
        return
    with files.whole_directory(destination) as temporary:
        write_huggingface(checkpoint_directory, temporary)
        write_chat_template(checkpoint_directory, temporary)
        (temporary / README_NAME).write_text(card, encoding="utf-8")


def _finetuning(directory: str, reader: CheckpointReader) -> FineTuning:
    finetuning = reader.manifest.finetuning
    if finetuning is None:
        raise ConfigError(f"checkpoint {directory} is not of a fine-tuning; `gradstream ckpt export` exports it")
    return finetuning


class _Adapter:
    """The adapter that a checkpoint holds, and peft's config of it."""

    def __init__(self, directory: str):
        self._reader = CheckpointReader(directory)
        finetuning = _finetuning(directory, self._reader)
        if finetuning.lora is None:
            raise ConfigError(
                f"checkpoint {directory} is of a full fine-tuning, which has no adapter; export it merged"
            )
        self.base: Base = finetuning.base
        self.lora: LoraConfig = finetuning.lora
        self.names = [entry.name for entry in self._reader.manifest.tensors]
        self.modules = {module for name in self.names if (module := adapted_module(name)) is not None}
        model = build(self._reader.manifest.architecture, "meta")
        self.config: Any = peft_config(self.lora, model)
        self.config.base_model_name_or_path = self.base.path
        self.config.inference_mode = True
        self.config.init_lora_weights = True
        self.config.target_modules = _shortest(self.modules, [name for name, _ in model.named_modules()])

    def read(self, name: str) -> torch.Tensor:
        shape = self._reader.shape(name)
        return torch.from_numpy(self._reader.read(WEIGHT, name, 0, math.prod(shape))).reshape(shape)

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the base with its adapter's product added, if it has one."""
        module = name.removesuffix(".weight")
        if module == name or module not in self.modules:
            return weight
        a, b = (self.read(factor) for factor in factors(module))
        product = b @ a
        if self.config.fan_in_fan_out:
            product = product.T
        return (weight.float() + product * self.lora.scaling).to(weight.dtype)


def _shortest(modules: set[str], every: Sequence[str]) -> list[str]:
    """The last parts of the modules' names where these mean no other module, as people write them; else the names."""
    ends = {name.rsplit(".", 1)[-1] for name in modules}
    meant = {name for name in every if name.rsplit(".", 1)[-1] in ends}
    return sorted(ends if meant == modules else modules)


def _write_model(reader: BaseReader, adapter: _Adapter, destination: Path) -> None:
    """Write all tensors, in files of at most EXPORT_FILE_BYTES unless one tensor is larger."""
    unknown = adapter.modules - {name.removesuffix(".weight") for name in reader.names()}
    if unknown:
        raise CheckpointError(
            f"the base has no weight for the adapter of '{min(unknown)}'; they do not belong together"
        )
    groups: list[list[str]] = [[]]
    size = total = 0
    for name in reader.names():
        num_bytes = math.prod(reader.shape(name)) * reader.dtype(name).itemsize
        if groups[-1] and size + num_bytes > EXPORT_FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
        total += num_bytes
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        kinds = [(name, reader.dtype(name), reader.shape(name)) for name in group]
        write_safetensors(destination / file, kinds, lambda name: adapter.merged(name, reader.tensor(name)))
        weight_map.update(dict.fromkeys(group, file))
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (destination / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_safetensors(
    path: Path,
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    tensor: Callable[[str], torch.Tensor],
) -> None:
    """Write (name, dtype, shape) tensors as a safetensors file, asking `tensor` for one at a time."""
    kinds = {name: (dtype, shape) for name, dtype, shape in tensors}

    def contents(name: str) -> npt.NDArray[Any]:
        value = tensor(name)
        if (value.dtype, tuple(value.shape)) != kinds[name]:
            raise ValueError(f"tensor '{name}' is not the {kinds[name]} that was announced")
        return value.contiguous().reshape(-1).view(torch.uint8).numpy()

    specs = [TensorSpec(name, DTYPE_NAMES[dtype], shape) for name, dtype, shape in tensors]
    with path.open("wb") as stream:
        write_tensors(stream, specs, contents, {"format": "pt"})


def _write_config(base: Base, config: dict[str, Any], destination: Path) -> None:
    if base.kind == "checkpoint":
        write_config(CheckpointReader(base.path), destination)
        return
    (destination / "config.json").write_text(json.dumps(config, indent=1))
    generation = "generation_config.json"
    if generation in files.list_names(base.path):
        (destination / generation).write_bytes(read_small(base.path, generation))
