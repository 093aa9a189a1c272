"""Fragments: the unit of placement, transfer and optimization.

A fragment is a contiguous slice of one tensor, flattened in row-major order. The cut depends only on the tensors, not
on the number of servers: the optimizer works on the same slices on any servers, which is the basis of "the same bits".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TensorKind = Literal["matrix", "head", "embedding", "vector"]
"""What a tensor is in the model. The head gives the logits; a head that is tied to the embedding is an embedding."""

BYTES_PER_ELEMENT = 4  # master weights are fp32
BLOCK_ELEMENTS = 256  # a block of int8: a fragment that starts on a block has the same scales as the whole tensor


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the model's inventory.

    `unit` is the index of the first forward unit that needs the tensor, `last_unit` that of the last one; the two
    differ for a tied tensor. `kind` is the tensor's kind in the model.
    """

    name: str
    shape: tuple[int, ...]
    decay: bool
    unit: int
    kind: TensorKind = "matrix"
    last_unit: int = -1

    def __post_init__(self) -> None:
        if self.last_unit < 0:
            object.__setattr__(self, "last_unit", self.unit)

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def is_tied(self) -> bool:
        """Whether two units use the tensor."""
        return self.last_unit != self.unit


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [begin, end) of the flattened tensor number `tensor`. `index` is the fragment's place in the plan.

    `columns` is the length of the tensor's rows if the slice is whole rows of a matrix, else 0.
    """

    index: int
    tensor: int
    begin: int
    end: int
    columns: int = 0

    @property
    def num_elements(self) -> int:
        return self.end - self.begin

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns) if the slice is whole rows of a matrix, else (elements,)."""
        return (self.num_elements // self.columns, self.columns) if self.columns else (self.num_elements,)

    @property
    def num_bytes(self) -> int:
        """Bytes of the fragment's fp32 master weights."""
        return self.num_elements * BYTES_PER_ELEMENT


def num_fragments(tensors: Sequence[Tensor], fragment_elements: int) -> int:
    """The number of fragments that `cut` makes, without making them: a peer's sizes may need too much memory."""
    return sum(_num_pieces(tensor, fragment_elements) for tensor in tensors)


def _block(tensor: Tensor, fragment_elements: int) -> int:
    """The number of elements of which a tensor's cuts are multiples."""
    row = max(1, tensor.shape[-1]) if len(tensor.shape) > 1 else 1
    block = math.lcm(BLOCK_ELEMENTS, row)
    return block if block <= fragment_elements else BLOCK_ELEMENTS


def _num_pieces(tensor: Tensor, fragment_elements: int) -> int:
    block = _block(tensor, fragment_elements)
    num_blocks, max_blocks = -(-tensor.num_elements // block), max(1, fragment_elements // block)
    return -(-num_blocks // max_blocks)


def cut(tensors: Sequence[Tensor], fragment_elements: int) -> list[Fragment]:
    """Cut every tensor into fragments of at most `fragment_elements`, in forward order.

    Cuts fall on multiples of 256 elements (one int8 block), which is also the smallest allowed `fragment_elements`. If
    a fragment can hold such a multiple of whole rows of a matrix, cuts also fall between rows. The pieces of a tensor
    differ by at most one such block, which avoids very small fragments.
    """
    fragments: list[Fragment] = []
    for number, tensor in enumerate(tensors):
        row = max(1, tensor.shape[-1]) if len(tensor.shape) > 1 else 1
        block = _block(tensor, fragment_elements)
        columns = row if row > 1 and block % row == 0 else 0
        blocks = -(-tensor.num_elements // block)
        pieces = _num_pieces(tensor, fragment_elements)
        begin = 0
        for piece in range(pieces):
            end = min(tensor.num_elements, blocks * (piece + 1) // pieces * block)
            fragments.append(Fragment(len(fragments), number, begin, end, columns if (end - begin) % row == 0 else 0))
            begin = end
    return fragments
