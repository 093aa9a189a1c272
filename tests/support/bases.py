"""Tiny pretrained models with random weights, as transformers saves them, and checkpoints of fine-tunings of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gradstream.core.checkpoint import shard as checkpoint_shard
from gradstream.core.checkpoint.manifest import CheckpointManifest, TensorEntry, state_digest
from gradstream.core.model.model import build, inventory, load_config
from gradstream.core.plan.fragments import Tensor, cut
from gradstream.core.recipe.fine_tuning import Base, FineTuning, LoraConfig
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.storage import files
from support.micro import MICRO_LLAMA

CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
WORDS = ["<end>", "<unk>", "user", "assistant", *"abcdefghijklmnopqrstuvwxyz"]

_GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
_GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": MICRO_LLAMA,
    "llama-tied": MICRO_LLAMA | {"tie_word_embeddings": True},
    "mistral": MICRO_LLAMA | {"model_type": "mistral"},
    "qwen2": MICRO_LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": MICRO_LLAMA | {"model_type": "qwen3", "head_dim": 8},
    "gpt2": {"model_type": "gpt2"} | _GPT2,
}


def save_tokenizer(directory: Path, chat_template: str | None = None) -> None:
    """Save a tokenizer of words. The first word, id 0, ends a text."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(directory)


def save_base(
    directory: Path, family: str = "llama", dtype: torch.dtype = torch.float32, chat: bool = False, **options: Any
) -> Path:
    """Save a model of a family with random weights. `options` are passed to save_pretrained."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(load_config(FAMILIES[family]), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that a forgotten one is noticed
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, **options)
    save_tokenizer(directory, CHAT_TEMPLATE if chat else None)
    return directory


def write_checkpoint(
    directory: Path,
    architecture: Mapping[str, Any],
    tensors: list[Tensor],
    weights: Mapping[str, np.ndarray],
    fine_tuning: FineTuning | None = None,
) -> str:
    """Write a checkpoint in one file with these weights, as a job would."""
    fragments = cut(tensors, 200)
    shard = [
        (piece, {"weight": weights[tensors[piece.tensor].name].reshape(-1)[piece.begin : piece.end].copy()})
        for piece in fragments
    ]
    entry, digests = checkpoint_shard.write_shard(str(directory), "shard-0.safetensors", tensors, shard)
    recipe = {
        "name": "tiny",
        "model": {"config": dict(architecture)},
        "training": {"num_steps": 4, "num_slots": 1, "global_batch": 1, "microbatch": 1, "sequence_length": 8},
        "data": {"path": "data"},
        "fine_tuning": fine_tuning.model_dump(mode="json") if fine_tuning else None,
    }
    manifest = CheckpointManifest(
        job_id="tiny-1",
        epoch=1,
        version=4,
        unix_ms=0,
        recipe=parse_recipe(recipe).model_dump(mode="json"),
        architecture=dict(architecture),
        end_of_text_id=0,
        tensors=tuple(TensorEntry(name=t.name, shape=t.shape, decay=t.decay, unit=t.unit) for t in tensors),
        fragment_elements=200,
        placement=(0,) * len(fragments),
        files=(entry,),
        state_sha256=state_digest(digests),
        progress={},
    )
    save_tokenizer(directory)
    (directory / "tokenizer_config.json").unlink()
    files.write_atomic(
        str(directory / "manifest.json"), lambda stream: stream.write(manifest.model_dump_json().encode())
    )
    return str(directory)


def full_checkpoint(directory: Path, architecture: Mapping[str, Any], fine_tuning: FineTuning | None = None) -> str:
    """Write a checkpoint of a whole model with random weights."""
    tensors = inventory(architecture)
    return write_checkpoint(directory, architecture, tensors, _random(tensors), fine_tuning)


def lora_checkpoint(directory: Path, base: Base, config: Mapping[str, Any], lora: LoraConfig) -> str:
    """Write a checkpoint of a LoRA job on a base. Neither factor is zero, as after training."""
    tensors = inventory(config, lora)
    fine_tuning = FineTuning(base=base, method="lora", lora=lora)
    return write_checkpoint(directory, config, tensors, _random(tensors), fine_tuning)


def _random(tensors: list[Tensor]) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(1)
    return {tensor.name: numbers.normal(0, 0.2, tensor.shape).astype(np.float32) for tensor in tensors}


def adapted_model(checkpoint_directory: str, config: Mapping[str, Any], base_directory: Path) -> torch.nn.Module:
    """Load the model as workers hold it: the base in fp32 with the checkpoint's adapters."""
    reader = checkpoint_shard.CheckpointReader(checkpoint_directory)
    lora = LoraConfig.model_validate(reader.manifest.recipe["fine_tuning"]["lora"])
    plain = AutoModelForCausalLM.from_pretrained(base_directory, dtype=torch.float32)
    model = build(config, lora=lora)
    state = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            state[name].copy_(parameter)
        for entry in reader.manifest.tensors:
            values = reader.read("weight", entry.name, 0, entry.tensor().num_elements)
            state[entry.name].copy_(torch.from_numpy(values).reshape(entry.shape))
    return model.eval()


def change_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; a value of None removes the key."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
