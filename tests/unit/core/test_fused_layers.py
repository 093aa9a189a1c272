"""Fused layers give what a model's own code gives, to the bit or within the rounding of exponentials, and take over
nothing where they would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny import GPT2, LLAMA, NO_DROPOUT, VOCAB_SIZE
from torch import nn

from gradstream.core.model import fused_layers
from gradstream.core.model.fused_functions import Gated, Gelu, cross_entropy_sum
from gradstream.core.model.fused_layers import fuse
from gradstream.core.model.model import build

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
    "llama": {"LlamaRMSNorm", "LlamaAttention", "LlamaMLP"},
    "mistral": {"MistralRMSNorm", "MistralAttention", "MistralMLP"},
    "qwen2": {"Qwen2RMSNorm", "Qwen2Attention", "Qwen2MLP"},
    "qwen3": {"Qwen3RMSNorm", "Qwen3Attention", "Qwen3MLP"},
    "gemma2": {"Gemma2Attention", "GELUTanh"},
    "cohere": {"CohereMLP"},
    "glm": {"GlmRMSNorm"},  # its gate and values are one matrix
    "stablelm": {"StableLmAttention", "StableLmMLP"},
    "gpt2": {"NewGELUActivation"},
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


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """By the largest of each tensor: a unit in the last place of an exponential is 1.2e-7."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        difference, largest = float((found[name] - tensor).abs().max()), float(tensor.abs().max())
        assert difference <= 1e-5 * max(largest, 1.0), name  # some gradients are nothing but rounding


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only layers whose bits are those of a model's own code are taken."""
    for name in ("_is_gated", "_is_gelu"):
        monkeypatch.setattr(fused_layers, name, lambda layer: False)


