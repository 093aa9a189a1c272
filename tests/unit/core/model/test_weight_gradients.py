"""Weight gradients that are added where they are computed: their bits, their values and autograd's hooks.

They have the same bits in whole and in split backward passes, and autograd's values. A BLAS chooses the order of its
sums by the processor. So no test here compares bits with another order of calls than the product's own: values are
compared in double precision, or within the bound that holds for every order.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradstream.core.model import weight_gradients
from gradstream.core.model.weight_gradients import MAX_ROWS_IN_PLACE, WeightGradients, WeightPart, add_product

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_MICROBATCHES = 3
WAYS = ["whole", "until given", "in parts"]
"""How a backward pass is made: in one part; with its matrices' gradients put off; with all gradients put off."""


class Net(nn.Module):
    """Linear layers with and without bias, a Conv1D, a table of positions, and a head that shares the words' table.
    The first layer is a small one here, the second and third are large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 48)
        self.positions = nn.Embedding(2 * MAX_ROWS_IN_PLACE, 48)
        self.first = nn.Linear(48, 80)
        self.second = Conv1D(96, 80)
        self.third = nn.Linear(96, 48, bias=False)
        self.norm = nn.LayerNorm(48)
        self.head = nn.Linear(48, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor, received: torch.Tensor | float = 0.0) -> torch.Tensor:
        places = torch.arange(tokens.shape[1]) // 2  # each twice
        hidden = self.table(tokens) + self.positions(places) + received
        hidden = torch.tanh(self.second(torch.relu(self.first(hidden))))
        result: torch.Tensor = self.head(self.norm(self.third(hidden)))
        return result


def microbatches(num_tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (1, num_tokens), generator=generator) for _ in range(NUM_MICROBATCHES)]


def loss(
    net: nn.Module, tokens: torch.Tensor, precision: torch.dtype, received: torch.Tensor | float = 0.0
) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        logits = net(tokens, received)
    if precision is torch.bfloat16:
        logits = logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")


def gradients_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def assert_equal_in_double(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same values but for the rounding of double precision: a product that is missing, doubled or added elsewhere
    differs by more than a thousandth."""
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert gradient.dtype is torch.float64
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10)


def backward(net: Net, num_tokens: int, precision: torch.dtype, way: str) -> dict[str, torch.Tensor]:
    """The net's gradients after all microbatches, and those of each microbatch's input as "received 0" and so on. What
    is called meanwhile is checked."""
    added: Counter[int] = Counter()
    once = Counter(id(parameter) for parameter in net.parameters())
    gradients = WeightGradients(net, way != "whole", lambda parameter: added.update([id(parameter)]))
    layers_put_off = {id(layer.weight) for layer in (net.positions, net.first, net.second, net.third)}
    later: list[WeightPart] = []
    of_inputs: dict[str, torch.Tensor] = {}
    for number, tokens in enumerate(microbatches(num_tokens)):
        received = torch.zeros(num_tokens, 48, dtype=net.first.weight.dtype, requires_grad=True)
        result = loss(net, tokens, precision, received)
        added.clear()
        if way == "whole":
            result.backward()
            assert received.grad is not None
            of_inputs[f"received {number}"] = received.grad
        else:
            first_part = gradients.backward_until_given if way == "until given" else gradients.backward_input
            of_inputs[f"received {number}"], weight_part = first_part(result, None, received)
            assert {id(gradient.weight) for gradient in weight_part.put_off} == layers_put_off
            if way == "until given":
                assert set(added) == set(once) - layers_put_off
                weight_part.add()
            else:
                assert not added
                later.append(weight_part)
        assert added == (Counter() if way == "in parts" else once)
    if way == "in parts":
        assert not gradients_of(net)
    for weight_part in later:
        added.clear()
        weight_part.add()
        assert added == once
    return gradients_of(net) | of_inputs


def plain_autograd(net: Net, num_tokens: int, precision: torch.dtype) -> dict[str, torch.Tensor]:
    """What `backward` gives, by torch alone."""
    of_inputs: dict[str, torch.Tensor] = {}
    for number, tokens in enumerate(microbatches(num_tokens)):
        received = torch.zeros(num_tokens, 48, dtype=net.first.weight.dtype, requires_grad=True)
        loss(net, tokens, precision, received).backward()
        assert received.grad is not None
        of_inputs[f"received {number}"] = received.grad
    return gradients_of(net) | of_inputs


