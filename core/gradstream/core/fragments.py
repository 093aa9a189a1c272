"""Fragments: the unit of placement, transfer and optimization.

A fragment is a contiguous slice of one tensor, flattened in row-major order. The cut depends on the tensors alone,
never on how many servers there are, so the optimizer works on the same slices whoever holds them: the root of "the
same bits".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BYTES_PER_ELEMENT = 4  # master weights are fp32
BLOCK_ELEMENTS = 256  # of int8: a fragment that starts on a block has the same scales as the whole tensor


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the model's inventory. `unit` is the index of the forward unit that needs it."""

    name: str
    shape: tuple[int, ...]
    decay: bool
    unit: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [begin, end) of the flattened tensor number `tensor`; `index` is its place in the plan."""

    index: int
    tensor: int
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        return self.end - self.begin

    @property
    def num_bytes(self) -> int:
        """Bytes of its fp32 master copy."""
        return self.num_elements * BYTES_PER_ELEMENT


def cut(tensors: Sequence[Tensor], fragment_elements: int) -> list[Fragment]:
    """Cut every tensor into fragments of at most `fragment_elements`, in forward order.

    Cuts fall on multiples of 256 elements (one int8 block), which is also the least that a fragment may be asked to
    hold. The pieces of a tensor differ by at most one block, so that no fragment is a sliver.
    """
    most_blocks = max(1, fragment_elements // BLOCK_ELEMENTS)
    fragments: list[Fragment] = []
    for number, tensor in enumerate(tensors):
        blocks = -(-tensor.num_elements // BLOCK_ELEMENTS)
        pieces = -(-blocks // most_blocks)
        begin = 0
        for piece in range(pieces):
            end = min(tensor.num_elements, blocks * (piece + 1) // pieces * BLOCK_ELEMENTS)
            fragments.append(Fragment(len(fragments), number, begin, end))
            begin = end
    return fragments
