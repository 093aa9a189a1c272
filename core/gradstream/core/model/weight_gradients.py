"""Weight gradients of linear and embedding layers, added up where they are made.

autograd makes each microbatch's weight gradient as a tensor of its own, for an embedding one of mostly zeros, and then
adds it to `grad`: where a microbatch has few tokens for the size of a layer, that takes as long as a pass. The layers
of Megatron-LM add in place for that reason ("gradient accumulation fusion"). A layer that has its own backward pass can
also put its weight's gradient off until there is time for it: the split backward pass of zero-bubble schedules (Qi et
al., "Zero Bubble Pipeline Parallelism", 2023). Small linear layers are left to autograd unless that is wanted.

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
"""With more tokens than this the product is made first and added then, as autograd does it: there is little to gain.
The two ways may round differently, from a number of rows on that depends on the BLAS and the processor. Which way is
taken depends on the recipe alone, so that all schedules, stages and workers have the same bits."""

MIN_ELEMENTS_IN_PLACE = 1 << 18
"""Where backward passes come in one part, a matrix with fewer elements than this is left to autograd, which makes the
product first: one pass over them more takes less time than what a layer of ours costs in Python."""

Add = Callable[..., None]
"""Adds the gradient of a weight, its first argument, to the weight's `grad`: add_product or add_rows."""


@dataclass(frozen=True)
class WeightGradient:
    """A layer's gradient of one microbatch that was put off: `add(weight, *tensors)` makes it and adds it."""

    add: Add
    weight: nn.Parameter
    tensors: tuple[torch.Tensor, ...]


def add_product(weight: nn.Parameter, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a matrix's gradient to the weight's `grad`: the transposed left, N × rows of the weight, times the right,
    N × columns."""
    total = weight.grad
    if total is None:
        weight.grad = left.t().mm(right).to(weight.dtype)
    elif _is_large(weight) and total.dtype is right.dtype and 1 < right.shape[0] <= MAX_ROWS_IN_PLACE:
        total.addmm_(left.t(), right)
    else:
        total.add_(left.t().mm(right))


def add_rows(weight: nn.Parameter, indices: torch.Tensor, rows: torch.Tensor) -> None:
    """Add an embedding's gradient to the weight's `grad`: that of the rows that were looked up, one for each index,
    which may be there several times."""
    found, places = torch.unique(indices, return_inverse=True)
    sums = torch.ops.aten.embedding_dense_backward(rows, places, len(found), -1, False)
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad.index_add_(0, found, sums)


OnAdded = Callable[[nn.Parameter], None]


@dataclass(frozen=True)
class WeightPart:
    """What the first part of a backward pass has left to its second, last layers first. It is added once."""

    put_off: list[WeightGradient]
    others: list[tuple[nn.Parameter, torch.Tensor]]
    """Gradients that are made already: of what is no layer's own matrix, such as norms and biases."""
    on_added: OnAdded

    @torch.no_grad()
    def add(self) -> None:
        """Add the gradients to those of the microbatches before, in each parameter's `grad`, and call `on_added` for
        each parameter when it has all of its own. What they are made from is let go meanwhile."""
        left = Counter(id(parameter) for parameter, _ in self.others)
        left.update(id(gradient.weight) for gradient in self.put_off)

        def added(parameter: nn.Parameter) -> None:
            left[id(parameter)] -= 1
            if not left[id(parameter)]:
                self.on_added(parameter)

        for pieces in (self.others, self.put_off):
            pieces.reverse()  # to take them from the end
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
    """Adds up the gradients of a module's nn.Linear, nn.Embedding and Conv1D (GPT-2's linear layer).

    From here on `backward()` leaves their sum in `grad` as before, and calls the hooks that wait for it
    (`register_post_accumulate_grad_hook`). A weight that several layers share is left to autograd. While `split` is
    set, forward passes are such that their backward pass can come in two parts. `on_added(parameter)` is called
    whenever a backward pass, whole or in parts, has added all of a parameter's gradient.
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
        """Call `on_added` no more. Python's garbage collector cannot see the way by which the hooks lead back to this
        object, so that neither it nor what it calls would ever be freed."""
        for hook in self._hooks:
            hook.remove()

    def backward_until_given(
        self, result: torch.Tensor, gradient: torch.Tensor | None, received: torch.Tensor
    ) -> tuple[torch.Tensor, WeightPart]:
        """A backward pass that puts its matrices' gradients off: from the gradient of `result` (None: of a scalar, the
        loss) to that of `received`, and what is left. All other gradients are added already, as autograd makes them.
        The forward pass was made while `split` was set."""
        with self._putting_off() as put_off:
            result.backward(gradient)  # type: ignore[no-untyped-call]
        of_received, received.grad = received.grad, None
        assert of_received is not None
        return of_received, WeightPart(put_off, [], self._on_added)

    def backward_input(
        self, result: torch.Tensor, gradient: torch.Tensor | None, received: torch.Tensor
    ) -> tuple[torch.Tensor, WeightPart]:
        """The first part of a backward pass whose second may come after other passes: as `backward_until_given`, but
        no gradient of a parameter is touched, and those that are not put off are held until then."""
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        with self._putting_off() as put_off:
            of_received, *made = torch.autograd.grad([result], [received, *trained], [gradient], allow_unused=True)
        # What is put off is None here.
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
        """autograd is through with a parameter; with what was put off it has nothing to do."""
        if not any(gradient.weight is parameter for gradient in self._put_off or ()):
            self._on_added(parameter)

    def take(self, add: Add, weight: nn.Parameter, *tensors: torch.Tensor) -> None:
        """Called in a layer's backward pass: `add(weight, *tensors)` adds the weight's gradient, now or later."""
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
    """A layer's `forward`. It runs for each layer of each microbatch, and so does all that it calls: what would change
    nothing (a cast, an object for a product that is made at once) is left out."""

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
    """What an embedding does."""

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
    """What a linear layer computes, in autocast's type where that is on."""

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
        # Not saved with them: activation checkpointing would give back a copy, whose `grad` nobody looks at.
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
