"""Every causal language model that transformers registers: computed as transformers does, or refused by name.

Memory is poisoned (fresh tensors are NaN), and weights are drawn. Each family's default config is shrunk to its twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gradstream.core.errors import ConfigError
from gradstream.core.model.constants import FAMILIES, constants, constants_of, exported_constants
from gradstream.core.model.frozen_modules import HeldMatrix, replace_frozen
from gradstream.core.model.lora import adapted_module, frozen_name
from gradstream.core.model.model import build, initial_weights, initialize_buffers, load_config
from gradstream.core.model.stage_module import StageModule, segments_of, stage_tensors
from gradstream.core.model.trial import ModelUse, Trial, try_model
from gradstream.core.model.twin import twin_config
from gradstream.core.recipe.fine_tuning import LoraConfig

pytestmark = pytest.mark.slow

# Families whose default config is none that can be built: what a config.json of them has.
MORE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_head": 64, "mamba_n_heads": 24, "mamba_d_ssm": 1536},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128},
}
# What must go on being taken, cut into stages, whole, and with packed rows.
STAGES = """apertus arcee bitnet cohere cohere2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 flex_olmo gemma gemma2
gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss granite granitemoe helium internlm3 lfm2 llama
llama4_text minicpm3 mistral mixtral nanochat olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
qwen3_moe seed_oss smollm3 stablelm starcoder2"""
WHOLE = "afmoe bamba bloom codegen falcon falcon_mamba gpt_neo gptj jamba mamba mamba2 mpt opt qwen3_next"
# What must go on being taken with adapters.
ADAPTED = """apertus arcee bamba bitnet bloom codegen cohere cohere2 ernie4_5 exaone4 falcon flex_olmo
gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe
helium internlm3 lfm2 llama minicpm3 mistral mixtral mpt nanochat olmo olmo2 olmo3 olmoe opt persimmon
phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 stablelm starcoder2"""
PACKED = """apertus cohere2 gemma gemma2 gemma3_text gpt2 gpt_neox granite llama llama4_text mistral mixtral olmo olmo2
olmo3 phi3 qwen2 qwen2_moe qwen3 qwen3_moe smollm3 starcoder2"""

LORA = LoraConfig(rank=4, alpha=6)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(num_threads)


def config_of(family: str) -> dict[str, Any]:
    return {"model_type": family, **MORE.get(family, {})}


@pytest.mark.parametrize("family", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_a_family_is_computed_as_transformers_does_or_is_refused(family: str, tmp_path: Path) -> None:
    use = ModelUse(has_pipeline=True, packs_examples=family in PACKED.split())
    is_refused, reason = try_model(config_of(family), use, LORA)
    is_uncut = "cannot be cut into pipeline stages" in reason
    if is_uncut:
        is_refused, reason = try_model(config_of(family), lora=LORA)
    is_unadapted = "lora.target_modules" in reason
    if is_unadapted:
        assert family not in ADAPTED.split(), reason
        assert "\n" not in reason
    elif is_refused:
        assert family not in f"{STAGES} {WHOLE}".split()
        assert reason.startswith("model.config")
        assert "\n" not in reason
        return
    config = twin_config(config_of(family))
    weights = dict(initial_weights(config, 3))
    for name, tensor in initial_weights(config, 3):
        assert torch.equal(tensor, weights[name]), name
    generator = torch.Generator().manual_seed(5)
    for tensor in weights.values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=max(tensor.shape[-1:], default=25) ** -0.5)

    theirs = AutoModelForCausalLM.from_config(load_config(config), dtype=torch.float32)
    whole = build(config, "meta")
    initialize_buffers(whole, "cpu")
    whole.tie_weights()  # type: ignore[operator]
    for model in (theirs, whole):
        named = dict(model.named_parameters())
        assert {name for name, parameter in named.items() if parameter.requires_grad} == set(weights)
        with torch.no_grad():
            for name, tensor in weights.items():
                named[name].copy_(tensor)
    ids_BT = torch.randint(0, 60, (2, 24), generator=generator)
    wanted_BTV = logits(theirs, ids_BT)
    torch.testing.assert_close(logits(whole, ids_BT), wanted_BTV, rtol=0, atol=0)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in whole.named_parameters():
        assert same(parameter.grad, gradients[name]), name

    check_reloaded(whole, config, weights, ids_BT, wanted_BTV, tmp_path)
    if is_uncut:
        assert family not in STAGES.split()
    else:
        check_stages(whole, config, weights, ids_BT, wanted_BTV, gradients)
    if not is_unadapted:
        check_adapters(config, weights, ids_BT, theirs)


def check_adapters(config: dict[str, Any], weights: dict[str, torch.Tensor], ids_BT: torch.Tensor, theirs: Any) -> None:
    """Adapters on frozen modules as workers hold them: peft's logits and gradients."""
    ours = build(config, "meta", LORA)
    initialize_buffers(ours, "cpu")
    tied = getattr(ours, "all_tied_weights_keys", None) or {}
    replace_frozen(
        ours,
        lambda name, _: name if (name := frozen_name(name)) in weights else tied[name],
        lambda name: HeldMatrix.of(weights[name], "fp32"),
        weights.__getitem__,
    )
    adapters = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    # By name: for peft all-linear means fused experts too, which are no linear modules.
    modules = sorted({str(adapted_module(name)) for name in adapters})
    theirs.zero_grad()
    wrapped = peft.get_peft_model(
        theirs,
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=modules, r=4, lora_alpha=6, init_lora_weights=False),
    )
    named = {name.removeprefix("base_model.model."): parameter for name, parameter in wrapped.named_parameters()}
    assert adapters.keys() == {name for name, parameter in named.items() if parameter.requires_grad}
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            named[name].copy_(parameter)
    torch.testing.assert_close(logits(ours, ids_BT), logits(theirs, ids_BT), rtol=1e-5, atol=1e-5)
    for name, parameter in adapters.items():
        assert same(parameter.grad, named[name].grad), name


def logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """In training without dropout's draws, with gradients of the sum of squares."""
    model.eval()
    found: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits
    found.square().mean().backward()
    return found.detach()


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Also where one has no gradient and the other zeros."""
    if one is None or other is None:
        return all(tensor is None or not tensor.any() for tensor in (one, other))
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


def check_reloaded(
    whole: Any,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    ids_BT: torch.Tensor,
    wanted_BTV: torch.Tensor,
    directory: Path,
) -> None:
    """What an export holds is a whole model for transformers, also where a family has tensors that are not trained."""
    untrained = constants_of(whole)
    if not untrained:
        return
    exported = untrained if config["model_type"] in FAMILIES else {}
    save_file({**weights, **exported}, directory / "model.safetensors", {"format": "pt"})
    load_config(config).save_pretrained(directory)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded, ids_BT), wanted_BTV, rtol=1e-6, atol=1e-6)


def test_a_child_finds_what_an_export_needs() -> None:
    config = {**TINY, "model_type": "apertus"}
    found = exported_constants(config)
    assert {name.rsplit(".", 1)[-1] for name in found} == {"beta", "eps"}
    for name, tensor in constants(config).items():
        assert torch.equal(torch.from_numpy(found[name]), tensor), name
    assert exported_constants(TINY | {"model_type": "llama"}) == {}


def check_stages(
    whole: Any,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    ids_BT: torch.Tensor,
    wanted_BTV: torch.Tensor,
    gradients: dict[str, torch.Tensor | None],
) -> None:
    num_segments = len(segments_of(whole))
    stages = [StageModule(config, range(*cut)).eval() for cut in pairwise([0, 2, num_segments - 1, num_segments])]
    tensors = [stage_tensors(stage, weights) for stage in stages]
    inputs, outputs = [], []
    received = ids_BT
    for stage, parameters in zip(stages, tensors, strict=True):
        with torch.no_grad():
            for (name, _), parameter in parameters.items():
                parameter.copy_(weights[name])
        inputs.append(received)
        outputs.append(stage(received))
        received = outputs[-1].detach().requires_grad_()
    torch.testing.assert_close(outputs[-1], wanted_BTV, rtol=1e-5, atol=1e-5)
    outputs[-1].square().mean().backward()
    for output, after in zip(reversed(outputs[:-1]), reversed(inputs[1:]), strict=True):
        output.backward(after.grad)
    found: dict[str, torch.Tensor] = {}
    for parameters in tensors:
        for (name, _), parameter in parameters.items():
            if parameter.grad is not None:
                found[name] = found.get(name, torch.zeros(())) + parameter.grad
    for name in weights:
        assert same(found.get(name), gradients[name]), name


@pytest.mark.parametrize("family", ["mamba", "jamba", "bloom", "falcon"])
def test_a_family_that_sees_other_examples_of_a_row_is_refused(family: str) -> None:
    is_refused, reason = try_model(config_of(family), ModelUse(packs_examples=True))
    assert is_refused
    assert "cannot be trained on packed examples: an example's logits depend on the examples before it" in reason


TINY: dict[str, Any] = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GEMMA3 = {**TINY, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8}
MIXTRAL = {**TINY, "model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True}


@pytest.mark.parametrize(
    "config",
    [
        {**GEMMA3, "use_bidirectional_attention": True},
        {**TINY, "model_type": "bert"},
        {**TINY, "model_type": "roberta", "max_position_embeddings": 80, "pad_token_id": 1},
        {**TINY, "model_type": "electra"},
    ],
    ids=lambda config: str(config["model_type"]),
)
def test_what_sees_later_tokens_is_refused(config: dict[str, Any]) -> None:
    is_refused, reason = try_model(config)
    assert is_refused
    assert "is not causal as configured: tokens from position" in reason


@pytest.mark.parametrize(
    "config", [GEMMA3, {**TINY, "model_type": "bert", "is_decoder": True}], ids=["gemma3_text", "bert"]
)
def test_the_same_family_is_taken_when_it_is_causal(config: dict[str, Any]) -> None:
    assert try_model(config) == (False, "")


def test_a_router_loss_is_known_and_refused_where_it_cannot_be_computed() -> None:
    assert try_model(MIXTRAL) == (False, "")
    is_refused, reason = try_model(MIXTRAL, ModelUse(has_pipeline=True))
    assert is_refused
    assert "output_router_logits adds MixtralForCausalLM's router loss" in reason
    assert try_model({**MIXTRAL, "output_router_logits": False}, ModelUse(has_pipeline=True)) == (False, "")


def test_a_loss_that_is_not_known_is_refused() -> None:
    is_refused, reason = try_model({"model_type": "bamba", "z_loss_coefficient": 0.5})
    assert is_refused
    assert "the training loss of BambaForCausalLM is not the cross-entropy of the next tokens alone" in reason


def test_a_parameter_that_nobody_sets_is_refused_by_name() -> None:
    config = {"model_type": "openai-gpt", "n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 20}
    with pytest.raises(ConfigError, match=r"nothing sets the initial value of 'transformer.h.0.attn.c_attn.weight'"):
        dict(initial_weights(config, 0))
    with pytest.raises(ConfigError, match="nothing sets the initial value"):
        Trial(config)


def test_what_a_constructor_sets_is_what_transformers_begins_with() -> None:
    config = {**TINY, "model_type": "apertus"}
    theirs = dict(AutoModelForCausalLM.from_config(load_config(config)).named_parameters())
    for name, tensor in initial_weights(config, 3):
        if "act_fn" in name:
            assert torch.equal(tensor, theirs[name]), name
