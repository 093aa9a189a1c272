"""A tiny pretrained model in a Hugging Face directory, and rows of examples to fine-tune it on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gradstream.core.data.manifest import NO_TARGET, DataShard, Manifest
from gradstream.core.pretrained.base import find_base
from gradstream.core.recipe.loading import absolute_paths, parse_recipe
from gradstream.core.recipe.recipe import Recipe
from support.tiny import LLAMA, VOCAB_SIZE

ROW_LENGTH = 24
END_OF_TEXT = "<|endoftext|>"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer of VOCAB_SIZE tokens. END_OF_TEXT has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def add(a, b): return a + b", "the sum of a and b", "a b c d e f"] * 8, trainer)
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def write_base(directory: Path, config: dict[str, Any] = LLAMA, seed: int = 3, dtype: str = "float32") -> Path:
    """Save a random model with transformers, and a tokenizer."""
    fields = dict(config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    # Weights large enough that an untrained model has definite predictions.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def random_rows(count: int, seed: int) -> np.ndarray[Any, Any]:
    """Make rows (count, 3, ROW_LENGTH) of two or three examples each; the first third of each example is its prompt."""
    draws = np.random.default_rng(seed)
    rows = np.zeros((count, 3, ROW_LENGTH), np.uint32)
    rows[:, 1] = NO_TARGET
    for row in rows:
        begin, number = 0, 1
        while begin < ROW_LENGTH - 4 and number < 4:
            length = int(draws.integers(5, 10))
            ids = draws.integers(1, VOCAB_SIZE, length + 1)
            length = min(length, ROW_LENGTH - begin)
            row[0, begin : begin + length] = ids[:length]
            row[1, begin + length // 3 : begin + length] = ids[1 + length // 3 : length + 1]
            row[2, begin : begin + length] = number
            begin, number = begin + length, number + 1
    return rows


def write_rows(directory: Path, num_train: int = 24, num_validation: int = 8, num_shards: int = 4) -> Path:
    """Write a data set of rows."""
    directory.mkdir(parents=True)
    tiny_tokenizer().save_pretrained(directory / "tokenizer")
    tokenizer = (directory / "tokenizer" / "tokenizer.json").read_bytes()
    (directory / "tokenizer.json").write_bytes(tokenizer)
    shards = []
    for split, count, seed in (("train", num_train, 1), ("validation", num_validation, 2)):
        for number, part in enumerate(np.array_split(random_rows(count, seed), num_shards)):
            data, index = part.astype("<u4").tobytes(), np.arange(len(part) + 1, dtype="<u8") * ROW_LENGTH
            file = f"{split}-{number:05d}"
            (directory / f"{file}.tokens").write_bytes(data)
            (directory / f"{file}.index").write_bytes(index.tobytes())
            shards.append(
                DataShard(
                    file=f"{file}.tokens",
                    index_file=f"{file}.index",
                    split=split,  # type: ignore[arg-type]
                    num_tokens=len(part) * ROW_LENGTH,
                    num_documents=len(part),
                    num_bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                    index_sha256=hashlib.sha256(index.tobytes()).hexdigest(),
                )
            )
    manifest = Manifest(
        token_dtype="uint32",
        vocab_size=VOCAB_SIZE,
        end_of_text_id=0,
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
        shards=tuple(shards),
        layout="rows",
        row_length=ROW_LENGTH,
    )
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    return directory


def tuning_recipe(base_directory: Path, data: Path, run_root: Path, **sections: Any) -> Recipe:
    """Make the recipe of a fine-tuning as the service submits it: LoRA, unless `fine_tuning` sets another method."""
    base, _ = find_base(str(base_directory))
    config = json.loads((base_directory / "config.json").read_text())
    tree: dict[str, Any] = {
        "name": "tune",
        "seed": 7,
        "run_root": str(run_root),
        "model": {"config": config},
        "training": {
            "num_steps": 6,
            "num_slots": 4,
            "global_batch": 8,
            "microbatch": 1,
            "sequence_length": ROW_LENGTH,
        },
        "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.0},
        "schedule": {"kind": "constant"},
        "codec": {"push": "fp32", "pull": "fp32"},
        "data": {"path": str(data)},
        "validation": {"interval_steps": 2, "num_samples": 8},
        "checkpoint": {"interval_steps": 2, "keep": 10},
        "fine_tuning": {
            "base": base.model_dump(mode="json"),
            "method": "lora",
            "lora": {"rank": 4, "alpha": 8},
            "held": "fp32",
        },
        "cluster": {"fragment_bytes": 4096},
    }
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    return absolute_paths(parse_recipe(tree))
