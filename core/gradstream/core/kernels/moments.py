"""Stochastic rounding of an optimizer's moments to bf16. `codec` explains how kernels are written."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import uint32, uint64

from gradstream.core.kernels.compiled import INFINITY_BITS, U16, kernel

U32 = npt.NDArray[np.uint32]


@kernel
def round_moments(first_N: U32, second_N: U32, key: int, begin: int, first_out_N: U16, second_out_N: U16) -> None:
    """Round two arrays of fp32, given as bits, to bf16: up with a probability of the fraction that rounding drops.

    The draw for element i is a hash of (key, begin + i), so it does not depend on how a tensor is cut. The hash is two
    rounds of the 32-bit finalizer of MurmurHash3; 16 bits of it are for the first array and 16 for the second.
    Infinity and NaN stay what they are.
    """
    low_key, high_key = uint32(uint64(key)), uint32(uint64(key) >> uint64(32))
    infinity = uint32(INFINITY_BITS)
    for i in range(first_N.shape[0]):
        element = uint64(begin + i)
        # numba widens sums and products of 32-bit numbers to 64 bits.
        draw = uint32(uint32(element) ^ low_key)
        draw = uint32(uint32(draw ^ uint32(draw >> uint32(16))) * uint32(0x85EBCA6B))
        draw = uint32(uint32(draw ^ uint32(draw >> uint32(13))) * uint32(0xC2B2AE35))
        draw = uint32(uint32(draw ^ uint32(draw >> uint32(16))) + uint32(high_key + uint32(element >> uint64(32))))
        draw = uint32(uint32(draw ^ uint32(draw >> uint32(16))) * uint32(0x85EBCA6B))
        draw = uint32(uint32(draw ^ uint32(draw >> uint32(13))) * uint32(0xC2B2AE35))
        draw = uint32(draw ^ uint32(draw >> uint32(16)))
        first, second = first_N[i], second_N[i]
        if uint32(first & infinity) != infinity:
            first = uint32(first + uint32(draw & uint32(0xFFFF)))
        if uint32(second & infinity) != infinity:
            second = uint32(second + uint32(draw >> uint32(16)))
        first_out_N[i] = np.uint16(first >> uint32(16))
        second_out_N[i] = np.uint16(second >> uint32(16))


def preload() -> None:
    """Compile the kernel, or load it from the cache."""
    round_moments(np.zeros(1, np.uint32), np.zeros(1, np.uint32), 0, 0, np.zeros(1, np.uint16), np.zeros(1, np.uint16))
