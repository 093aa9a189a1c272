"""Frozen modules of a fine-tuning with adapters: linear modules and embeddings with compactly held weights.

A weight is held as fp32, bf16, or int8 with one scale for each row (the vector-wise form of LLM.int8 without its
outliers, Dettmers et al., 2022). The matrix for a product is made when it is needed and not kept for the backward pass,
which makes it again. Norms and biases are small and held as fp32.

A module with its own forward pass computes more than a product with its matrix (Gemma's embeddings are scaled, some
routers choose experts). It is not replaced and stays in fp32.

Shape legend: K inputs, N outputs, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradstream.core.model.lora import is_from_base

Held = Literal["fp32", "bf16", "int8"]
ROWS_AT_ONCE = 2048
_PLAIN = (nn.Linear.forward, Conv1D.forward, nn.Embedding.forward)


@dataclass(frozen=True)
class HeldMatrix:
    """A compactly held matrix: values of shape (rows, columns), and for int8 the scales of the rows, (rows, 1)."""

    values: torch.Tensor
    scales: torch.Tensor | None = None

    @classmethod
    def of(cls, matrix: torch.Tensor, held: Held) -> HeldMatrix:
        """Hold a copy of a matrix, rounded to nearest.

        The matrix is copied even if nothing is rounded, because it may be a view of a mapped file. A write to that file
        would change the base of a running job, or end its worker with a SIGBUS.
        """
        if held != "int8":
            dtype = torch.float32 if held == "fp32" else torch.bfloat16
            return cls(matrix.to(dtype, copy=True, memory_format=torch.contiguous_format))
        values = torch.empty(matrix.shape, dtype=torch.int8)
        scales = torch.empty((len(matrix), 1))
        # Some rows at a time, because a whole embedding in fp32 takes more memory than its held form.
        for begin in range(0, len(matrix), ROWS_AT_ONCE):
            rows = slice(begin, begin + ROWS_AT_ONCE)
            part = matrix[rows].float()
            scales[rows] = part.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
            values[rows] = torch.round(part / scales[rows])
        return cls(values, scales)

    def to(self, device: torch.device) -> HeldMatrix:
        """The matrix on a device."""
        return HeldMatrix(self.values.to(device), None if self.scales is None else self.scales.to(device))

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole matrix in `dtype`."""
        values = self.values.to(dtype)
        return values if self.scales is None else values.mul_(self.scales.to(dtype))

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The rows with the given indices, fp32."""
        rows = nn.functional.embedding(index, self.values).float()
        return rows if self.scales is None else rows * nn.functional.embedding(index, self.scales)

    @property
    def num_bytes(self) -> int:
        """Memory of the held matrix in bytes."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)


class _Product(torch.autograd.Function):
    """x @ W^T for a held W (N, K), or x @ W for a W stored as (K, N). Only x gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x_BTK: torch.Tensor, matrix: HeldMatrix, transposed: bool) -> torch.Tensor:
        ctx.matrix, ctx.transposed = matrix, transposed
        whole = matrix.whole(x_BTK.dtype)
        return x_BTK @ (whole if transposed else whole.T)

    @staticmethod
    def backward(ctx: Any, gradient_BTN: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        whole = ctx.matrix.whole(gradient_BTN.dtype)
        return gradient_BTN @ (whole.T if ctx.transposed else whole), None, None


class HeldLinear(nn.Module):
    """A linear module with a held matrix; with `transposed`, in place of transformers' Conv1D."""

    def __init__(self, matrix: HeldMatrix, bias: torch.Tensor | None, transposed: bool):
        super().__init__()
        self.matrix = matrix
        self.transposed = transposed
        self.bias = bias
        # peft reads the device of its base layer from `weight`.
        self.weight = matrix.values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        result: torch.Tensor = _Product.apply(x, self.matrix, self.transposed)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias.to(result.dtype)


class HeldEmbedding(nn.Module):
    """An embedding with a held matrix."""

    def __init__(self, matrix: HeldMatrix):
        super().__init__()
        self.matrix = matrix
        self.weight = matrix.values

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.matrix.rows(ids)


def replace_frozen(
    model: nn.Module,
    source: Callable[[str, nn.Parameter], str],
    matrix: Callable[[str], HeldMatrix],
    vector: Callable[[str], torch.Tensor],
) -> set[str]:
    """Replace linear modules and embeddings by held ones, and fill in the other parameters.

    `source` returns the name of a parameter's tensor; `matrix` and `vector` return that tensor, held or as fp32. The
    result is the names of the tensors that were used.
    """
    used: set[str] = set()
    for path, module in list(model.named_modules()):
        own = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if is_from_base(parameter)
        }
        if not own:
            continue
        sources = {name: source(f"{path}.{name}" if path else name, parameter) for name, parameter in own.items()}
        used.update(sources.values())
        held: nn.Module | None = None
        if type(module).forward not in _PLAIN:
            pass
        elif isinstance(module, (nn.Linear, Conv1D)):
            bias = vector(sources["bias"]) if "bias" in sources else None
            held = HeldLinear(matrix(sources["weight"]), bias, isinstance(module, Conv1D))
        elif isinstance(module, nn.Embedding):
            held = HeldEmbedding(matrix(sources["weight"]))
        if held is not None:
            model.set_submodule(path, held)
            continue
        for name in own:
            value = vector(sources[name])
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return used
