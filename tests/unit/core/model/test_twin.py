"""A model's twin has each kind of layer of its model, and consistent sizes."""

from __future__ import annotations

from typing import Any

import pytest

from gradstream.core.model.model import build
from gradstream.core.model.trial import ModelUse, try_model
from gradstream.core.model.twin import twin_config

# Configs as a hub has them, at their own sizes.
PHI3_LONG: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + n for n in range(48)]},
    "sliding_window": 262144,
}
PHI4_MINI = {**PHI3_LONG, "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75}
PHI2 = {"model_type": "phi", "hidden_size": 2560, "num_attention_heads": 32, "partial_rotary_factor": 0.4}
MINICPM3: dict[str, Any] = {
    "model_type": "minicpm3",
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "rope_scaling": {
        "type": "longrope",
        "long_factor": [1.0 + n for n in range(16)],
        "short_factor": [1.0] * 16,
        "original_max_position_embeddings": 32768,
    },
}


@pytest.mark.parametrize("config", [PHI3_LONG, PHI4_MINI, PHI2, MINICPM3, {"model_type": "zamba2"}])
def test_sizes_that_a_family_derives_from_each_other_go_together(config: dict[str, Any]) -> None:
    assert try_model(config) == (False, "")


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        # The first three layers are dense.
        ({"model_type": "deepseek_v3"}, {"DeepseekV3MLP", "DeepseekV3MoE"}),
        # Attention in every eighth layer, experts in every second one.
        ({"model_type": "jamba"}, {"JambaAttention", "JambaMambaMixer", "JambaSparseMoeBlock", "JambaMLP"}),
        ({"model_type": "recurrent_gemma"}, {"RecurrentGemmaAttention", "RecurrentGemmaRecurrentBlock"}),
        # Layers by their numbers.
        (
            {"model_type": "qwen3_moe", "num_hidden_layers": 48, "mlp_only_layers": [0, 1, 47]},
            {"Qwen3MoeMLP", "Qwen3MoeSparseMoeBlock"},
        ),
    ],
)
def test_each_kind_of_layer_is_tried(config: dict[str, Any], kinds: set[str]) -> None:
    twin = build(twin_config(config), "meta")
    assert kinds <= {type(module).__name__ for module in twin.modules()}
    assert twin.config.num_hidden_layers <= 6  # type: ignore[operator,union-attr]
    assert try_model(config, ModelUse(has_pipeline=True)) == (False, "")
