"""Fused layers give the bits of a model's own code, and take over nothing where they would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import GPT2, LLAMA, NO_DROPOUT, VOCAB_SIZE
from torch import nn

from gradstream.core.fused_layers import LOSS_ROWS, cross_entropy_sum, fuse
from gradstream.core.model import build

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH: dict[str, Any] = {**LLAMA, "num_key_value_heads": 1, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WIDTH,
    "mistral": {**WIDTH, "model_type": "mistral"},
    "qwen2": {**WIDTH, "model_type": "qwen2"},
    "qwen3": {**WIDTH, "model_type": "qwen3"},  # norms of each head's queries and keys
    "gemma2": {**WIDTH, "model_type": "gemma2"},  # norms whose weights begin at zero
    "cohere": {**WIDTH, "model_type": "cohere"},  # rotates neighbours instead of halves
    "glm": {**WIDTH, "model_type": "glm", "pad_token_id": 0},  # rotates half of each head
    "stablelm": {**WIDTH, "model_type": "stablelm"},  # rotates a slice of each head
    "gpt2": {**GPT2, **NO_DROPOUT},
}
TAKEN = {
    "llama": {"LlamaRMSNorm", "LlamaAttention"},
    "mistral": {"MistralRMSNorm", "MistralAttention"},
    "qwen2": {"Qwen2RMSNorm", "Qwen2Attention"},
    "qwen3": {"Qwen3RMSNorm", "Qwen3Attention"},
    "gemma2": {"Gemma2Attention"},
    "cohere": set(),
    "glm": {"GlmRMSNorm"},
    "stablelm": {"StableLmAttention"},
    "gpt2": set(),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def made(family: str) -> Any:
    model = build(FAMILIES[family]).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(float(parameter.dim() == 1), 0.3, generator=generator)
    return model


def taken(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in vars(module)]


def passes(
    model: Any, precision: torch.dtype = torch.float32, size: tuple[int, int] = (2, 13), **layout: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Logits of some samples and all gradients."""
    model.zero_grad()
    tokens_BT = torch.randint(0, VOCAB_SIZE, size, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        logits_BTV = model(input_ids=tokens_BT[:, :-1], use_cache=False, **layout).logits
    cross_entropy_sum(logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**found, "logits": logits_BTV.detach()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def kernels_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are called from here on."""
    from gradstream.core import layer_kernels

    called: list[str] = []

    def listen(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            called.append(name)
            kernel(*arguments)

        return call

    for name in ("squares", "norm", "norm_products", "norm_backward", "rotate"):
        monkeypatch.setattr(layer_kernels, name, listen(name, getattr(layer_kernels, name)))
    return called


@every_family
def test_logits_and_gradients_are_those_of_the_models_own_code(family: str) -> None:
    model = made(family)
    expected = passes(model)
    fuse(model)
    assert {type(module).__name__ for module in taken(model)} == TAKEN[family]
    assert_same(passes(model), expected)
    for size in ((1, 13), (3, 2), (1, 2)):  # of samples, and of tokens and the one to predict
        assert_same(passes(model, size=size), passes(made(family), size=size))
    # Nobody else's model has changed.
    assert not taken(made(family))
    assert_same(passes(made(family)), expected)


def test_all_of_a_kind_are_taken_and_the_kernels_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    fuse(model)
    layers = LLAMA["num_hidden_layers"]
    assert len(taken(model)) == 3 * layers + 1
    called = kernels_called(monkeypatch)
    passes(model)
    assert called.count("norm") == called.count("norm_products") == called.count("norm_backward") == 2 * layers + 1
    assert called.count("rotate") == 4 * layers


def test_samples_with_positions_of_their_own() -> None:
    positions_BT = torch.stack([torch.arange(12), torch.arange(12) % 5])
    model = made("llama")
    expected = passes(model, position_ids=positions_BT)
    fuse(model)
    assert_same(passes(model, position_ids=positions_BT), expected)


def test_recomputed_passes() -> None:
    model = made("llama")
    expected = passes(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fuse(model)
    assert_same(passes(model), expected)


def test_frozen_weights_have_no_gradient() -> None:
    model = made("llama")
    fuse(model)
    every = passes(model)
    trained = {"model.layers.1.self_attn.q_proj.weight", "model.layers.0.input_layernorm.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    assert_same(passes(model), {name: every[name] for name in (*trained, "logits")})


@pytest.mark.parametrize("other", ["bf16 autocast", "two threads"])
def test_what_is_not_fp32_on_one_thread_takes_the_models_own_way(
    other: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    precision = torch.bfloat16 if other == "bf16 autocast" else torch.float32
    model = made("llama")
    fuse(model)
    if other == "two threads":
        request.addfinalizer(lambda: torch.set_num_threads(1))
        torch.set_num_threads(2)
    called = kernels_called(monkeypatch)
    found = passes(model, precision)
    assert not called
    assert_same(found, passes(made("llama"), precision))


def test_double_precision_takes_the_models_own_way() -> None:
    model = made("llama").double()
    expected = passes(model)
    fuse(model)
    assert_same(passes(model), expected)


class OddRMSNorm(nn.Module):
    """A norm with what few have: a shift, a bias, a gate."""

    def __init__(self, shift: float = 0.0, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24))
        self.bias = nn.Parameter(torch.zeros(24)) if bias else None
        self.shift = shift
        self.variance_epsilon = 1e-5

    def forward(self, values: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        values = values if gate is None else values * gate
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        result: torch.Tensor = (self.shift + self.weight) * values
        return result if self.bias is None else result + self.bias


@pytest.mark.parametrize("norm", [OddRMSNorm(shift=1.0), OddRMSNorm(bias=True)])
def test_a_norm_that_computes_something_else_is_left_alone(norm: nn.Module) -> None:
    fuse(norm)
    assert not taken(norm)


def test_a_norm_is_given_what_its_weight_does_not_fit() -> None:
    """The model's own code says what is wrong; a kernel would read what lies behind the weight."""
    norm = OddRMSNorm()
    fuse(norm)
    with pytest.raises(RuntimeError, match="size of tensor"):
        norm(torch.randn(5, 48))


class HeadsRMSNorm(nn.Module):
    """A norm whose weight has more than one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))
        self.variance_epsilon = 1e-5

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.weight * values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def test_a_norm_with_a_weight_of_two_dimensions_is_left_alone() -> None:
    norm = HeadsRMSNorm()
    fuse(norm)
    assert not taken(norm)


def test_what_a_norm_is_given_besides_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, values, gate = OddRMSNorm(), torch.randn(5, 24), torch.randn(5, 24)
    expected = norm(values, gate), norm(values, gate=gate), norm(values=values)
    fuse(norm)
    assert taken(norm) == [norm]
    for found, own in zip((norm(values, gate), norm(values, gate=gate), norm(values=values)), expected, strict=True):
        assert torch.equal(found, own)
    called = kernels_called(monkeypatch)
    assert torch.equal(norm(values), expected[2])
    assert called == ["squares", "norm"]


def test_no_random_number_is_drawn() -> None:
    state = torch.get_rng_state()
    fuse(build(FAMILIES["qwen3"], "meta"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_words", [1, 7, 320, 4096, 50257])
@pytest.mark.parametrize("num_tokens", [1, LOSS_ROWS, 2 * LOSS_ROWS + 5])
def test_the_loss_and_its_gradient_are_torchs(num_tokens: int, num_words: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    logits_NV = 5 * torch.randn(num_tokens, num_words, generator=generator)
    targets_N = torch.randint(0, num_words, (num_tokens,), generator=generator)
    targets_N[::3] = -100  # not counted

    def run(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        leaf_NV = logits_NV.clone().requires_grad_()
        loss = function(leaf_NV, targets_N)
        (gradient_NV,) = torch.autograd.grad(loss * 0.37, leaf_NV)
        return loss.detach(), gradient_NV

    expected = run(lambda logits, targets: nn.functional.cross_entropy(logits, targets, reduction="sum"))
    for found, own in zip(run(cross_entropy_sum), expected, strict=True):
        assert torch.equal(found, own)


def test_a_second_backward_pass_of_a_loss_is_refused() -> None:
    logits_NV = torch.randn(40, 50, requires_grad=True)
    loss = cross_entropy_sum(logits_NV, torch.zeros(40, dtype=torch.int64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


def test_logits_keep_what_they_hold() -> None:
    logits_NV = torch.randn(40, 50, requires_grad=True)
    before_NV = logits_NV.detach().clone()
    cross_entropy_sum(logits_NV, torch.zeros(40, dtype=torch.int64)).backward()
    assert torch.equal(logits_NV, before_NV)
