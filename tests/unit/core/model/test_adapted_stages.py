"""Adapters on pipeline stages: logits and gradients of the whole model, and of its merged export in transformers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from gradstream.core.model import constants
from gradstream.core.model.frozen_modules import HeldMatrix, replace_frozen
from gradstream.core.model.lora import adapted_module, factors, frozen_name, merged_weight
from gradstream.core.model.model import build, initial_weights, initialize_buffers, load_config
from gradstream.core.model.stage_module import StageModule, segments_of, stage_tensors
from gradstream.core.model.twin import twin_config
from gradstream.core.recipe.fine_tuning import LoraConfig

LORA = LoraConfig(rank=4, alpha=6)
# Families whose default config is none that can be built.
MORE = {"hunyuan_v1_dense": {"head_dim": 128}}
# Those that are cut into stages and take adapters.
FAMILIES = """apertus arcee bitnet cohere cohere2 doge ernie4_5 exaone4 flex_olmo gemma gemma2 gemma3_text glm glm4 gpt2
gpt_bigcode gpt_neox gpt_oss granite granitemoe granitemoehybrid helium hunyuan_v1_dense internlm3 jetmoe lfm2
llama minicpm3 mistral mixtral nanochat olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi phi3 qwen2 qwen2_moe
qwen3 qwen3_moe recurrent_gemma seed_oss smollm3 stablelm starcoder2 vaultgemma"""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(params=FAMILIES.split())
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return twin_config({"model_type": request.param, **MORE.get(request.param, {})})


@pytest.fixture
def weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The base: drawn, since a family may agree at its own initial weights."""
    found = dict(initial_weights(config, 3))
    generator = torch.Generator().manual_seed(5)
    for tensor in found.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=max(tensor.shape[-1:]) ** -0.5)
    return found


def hold(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Give frozen parameters their values, as a worker does."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    replace_frozen(
        model,
        lambda name, _: name if (name := frozen_name(name)) in weights else tied[name],
        lambda name: HeldMatrix.of(weights[name], "fp32"),
        weights.__getitem__,
    )
    assert not any(parameter.is_meta for parameter in model.parameters())


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_stages_with_adapters_and_a_merged_export_are_the_whole_model(
    config: dict[str, Any], weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    whole: Any = build(config, "meta", LORA).eval()
    initialize_buffers(whole, "cpu")
    hold(whole, weights)
    adapters = trained(whole)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    ids_BT = torch.randint(0, 60, (2, 24), generator=generator)
    wanted_BTV = whole(input_ids=ids_BT, use_cache=False).logits
    wanted_BTV.square().mean().backward()

    num_segments = len(segments_of(whole))
    found: dict[str, torch.Tensor] = {}
    inputs, outputs, received = [], [], ids_BT
    for cut in pairwise([0, 2, num_segments - 1, num_segments]):
        stage = StageModule(config, range(*cut), lora=LORA).eval()
        hold(stage.model, weights)
        with torch.no_grad():
            for (name, _), parameter in stage_tensors(stage, adapters.keys()).items():
                parameter.copy_(adapters[name])
                found[name] = parameter
        inputs.append(received)
        outputs.append(stage(received))
        received = outputs[-1].detach().requires_grad_()
    torch.testing.assert_close(outputs[-1], wanted_BTV, rtol=1e-5, atol=1e-5)
    outputs[-1].square().mean().backward()
    for output, after in zip(reversed(outputs[:-1]), reversed(inputs[1:]), strict=True):
        output.backward(after.grad)
    assert found.keys() == adapters.keys()
    for name, parameter in adapters.items():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)

    plain = build(config, "meta")
    merged = dict(weights)
    for module in {str(adapted_module(name)) for name in adapters}:
        a, b = (adapters[factor].detach() for factor in factors(module))
        weight = weights[f"{module}.weight"]
        merged[f"{module}.weight"] = merged_weight(weight, a, b, LORA, plain.get_submodule(module)).contiguous()
    if config["model_type"] in constants.FAMILIES:
        merged |= constants.constants(config)
    save_file(merged, tmp_path / "model.safetensors", {"format": "pt"})
    load_config(config).save_pretrained(tmp_path)
    loaded, told = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(told.values()), told
    torch.testing.assert_close(
        loaded.eval()(input_ids=ids_BT, use_cache=False).logits, wanted_BTV, rtol=1e-4, atol=1e-4
    )
