"""Muon: torch's rule, in fp32; the same bits for any slices and any number of threads; other tensors by AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.micro import MICRO_LLAMA

from gradstream.core.model.model import inventory
from gradstream.core.optimizer.muon import Muon, orthogonalize
from gradstream.core.optimizer.optimizer import Optimizer
from gradstream.core.optimizer.rule import Slice
from gradstream.core.optimizer.rules import moments_of, rule_of, whole_tensors
from gradstream.core.plan.fragments import Tensor, cut
from gradstream.core.recipe.recipe import MuonConfig, OptimizerConfig

RULE = OptimizerConfig(kind="muon", weight_decay=0.1)
RATES = [1e-3, 5e-4, 2e-3, 0.0, 1e-4]
# Of some of these sizes torch's products have other bits with two, three or four threads than with one.
SHAPES = [(16, 48), (24, 8), (100, 300), (17, 4096), (8, 8), (1, 64), (300, 7)]


@contextmanager
def threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    yield
    assert torch.get_num_threads() == num_threads
    torch.set_num_threads(before)


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(shapes: list[tuple[int, int]]) -> list[Tensor]:
    return [Tensor(f"{number}.weight", shape, True, 0) for number, shape in enumerate(shapes)]


def trained(rule: OptimizerConfig, shapes: list[tuple[int, int]], fragment_elements: int = 2**30) -> list[torch.Tensor]:
    """The matrices after a step of each rate, held as fragments of at most so many elements."""
    tensors = matrices(shapes)
    fragments = cut(tensors, fragment_elements)
    weights = [matrix(shape, number).reshape(-1) for number, shape in enumerate(shapes)]
    gradients = [torch.empty_like(weights_N) for weights_N in weights]
    optimizer = Optimizer(
        [
            Slice(
                weights[each.tensor][each.begin : each.end],
                gradients[each.tensor][each.begin : each.end],
                tensors[each.tensor],
            )
            for each in fragments
        ],
        rule,
    )
    for step, rate in enumerate(RATES):
        for number, gradient_N in enumerate(gradients):
            gradient_N.copy_(matrix(shapes[number], 100 * step + number).reshape(-1))
        optimizer.step(rate)
    return [weights_N.reshape(shape) for weights_N, shape in zip(weights, shapes, strict=True)]


def trained_by_torch(rule: OptimizerConfig, shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    weights = [matrix(shape, number) for number, shape in enumerate(shapes)]
    muon = torch.optim.Muon(
        weights,
        weight_decay=rule.weight_decay,
        momentum=rule.muon.momentum,
        nesterov=rule.muon.nesterov,
        adjust_lr_fn="match_rms_adamw",
    )
    for step, rate in enumerate(RATES):
        for number, weights_RC in enumerate(weights):
            weights_RC.grad = matrix(shapes[number], 100 * step + number)
        muon.param_groups[0]["lr"] = rate
        muon.step()
    return weights


@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_torchs_rule_but_in_fp32(nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near as fp32 lets it be where torch iterates in fp32 too; near enough where torch iterates in bf16."""
    rule = RULE.model_copy(update={"muon": MuonConfig(momentum=0.9, nesterov=nesterov)})
    ours, in_bf16 = trained(rule, SHAPES), trained_by_torch(rule, SHAPES)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    in_fp32 = trained_by_torch(rule, SHAPES)
    for number, (shape, found_RC) in enumerate(zip(SHAPES, ours, strict=True)):
        torch.testing.assert_close(found_RC, in_fp32[number], rtol=0, atol=2e-6)
        moved = (found_RC - matrix(shape, number)).norm()
        assert moved > 0
        assert (found_RC - in_bf16[number]).norm() < 0.05 * moved, shape


@pytest.mark.parametrize("fragment_elements", [256, 1024])
@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
def test_bits_depend_neither_on_slices_nor_on_threads(fragment_elements: int, num_threads: int) -> None:
    whole = trained(RULE, SHAPES)
    with threads(num_threads):
        sliced = trained(RULE, SHAPES, fragment_elements)
    for shape, left_RC, right_RC in zip(SHAPES, whole, sliced, strict=True):
        assert torch.equal(left_RC, right_RC), shape


