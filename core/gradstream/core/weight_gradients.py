"""Weight gradients of linear and embedding layers, added up where they are made.

autograd makes each microbatch's weight gradient as a tensor of its own, for an embedding one of mostly zeros, and then
adds it to `grad`: where a microbatch has few tokens for the size of a layer, that takes as long as a pass. The layers
of Megatron-LM add in place for that reason ("gradient accumulation fusion"). A layer that has its own backward pass can
also put its weight's gradient off until there is time for it: the split backward pass of zero-bubble schedules (Qi et
al., "Zero Bubble Pipeline Parallelism", 2023).

Shape legend: N tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

MOST_ROWS_IN_PLACE = 384
"""With more tokens than this the product is made first and added then, as autograd does it. MKL adds the products of
so many rows before it touches the sum, so up to here both have the same bits, and beyond there is little to gain."""


@dataclass(frozen=True)
class WeightProduct:
    """A matrix's gradient of one microbatch, as the product that it is."""

    weight: nn.Parameter
    left: torch.Tensor
    right: torch.Tensor
    """Of shapes N × rows and N × columns of the weight: the gradient is the transposed left times the right."""

    @torch.no_grad()
    def add(self) -> None:
        """Make the gradient and add it to the weight's `grad`."""
        weight, left, right = self.weight, self.left.t(), self.right
        if weight.grad is None:
            weight.grad = left.mm(right).to(weight.dtype)
        elif weight.dtype == right.dtype and 1 < len(right) <= MOST_ROWS_IN_PLACE:
            weight.grad.addmm_(left, right)
        else:
            weight.grad.add_(left.mm(right))


