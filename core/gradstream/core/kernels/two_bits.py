"""Kernels of the codecs that send two bits a value: a sign, and which of two levels of its group the magnitude has.

A group's levels are the means of its small and of its large magnitudes, as bf16. Where small ends follows from two
steps of Lloyd's algorithm (Lloyd, "Least squares quantization in PCM", 1982): the first border is 1.25 times the mean
magnitude, the second one half-way between the means that the first border gives. A mean has the least squared error of
its magnitudes, so the decoded values never have more energy than the input. `codec` explains how kernels are written.

A code is 2 * large + negative. Four codes share a byte, the first one lowest. A group's levels share a word, the small
one in its lower half.

Shape legend: B blocks of E = 256 elements, Q = 64 bytes of a block, C chunks, K elements kept of a chunk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int32, uint32

from gradstream.core.kernels.blocks import BLOCK, TOPK_CHUNK
from gradstream.core.kernels.compiled import F32, I32, INFINITY_BITS, U8, U16, U32, kernel
from gradstream.core.kernels.residual import _largest_of

FIRST_BORDER = 1.25
"""The first border between small and large, in means of the magnitudes. For normal numbers nearly the final one."""
NAN_LEVELS = 0x7FC07FC0
"""The levels of a group that is not finite."""
_LARGEST_HALF = 0x7F7F


@kernel
def _half_of(level_bits: U32) -> Any:
    """Round the level's bits to bf16, to nearest even. A finite level stays finite, as does the mean of finite ones."""
    bits = uint32(level_bits[0])
    half = uint32(bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
    return min(half, uint32(_LARGEST_HALF))


@kernel
def _sum_above(magnitudes_E: F32, border: Any, sums_64: F32) -> Any:
    """The sum of the magnitudes beyond the border, and of those that are NaN, in the order of `residual._add_up`.

    The first two halvings are one loop. `_sum_up_to` repeats the rest, because a call costs as much as the sum.
    """
    zero = np.float32(0.0)
    for i in range(64):
        first, second = magnitudes_E[i], magnitudes_E[128 + i]
        third, fourth = magnitudes_E[64 + i], magnitudes_E[192 + i]
        first = zero if first <= border else first
        second = zero if second <= border else second
        third = zero if third <= border else third
        fourth = zero if fourth <= border else fourth
        sums_64[i] = (first + second) + (third + fourth)
    for i in range(32):
        sums_64[i] += sums_64[32 + i]
    for i in range(16):
        sums_64[i] += sums_64[16 + i]
    for i in range(8):
        sums_64[i] += sums_64[8 + i]
    return ((sums_64[0] + sums_64[4]) + (sums_64[2] + sums_64[6])) + (
        (sums_64[1] + sums_64[5]) + (sums_64[3] + sums_64[7])
    )


@kernel
def _sum_up_to(magnitudes_E: F32, border: Any, sums_64: F32) -> Any:
    """The sum of the other magnitudes, in the same order."""
    zero = np.float32(0.0)
    for i in range(64):
        first, second = magnitudes_E[i], magnitudes_E[128 + i]
        third, fourth = magnitudes_E[64 + i], magnitudes_E[192 + i]
        first = zero if first > border else first
        second = zero if second > border else second
        third = zero if third > border else third
        fourth = zero if fourth > border else fourth
        sums_64[i] = (first + second) + (third + fourth)
    for i in range(32):
        sums_64[i] += sums_64[32 + i]
    for i in range(16):
        sums_64[i] += sums_64[16 + i]
    for i in range(8):
        sums_64[i] += sums_64[8 + i]
    return ((sums_64[0] + sums_64[4]) + (sums_64[2] + sums_64[6])) + (
        (sums_64[1] + sums_64[5]) + (sums_64[3] + sums_64[7])
    )


@kernel
def _count_above(magnitudes_E: F32, border: Any) -> Any:
    count = int32(0)
    for i in range(BLOCK):
        count = int32(count + int32(magnitudes_E[i] > border))
    return count


@kernel
def _fit_levels(magnitudes_E: F32, count: int, sums_64: F32, border_1: F32, level_1: F32, level_bits_1: U32) -> Any:
    """Find the levels of a group of at most 256 magnitudes, each divided by 256. Returns the word of both levels.

    The first `count` magnitudes count, zeros follow. Magnitudes beyond `border_1[0]`, which is divided by 256 as well,
    are large. Without large ones both levels are the same. `sums_64`, `level_1` and its memory `level_bits_1` are
    scratch memory. The first step's small sum is a difference, because it decides only on a border.
    """
    total = _sum_above(magnitudes_E, np.float32(-1.0), sums_64)
    level_1[0] = total
    if level_bits_1[0] >= uint32(INFINITY_BITS):  # a sum of magnitudes divided by 256 cannot overflow
        border_1[0] = np.float32(np.inf)
        return uint32(NAN_LEVELS)
    border = total * np.float32(FIRST_BORDER) / np.float32(count)
    num_large = _count_above(magnitudes_E, border)
    if num_large:
        large = _sum_above(magnitudes_E, border, sums_64)
        small = (total - large) / np.float32(max(count - num_large, 1))
        border = (small + large / np.float32(num_large)) * np.float32(0.5)
        num_large = _count_above(magnitudes_E, border)
    border_1[0] = border
    small = _sum_up_to(magnitudes_E, border, sums_64) / np.float32(max(count - num_large, 1))
    level_1[0] = small * np.float32(BLOCK)
    word = _half_of(level_bits_1)
    if num_large:
        level_1[0] = _sum_above(magnitudes_E, border, sums_64) / np.float32(num_large) * np.float32(BLOCK)
    return word | (_half_of(level_bits_1) << uint32(16))


@kernel
def _largest_level(levels: Any) -> Any:
    """The bf16 bits of the larger magnitude of a word of levels, NaN and infinity largest."""
    return max(int32(levels & uint32(0x7FFF)), int32((levels >> uint32(16)) & uint32(0x7FFF)))


@kernel
def _bits_of(levels: Any, code: int) -> Any:
    """The fp32 bits of a code's value."""
    half = (levels >> uint32(16)) if code & 2 else (levels & uint32(0xFFFF))
    return int32(uint32(half << uint32(16)) ^ (uint32(code & 1) << uint32(31)))


@kernel
def int2_encode(values_BE: F32, count: int, levels_B: U32, packed_BQ: U8) -> None:
    """Encode as int2: levels and codes of each block of 256, of which `count` elements count and zeros follow.

    A block that is not finite has levels of NaN.
    """
    magnitudes_E, values_E = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    bits_E = values_E.view(np.int32)
    sums_64, border_1, level_1 = np.empty(64, np.float32), np.empty(1, np.float32), np.empty(1, np.float32)
    level_bits_1 = level_1.view(np.uint32)
    codes_E = np.empty(BLOCK, np.uint8)
    words_Q = codes_E.view(np.uint32)
    for block in range(values_BE.shape[0]):
        for i in range(BLOCK):
            values_E[i] = values_BE[block, i]
        for i in range(BLOCK):
            magnitudes_E[i] = abs(values_E[i]) * np.float32(1 / BLOCK)
        levels_B[block] = _fit_levels(magnitudes_E, count, sums_64, border_1, level_1, level_bits_1)
        border = border_1[0]
        for i in range(BLOCK):
            large = uint32(2) if magnitudes_E[i] > border else uint32(0)
            codes_E[i] = np.uint8(large | (uint32(bits_E[i]) >> uint32(31)))
        for i in range(BLOCK // 4):
            word = words_Q[i]
            packed_BQ[block, i] = np.uint8(
                (word | (word >> uint32(6)) | (word >> uint32(12)) | (word >> uint32(18))) & uint32(0xFF)
            )


@kernel
def _decode_block(levels: Any, packed_BQ: U8, block: int, codes_E: U8, words_Q: U32, bits_E: I32) -> None:
    """Write the fp32 bits of one block's values. `words_Q` is the memory of the scratch array `codes_E`."""
    for i in range(BLOCK // 4):
        byte = uint32(packed_BQ[block, i])
        words_Q[i] = (
            (byte & uint32(0x03))
            | ((byte & uint32(0x0C)) << uint32(6))
            | ((byte & uint32(0x30)) << uint32(12))
            | ((byte & uint32(0xC0)) << uint32(18))
        )
    small = uint32(levels << uint32(16))
    large = uint32(levels & uint32(0xFFFF0000))
    for i in range(BLOCK):
        code = uint32(codes_E[i])
        level = large if code & uint32(2) else small
        bits_E[i] = int32(level ^ uint32(code << uint32(31)))


@kernel
def int2_decode(levels_B: U32, packed_BQ: U8, out_BE: F32, add: bool) -> None:
    """Decode int2: out = ±level. With `add` the result is added to `out`."""
    values_E, codes_E = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.uint8)
    bits_E, words_Q = values_E.view(np.int32), codes_E.view(np.uint32)
    for block in range(out_BE.shape[0]):
        _decode_block(levels_B[block], packed_BQ, block, codes_E, words_Q, bits_E)
        if add:
            for i in range(BLOCK):
                out_BE[block, i] += values_E[i]
        else:
            for i in range(BLOCK):
                out_BE[block, i] = values_E[i]


@kernel
def sparse_encode(values_CE: F32, residual_CE: F32, levels_C: U32, indices_CK: U16, codes_CK: U8) -> None:
    """Encode the K <= 64 sums value + residual of largest magnitude in each chunk of 4096, and update the residual.

    Which ones, and their order, are those of `residual.topk_encode`. Their codes are not packed yet.
    """
    keep = indices_CK.shape[1]
    sums_bits = np.empty(TOPK_CHUNK, np.int32)
    sums = sums_bits.view(np.float32)
    magnitude_bits, candidates = np.empty(TOPK_CHUNK, np.int32), np.empty(TOPK_CHUNK, np.int32)
    magnitudes_E, sums_64 = np.zeros(BLOCK, np.float32), np.empty(64, np.float32)
    border_1, level_1 = np.empty(1, np.float32), np.empty(1, np.float32)
    level_bits_1 = level_1.view(np.uint32)
    for chunk in range(values_CE.shape[0]):
        for i in range(TOPK_CHUNK):
            sums[i] = values_CE[chunk, i] + residual_CE[chunk, i]
            residual_CE[chunk, i] = sums[i]
        _largest_of(sums_bits, magnitude_bits, keep, candidates)
        for place in range(keep):
            magnitudes_E[place] = abs(sums[candidates[place]]) * np.float32(1 / BLOCK)
        levels = _fit_levels(magnitudes_E, keep, sums_64, border_1, level_1, level_bits_1)
        levels_C[chunk] = levels
        border = border_1[0]
        for place in range(keep):
            i = candidates[place]
            code = (2 if magnitudes_E[place] > border else 0) | int32(uint32(sums_bits[i]) >> uint32(31))
            indices_CK[chunk, place] = i
            codes_CK[chunk, place] = code
            level_bits_1[0] = uint32(_bits_of(levels, code))
            residual_CE[chunk, i] = sums[i] - level_1[0]


@kernel
def sparse_pack(indices_M: U16, codes_M: U8, packed_indices: U8, packed_codes: U8) -> None:
    """Pack indices to 12 bits, two in three bytes, and codes to 2 bits, four in a byte, the first ones lowest."""
    packed_indices[:] = 0
    packed_codes[:] = 0
    for m in range(len(indices_M)):
        bit = 12 * m
        shifted = uint32(indices_M[m]) << uint32(bit % 8)
        packed_indices[bit // 8] |= np.uint8(shifted & uint32(0xFF))
        packed_indices[bit // 8 + 1] |= np.uint8(shifted >> uint32(8))
        packed_codes[m // 4] |= np.uint8(codes_M[m] << (2 * (m % 4)))


@kernel
def sparse_unpack(levels_C: U32, packed_indices: U8, packed_codes: U8, indices_M: U16, halves_M: U16) -> None:
    """Unpack to indices and bf16 values, as topk has them. A chunk has 64 elements, the last one what is left."""
    for m in range(len(indices_M)):
        bit = 12 * m
        pair = uint32(packed_indices[bit // 8]) | (uint32(packed_indices[bit // 8 + 1]) << uint32(8))
        indices_M[m] = np.uint16((pair >> uint32(bit % 8)) & uint32(0x0FFF))
        code = int32(packed_codes[m // 4] >> (2 * (m % 4))) & 3
        halves_M[m] = np.uint16(uint32(_bits_of(levels_C[m // 64], code)) >> uint32(16))


def preload() -> None:
    """Compile every kernel of this file, or load it from the cache."""
    values_BE, levels_B, packed_BQ = (
        np.ones((1, BLOCK), np.float32),
        np.empty(1, np.uint32),
        np.empty((1, 64), np.uint8),
    )
    int2_encode(values_BE, BLOCK, levels_B, packed_BQ)
    int2_decode(levels_B, packed_BQ, values_BE, True)
    values_CE, residual_CE = np.ones((1, TOPK_CHUNK), np.float32), np.zeros((1, TOPK_CHUNK), np.float32)
    levels_C, indices_CK, codes_CK = np.empty(1, np.uint32), np.empty((1, 64), np.uint16), np.empty((1, 64), np.uint8)
    sparse_encode(values_CE, residual_CE, levels_C, indices_CK, codes_CK)
    packed_indices, packed_codes = np.empty(96, np.uint8), np.empty(16, np.uint8)
    sparse_pack(indices_CK[0], codes_CK[0], packed_indices, packed_codes)
    sparse_unpack(levels_C, packed_indices, packed_codes, indices_CK[0], indices_CK[0].copy())
