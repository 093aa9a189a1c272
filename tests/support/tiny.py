"""Tiny models on small real text: the source of a few modules of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from gradstream.coordinator.data.prepare import prepare
from gradstream.core.recipe.loading import absolute_paths, parse_recipe
from gradstream.core.recipe.recipe import PrepareConfig, Recipe

VOCAB_SIZE = 320
SEQUENCE_LENGTH = 32
MODULES = ["argparse.py", "ast.py", "bisect.py", "calendar.py", "cmd.py", "code.py", "codecs.py", "configparser.py"]


def prepare_tiny_data(directory: Path) -> Path:
    """Prepare a data set of 8 modules in 4 data shards a split; return its directory."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    # Pieces of 4 kB give enough documents to hold some out for every slot.
    source = directory / "source"
    source.mkdir(parents=True)
    for module in MODULES:
        text = (stdlib / module).read_text(encoding="utf-8")
        for number, begin in enumerate(range(0, len(text), 4000)):
            (source / f"{module}-{number:03d}.txt").write_text(text[begin : begin + 4000], encoding="utf-8")
    out = directory / "data"
    options = PrepareConfig(sources=[str(source)], vocab_size=VOCAB_SIZE, num_shards=4, validation_fraction=0.15)
    prepare(options, str(out), num_processes=1)
    return out


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
"""Settings of GPT-2 without dropout, for tests in which every pass must be the same."""


def tiny_recipe(data: Path, run_root: Path, **sections: Any) -> Recipe:
    """Make a recipe that trains in seconds. Keyword arguments replace keys of sections, or whole values."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "seed": 7,
        "run_root": str(run_root),
        "model": {"config": LLAMA},
        "training": {
            "num_steps": 6,
            "num_slots": 4,
            "global_batch": 8,
            "microbatch": 1,
            "sequence_length": SEQUENCE_LENGTH,
        },
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"warmup_steps": 2},
        "codec": {"push": "fp32", "pull": "fp32"},
        "data": {"path": str(data)},
        "validation": {"interval_steps": 3, "num_samples": 8},
        "checkpoint": {"interval_steps": 2, "keep": 10},
        # Small fragments: even a tiny model has more fragments than tensors.
        "cluster": {"fragment_bytes": 4096},
    }
    for key, value in sections.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            tree[key] = {**tree[key], **value}
        else:
            tree[key] = value
    return absolute_paths(parse_recipe(tree))
