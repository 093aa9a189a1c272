"""The smallest real model, and a plan for it: for unit tests, which need no data."""

from __future__ import annotations

from typing import Any

from gradstream.core.data.manifest import parse_manifest
from gradstream.core.model.model import inventory
from gradstream.core.plan.fragments import cut
from gradstream.core.plan.plan import Plan, Server
from gradstream.core.recipe.loading import parse_recipe

MICRO_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def micro_plan(
    model: dict[str, Any] = MICRO_LLAMA,
    codec: dict[str, Any] | None = None,
    sections: dict[str, Any] | None = None,
    **training: Any,
) -> Plan:
    """Make a plan on one server, which does not exist.

    `sections` are other sections of the recipe. Keyword arguments replace keys of its `training`.
    """
    recipe = {
        "name": "tiny",
        "model": {"config": model},
        "training": {"num_steps": 3, "num_slots": 2, "global_batch": 8, "microbatch": 2, "sequence_length": 8}
        | training,
        "codec": codec or {},
        "data": {"path": "data"},
        "validation": {"num_samples": 8},
    } | (sections or {})
    held_out = [
        {
            "file": f"validation-{number}.tokens",
            "index_file": f"validation-{number}.index",
            "split": "validation",
            "num_tokens": 1000,
            "num_documents": 1,
            "num_bytes": 2000,
            "sha256": "0" * 64,
            "index_sha256": "0" * 64,
        }
        for number in range(4)
    ]
    data = {
        "token_dtype": "uint16",
        "vocab_size": 64,
        "end_of_text_id": 0,
        "tokenizer_sha256": "0" * 64,
        "shards": held_out,
    }
    tensors = inventory(model)
    return Plan(
        job_id="job",
        epoch=1,
        recipe=parse_recipe(recipe),
        model_config=model,
        data_manifest=parse_manifest(data),
        tensors=tuple(tensors),
        fragment_elements=256,
        placement=(0,) * len(cut(tensors, 256)),
        servers=(Server("n0", "server-0", ""),),
        leader=0,
        start_version=0,
        checkpoint_path="",
        checkpoint_root="",
    )
