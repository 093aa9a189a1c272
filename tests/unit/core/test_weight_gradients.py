"""Weight gradients that are added where they are made are those of autograd, and its hooks are called."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradstream.core import weight_gradients
from gradstream.core.weight_gradients import MOST_ROWS_IN_PLACE, WeightGradients, WeightPart

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_MICROBATCHES = 3
MOST_SURE_ROWS = 128
"""Every BLAS seen so far adds the products of at least so many rows before it touches a sum. With more rows autograd's
bits may be others than those of products that are added in place, which are then what is compared with."""


class Net(nn.Module):
    """Linear layers with and without bias, a Conv1D, a table of positions, and a head that shares the words' table.
    The first layer is a small one here, the second and third are large."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 48)
        self.positions = nn.Embedding(2 * MOST_ROWS_IN_PLACE, 48)
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
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="sum")


def gradients_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def add_in_place(net: Net) -> dict[str, torch.Tensor]:
    """The gradients of the net's large matrices as its backward passes from here on make them, every product but the
    first added to the sum by one addmm_."""
    sums: dict[str, torch.Tensor] = {}

    def listen(name: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, received: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            values_NI = received[0].detach().flatten(0, 1)

            def add(gradient: torch.Tensor) -> None:
                pair = values_NI, gradient.flatten(0, 1)
                left_NR, right_NC = pair if isinstance(layer, Conv1D) else pair[::-1]
                if name in sums:
                    sums[name].addmm_(left_NR.t(), right_NC)
                else:
                    sums[name] = left_NR.t().mm(right_NC)

            result.register_hook(add)

        layer.register_forward_hook(hook)

    for name in ("second", "third"):
        listen(f"{name}.weight", getattr(net, name))
    return sums


@pytest.fixture(autouse=True)
def small_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers large enough for the real bound would take seconds a microbatch."""
    net = Net()
    monkeypatch.setattr(weight_gradients, "FEWEST_ELEMENTS_IN_PLACE", net.third.weight.numel())
    assert net.first.weight.numel() < net.third.weight.numel() < net.second.weight.numel()


@pytest.mark.parametrize("way", ["whole", "until given", "in parts"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 2, 33, MOST_SURE_ROWS, MOST_ROWS_IN_PLACE, MOST_ROWS_IN_PLACE + 100])
def test_the_bits_are_those_of_autograd(num_tokens: int, precision: torch.dtype, way: str) -> None:
    net, plain = Net(), Net()
    added: Counter[int] = Counter()
    once = Counter(id(parameter) for parameter in net.parameters())
    gradients = WeightGradients(net, way != "whole", lambda parameter: added.update([id(parameter)]))
    layers_put_off = {id(layer.weight) for layer in (net.positions, net.first, net.second, net.third)}
    rounds_apart = precision is torch.float32 and MOST_SURE_ROWS < num_tokens <= MOST_ROWS_IN_PLACE
    in_place = add_in_place(plain) if rounds_apart else {}
    later: list[WeightPart] = []
    for tokens in microbatches(num_tokens):
        expected = torch.zeros(num_tokens, 48, requires_grad=True)
        loss(plain, tokens, precision, expected).backward()
        received = torch.zeros(num_tokens, 48, requires_grad=True)
        result = loss(net, tokens, precision, received)
        added.clear()
        if way == "whole":
            result.backward()
            assert received.grad is not None
            found = received.grad
        else:
            first_part = gradients.backward_until_given if way == "until given" else gradients.backward_input
            found, weight_part = first_part(result, None, received)
            assert {id(gradient.weight) for gradient in weight_part.put_off} == layers_put_off
            if way == "until given":
                assert set(added) == set(once) - layers_put_off
                weight_part.add()
            else:
                assert not added
                later.append(weight_part)
        assert expected.grad is not None
        assert torch.equal(found, expected.grad)
        assert added == (Counter() if way == "in parts" else once)
    if way == "in parts":
        assert not gradients_of(net)
    for weight_part in later:
        added.clear()
        weight_part.add()
        assert added == once
    expected_sums = gradients_of(plain)
    for name, gradient in in_place.items():
        torch.testing.assert_close(gradient, expected_sums[name])
    assert_same(gradients_of(net), expected_sums | in_place)


def test_hooks_are_called_when_a_sum_is_whole() -> None:
    net, plain = Net(), Net()
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
        loss(net, tokens, torch.float32).backward()
        loss(plain, tokens, torch.float32).backward()
        assert_same(called, gradients_of(plain))


@pytest.mark.parametrize("way", ["whole", "until given", "in parts"])
def test_a_layer_that_is_called_twice(way: str) -> None:
    """No supported family has one in its stages, but a whole model may be anything."""
    net, plain = nn.Linear(96, 96), nn.Linear(96, 96)
    plain.load_state_dict(net.state_dict())
    added: list[tuple[nn.Parameter, torch.Tensor]] = []

    def on_added(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        added.append((parameter, parameter.grad.clone()))

    gradients = WeightGradients(net, way != "whole", on_added)
    for _ in range(2):
        added.clear()
        received = torch.randn(5, 96, requires_grad=True)
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
