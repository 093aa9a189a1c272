"""Weight gradients of linear layers, added up by the very product that makes them.

autograd makes each microbatch's weight gradient as a tensor of its own and then adds it to `grad`: where a microbatch
has few tokens for the size of a layer, that takes as long as a pass. Megatron-LM's layers add in place for that reason
("gradient accumulation fusion"). A layer that has its own backward pass can also put its weight's product off until
there is time for it: the split backward pass of zero-bubble schedules (Qi et al., "Zero Bubble Pipeline Parallelism",
2023).

Shape legend: N tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

MOST_ROWS_IN_PLACE = 384
"""With more tokens than this the product is made first and added then, as autograd does it. MKL adds the products of
so many rows before it touches the sum, so up to here both have the same bits, and beyond there is little to gain."""


@dataclass(frozen=True)
class WeightProduct:
    """A weight's gradient of one microbatch, as the product that it is."""

    weight: nn.Parameter
    left: torch.Tensor
    right: torch.Tensor
    """Of shapes N × rows and N × columns of the weight: the gradient is the transposed left times the right."""


@dataclass(frozen=True)
class WeightPart:
    """What the first part of a backward pass has left to its second: no gradient of a parameter was touched so far."""

    products: list[WeightProduct]
    others: list[tuple[nn.Parameter, torch.Tensor]]
    """Gradients of what is not a linear layer's weight (norms, biases, embeddings), which take next to no time."""

    def add(self) -> None:
        """Add the gradients to those of the microbatches before, in each parameter's `grad`."""
        for product in self.products:
            _add(product)
        for parameter, gradient in self.others:
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.add_(gradient)


class WeightGradients:
    """Adds up the gradients of a module's linear layers, those of nn.Linear and of GPT-2's Conv1D.

    From here on `backward()` leaves their sum in `grad` as before, and calls the hooks that wait for it
    (`register_post_accumulate_grad_hook`). A weight that several layers share is left to autograd.
    """

    def __init__(self, module: nn.Module):
        self._put_off: list[WeightProduct] | None = None
        users = Counter(id(parameter) for inner in module.modules() for parameter in inner.parameters(recurse=False))
        own: set[int] = set()
        for layer in module.modules():
            if type(layer) in (nn.Linear, Conv1D) and users[id(layer.weight)] == 1:
                layer.forward = _Forward(self, layer)  # type: ignore[method-assign]
                own.add(id(layer.weight))
        self._others = [parameter for parameter in module.parameters() if id(parameter) not in own]

    def backward_input(
        self, result: torch.Tensor, gradient: torch.Tensor | None, received: torch.Tensor
    ) -> tuple[torch.Tensor, WeightPart]:
        """The first part of a backward pass, from the gradient of `result` (None: of a scalar, the loss) to that of
        `received`, and what is left for the second. No hooks are called, in either part."""
        others = [parameter for parameter in self._others if parameter.requires_grad]
        products: list[WeightProduct] = []
        self._put_off = products
        try:
            of_received, *found = torch.autograd.grad([result], [received, *others], [gradient], allow_unused=True)
        finally:
            self._put_off = None
        pairs = zip(others, found, strict=True)
        return of_received, WeightPart(products, [(other, each) for other, each in pairs if each is not None])

    def take(self, product: WeightProduct) -> None:
        """Called in a layer's backward pass."""
        if self._put_off is not None:
            self._put_off.append(product)
        else:
            _add(product)


@torch.no_grad()
def _add(product: WeightProduct) -> None:
    weight, left, right = product.weight, product.left.t(), product.right
    if weight.grad is None:
        weight.grad = left.mm(right).to(weight.dtype)
    elif weight.dtype == right.dtype and 1 < len(right) <= MOST_ROWS_IN_PLACE:
        weight.grad.addmm_(left, right)
    else:
        weight.grad.add_(left.mm(right))


class _Forward:
    """A layer's `forward`."""

    def __init__(self, gradients: WeightGradients, layer: nn.Linear | Conv1D):
        self._gradients = gradients
        self._layer = layer

    def __call__(self, received: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        if not (torch.is_grad_enabled() and layer.weight.requires_grad):
            result: torch.Tensor = type(layer).forward(layer, received)
            return result
        result = _Product.apply(  # type: ignore[no-untyped-call]
            received, layer.weight, layer.bias, isinstance(layer, Conv1D), self._gradients
        )
        return result


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
