"""A model's twin: a small model of the same family and choices, whose forward pass takes milliseconds.

The twin keeps the kinds of layers, windows, flags and activation functions. Only sizes shrink: widths, heads, experts,
the vocabulary, the number of layers of each kind, and the attention windows, so that a few tokens reach beyond one. No
size grows.

The kinds of layers are read from the model itself, built without weights, because a config may give them by a list, by
ids or by a period ("the first three are dense"). The twin then has enough layers to contain each kind.

torch is imported inside the functions, because its import is slow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gradstream.core.errors import ConfigError
from gradstream.core.model.model import build, load_config

if TYPE_CHECKING:
    from torch import nn

NUM_HEADS, HEAD_SIZE, HIDDEN, WINDOW, VOCABULARY = 4, 24, 96, 4, 64
MAX_LAYERS = 2
"""Layers of a twin whose family has no list of its layers' kinds. With a list, the twin keeps each kind, in order, with
its neighbours."""
MAX_FIRST_LAYERS = 6
"""Maximum number of layers of a twin that takes its model's first layers until each kind is included."""

_LAYERS = re.compile(r"(num_|n_)?(hidden_|decoder_|encoder_)?layers?|num_blocks")
# The first pattern that matches a whole key gives the key's new size. A key without a match keeps its number.
_SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|encoder_hash_byte_group_vocab|shape_vocab_size", VOCABULARY),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads|num_heads", 2 * NUM_HEADS),
    (r"(swa_)?num_(key_value|kv)_heads|num_query_groups", 2),
    (r"(.*_)?(num_|n_)?heads|n_head|num_attention_heads_per_layer", NUM_HEADS),
    (r"linear_num_(key|value)_heads", NUM_HEADS),
    (r"(hidden|embedding|input_embedding|output_embedding)_size|d_model|n_embd|emb_dim", HIDDEN),
    (r"embedding_dim|word_embed_proj_dim|lru_width|prompt_mid_dim", HIDDEN),
    (r"num_layers_per_stack", MAX_LAYERS),
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
_LAYER_IDS = re.compile(r".*layer_ids|.*layers?_indices|.*_idxs|.*_only_layers|cross_attention_layers|moe_layers")
"""Keys whose lists have layer numbers."""
_KEY_HEADS = re.compile(r"num_(key_value|kv)_heads")
_COMPILED = tuple((re.compile(pattern), size) for pattern, size in _SIZES)


def twin_config(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The twin's config.json.

    Raises ConfigError as `load_config` does. The config class may refuse the returned config.
    """
    twin: dict[str, Any] = json.loads(_twin_config(json.dumps(model_config)))
    return twin


@lru_cache(maxsize=64)
def _twin_config(config_json: str) -> str:
    model_config = json.loads(config_json)
    first = _shrunk_config(model_config, None)
    wanted = _kinds_of(model_config)
    seen: dict[object, int] = {}
    for layer, kind in enumerate(wanted):
        seen.setdefault(kind, layer)
    missing = seen.keys() - set(_kinds_of(first))
    if not missing:
        return json.dumps(first)
    # Try the layers that begin a kind, which suffice if lists give the kinds; else all layers up to the last of them.
    tried = [first]
    ways = [sorted(seen.values())]
    if max(seen.values()) < MAX_FIRST_LAYERS:
        ways.append(list(range(max(seen.values()) + 1)))
    for kept in ways:
        tried.append(_shrunk_config(model_config, (len(wanted), kept)))
    return json.dumps(min(tried, key=lambda small: len(seen.keys() - set(_kinds_of(small)))))


def _kinds_of(model_config: Mapping[str, Any]) -> list[object]:
    """The kind of each layer of a model, in order; empty for a model that cannot be built."""
    try:
        model = build(model_config, "meta")
    except ConfigError:
        return []
    from torch import nn

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    config: Any = model.config
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    layers = next((layers for layers in lists if len(layers) == count), lists[0] if lists else nn.ModuleList())
    return [_kind(layer) for layer in layers]


def _kind(layer: nn.Module) -> object:
    """The kind of a layer: its modules with their settings except sizes, such as flags, names and missing parts."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if (value is None or isinstance(value, (bool, str))) and key != "training"
            ),
        )
        for name, module in layer.named_modules()
    )


def _shrunk_config(model_config: Mapping[str, Any], asked: tuple[int, Sequence[int]] | None) -> dict[str, Any]:
    """The twin's config.json. `asked` has the model's number of layers, and the layers that the twin keeps."""
    config = load_config(model_config)
    tree = config.to_dict()
    for name in config.sub_configs:
        if isinstance(tree.get(name), Mapping):
            tree[name] = _shrunk(tree[name], asked)
    small = {**_shrunk(tree, asked), "model_type": model_config["model_type"]}
    small.pop("transformers_version", None)
    return small


