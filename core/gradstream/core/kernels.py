"""Fused CPU kernels of the codecs: one pass over memory, one thread, without the interpreter's lock.

numba compiles them at their first call and caches the result beside this file; `preload` does it ahead of time, since
it holds the interpreter for seconds. They use IEEE operations in a fixed order (no fast-math, no contraction), so their
bits are those of the expressions in the docstrings. Whole blocks only, as 2-D arrays: with the inner length a constant
the compiler vectorizes every loop.

Shape legend: B blocks, E elements a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import int32, njit, uint32

INT8_BLOCK = 256
BF16_BLOCK = 1024

F32 = npt.NDArray[np.float32]
F = TypeVar("F", bound=Callable[..., None])

_INFINITY_BITS = 0x7F800000
_MAGNITUDE_BITS = 0x7FFFFFFF


def _kernel(function: F) -> F:
    return cast(F, njit(nogil=True, cache=True, fastmath=False, error_model="numpy", boundscheck=False)(function))


@_kernel
def int8_encode(values_BE: F32, bits_BE: npt.NDArray[np.int32], scales_B: F32, quotients_BE: npt.NDArray[Any]) -> None:
    """scale = max |x| / 127 of each block of 256, q = round_half_even(x / scale) in ±127.

    `bits_BE` is `values_BE` seen as int32. The largest magnitude is found on the bit patterns: as integers they order
    like the values, with infinity and NaN largest. A block that is not finite gets q = 0, which its scale turns into
    NaN; a block of zeros gets q = 0 as well.
    """
    largest_bits = np.empty(1, np.int32)
    largest = largest_bits.view(np.float32)
    for block in range(values_BE.shape[0]):
        magnitude = int32(0)
        for i in range(INT8_BLOCK):
            magnitude = max(magnitude, bits_BE[block, i] & int32(_MAGNITUDE_BITS))
        largest_bits[0] = magnitude
        scale = largest[0] / np.float32(127.0)
        scales_B[block] = scale
        if magnitude >= int32(_INFINITY_BITS) or scale == np.float32(0.0):
            for i in range(INT8_BLOCK):
                quotients_BE[block, i] = 0
        else:
            for i in range(INT8_BLOCK):
                # Beyond 127 only where the scale itself was rounded among the subnormal numbers.
                quotient = min(max(np.rint(values_BE[block, i] / scale), np.float32(-127.0)), np.float32(127.0))
                quotients_BE[block, i] = np.int8(int32(quotient))


@_kernel
def int8_decode(scales_B: F32, quotients_BE: npt.NDArray[np.int8], out_BE: F32) -> None:
    """out = q * scale."""
    for block in range(out_BE.shape[0]):
        scale = scales_B[block]
        for i in range(INT8_BLOCK):
            out_BE[block, i] = np.float32(quotients_BE[block, i]) * scale


@_kernel
def int8_decode_add(scales_B: F32, quotients_BE: npt.NDArray[np.int8], out_BE: F32) -> None:
    """out = out + q * scale, the product rounded before it is added."""
    for block in range(out_BE.shape[0]):
        scale = scales_B[block]
        for i in range(INT8_BLOCK):
            out_BE[block, i] += np.float32(quotients_BE[block, i]) * scale


@_kernel
def bf16_decode_add(halves_BE: npt.NDArray[np.uint16], out_BE: F32) -> None:
    """out = out + float32(half). The halves are widened in a scratch block that stays in the first-level cache."""
    scratch_bits = np.empty(BF16_BLOCK, np.uint32)
    scratch = scratch_bits.view(np.float32)
    for block in range(out_BE.shape[0]):
        for i in range(BF16_BLOCK):
            scratch_bits[i] = uint32(halves_BE[block, i]) << uint32(16)
        for i in range(BF16_BLOCK):
            out_BE[block, i] += scratch[i]


def preload() -> None:
    """Compile every kernel, or load it from the cache."""
    values_BE = np.ones((1, INT8_BLOCK), np.float32)
    scales_B, quotients_BE = np.empty(1, np.float32), np.empty((1, INT8_BLOCK), np.int8)
    int8_encode(values_BE, values_BE.view(np.int32), scales_B, quotients_BE)
    int8_decode(scales_B, quotients_BE, values_BE)
    int8_decode_add(scales_B, quotients_BE, values_BE)
    bf16_decode_add(np.zeros((1, BF16_BLOCK), np.uint16), np.zeros((1, BF16_BLOCK), np.float32))


if __name__ == "__main__":
    preload()
