"""Has a model's layers compute by the functions of `fused_functions`, where these compute the same.

A layer is tried beside its own code first, forward and backward, and is left alone unless both agree: norms and rotary
embeddings to the bit, what takes exponentials within their rounding. What is not fp32 on one thread of a CPU takes the
model's own way as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from gradstream.core.model.fused_functions import Gated, Gelu, Rotary, can_rotate, is_ours, rms_norm

ROTARY = "apply_rotary_pos_emb"
"""By this name every decoder of transformers has a function (queries, keys, cos, sin) beside its attention."""


Function = Callable[..., Any]


def fuse(module: nn.Module) -> None:
    """Let a model's norms, rotary embeddings, MLPs and activations compute by ours, where these give the same."""
    for layer in module.modules():
        if "forward" in vars(layer):
            continue  # somebody else's
        name, eps = type(layer).__name__, getattr(layer, "variance_epsilon", None)
        if name.endswith("RMSNorm") and isinstance(eps, float) and _is_norm(layer, eps):
            layer.forward = _NormForward(layer, eps)  # type: ignore[method-assign]
        elif name.endswith("MLP") and _is_gated(layer):
            layer.forward = partial(_gated_forward, layer)  # type: ignore[method-assign]
        elif "GELU" in name and _is_gelu(layer):
            layer.forward = partial(_gelu_forward, layer)  # type: ignore[method-assign]
        forward = _rotary_forward(type(layer).forward)
        if forward is not None:
            layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


# --- RMS norms --------------------------------------------------------------------------------------------------------


class _NormForward:
    """A norm's `forward`."""

    def __init__(self, layer: nn.Module, eps: float):
        self._layer, self._eps = layer, eps

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        layer = self._layer
        if len(arguments) == 1 and not named:
            (values,), weight = arguments, layer.weight
            if is_ours(values, weight) and values.is_contiguous() and values.shape[-1:] == weight.shape:  # type: ignore[arg-type]
                return rms_norm(values, weight, self._eps)  # type: ignore[arg-type]
        return type(layer).forward(layer, *arguments, **named)


def _is_norm(layer: nn.Module, eps: float) -> bool:
    """Whether `rms_norm` gives the bits of a layer, whatever its weight is."""
    parameters = dict(layer.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].dim() != 1:
        return False
    twin = copy.copy(layer)  # a flat one: of its own it has only the weight
    size = len(parameters["weight"])

    def own(values: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        vars(twin)["_parameters"] = {"weight": weight}
        return (values + type(layer).forward(twin, values),)  # the values have another use, as in a decoder's layers

    def ours(values: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (values + rms_norm(values, weight, eps),)

    return _agree(own, ours, _draw(2, 3, size), _draw(size))


# --- MLPs and activations ---------------------------------------------------------------------------------------------


def _gated_forward(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
    """The `forward` of an MLP with a gate."""
    if len(arguments) == 1 and not named:
        return _gated_mlp(layer, arguments[0])
    return type(layer).forward(layer, *arguments, **named)


def _gated_mlp(layer: nn.Module, received: torch.Tensor) -> torch.Tensor:
    gates, values = layer.gate_proj(received), layer.up_proj(received)  # type: ignore[operator]
    if is_ours(gates, values) and gates.shape == values.shape:  # what the matrices gave may be of another type
        gated = Gated.apply(gates, values)  # type: ignore[no-untyped-call]
    else:
        gated = layer.act_fn(gates) * values  # type: ignore[operator]
    result: torch.Tensor = layer.down_proj(gated)  # type: ignore[operator]
    return result


def _is_gated(layer: nn.Module) -> bool:
    """Whether a layer computes what `_gated_mlp` does, whatever its matrices are."""
    if set(layer._modules) != {"gate_proj", "up_proj", "down_proj", "act_fn"} or layer._parameters:
        return False
    twin = copy.copy(layer)  # with small matrices
    small = {name: nn.Linear(*shape, bias=False, device="meta") for name, shape in _SMALL.items()}
    for number, matrix in enumerate(small.values()):
        matrix.weight = nn.Parameter(_draw(*matrix.weight.shape) + number)
    vars(twin)["_modules"] = {**small, "act_fn": layer.act_fn}
    return _agree(
        lambda values: (type(layer).forward(twin, values),),
        lambda values: (_gated_mlp(twin, values),),
        _draw(2, 3, 4),
        exactly=False,
    )


_SMALL = {"gate_proj": (4, 8), "up_proj": (4, 8), "down_proj": (8, 4)}


def _gelu_forward(layer: nn.Module, values: torch.Tensor) -> Any:
    """An activation's `forward`."""
    if is_ours(values):
        return Gelu.apply(values)  # type: ignore[no-untyped-call]
    return type(layer).forward(layer, values)


def _is_gelu(layer: nn.Module) -> bool:
    """Whether an activation is GELU by its approximation with tanh."""
    return _agree(
        lambda values: (type(layer).forward(layer, values),),
        lambda values: (Gelu.apply(values),),  # type: ignore[no-untyped-call]
        4 * _draw(300),
        exactly=False,
    )


# --- rotary embeddings ------------------------------------------------------------------------------------------------


@cache
def _rotary_forward(forward: Any) -> FunctionType | None:
    """An attention's `forward` that finds our function by the name of its own; None where it has none that agrees."""
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(ROTARY)
    if own is None:
        return None
    cos, sin = _draw(1, 5, 8), _draw(1, 5, 8)
    queries, keys = _draw(2, 5, 4, 8).transpose(1, 2), _draw(2, 5, 2, 8).transpose(1, 2)
    if not _agree(lambda q, k: own(q, k, cos, sin), lambda q, k: Rotary.apply(q, k, cos, sin), queries, keys):  # type: ignore[no-untyped-call]
        return None

    def rotary(*arguments: Any, **named: Any) -> Any:
        plain = len(arguments) == 4 and not named and all(isinstance(argument, torch.Tensor) for argument in arguments)
        if plain and can_rotate(*arguments):
            return Rotary.apply(*arguments)  # type: ignore[no-untyped-call]
        return own(*arguments, **named)

    # The same code with other names around it, so that nobody else's model changes.
    names = {**forward.__globals__, ROTARY: rotary}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


# --- the trial --------------------------------------------------------------------------------------------------------


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(sum(shape)), device="cpu")


@torch.enable_grad()
def _agree(own: Function, ours: Function, *inputs: torch.Tensor, exactly: bool = True) -> bool:
    """Whether two functions give the same results and gradients of their inputs: `exactly`, to the bit and in the same
    order in memory, or within the rounding of exponentials."""

    def run(function: Function) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        results = function(*leaves)
        gradients = [torch.empty_like(result).copy_(_draw(*result.shape)) for result in results]
        made = torch.autograd.grad(results, leaves, gradients)
        return [*results, *made]

    try:
        expected = run(own)
    except Exception:  # any family's own code, which may be a function of something else
        return False
    pairs = list(zip(expected, run(ours), strict=True))
    if not exactly:
        return all(
            one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in pairs
        )
    return all(torch.equal(one, other) and one.stride() == other.stride() for one, other in pairs)
