"""Weight gradients of linear and embedding layers, accumulated in place.

autograd makes each microbatch's weight gradient as a new tensor, which for an embedding is mostly zeros, and then adds
it to `grad`. If a microbatch has few tokens for the size of a layer, this takes as long as a pass. Megatron-LM's layers
add in place for this reason ("gradient accumulation fusion"). A layer with its own backward pass can also defer its
weight's gradient until the worker has time: the split backward pass of zero-bubble schedules (Qi et al., "Zero Bubble
Pipeline Parallelism", 2023). Small linear layers are left to autograd unless backward passes are split.

Shape legend: N tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

MAX_ROWS_IN_PLACE = 384
"""Number of tokens up to which a product is added in place. With more, the product is computed first and then added, as
in autograd, because there is little to gain. The two ways may round differently, from a number of rows that depends on
the BLAS and the processor. The choice depends only on the recipe, so all schedules, stages and workers have the same
bits."""

MIN_ELEMENTS_IN_PLACE = 1 << 18
"""In unsplit backward passes autograd handles matrices with fewer elements than this. autograd computes the product
first, but its additional pass over the elements takes less time than the Python code of a layer here."""

Add = Callable[..., None]
"""A function that adds the gradient of its first argument, a weight, to the weight's `grad`: add_product or add_rows.
"""


@dataclass(frozen=True)
class WeightGradient:
    """A layer's deferred gradient of one microbatch, which `add(weight, *tensors)` computes and adds."""

    add: Add
    weight: nn.Parameter
    tensors: tuple[torch.Tensor, ...]


def add_product(weight: nn.Parameter, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a matrix's gradient to the weight's `grad`: transpose(left) @ right.

    `left` is N × the weight's rows, `right` is N × the weight's columns.
    """
    total = weight.grad
    if total is None:
        weight.grad = left.t().mm(right).to(weight.dtype)
    elif _is_large(weight) and total.dtype is right.dtype and 1 < right.shape[0] <= MAX_ROWS_IN_PLACE:
        total.addmm_(left.t(), right)
    else:
        total.add_(left.t().mm(right))


def add_rows(weight: nn.Parameter, indices: torch.Tensor, rows: torch.Tensor) -> None:
    """Add an embedding's gradient to the weight's `grad`.

    `rows` has one gradient for each of `indices`, which may repeat.
    """
    found, places = torch.unique(indices, return_inverse=True)
    sums = torch.ops.aten.embedding_dense_backward(rows, places, len(found), -1, False)
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad.index_add_(0, found, sums)


OnAdded = Callable[[nn.Parameter], None]


@dataclass(frozen=True)
class WeightPart:
    """The gradients that the first part of a backward pass leaves to the second, last layers first. Added once."""

    put_off: list[WeightGradient]
    others: list[tuple[nn.Parameter, torch.Tensor]]
    """Gradients that are already computed, of parameters other than layers' matrices, such as norms and biases."""
    on_added: OnAdded

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradients to each parameter's `grad`; call `on_added` once a parameter's gradient is complete.

        The tensors from which gradients are computed are freed one by one.
        """
        left = Counter(id(parameter) for parameter, _ in self.others)
        left.update(id(gradient.weight) for gradient in self.put_off)

        def added(parameter: nn.Parameter) -> None:
            left[id(parameter)] -= 1
            if not left[id(parameter)]:
                self.on_added(parameter)

        for pieces in (self.others, self.put_off):
            pieces.reverse()  # they are popped from the end
        while self.others:
            parameter, made = self.others.pop()
            if parameter.grad is None:
                parameter.grad = made.clone()
            else:
                parameter.grad.add_(made)
            added(parameter)
        while self.put_off:
            gradient = self.put_off.pop()
            gradient.add(gradient.weight, *gradient.tensors)
            added(gradient.weight)


class WeightGradients:
    """Accumulates the gradients of a module's nn.Linear, nn.Embedding and Conv1D (GPT-2's linear layer).

    `backward()` leaves their sum in `grad` as before, and calls its hooks (`register_post_accumulate_grad_hook`). A
    weight that several layers share is left to autograd. The backward pass of a forward pass made while `split` is set
    can be split into two parts. `on_added(parameter)` is called whenever a backward pass, whole or split, has added all
    of a parameter's gradient.
    """

    def __init__(self, module: nn.Module, split: bool, on_added: OnAdded = lambda parameter: None):
        self.split = split
        self._on_added = on_added
        self._put_off: list[WeightGradient] | None = None
        users = Counter(id(parameter) for inner in module.modules() for parameter in inner.parameters(recurse=False))
        for layer in module.modules():
            if _is_known(layer) and users[id(layer.weight)] == 1:
                layer.forward = _Forward(self, layer)  # type: ignore[method-assign]
        self._parameters = list(module.parameters())
        self._hooks: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._on_accumulated)  # type: ignore[no-untyped-call]
            for parameter in self._parameters
            if parameter.requires_grad
        ]

    def close(self) -> None:
        """Stop calling `on_added`.

        Python's garbage collector cannot see the references from the hooks to this object. Without `close` neither this
        object nor the objects that it calls would ever be freed.
        """
        for hook in self._hooks:
            hook.remove()

    def backward_until_given(
        self, result: torch.Tensor, gradient: torch.Tensor | None, received: torch.Tensor
    ) -> tuple[torch.Tensor, WeightPart]:
        """Run a backward pass and defer the gradients of matrices; return the gradient of `received`, and the rest.

        `gradient` is the gradient of `result`; None if `result` is a scalar, the loss. Other gradients are added at
        once, as autograd computes them. The forward pass must have been made while `split` was set.
        """
        with self._putting_off() as put_off:
            result.backward(gradient)  # type: ignore[no-untyped-call]
        of_received, received.grad = received.grad, None
        assert of_received is not None
        return of_received, WeightPart(put_off, [], self._on_added)

    def backward_input(
        self, result: torch.Tensor, gradient: torch.Tensor | None, received: torch.Tensor
    ) -> tuple[torch.Tensor, WeightPart]:
        """Run the first part of a backward pass, whose second part may come after other passes.

        As `backward_until_given`, but no parameter's `grad` changes: gradients that are not deferred are held until the
        second part.
        """
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        with self._putting_off() as put_off:
            of_received, *made = torch.autograd.grad([result], [received, *trained], [gradient], allow_unused=True)
        # A deferred gradient is None here.
        others = [pair for pair in zip(reversed(trained), reversed(made), strict=True) if pair[1] is not None]
        return of_received, WeightPart(put_off, others, self._on_added)

    @contextmanager
    def _putting_off(self) -> Iterator[list[WeightGradient]]:
        self._put_off = put_off = list[WeightGradient]()
        try:
            yield put_off
        finally:
            self._put_off = None

    def _on_accumulated(self, parameter: nn.Parameter) -> None:
        """Call `on_added` once autograd has added a parameter's gradient. Deferred gradients do not pass here."""
        if not any(gradient.weight is parameter for gradient in self._put_off or ()):
            self._on_added(parameter)

    def take(self, add: Add, weight: nn.Parameter, *tensors: torch.Tensor) -> None:
        """Take a weight's gradient in a layer's backward pass: `add(weight, *tensors)` adds it, now or later."""
        if self._put_off is None:
            add(weight, *tensors)
        else:
            self._put_off.append(WeightGradient(add, weight, tensors))


