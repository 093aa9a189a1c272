"""What a decoder's layers compute besides matrix products, with gradients, in fewer passes over memory than a model's
own code makes: on one thread of a CPU, in fp32.

torch makes a tensor of each step of these, a dozen for a norm and its gradient, which takes a sixth of a small model's
time on one thread. Liger Kernel (Hsu et al., 2024) fuses the same on GPUs. Norms and rotary embeddings have the bits of
torch's own steps; what takes exponentials has bits of its own, within a few units in the last place of torch's.

Shape legend: N tokens, V vocabulary; B samples, H heads, T tokens of a sample, D elements a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradstream.core.kernels import exp, layer


def is_ours(*tensors: torch.Tensor) -> bool:
    """Whether the kernels compute this faster: they take one thread, and numbers that torch would not cast."""
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return False
    return torch.get_num_threads() == 1 and not torch.is_autocast_enabled("cpu")


# --- the loss ---------------------------------------------------------------------------------------------------------


def cross_entropy_sum(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The sum of the tokens' cross entropies, without those whose target is -100. Raises IndexError for targets that
    are not in the vocabulary."""
    if is_ours(logits_NV) and targets_N.is_cpu:
        loss: torch.Tensor = _Loss.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
        return loss
    return nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")


class _Loss(torch.autograd.Function):
    """The gradient takes the place of what the forward pass saved."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        logits_NV, targets_N = logits_NV.contiguous(), targets_N.contiguous()
        num_words = logits_NV.shape[1]
        counted_N = targets_N[targets_N != exp.IGNORED]
        if len(counted_N) and not 0 <= int(counted_N.min()) <= int(counted_N.max()) < num_words:
            raise IndexError(f"a target is not in the vocabulary of {num_words}")
        terms_NV, sums_N = torch.empty_like(logits_NV), torch.empty(len(logits_NV))
        addresses = (tensor.data_ptr() for tensor in (logits_NV, targets_N, terms_NV, sums_N))
        total = exp.cross_entropy(len(logits_NV), num_words, *addresses)
        ctx.save_for_backward(terms_NV, sums_N, targets_N)
        return torch.tensor(total, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        terms_NV, sums_N, targets_N = ctx.saved_tensors
        addresses = (tensor.data_ptr() for tensor in (targets_N, sums_N, terms_NV))
        exp.cross_entropy_backward(len(terms_NV), terms_NV.shape[1], float(gradient), *addresses)
        torch.autograd.graph.increment_version(terms_NV)  # so that a second backward pass is refused
        return terms_NV, None


# --- RMS norms --------------------------------------------------------------------------------------------------------


def rms_norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight · value / √(mean square + ε)."""
    result: torch.Tensor = _Norm.apply(values, values, weight, eps)  # type: ignore[no-untyped-call]
    return result


class _Norm(torch.autograd.Function):
    """The values come twice, as what is scaled and as what the scale is made of: autograd adds both gradients, one
    after the other, to that of other uses, and a sum in another order would have other bits."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, _: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        result = torch.empty_like(values)
        layer.squares(values.numel(), values.data_ptr(), result.data_ptr())
        scales = result.sum(-1, keepdim=True)
        layer.norm(
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
        layer.norm_products(*sizes, *known, products.data_ptr(), scaled.data_ptr())
        of_weight = None
        if for_weight:
            # torch adds in the order in which its product lies in memory, which follows the gradient.
            of_tokens = scaled if gradient_ND is gradient else gradient * (values * scales)
            of_weight = of_tokens.sum(tuple(range(values.dim() - 1)))
        if not for_values:
            return None, None, of_weight, None
        of_scales = products.sum(-1)
        layer.norm_backward(*sizes, *known, of_scales.data_ptr(), scaled.data_ptr(), products.data_ptr())
        return scaled, products, of_weight, None


# --- rotary embeddings ------------------------------------------------------------------------------------------------


class Rotary(torch.autograd.Function):
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
    layer.rotate(
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


def can_rotate(queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    if not queries.dim() == keys.dim() == 4:
        return False
    samples, _, tokens, size = queries.shape
    return (
        is_ours(queries, keys, cos, sin)
        and cos.shape in ((samples, tokens, size), (1, tokens, size))
        and (cos.shape, cos.stride()) == (sin.shape, sin.stride())
        and size % 2 == 0
        and keys.shape[::2] == queries.shape[::2]
        and keys.shape[-1] == size
        and queries.stride(-1) == keys.stride(-1) == cos.stride(-1) == 1
        and not (cos.requires_grad or sin.requires_grad)
    )


# --- gates and GELU ---------------------------------------------------------------------------------------------------


class Gated(torch.autograd.Function):
    """SiLU(gate) · value, as in SwiGLU (Shazeer, 2020), without a tensor of what SiLU gives."""

    @staticmethod
    def forward(ctx: Any, gates: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        gates, values = gates.contiguous(), values.contiguous()
        ctx.save_for_backward(gates, values)
        result = torch.empty_like(values)
        exp.gated(result.numel(), gates.data_ptr(), values.data_ptr(), result.data_ptr())
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        gates, values = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_gates, of_values = torch.empty_like(gates), torch.empty_like(values)
        addresses = (tensor.data_ptr() for tensor in (gradient, gates, values, of_gates, of_values))
        exp.gated_backward(gradient.numel(), *addresses)
        return of_gates, of_values


class Gelu(torch.autograd.Function):
    """GELU by its approximation with tanh, as in GPT-2."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        values = values.contiguous()
        ctx.save_for_backward(values)
        result = torch.empty_like(values)
        exp.gelu(values.numel(), values.data_ptr(), result.data_ptr())
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (values,) = ctx.saved_tensors
        gradient, result = gradient.contiguous(), torch.empty_like(values)
        exp.gelu_backward(values.numel(), gradient.data_ptr(), values.data_ptr(), result.data_ptr())
        return result
