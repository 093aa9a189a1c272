"""The sum of a step's contributions to a bundle, in fixed point: no bit of it depends on their order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from gradstream.core.kernels import fixed_point, residual
from gradstream.core.kernels.blocks import BLOCK
from gradstream.core.kernels.compiled import U16
from gradstream.core.kernels.dense import I64
from gradstream.core.kernels.grid import EMPTY, grid
from gradstream.core.plan.sizes import sum_bytes

PAGE = 1024
"""Elements of a page of memory."""


class FixedPointSum:
    """A sum of contributions to fragments of `num_elements` each; 8 bytes an element. `kernels.fixed_point` says how.

    One call at a time. `num_contributions` is the number of contributions that make it complete.
    """

    def __init__(self, num_elements: Sequence[int], num_contributions: int):
        self.num_bytes = sum(map(sum_bytes, num_elements))
        """Bytes of the sum."""
        elements, blocks = sum(num_elements), [-(-count // BLOCK) for count in num_elements]
        self._grid = grid(num_contributions)
        self._elements_F = np.array(num_elements, dtype=np.int64)
        # The digits do not lie at the same place of a page: there a load would wait for the store before it.
        low = elements + PAGE // 2 + -elements % PAGE
        self._digits_N = np.empty(low + elements, dtype=np.int32)
        self._tops_B = np.full(sum(blocks), EMPTY, dtype=np.int8)
        self.result_N = torch.from_numpy(self._digits_N.view(np.float32)[:elements])
        """The sum in fp32, fragments end to end. Valid from `finish` until the next `add`; the caller may change it."""
        self._begins_F, self._first_blocks_F = _bounds(num_elements), _bounds(blocks)
        high_F = self._digits_N.ctypes.data + 4 * self._begins_F[:-1]
        self._addresses = high_F, high_F + 4 * low, self._tops_B.ctypes.data + self._first_blocks_F[:-1]

    def add(self, kinds_F: I64, elements_F: I64, keys_F: I64, payloads_FC: I64, fragments: slice = slice(None)) -> None:
        """Add contributions, given as the addresses of each fragment's payloads (`kernels.fixed_point.add`).

        The arguments are of all fragments, or of those that `fragments` selects.
        """
        on = self._grid
        high_F, low_F, tops_F = (addresses[fragments] for addresses in self._addresses)
        fixed_point.add(
            kinds_F,
            elements_F,
            keys_F,
            payloads_FC,
            high_F,
            low_F,
            tops_F,
            on.tops,
            on.scaled_tops,
            on.factors,
            on.width,
        )

    def add_elements(self, fragment: int, indices_M: U16, halves_M: U16) -> None:
        """Add some elements of fragment number `fragment`, as topk has them (`kernels.residual.topk_sum`)."""
        begin, end = self._begins_F[fragment], self._begins_F[fragment + 1]
        low = len(self._digits_N) - int(self._begins_F[-1])
        first = self._first_blocks_F[fragment]
        on = self._grid
        residual.topk_sum(
            indices_M,
            halves_M,
            self._digits_N[begin:end],
            self._digits_N[low + begin : low + end],
            self._tops_B[first : self._first_blocks_F[fragment + 1]],
            on.tops,
            on.factors,
            np.float32(2.0**on.width),
        )

    def finish(self) -> None:
        """Write the sum to `result_N`, and begin the next one."""
        on = self._grid
        fixed_point.finish(self._elements_F, *self._addresses, on.lower_units, on.width)
        self.clear()

    def clear(self) -> None:
        """Begin the next sum."""
        self._tops_B.fill(EMPTY)


def _bounds(lengths: Sequence[int]) -> I64:
    """Where each of the parts begins, and where the last one ends."""
    return np.array([0, *accumulate(lengths)], dtype=np.int64)