def _is_large(weight: torch.Tensor) -> bool:
    return weight.numel() >= MIN_ELEMENTS_IN_PLACE


def _is_known(layer: nn.Module) -> TypeGuard[nn.Linear | nn.Embedding | Conv1D]:
    if type(layer) is nn.Embedding:
        return (layer.padding_idx, layer.max_norm, layer.scale_grad_by_freq, layer.sparse) == (None, None, False, False)
    return type(layer) in (nn.Linear, Conv1D)


class _Forward:
    """The `forward` of a layer.

    It runs for each layer of each microbatch, so it leaves out operations without effect, such as a needless cast.
    """

    def __init__(self, gradients: WeightGradients, layer: nn.Linear | nn.Embedding | Conv1D):
        self.gradients = gradients
        self.inputs_first = isinstance(layer, Conv1D)
        self._layer = layer
        self._is_lookup = isinstance(layer, nn.Embedding)
        self._only_split = not self._is_lookup and not _is_large(layer.weight)

    def __call__(self, received: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        weight = layer.weight
        result: torch.Tensor
        as_it_is = self._only_split and not self.gradients.split
        if as_it_is or not (weight.requires_grad and torch.is_grad_enabled()):
            result = type(layer).forward(layer, received)  # type: ignore[arg-type]
        elif self._is_lookup:
            result = _Lookup.apply(received, weight, self.gradients)  # type: ignore[no-untyped-call]
        else:
            result = _Product.apply(received, weight, layer.bias, self)  # type: ignore[no-untyped-call]
        return result


class _Lookup(torch.autograd.Function):
    """The lookup of an embedding."""

    @staticmethod
    def forward(ctx: Any, indices: torch.Tensor, weight: nn.Parameter, gradients: WeightGradients) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.weight, ctx.gradients = weight, gradients  # not saved, as in _Product
        return nn.functional.embedding(indices, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        (indices,) = ctx.saved_tensors
        ctx.gradients.take(add_rows, ctx.weight, indices, gradient)
        return None, None, None


class _Product(torch.autograd.Function):
    """The product of a linear layer, in autocast's type if autocast is on."""

    @staticmethod
    def forward(
        ctx: Any, received: torch.Tensor, weight: nn.Parameter, bias: torch.Tensor | None, layer: _Forward
    ) -> torch.Tensor:
        dtype, device = received.dtype, received.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        values = received if received.dtype is dtype else received.to(dtype)
        matrix: torch.Tensor = weight if weight.dtype is dtype else weight.to(dtype)
        if bias is not None and bias.dtype is not dtype:
            bias = bias.to(dtype)
        ctx.save_for_backward(values)
        # Not saved with the tensors: activation checkpointing would return a copy of the weight, with an unused `grad`.
        ctx.context = weight, layer, received.dtype
        if not layer.inputs_first:
            return nn.functional.linear(values, matrix, bias)
        assert bias is not None
        result_NO = torch.addmm(bias, values.reshape(-1, values.shape[-1]), matrix)
        return result_NO.view(*values.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (values,) = ctx.saved_tensors
        weight, layer, received_dtype = ctx.context
        for_received, for_weight, for_bias, _ = ctx.needs_input_grad
        shape = values.shape
        values_NI, gradient_NO = values.reshape(-1, shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        of_received = None
        if for_received:
            matrix = weight if weight.dtype is values.dtype else weight.to(values.dtype)
            of_received = gradient_NO.mm(matrix.t() if layer.inputs_first else matrix).view(shape)
            if received_dtype is not of_received.dtype:
                of_received = of_received.to(received_dtype)
        if for_weight:
            left, right = (values_NI, gradient_NO) if layer.inputs_first else (gradient_NO, values_NI)
            layer.gradients.take(add_product, weight, left, right)
        return of_received, None, gradient_NO.sum(0) if for_bias else None, None