@dataclass(frozen=True)
class WeightRows:
    """An embedding's gradient of one microbatch: that of the rows which were looked up."""

    weight: nn.Parameter
    indices: torch.Tensor
    rows: torch.Tensor
    """One for each index, which may be there several times."""

    @torch.no_grad()
    def add(self) -> None:
        """Add up the rows of each index, and those sums to the weight's `grad`."""
        found, places = torch.unique(self.indices, return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(self.rows, places, len(found), -1, False)
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        self.weight.grad.index_add_(0, found, sums)


WeightGradient = WeightProduct | WeightRows


@dataclass(frozen=True)
class WeightPart:
    """What the first part of a backward pass has left to its second: no gradient of a parameter was touched so far."""

    put_off: list[WeightGradient]
    others: list[tuple[nn.Parameter, torch.Tensor]]
    """Gradients of norms and biases, which take next to no time, and of what several layers share."""

    def add(self) -> None:
        """Add the gradients to those of the microbatches before, in each parameter's `grad`."""
        for gradient in self.put_off:
            gradient.add()
        for parameter, made in self.others:
            if parameter.grad is None:
                parameter.grad = made.clone()
            else:
                parameter.grad.add_(made)


class WeightGradients:
    """Adds up the gradients of a module's nn.Linear, nn.Embedding and Conv1D (GPT-2's linear layer).

    From here on `backward()` leaves their sum in `grad` as before, and calls the hooks that wait for it
    (`register_post_accumulate_grad_hook`). A weight that several layers share is left to autograd.
    """

    def __init__(self, module: nn.Module):
        self._put_off: list[WeightGradient] | None = None
        users = Counter(id(parameter) for inner in module.modules() for parameter in inner.parameters(recurse=False))
        for layer in module.modules():
            if _is_known(layer) and users[id(layer.weight)] == 1:
                layer.forward = _Forward(self, layer)  # type: ignore[method-assign]
        self._parameters = list(module.parameters())

    def backward_input(
        self, result: torch.Tensor, gradient: torch.Tensor | None, received: torch.Tensor
    ) -> tuple[torch.Tensor, WeightPart]:
        """The first part of a backward pass, from the gradient of `result` (None: of a scalar, the loss) to that of
        `received`, and what is left for the second. No hooks are called, in either part."""
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._put_off = put_off = list[WeightGradient]()
        try:
            of_received, *made = torch.autograd.grad([result], [received, *trained], [gradient], allow_unused=True)
        finally:
            self._put_off = None
        # What is put off is None here.
        others = [pair for pair in zip(trained, made, strict=True) if pair[1] is not None]
        return of_received, WeightPart(put_off, others)

    def take(self, gradient: WeightGradient) -> None:
        """Called in a layer's backward pass."""
        if self._put_off is not None:
            self._put_off.append(gradient)
        else:
            gradient.add()


def _is_known(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Embedding | Conv1D]:
    if type(layer) is nn.Embedding:
        return (layer.padding_idx, layer.max_norm, layer.scale_grad_by_freq, layer.sparse) == (None, None, False, False)
    return type(layer) in (nn.Linear, Conv1D)


class _Forward:
    """A layer's `forward`."""

    def __init__(self, gradients: WeightGradients, layer: nn.Linear | nn.Embedding | Conv1D):
        self._gradients = gradients
        self._layer = layer

    def __call__(self, received: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        if not (torch.is_grad_enabled() and layer.weight.requires_grad):
            result = type(layer).forward(layer, received)  # type: ignore[arg-type]
        elif isinstance(layer, nn.Embedding):
            result = _Lookup.apply(received, layer.weight, self._gradients)  # type: ignore[no-untyped-call]
        else:
            result = _Product.apply(  # type: ignore[no-untyped-call]
                received, layer.weight, layer.bias, isinstance(layer, Conv1D), self._gradients
            )
        assert isinstance(result, torch.Tensor)
        return result


class _Lookup(torch.autograd.Function):
    """What an embedding does."""

    @staticmethod
    def forward(ctx: Any, indices: torch.Tensor, weight: nn.Parameter, gradients: WeightGradients) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.weight, ctx.gradients = weight, gradients  # not saved, as in _Product
        return nn.functional.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        (indices,) = ctx.saved_tensors
        ctx.gradients.take(WeightRows(ctx.weight, indices, gradient))
        return None, None, None


class _Product(torch.autograd.Function):
    """What a linear layer computes, in autocast's type where that is on; `inputs_first` when the weight is I × O."""

    @staticmethod
    def forward(
        ctx: Any,
        received: torch.Tensor,
        weight: nn.Parameter,
        bias: torch.Tensor | None,
        inputs_first: bool,
        gradients: WeightGradients,
    ) -> torch.Tensor:
        device = received.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else received.dtype
        values, matrix = received.to(dtype), weight.to(dtype)
        ctx.save_for_backward(values)
        # Not saved with them: activation checkpointing would give back a copy, whose `grad` nobody looks at.
        ctx.weight = weight
        ctx.received_dtype, ctx.inputs_first, ctx.gradients = received.dtype, inputs_first, gradients
        if not inputs_first:
            return nn.functional.linear(values, matrix, bias if bias is None else bias.to(dtype))
        assert bias is not None
        result_NO = torch.addmm(bias.to(dtype), values.reshape(-1, values.shape[-1]), matrix)
        return result_NO.view(*values.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (values,), weight = ctx.saved_tensors, ctx.weight
        values_NI, gradient_NO = values.reshape(-1, values.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        of_received = of_bias = None
        if ctx.needs_input_grad[0]:
            matrix = weight.to(values.dtype)
            of_received = gradient_NO.mm(matrix.t() if ctx.inputs_first else matrix).view(values.shape)
            of_received = of_received.to(ctx.received_dtype)
        if ctx.needs_input_grad[1]:
            pair = (values_NI, gradient_NO) if ctx.inputs_first else (gradient_NO, values_NI)
            ctx.gradients.take(WeightProduct(weight, *pair))
        if ctx.needs_input_grad[2]:
            of_bias = gradient_NO.sum(0)
        return of_received, None, of_bias, None, None