@pytest.mark.parametrize("shape", [(64, 128), (64, 200), (200, 64)])
def test_singular_values_come_close_to_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalize(matrix(shape, 0)))
    assert 0.6 < values.min() <= values.max() < 1.3
    assert not orthogonalize(torch.zeros(shape)).any()


def test_an_update_is_as_large_as_one_of_adamw() -> None:
    """So that one learning rate serves both rules, whichever way round a model holds a matrix."""
    rule = RULE.model_copy(update={"weight_decay": 0.0})
    for shape in ((256, 64), (64, 256), (128, 128)):
        weights_RC, gradient_RC = torch.zeros(shape), matrix(shape, 1)
        Optimizer([Slice(weights_RC.view(-1), gradient_RC.view(-1), *matrices([shape]))], rule).step(1.0)
        rms = float(weights_RC.square().mean().sqrt())
        expected = 0.2 * math.sqrt(max(shape)) * math.sqrt(min(shape) / math.prod(shape))
        assert rms == pytest.approx(expected, rel=0.2)
        assert expected == pytest.approx(0.2)


def test_embedding_head_and_vectors_follow_adamw() -> None:
    tensors = inventory(MICRO_LLAMA)
    by_muon = {tensor.name for tensor in tensors if rule_of(RULE, tensor) is Muon}
    layers = {tensor.name for tensor in tensors if ".layers." in tensor.name and "norm" not in tensor.name}
    assert by_muon == layers
    assert {tensor.kind for tensor in tensors if tensor.name not in by_muon} == {"embedding", "head", "vector"}
    assert {tensors[number].name for number in whole_tensors(RULE, tensors)} == layers
    assert not whole_tensors(OptimizerConfig(), tensors)
    for tensor in tensors:
        kept = ("momentum_buffer",) if tensor.name in layers else ("exp_avg", "exp_avg_sq")
        assert moments_of(RULE, tensor) == kept
    # More than two dimensions, as of experts in one tensor.
    assert rule_of(RULE, Tensor("experts", (4, 8, 8), True, 0)) is not Muon


def test_a_saved_and_loaded_state_goes_on_bit_for_bit() -> None:
    """With slices of both rules in one optimizer, in mixed order."""
    tensors = [
        Tensor("norm", (40,), False, 0, "vector"),
        *matrices([(24, 40)]),
        Tensor("head", (8, 40), True, 1, "head"),
    ]
    fragments = cut(tensors, 256)

    def made(weights: list[torch.Tensor]) -> tuple[Optimizer, list[torch.Tensor]]:
        gradients = [torch.empty_like(weights_N) for weights_N in weights]
        own = [tensors[each.tensor] for each in fragments]
        return Optimizer(list(map(Slice, weights, gradients, own)), RULE), gradients

    def step(optimizer: Optimizer, gradients: list[torch.Tensor], number: int) -> None:
        for place, gradient_N in enumerate(gradients):
            gradient_N.copy_(matrix((1, len(gradient_N)), 10 * number + place)[0])
        optimizer.step(RATES[number])

    weights = [matrix((1, each.num_elements), each.index)[0] for each in fragments]
    through, gradients = made(weights)
    for number in range(2):
        step(through, gradients, number)
    states = [{name: array.copy() for name, array in state.items()} for state in through.state()]
    for number, (fragment, state) in enumerate(zip(fragments, states, strict=True)):
        assert tuple(state) == through.names(number)
        assert ("momentum_buffer" in state) == (tensors[fragment.tensor].kind == "matrix")
    held = [array for state in states for name, array in state.items() if name != "step"]
    assert sum(array.nbytes for array in held) == through.state_bytes
    again = [weights_N.clone() for weights_N in weights]
    loaded, other_gradients = made(again)
    loaded.load(states)
    for number in range(2, 5):
        step(through, gradients, number)
        step(loaded, other_gradients, number)
    assert all(torch.equal(left_N, right_N) for left_N, right_N in zip(weights, again, strict=True))
