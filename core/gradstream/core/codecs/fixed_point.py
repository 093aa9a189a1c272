"""The sum of a step's contributions to a bundle, in fixed point: no bit of it depends on their order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from gradstream.core.kernels import fixed_point
from gradstream.core.kernels.blocks import BLOCK
from gradstream.core.kernels.dense import I64
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
        self._grid = fixed_point.grid(num_contributions)
        self._elements_F = np.array(num_elements, dtype=np.int64)
        # The digits do not lie at the same place of a page: there a load would wait for the store before it.
        low = elements + PAGE // 2 + -elements % PAGE
        self._digits_N = np.empty(low + elements, dtype=np.int32)
        self._tops_B = np.full(sum(blocks), fixed_point.EMPTY, dtype=np.int8)
        self.result_N = torch.from_numpy(self._digits_N.view(np.float32)[:elements])
        """The sum in fp32, fragments end to end. Valid from `finish` until the next `add`; the caller may change it."""
        high_F = self._digits_N.ctypes.data + 4 * _begins(num_elements)
        self._addresses = high_F, high_F + 4 * low, self._tops_B.ctypes.data + _begins(blocks)

    def add(self, kinds_F: I64, elements_F: I64, keys_F: I64, payloads_FC: npt.NDArray[np.int64]) -> None:
        """Add contributions, given as the addresses of each fragment's payloads (`kernels.fixed_point.add`)."""
        grid = self._grid
        high_F, low_F, tops_F = self._addresses
        fixed_point.add(
            kinds_F,
            elements_F,
            keys_F,
            payloads_FC,
            high_F,
            low_F,
            tops_F,
            grid.tops,
            grid.scaled_tops,
            grid.factors,
            grid.width,
        )

    def finish(self) -> None:
        """Write the sum to `result_N`, and begin the next one."""
        grid = self._grid
        fixed_point.finish(self._elements_F, *self._addresses, grid.lower_units, grid.width)
        self.clear()

    def clear(self) -> None:
        """Begin the next sum."""
        self._tops_B.fill(fixed_point.EMPTY)


def _begins(lengths: Sequence[int]) -> I64:
    return np.array([0, *accumulate(lengths)][:-1], dtype=np.int64)
