"""Stages of many families: the same bits as the whole model, forward and backward."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from support.tiny import GPT2, NO_DROPOUT
from torch import nn

from gradstream.core.errors import ConfigError
from gradstream.core.model.model import build, initial_weights
from gradstream.core.model.stage_module import StageModule, segments_of, stage_tensors

NUM_LAYERS = 4
COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "model_type": "llama"},
    "llama-tied": {**COMMON, "model_type": "llama", "tie_word_embeddings": True},
    "mistral": {**COMMON, "model_type": "mistral", "sliding_window": 8},
    "qwen2": {**COMMON, "model_type": "qwen2"},
    "qwen3": {**COMMON, "model_type": "qwen3", "head_dim": 8},
    "gemma": {**COMMON, "model_type": "gemma", "head_dim": 8},
    "gemma2": {**COMMON, "model_type": "gemma2", "head_dim": 8, "sliding_window": 8},
    # Layers of two kinds in turn, which look back 8 tokens or all of them.
    "gemma3_text": {
        **COMMON,
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "olmo2": {**COMMON, "model_type": "olmo2"},
    "phi": {**COMMON, "model_type": "phi", "num_key_value_heads": 4},
    "gpt_neox": {**COMMON, "model_type": "gpt_neox"},
    "gpt2": {**GPT2, **NO_DROPOUT, "n_layer": NUM_LAYERS},
}
CUTS = {
    "whole": [0, NUM_LAYERS + 2],
    "halves": [0, 3, NUM_LAYERS + 2],
    "every segment": list(range(NUM_LAYERS + 3)),
}


def fill(parameters: dict[tuple[str, int], nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for (name, _), parameter in parameters.items():
            parameter.copy_(weights[name])


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_have_the_bits_of_the_whole_model(family: str, cut: str) -> None:
    config = FAMILIES[family]
    weights = dict(initial_weights(config, seed=3))
    whole = build(config)
    fill({(name, 0): parameter for name, parameter in whole.named_parameters()}, weights)
    ids_BT = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    wanted_BTV = whole(input_ids=ids_BT, use_cache=False).logits
    wanted_BTV.float().square().sum().backward()

    stages = [StageModule(config, range(begin, end)) for begin, end in pairwise(CUTS[cut])]
    tensors = [stage_tensors(stage, weights) for stage in stages]
    for parameters in tensors:
        fill(parameters, weights)
    # Each stage computes on its own: activations forward, their gradients back.
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    received = ids_BT
    for stage in stages:
        inputs.append(received)
        outputs.append(stage(received))
        received = outputs[-1].detach().requires_grad_()
    assert torch.equal(outputs[-1], wanted_BTV)
    outputs[-1].float().square().sum().backward()
    for output, after in zip(reversed(outputs[:-1]), reversed(inputs[1:]), strict=True):
        output.backward(after.grad)

    found: dict[str, list[torch.Tensor]] = {}
    for parameters in tensors:
        for (name, _), parameter in parameters.items():
            assert parameter.grad is not None, name
            found.setdefault(name, []).append(parameter.grad)
    assert set(found) == set(weights)
    for name, parameter in whole.named_parameters():
        assert parameter.grad is not None
        if len(found[name]) == 1:
            assert torch.equal(found[name][0], parameter.grad), name
        else:  # the whole model adds the two parts in an order of its own
            torch.testing.assert_close(sum(found[name]), parameter.grad)


def test_a_stage_has_no_parameters_but_its_own() -> None:
    config = FAMILIES["llama"]
    whole = build(config, "meta")
    segments = segments_of(whole)
    assert [segment.name for segment in segments] == [
        "embedding",
        *(f"model.layers.{i}" for i in range(NUM_LAYERS)),
        "head",
    ]
    stages = [StageModule(config, range(number, number + 1)) for number in range(len(segments))]
    names = [{name.removeprefix("model.") for name, _ in stage.named_parameters()} for stage in stages]
    assert set.union(*names) == {name for name, _ in whole.named_parameters()}
    assert sum(map(len, names)) == len(set.union(*names))
    assert names[0] == {"model.embed_tokens.weight"}
    assert names[-1] == {"model.norm.weight", "lm_head.weight"}


def test_a_family_whose_segments_are_not_in_order_is_refused() -> None:
    config = {**COMMON, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
    with pytest.raises(
        ConfigError, match=r"'model.decoder.final_layer_norm' lies before the layers and is no embedding"
    ):
        segments_of(build(config, "meta"))


def test_a_family_that_takes_its_layers_results_apart_is_refused() -> None:
    config = {
        "model_type": "gpt_neo",
        "vocab_size": 61,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global"], 2]],
        "max_position_embeddings": 32,
    }
    stage = StageModule(config, range(3, 4))
    with pytest.raises(ConfigError, match=r"GPTNeoForCausalLM cannot be cut .* turned \(2, 8\) tokens into \(1, 8\)"):
        stage(torch.zeros(2, 8, 32))


@pytest.mark.parametrize("segments", [range(0), range(3, 8), range(-1, 2)])
def test_segments_that_do_not_exist(segments: range) -> None:
    with pytest.raises(ConfigError, match="the model has segments 0 to 5"):
        StageModule(FAMILIES["llama"], segments)