@pytest.fixture(autouse=True)
def small_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers large enough for the real bound would take seconds a microbatch."""
    net = Net()
    monkeypatch.setattr(weight_gradients, "MIN_ELEMENTS_IN_PLACE", net.third.weight.numel())
    assert net.first.weight.numel() < net.third.weight.numel() < net.second.weight.numel()


sizes = pytest.mark.parametrize("num_tokens", [1, 2, 33, 128, MAX_ROWS_IN_PLACE, MAX_ROWS_IN_PLACE + 100])


@sizes
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_bits_are_the_same_whichever_way_a_backward_pass_goes(num_tokens: int, precision: torch.dtype) -> None:
    """So a job has the same bits with any schedule: pipelines split their backward passes, others do not."""
    found = [backward(Net(), num_tokens, precision, way) for way in WAYS]
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@sizes
@pytest.mark.parametrize("way", WAYS)
def test_in_double_precision_the_gradients_are_those_of_autograd(num_tokens: int, way: str) -> None:
    found = backward(Net().double(), num_tokens, torch.float64, way)
    assert_equal_in_double(found, plain_autograd(Net().double(), num_tokens, torch.float64))


def test_in_bf16_the_gradients_are_near_those_of_autograd() -> None:
    found = backward(Net(), 33, torch.bfloat16, "whole")
    exact = plain_autograd(Net().double(), 33, torch.float64)
    for name, gradient in plain_autograd(Net(), 33, torch.bfloat16).items():
        error, others = (found[name] - exact[name]).norm(), (gradient - exact[name]).norm()
        assert found[name].dtype is torch.float32
        assert error <= 2 * others, name


@sizes
def test_a_product_is_added_within_the_bound_of_every_order(num_tokens: int) -> None:
    """A sum of n products in any order is off by at most n + 1 roundings of the sum of the magnitudes (Higham, Accuracy
    and Stability of Numerical Algorithms, 2002, section 3.1)."""
    generator = torch.Generator().manual_seed(2)
    left = torch.randn(num_tokens, 96, generator=generator)
    right = torch.randn(num_tokens, 80, generator=generator)
    weight = nn.Parameter(torch.zeros(96, 80))
    for times in (1, 2):
        add_product(weight, left, right)
        assert weight.grad is not None
        exact = times * left.double().t() @ right.double()
        magnitudes = times * left.double().abs().t() @ right.double().abs()
        roundings = times * num_tokens + times
        assert bool(((weight.grad.double() - exact).abs() <= roundings * 2.0**-24 * magnitudes).all())


def test_hooks_are_called_when_a_sum_is_whole() -> None:
    net, plain = Net().double(), Net().double()
    WeightGradients(net, split=False)
    called: dict[str, torch.Tensor] = {}

    def listen(name: str, parameter: nn.Parameter) -> None:
        def hook(weight: torch.Tensor) -> None:
            assert weight.grad is not None
            assert name not in called
            called[name] = weight.grad.clone()

        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    for name, parameter in net.named_parameters():
        listen(name, parameter)
    for tokens in microbatches(33):
        called.clear()
        loss(net, tokens, torch.float64).backward()
        loss(plain, tokens, torch.float64).backward()
        assert_equal_in_double(called, gradients_of(plain))


@pytest.mark.parametrize("way", ["whole", "until given", "in parts"])
def test_a_layer_that_is_called_twice(way: str) -> None:
    """No supported family has one in its stages, but a whole model may be anything."""
    net, plain = nn.Linear(96, 96).double(), nn.Linear(96, 96).double()
    plain.load_state_dict(net.state_dict())
    added: list[tuple[nn.Parameter, torch.Tensor]] = []

    def on_added(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        added.append((parameter, parameter.grad.clone()))

    gradients = WeightGradients(net, way != "whole", on_added)
    for _ in range(2):
        added.clear()
        received = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
        plain(torch.tanh(plain(received))).sum().backward()
        result = net(torch.tanh(net(received))).sum()
        if way == "whole":
            result.backward()
        else:
            first_part = gradients.backward_until_given if way == "until given" else gradients.backward_input
            first_part(result, None, received)[1].add()
    assert {id(parameter) for parameter, _ in added} == {id(net.weight), id(net.bias)}
    assert len(added) == 2, "once for each of them"
    for parameter, gradient in added:
        expected = plain.weight.grad if parameter is net.weight else plain.bias.grad
        assert expected is not None
        torch.testing.assert_close(gradient, expected)


def test_nothing_is_called_after_the_end() -> None:
    net, called = Net(), list[nn.Parameter]()
    gradients = WeightGradients(net, False, called.append)
    gradients.close()
    loss(net, microbatches(7)[0], torch.float32).backward()
    assert gradients_of(net)
    assert not called


def test_small_matrices_are_left_to_autograd_unless_passes_come_in_two_parts() -> None:
    net = Net()
    gradients = WeightGradients(net, split=False)

    def made_by(layer: nn.Module, num_inputs: int) -> str:
        result: torch.Tensor = layer(torch.randn(3, num_inputs))
        assert result.grad_fn is not None
        return result.grad_fn.name()

    assert made_by(net.first, 48) == "AddmmBackward0"
    assert made_by(net.second, 80) == made_by(net.third, 96) == "_ProductBackward"
    gradients.split = True
    assert made_by(net.first, 48) == "_ProductBackward"


@pytest.mark.parametrize("name", ["first", "second"])
def test_what_is_frozen_gets_none(name: str) -> None:
    net = Net()
    frozen = getattr(net, name)
    frozen.weight.requires_grad_(False)
    WeightGradients(net, split=False)
    loss(net, microbatches(7)[0], torch.float32).backward()
    assert frozen.weight.grad is None
    assert frozen.bias.grad is not None
    assert net.third.weight.grad is not None
    with torch.no_grad():
        assert not net(microbatches(7)[0]).requires_grad
