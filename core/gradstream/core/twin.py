"""A model's twin: the same family and the same choices at sizes at which a forward pass takes milliseconds.

What a family computes with (kinds of layers, windows, flags, activation functions) stays. Only sizes shrink: widths,
heads, experts, the vocabulary, the number of layers of each kind, and the windows that attention looks back, so that a
few tokens reach beyond them. No size grows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gradstream.core.model import load_config

NUM_HEADS, HEAD_SIZE, HIDDEN, WINDOW, VOCABULARY = 4, 24, 96, 4, 64
MOST_LAYERS = 2
"""Of a family without a list of its layers' kinds; those with one keep each kind, and its neighbours in order."""

_LAYERS = re.compile(r"(num_|n_)?(hidden_|decoder_|encoder_)?layers?|num_blocks")
# The first pattern that matches a whole key says what its number becomes; a key without a match keeps its number.
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|encoder_hash_byte_group_vocab|shape_vocab_size", VOCABULARY),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads|num_heads", 2 * NUM_HEADS),
    (r"(swa_)?num_(key_value|kv)_heads|num_query_groups", 2),
    (r"(.*_)?(num_|n_)?heads|n_head|num_attention_heads_per_layer", NUM_HEADS),
    (r"linear_num_(key|value)_heads", NUM_HEADS),
    (r"(hidden|embedding|input_embedding|output_embedding|attention_hidden)_size|d_model|n_embd|emb_dim", HIDDEN),
    (r"embedding_dim|word_embed_proj_dim|lru_width|prompt_mid_dim", HIDDEN),
    (r"num_layers_per_stack", MOST_LAYERS),
    (r"mamba_d_ssm", 2 * HIDDEN),
    (r"qk_head_dim", 2 * HEAD_SIZE),
    (r"rotary_dim", HEAD_SIZE // 2),
    (r"(.*_)?head_?(dim|size)|dim_head|d_head|kv_channels|mamba_d_head", HEAD_SIZE),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_(dim|hidden_size)|dff|dim_ff|d_inner|feed_forward_size", 128),
    (r"(.*_)?(num_|n_)?(local_|routed_)?experts|zero_expert_num", 8),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k", 2),
    (r"n_group|num_expert_group|topk_group", 2),
    (r"(kv|q|o)_lora_rank|(.*_)?rank|hidden_size_per_layer_input|router_hidden_size", 16),
    (r"sliding_window(_size)?|(keep_|local_attention_|attention_)?window_(size|len)", WINDOW),
    (r"local_attention|attention_chunk_size|keep_window_size|index_topk", WINDOW),
    (r"(mamba_)?(d_state|state_size)|ssm_state_size", 8),
    (r"(mamba_)?chunk_size|block_size", 8),
)
_KEY_HEADS = re.compile(r"num_(key_value|kv)_heads")
_COMPILED = tuple((re.compile(pattern), size) for pattern, size in _SIZES)


def twin_config(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a config.json of the twin. Raises ConfigError as `load_config` does; the twin's own config may be
    one that its class refuses."""
    config = load_config(model_config)
    tree = config.to_dict()
    for name in config.sub_configs:
        if isinstance(tree.get(name), Mapping):
            tree[name] = _shrunk(tree[name])
    small = {**_shrunk(tree), "model_type": model_config["model_type"]}
    small.pop("transformers_version", None)
    return small


def _shrunk(tree: Mapping[str, Any]) -> dict[str, Any]:
    kept = _kept_layers(tree)
    small = {key: _small(key, value, tree, kept) for key, value in tree.items()}
    shared = tree.get("num_kv_shared_layers")
    if kept is not None and isinstance(shared, int):  # the last layers
        small["num_kv_shared_layers"] = sum(layer >= max(_counts(tree)) - shared for layer in kept)
    return small


def _kept_layers(tree: Mapping[str, Any]) -> list[int] | None:
    """Which layers the twin has; None for a config that does not say how many there are."""
    count = next((tree[key] for key in tree if _LAYERS.fullmatch(key) and isinstance(tree[key], int)), None)
    if count is None or count <= 0:
        return None
    lists = [value for value in tree.values() if isinstance(value, list) and len(value) == count]
    kinds = [repr([kinds_of[layer] for kinds_of in lists]) for layer in range(count)]
    first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    last = {kind: layer for layer, kind in enumerate(kinds)}
    kept = sorted({*first.values(), *last.values()})
    if len(kept) > 2 * MOST_LAYERS:  # a number of its own for each layer is no kind
        kept = kept[: 2 * MOST_LAYERS]
    rest = [layer for layer in range(count) if layer not in kept]
    return sorted(kept + rest[: max(0, MOST_LAYERS - len(kept))])


def _small(key: str, value: Any, tree: Mapping[str, Any], kept: list[int] | None) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if kept is not None and _LAYERS.fullmatch(key):
            return min(value, len(kept))
        if key.endswith("_token_id"):
            return min(value, VOCABULARY - 1)
        if _KEY_HEADS.fullmatch(key) and value in (tree.get("num_attention_heads"), tree.get("n_head")):
            return min(value, NUM_HEADS)  # as many as there are for queries
        for pattern, size in _COMPILED:
            if pattern.fullmatch(key):
                return min(value, size)
        return value
    if isinstance(value, list) and kept is not None and len(value) == max(_counts(tree)):
        return [_small(key, value[layer], tree, None) for layer in kept]
    if isinstance(value, Mapping) and kept is not None and value and all(str(layer).isdigit() for layer in value):
        named = {int(layer): own for layer, own in value.items()}
        return {place: named[layer] for place, layer in enumerate(kept) if layer in named}
    if isinstance(value, list) and key.endswith("_token_id"):
        return [min(item, VOCABULARY - 1) for item in value]
    return value


def _counts(tree: Mapping[str, Any]) -> list[int]:
    return [value for key, value in tree.items() if _LAYERS.fullmatch(key) and isinstance(value, int)]
