"""The grid of bins on which `fixed_point` adds contributions, and the tops of blocks on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradstream.core.kernels.blocks import BLOCK
from gradstream.core.kernels.compiled import F32, I8, I32, kernel

F64 = npt.NDArray[np.float64]

EMPTY = -2
"""The top of a block without contributions: more than one bin below every other top."""
NOT_FINITE = 127
"""The top of a block with a contribution that is not finite. Its sum is NaN."""
_BIAS = 127
_SCALED_BITS = 8
"""A value is at most 2**7 times its scale: 128 in int8, 8 in int4, 8 * 16 if rotated. One bit more is for what the
rotation rounds."""
_MIN_EXPONENT = -126


@dataclass(frozen=True)
class Grid:
    """The grid for a number of contributions. Bins are numbered from 0, the lowest one that can be a top."""

    width: int
    """Bits of a bin."""
    tops: I8
    """The top that a value needs, by its biased exponent (0 to 255)."""
    scaled_tops: I8
    """The top that a block of int8 or int4 needs, by the biased exponent of its scale."""
    factors: F32
    """1 / unit, by bin."""
    lower_units: F64
    """The unit of the bin below, by bin."""


def grid(num_contributions: int) -> Grid:
    """Make the grid on which this number of contributions can be added without overflow."""
    width = 31 - (num_contributions - 1).bit_length()
    lowest = -(-_MIN_EXPONENT // width)  # the inverse of its unit is still a normal number

    def tops(bits: int) -> list[int]:
        # Magnitudes below 2**end need the lowest top with 2**end <= unit(top + 1) / 2.
        ends = [biased - _BIAS + 1 + bits for biased in range(255)]
        return [max(-(-(end + 1) // width) - 1, lowest) - lowest for end in ends]

    plain, scaled = tops(0), tops(_SCALED_BITS)
    bins = [width * (lowest + number) for number in range(scaled[-1] + 1)]
    return Grid(
        width,
        np.array([*plain, NOT_FINITE], dtype=np.int8),
        np.array([*scaled, NOT_FINITE], dtype=np.int8),
        np.array([2.0**-exponent for exponent in bins], dtype=np.float32),
        np.array([2.0 ** (exponent - width) for exponent in bins]),
    )


@kernel
def _raise_top(high_TE: I32, low_TE: I32, tops_T: I8, block: int, top: int) -> None:
    """Raise the top of a block to `top`: the digits move down, those below the lower bin are dropped."""
    if top == tops_T[block] + 1:
        for i in range(BLOCK):
            low_TE[block, i] = high_TE[block, i]
    else:
        for i in range(BLOCK):
            low_TE[block, i] = 0
    for i in range(BLOCK):
        high_TE[block, i] = 0
    tops_T[block] = top