def _shrunk(tree: Mapping[str, Any], asked: tuple[int, Sequence[int]] | None) -> dict[str, Any]:
    kept = _kept_layers(tree)
    if asked is not None and kept is not None and max(_counts(tree)) == asked[0]:
        kept = list(asked[1])
        kept += [layer for layer in range(asked[0]) if layer not in kept][: max(0, MAX_LAYERS - len(kept))]
    small = {key: _small(key, value, tree, kept) for key, value in tree.items()}
    _keep_relations(small, tree)
    shared = tree.get("num_kv_shared_layers")
    if kept is not None and isinstance(shared, int):  # the last layers
        small["num_kv_shared_layers"] = sum(layer >= max(_counts(tree)) - shared for layer in kept)
    return small


def _keep_relations(small: dict[str, Any], tree: Mapping[str, Any]) -> None:
    """Make sizes that a family derives from each other fit again, in place."""
    size, hidden, heads = tree.get("attention_hidden_size"), tree.get("hidden_size"), tree.get("num_attention_heads")
    if size and hidden:  # Zamba's attention has the embeddings as input too
        small["attention_hidden_size"] = size * small["hidden_size"] // hidden
        if heads and tree.get("attention_head_dim") == size // heads:
            small["attention_head_dim"] = small["attention_hidden_size"] // small["num_attention_heads"]
    rope = tree.get("qk_rope_head_dim")
    _fit_rotary(small, small, lambda num_factors: rope == 2 * num_factors)


def _fit_rotary(
    values: dict[str, Any], small: Mapping[str, Any], is_of_rope_head: Callable[[int], bool], share: float = 1.0
) -> None:
    """Fit rotary settings: they rotate an even number of a head's elements, and longrope has a factor for each two."""
    head = small.get("head_dim") or small.get("hidden_size", HIDDEN) // (small.get("num_attention_heads") or NUM_HEADS)
    for key in ("partial_rotary_factor", "rotary_pct"):
        if isinstance(values.get(key), float) and 0 < values[key] < 1:
            # A little more, because the product is rounded down.
            share = values[key] = (2 * max(1, round(values[key] * head / 2)) + 0.01) / head
    for key, value in values.items():
        if isinstance(value, dict):
            _fit_rotary(value, small, is_of_rope_head, share)
        elif key in ("short_factor", "long_factor") and isinstance(value, list) and value:
            turned = small["qk_rope_head_dim"] if is_of_rope_head(len(value)) else int(head * share)
            values[key] = [value[place * len(value) * 2 // turned] for place in range(turned // 2)]


def _kept_layers(tree: Mapping[str, Any]) -> list[int] | None:
    """The layers that the twin keeps; None for a config without a number of layers."""
    count = next((tree[key] for key in tree if _LAYERS.fullmatch(key) and isinstance(tree[key], int)), None)
    if count is None or count <= 0:
        return None
    lists = [
        value
        for key, value in tree.items()
        if isinstance(value, list) and len(value) == count and not _is_ids(key, value)
    ]
    kinds = [repr([kinds_of[layer] for kinds_of in lists]) for layer in range(count)]
    first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    last = {kind: layer for layer, kind in enumerate(kinds)}
    kept = sorted({*first.values(), *last.values()})
    if len(kept) > 2 * MAX_LAYERS:  # each layer has a number of its own, so the numbers are not kinds
        kept = kept[: 2 * MAX_LAYERS]
    rest = [layer for layer in range(count) if layer not in kept]
    return sorted(kept + rest[: max(0, MAX_LAYERS - len(kept))])


def _small(key: str, value: Any, tree: Mapping[str, Any], kept: list[int] | None) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if kept is not None and _LAYERS.fullmatch(key):
            return min(value, len(kept))
        if key.endswith("_token_id"):
            return min(value, VOCABULARY - 1)
        if _KEY_HEADS.fullmatch(key) and value in (tree.get("num_attention_heads"), tree.get("n_head")):
            return min(value, NUM_HEADS)  # as many as the query heads
        for pattern, size in _COMPILED:
            if pattern.fullmatch(key):
                return min(value, size)
        return value
    if kept is not None and _is_ids(key, value):
        return [kept.index(layer) for layer in value if layer in kept]
    if isinstance(value, list) and kept is not None and len(value) == max(_counts(tree)):
        return [_small(key, value[layer], tree, None) for layer in kept]
    if isinstance(value, Mapping) and kept is not None and value and all(str(layer).isdigit() for layer in value):
        named = {int(layer): own for layer, own in value.items()}
        return {place: named[layer] for place, layer in enumerate(kept) if layer in named}
    if isinstance(value, list) and key.endswith("_token_id"):
        return [min(item, VOCABULARY - 1) for item in value]
    return value


def _is_ids(key: str, value: Any) -> bool:
    return _LAYER_IDS.fullmatch(key) is not None and isinstance(value, list) and all(type(id) is int for id in value)


def _counts(tree: Mapping[str, Any]) -> list[int]:
    return [value for key, value in tree.items() if _LAYERS.fullmatch(key) and isinstance(value, int)]
