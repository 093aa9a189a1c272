"""RMS norms, rotary embeddings and the loss, in fewer passes over memory than a model's own code makes, on a CPU.

torch makes a tensor of each step of these three, a dozen for a norm and its gradient, which takes a tenth of a small
model's time on one thread. Liger Kernel (Hsu et al., 2024) fuses the same three on GPUs, to other bits; here the bits
are those of the model's own code: a layer is tried beside that code first, forward and backward, and is left alone
unless all bits agree. What is not fp32 on one thread of a CPU takes the model's own way as well.

Shape legend: N tokens, V vocabulary; B samples, H heads, T tokens of a sample, D elements a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from gradstream.core import layer_kernels

ROTARY = "apply_rotary_pos_emb"
"""By this name every decoder of transformers has a function (queries, keys, cos, sin) beside its attention."""

LOSS_ROWS = 32
"""Tokens whose gradient of the loss is made at once: few enough for a processor's cache."""


def fuse(module: nn.Module) -> None:
    """Let a model's norms and attentions compute by the functions below, where these give the same bits."""
    for layer in module.modules():
        if "forward" in vars(layer):
            continue  # somebody else's
        eps = getattr(layer, "variance_epsilon", None)
        if type(layer).__name__.endswith("RMSNorm") and isinstance(eps, float) and _is_norm(layer, eps):
            layer.forward = _NormForward(layer, eps)  # type: ignore[method-assign]
        forward = _rotary_forward(type(layer).forward)
        if forward is not None:
            layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]