def kernels_called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are called from here on."""
    from gradstream.core.kernels import exp
    from gradstream.core.kernels import layer as layer_kernels

    called: list[str] = []

    def listen(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            called.append(name)
            kernel(*arguments)

        return call

    for module, names in (
        (layer_kernels, ("squares", "norm", "norm_products", "norm_backward", "rotate")),
        (exp, ("gated", "gated_backward", "gelu", "gelu_backward")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, listen(name, getattr(module, name)))
    return called


@every_family
@pytest.mark.usefixtures("exact")
def test_norms_and_rotary_embeddings_have_the_bits_of_the_models_own_code(family: str) -> None:
    model = made(family)
    expected = passes(model)
    fuse(model)
    assert {type(module).__name__ for module in taken(model)} == {
        name for name in TAKEN[family] if name.endswith(("RMSNorm", "Attention"))
    }
    assert_same(passes(model), expected)
    for size in ((1, 13), (3, 2), (1, 2)):  # of samples, and of tokens and the one to predict
        assert_same(passes(model, size=size), passes(made(family), size=size))
    # Nobody else's model has changed.
    assert not taken(made(family))
    assert_same(passes(made(family)), expected)


@every_family
def test_logits_and_gradients_are_those_of_the_models_own_code(family: str) -> None:
    model = made(family)
    fuse(model)
    assert {type(module).__name__ for module in taken(model)} == TAKEN[family]
    for size in ((2, 13), (1, 2)):
        found = passes(model, size=size)
        assert_close(found, passes(made(family), size=size))
        assert_same(found, passes(model, size=size))
    assert not taken(made(family))


def test_all_of_a_kind_are_taken_and_the_kernels_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    fuse(model)
    layers = LLAMA["num_hidden_layers"]
    assert len(taken(model)) == 4 * layers + 1
    called = kernels_called(monkeypatch)
    passes(model)
    assert called.count("norm") == called.count("norm_products") == called.count("norm_backward") == 2 * layers + 1
    assert called.count("rotate") == 4 * layers
    assert called.count("gated") == called.count("gated_backward") == layers


@pytest.mark.usefixtures("exact")
def test_samples_with_positions_of_their_own() -> None:
    positions_BT = torch.stack([torch.arange(12), torch.arange(12) % 5])
    model = made("llama")
    expected = passes(model, position_ids=positions_BT)
    fuse(model)
    assert_same(passes(model, position_ids=positions_BT), expected)


@pytest.mark.usefixtures("exact")
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


class OddMLP(nn.Module):
    """An MLP with what few have: a factor, a bias of its own."""

    def __init__(self, factor: float = 1.0, bias: bool = False):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()
        self.bias = nn.Parameter(torch.zeros(8)) if bias else None
        self.factor = factor

    def forward(self, values: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        gated = self.act_fn(self.gate_proj(values)) * self.up_proj(values)
        result: torch.Tensor = self.factor * factor * self.down_proj(gated)
        return result if self.bias is None else result + self.bias


@pytest.mark.parametrize("mlp", [OddMLP(factor=1.01), OddMLP(bias=True)])
def test_an_mlp_that_computes_something_else_is_left_alone(mlp: nn.Module) -> None:
    fuse(mlp)
    assert not taken(mlp)


def test_what_an_mlp_is_given_besides_reaches_it() -> None:
    mlp, values = OddMLP(), torch.randn(5, 8)
    expected = mlp(values, factor=3.0)
    fuse(mlp)
    assert taken(mlp) == [mlp]
    assert torch.equal(mlp(values, factor=3.0), expected)


def test_another_gelu_is_left_alone() -> None:
    exact_gelu, by_tanh = nn.GELU(), nn.GELU(approximate="tanh")
    fuse(nn.ModuleList([exact_gelu, by_tanh]))
    assert not taken(exact_gelu)
    assert taken(by_tanh) == [by_tanh]


ODD = [0.0, -0.0, 1e-30, 3.0, -3.0, 87.0, -87.0, 90.0, -90.0, 1e4, -1e4]


@pytest.mark.parametrize("num_elements", [1, 15, 1000])
def test_gates_and_gelu_are_as_exact_as_torchs(num_elements: int) -> None:
    """Beside torch in double precision: no further from it than a few units in the last place."""

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype, *inputs: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        result = function(*leaves)
        return [result.detach(), *torch.autograd.grad(result, leaves, torch.ones_like(result))]

    generator = torch.Generator().manual_seed(num_elements)
    drawn = [5 * torch.randn(num_elements, generator=generator) for _ in range(2)]
    gates, values = (torch.cat([torch.tensor(ODD), tensor]) for tensor in drawn)
    for ours, own, inputs in (
        (Gated.apply, lambda gates, values: nn.functional.silu(gates) * values, (gates, values)),
        (Gelu.apply, lambda values: nn.functional.gelu(values, approximate="tanh"), (gates,)),
    ):
        for found, exact in zip(run(ours, torch.float32, *inputs), run(own, torch.float64, *inputs), strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-6)


def test_what_is_not_a_number_stays_so() -> None:
    values = torch.tensor([float("nan"), 1.0])
    assert Gated.apply(values, torch.ones(2)).isnan().tolist() == [True, False]
    assert Gelu.apply(values).isnan().tolist() == [True, False]
    logits_NV = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 1.0, 2.0]])
    assert cross_entropy_sum(logits_NV, torch.tensor([0, 0])).isnan()
    assert not cross_entropy_sum(logits_NV, torch.tensor([-100, 0])).isnan()


@pytest.mark.parametrize("num_words", [1, 7, 320, 4096, 50257])
@pytest.mark.parametrize("num_tokens", [1, 32, 69])
def test_the_loss_and_its_gradient_are_torchs(num_tokens: int, num_words: int) -> None:
    """Beside torch in double precision."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits_NV = 5 * torch.randn(num_tokens, num_words, generator=generator) - 3
    logits_NV[0, 0] = 1e4  # alone in its softmax
    targets_N = torch.randint(0, num_words, (num_tokens,), generator=generator)
    targets_N[::3] = -100  # not counted

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        leaf_NV = logits_NV.to(dtype).requires_grad_()
        loss = function(leaf_NV, targets_N)
        (gradient_NV,) = torch.autograd.grad(loss * 0.37, leaf_NV)
        return loss.detach(), gradient_NV

    loss, gradient_NV = run(cross_entropy_sum, torch.float32)
    expected, exact_NV = run(
        lambda logits, targets: nn.functional.cross_entropy(logits, targets, reduction="sum"), torch.float64
    )
    torch.testing.assert_close(loss.double(), expected, rtol=2e-7, atol=1e-7)
    torch.testing.assert_close(gradient_NV.double(), exact_NV, rtol=1e-6, atol=1e-7)
    assert loss.dtype is torch.float32


@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_outside_of_the_vocabulary_is_refused(target: int) -> None:
    """A kernel would read and write beside the logits."""
    with pytest.raises(IndexError, match="not in the vocabulary of 50"):
        cross_entropy_sum(torch.zeros(2, 50), torch.tensor([0, target]))


def test_a_loss_without_any_target_is_zero() -> None:
    logits_NV = torch.randn(3, 5, requires_grad=True)
    loss = cross_entropy_sum(logits_NV, torch.full((3,), -100))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits_NV.grad is not None
    assert not logits_NV.grad.any()


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