def cross_entropy_sum(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The sum of the tokens' cross entropies, without those whose target is -100."""
    if _is_ours(logits_NV):
        loss: torch.Tensor = _Loss.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
        return loss
    return nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")


def _is_ours(*tensors: torch.Tensor) -> bool:
    """Whether the kernels compute this faster: they take one thread, and numbers that torch would not cast."""
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    return torch.get_num_threads() == 1 and not torch.is_autocast_enabled("cpu")


# --- the loss ---------------------------------------------------------------------------------------------------------


class _Loss(torch.autograd.Function):
    """torch's cross entropy. Its gradient takes the place of what the forward pass saved."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        logs_NV = torch.log_softmax(logits_NV, -1)
        ctx.save_for_backward(logs_NV, targets_N)
        return nn.functional.nll_loss(logs_NV, targets_N, reduction="sum")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        logs_NV, targets_N = ctx.saved_tensors
        sum_of_losses, ignored, weight_of_all = 2, -100, gradient  # the last counts for means alone
        for begin in range(0, len(targets_N), LOSS_ROWS):
            logs_RV, targets_R = logs_NV[begin : begin + LOSS_ROWS], targets_N[begin : begin + LOSS_ROWS]
            of_logs_RV = torch.ops.aten.nll_loss_backward(
                gradient, logs_RV, targets_R, None, sum_of_losses, ignored, weight_of_all
            )
            torch.ops.aten._log_softmax_backward_data.out(of_logs_RV, logs_RV, -1, torch.float32, out=logs_RV)
        return logs_NV, None


# --- RMS norms --------------------------------------------------------------------------------------------------------


class _NormForward:
    """A norm's `forward`."""

    def __init__(self, layer: nn.Module, eps: float):
        self._layer, self._eps = layer, eps

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        layer = self._layer
        if len(arguments) == 1 and not named:
            (values,), weight = arguments, layer.weight
            if _is_ours(values, weight) and values.is_contiguous() and values.shape[-1:] == weight.shape:  # type: ignore[arg-type]
                return _norm(values, weight, self._eps)  # type: ignore[arg-type]
        return type(layer).forward(layer, *arguments, **named)


def _norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight · value / √(mean square + ε)."""
    result: torch.Tensor = _Norm.apply(values, values, weight, eps)  # type: ignore[no-untyped-call]
    return result


class _Norm(torch.autograd.Function):
    """The values come twice, as what is scaled and as what the scale is made of: autograd adds both gradients, one
    after the other, to that of other uses, and a sum in another order would have other bits."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, _: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        result = torch.empty_like(values)
        layer_kernels.squares(values.numel(), values.data_ptr(), result.data_ptr())
        scales = result.sum(-1, keepdim=True)
        layer_kernels.norm(
            scales.numel(),
            values.shape[-1],
            eps,
            values.data_ptr(),
            scales.data_ptr(),
            weight.data_ptr(),
            result.data_ptr(),
        )
        ctx.save_for_backward(values, scales, weight)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        values, scales, weight = ctx.saved_tensors
        for_values, _, for_weight, _ = ctx.needs_input_grad
        gradient_ND = gradient.contiguous()
        sizes = scales.numel(), values.shape[-1]
        known = gradient_ND.data_ptr(), values.data_ptr(), scales.data_ptr(), weight.data_ptr()
        products, scaled = torch.empty_like(values), torch.empty_like(values)
        layer_kernels.norm_products(*sizes, *known, products.data_ptr(), scaled.data_ptr())
        of_weight = None
        if for_weight:
            # torch adds in the order in which its product lies in memory, which follows the gradient.
            of_tokens = scaled if gradient_ND is gradient else gradient * (values * scales)
            of_weight = of_tokens.sum(tuple(range(values.dim() - 1)))
        if not for_values:
            return None, None, of_weight, None
        of_scales = products.sum(-1)
        layer_kernels.norm_backward(*sizes, *known, of_scales.data_ptr(), scaled.data_ptr(), products.data_ptr())
        return scaled, products, of_weight, None


def _is_norm(layer: nn.Module, eps: float) -> bool:
    """Whether `_norm` gives the bits of a layer, whatever its weight is."""
    parameters = dict(layer.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].dim() != 1:
        return False
    twin = copy.copy(layer)  # a flat one: of its own it has only the weight
    size = len(parameters["weight"])

    def own(values: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        vars(twin)["_parameters"] = {"weight": weight}
        return (values + type(layer).forward(twin, values),)  # the values have another use, as in a decoder's layers

    def ours(values: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (values + _norm(values, weight, eps),)

    return _agree(own, ours, _draw(2, 3, size), _draw(size))


# --- rotary embeddings ------------------------------------------------------------------------------------------------


class _Rotary(torch.autograd.Function):
    """Queries and keys, (B, H, T, D), rotated by (1 or B, T, D) cosines and sines."""

    @staticmethod
    def forward(
        ctx: Any, queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(queries, cos, sin, False), _rotated(keys, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        made = (
            _rotated(gradient, cos, sin, True) if wanted else None
            for wanted, gradient in zip(ctx.needs_input_grad, gradients, strict=False)
        )
        return *made, None, None


def _rotated(values_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool) -> torch.Tensor:
    """In the same order in memory as what torch's own steps give."""
    if values_BHTD.stride(-1) != 1:
        values_BHTD = values_BHTD.contiguous()
    result = torch.empty(values_BHTD.shape, device="cpu") if backward else torch.empty_like(values_BHTD)
    layer_kernels.rotate(
        tuple(values_BHTD.shape),
        values_BHTD.data_ptr(),
        values_BHTD.stride()[:3],
        cos.data_ptr(),
        sin.data_ptr(),
        (cos.stride(0) if len(cos) > 1 else 0, cos.stride(1)),
        result.data_ptr(),
        result.stride()[:3],
        backward,
    )
    return result


def _can_rotate(queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    if not queries.dim() == keys.dim() == 4:
        return False
    samples, _, tokens, size = queries.shape
    return (
        _is_ours(queries, keys, cos, sin)
        and cos.shape in ((samples, tokens, size), (1, tokens, size))
        and (cos.shape, cos.stride()) == (sin.shape, sin.stride())
        and size % 2 == 0
        and keys.shape[::2] == queries.shape[::2]
        and keys.shape[-1] == size
        and queries.stride(-1) == keys.stride(-1) == cos.stride(-1) == 1
        and not (cos.requires_grad or sin.requires_grad)
    )


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
    if not _agree(lambda q, k: own(q, k, cos, sin), lambda q, k: _Rotary.apply(q, k, cos, sin), queries, keys):  # type: ignore[no-untyped-call]
        return None

    def rotary(*arguments: Any, **named: Any) -> Any:
        plain = len(arguments) == 4 and not named and all(isinstance(argument, torch.Tensor) for argument in arguments)
        if plain and _can_rotate(*arguments):
            return _Rotary.apply(*arguments)  # type: ignore[no-untyped-call]
        return own(*arguments, **named)

    # The same code with other names around it, so that nobody else's model changes.
    names = {**forward.__globals__, ROTARY: rotary}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


# --- the trial --------------------------------------------------------------------------------------------------------


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(sum(shape)), device="cpu")


Function = Callable[..., tuple[torch.Tensor, ...]]


@torch.enable_grad()
def _agree(own: Function, ours: Function, *inputs: torch.Tensor) -> bool:
    """Whether two functions give the same bits and the same gradients of their inputs, in the same order in memory."""

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
    return all(
        torch.equal(one, other) and one.stride() == other.stride()
        for one, other in zip(expected, run(ours), strict=True)
    )
