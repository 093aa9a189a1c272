"""Fused CPU kernels of the codecs with a residual. `codec` explains how kernels are written.

Each kernel adds the residual, encodes, and replaces the old residual by the new one, in one pass over whole blocks.
The input must be finite; `sum_is_finite` checks it before.

Shape legend: B blocks of E elements, C chunks of E elements, K elements kept of a chunk, Y bytes of sign bits a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int32, uint32, uint64

from gradstream.core.kernels.blocks import BLOCK, TOPK_CHUNK
from gradstream.core.kernels.compiled import F32, I8, I32, INFINITY_BITS, MAGNITUDE_BITS, U8, U16, kernel
from gradstream.core.kernels.grid import NOT_FINITE, grid

_GROUP = 64
_NUM_GROUPS = TOPK_CHUNK // _GROUP


@kernel
def sum_is_finite(values_BE: F32, residual_BE: F32) -> bool:
    """Whether value + residual is finite everywhere. E is 256."""
    sums_bits = np.empty(BLOCK, np.int32)
    sums = sums_bits.view(np.float32)
    for block in range(values_BE.shape[0]):
        for i in range(BLOCK):
            sums[i] = values_BE[block, i] + residual_BE[block, i]
        magnitude = int32(0)
        for i in range(BLOCK):
            magnitude = max(magnitude, sums_bits[i] & int32(MAGNITUDE_BITS))
        if magnitude >= int32(INFINITY_BITS):
            return False
    return True


@kernel
def _add_up(values_E: F32) -> Any:
    """Add 256 values up, in place: the second half to the first half, and so on until one is left.

    This order vectorizes, since each loop has a constant length, and torch can repeat it.
    """
    for i in range(128):
        values_E[i] += values_E[128 + i]
    for i in range(64):
        values_E[i] += values_E[64 + i]
    for i in range(32):
        values_E[i] += values_E[32 + i]
    for i in range(16):
        values_E[i] += values_E[16 + i]
    for i in range(8):
        values_E[i] += values_E[8 + i]
    for i in range(4):
        values_E[i] += values_E[4 + i]
    for i in range(2):
        values_E[i] += values_E[2 + i]
    return values_E[0] + values_E[1]


@kernel
def sign_encode(values_BE: F32, residual_BE: F32, scales_B: F32, signs_BY: U8) -> None:
    """Encode as signs: scale = mean |value + residual| of each block of 256, and one bit for each element.

    A bit is 1 for a negative element. The first element has the lowest bit.

    The magnitudes are added as `_add_up` says. Each is first divided by 256, which is exact and cannot overflow.
    """
    sums_bits = np.empty(BLOCK, np.int32)
    sums = sums_bits.view(np.float32)
    magnitudes = np.empty(BLOCK, np.float32)
    flags = np.empty(BLOCK, np.uint8)
    flag_words = flags.view(np.uint64)
    for block in range(values_BE.shape[0]):
        for i in range(BLOCK):
            sums[i] = values_BE[block, i] + residual_BE[block, i]
        for i in range(BLOCK):
            magnitudes[i] = abs(sums[i]) * np.float32(1 / BLOCK)
        scale = _add_up(magnitudes)
        scales_B[block] = scale
        for i in range(BLOCK):
            flags[i] = np.uint8(uint32(sums_bits[i]) >> uint32(31))
        for i in range(BLOCK // 8):
            # The multiplication gathers the lowest bits of eight bytes in the highest byte of the product.
            signs_BY[block, i] = np.uint8((flag_words[i] * uint64(0x0102040810204080)) >> uint64(56))
        for i in range(BLOCK):
            residual_BE[block, i] = sums[i] - (scale if flags[i] == 0 else -scale)


@kernel
def sign_decode(scales_B: F32, signs_BY: U8, out_BE: F32, add: bool) -> None:
    """Decode signs: out = ±scale. With `add` the result is added to `out`."""
    flags = np.empty(BLOCK, np.uint8)
    flag_words = flags.view(np.uint64)
    for block in range(out_BE.shape[0]):
        scale = scales_B[block]
        for i in range(BLOCK // 8):
            # Eight copies of the byte. Each copy keeps one of its bits.
            copies = uint64(signs_BY[block, i]) * uint64(0x0101010101010101)
            flag_words[i] = copies & uint64(0x8040201008040201)
        if add:
            for i in range(BLOCK):
                out_BE[block, i] += scale if flags[i] == 0 else -scale
        else:
            for i in range(BLOCK):
                out_BE[block, i] = scale if flags[i] == 0 else -scale


@kernel
def _largest_of(sums_bits: I32, magnitudes: I32, keep: int, kept: I32) -> None:
    """Write the places of the `keep` <= 64 values of largest magnitude of a chunk of 4096 to `kept`, in rising order.

    Of equal magnitudes the first ones are taken. Instead of sorting, bisection finds the K-th largest bit pattern,
    because bit patterns have the order of the magnitudes. Each bisection step counts the patterns that reach the
    middle, in a vectorized pass over the chunk, which stays in the first-level cache. The bisection starts at the
    smallest of 64 groups' maxima, which at least 64 elements reach. `magnitudes` is scratch memory. `kept` has 4096
    places, of which all may be written.
    """
    largest = np.empty(_NUM_GROUPS, np.int32)
    for i in range(TOPK_CHUNK):
        magnitudes[i] = sums_bits[i] & int32(MAGNITUDE_BITS)
    low, high = int32(MAGNITUDE_BITS), int32(0)
    for group in range(_NUM_GROUPS):
        most = int32(0)
        for i in range(_GROUP):
            most = max(most, magnitudes[group * _GROUP + i])
        largest[group] = most
        low, high = min(low, most), max(high, most)
    # At least `keep` elements reach `low`, fewer than `keep` reach `high`.
    high += int32(1)
    while high - low > 1:
        middle = int32(low + (high - low) // 2)
        count = int32(0)
        for i in range(TOPK_CHUNK):
            count = int32(count + int32(magnitudes[i] >= middle))  # int32 + int32 is wider to numba
        if count >= keep:
            low = middle
            if count == keep:
                break
        else:
            high = middle
    above = int32(0)
    for i in range(TOPK_CHUNK):
        above = int32(above + int32(magnitudes[i] > low))
    ties = keep - above
    # Each index is written, candidate or not, to avoid a branch that would be mispredicted.
    num_candidates = 0
    for group in range(_NUM_GROUPS):
        if largest[group] >= low:
            for i in range(group * _GROUP, (group + 1) * _GROUP):
                kept[num_candidates] = i
                num_candidates += magnitudes[i] >= low
    place = 0
    for candidate in range(num_candidates):
        i = kept[candidate]
        if magnitudes[i] == low:
            if ties == 0:
                continue
            ties -= 1
        kept[place] = i
        place += 1


@kernel
def topk_encode(values_CE: F32, residual_CE: F32, indices_CK: U16, halves_CK: U16) -> None:
    """Encode the K <= 64 sums value + residual of largest magnitude in each chunk of 4096: indices and bf16 values.

    `_largest_of` chooses them. Indices ascend.
    """
    keep = indices_CK.shape[1]
    sums_bits = np.empty(TOPK_CHUNK, np.int32)
    sums = sums_bits.view(np.float32)
    magnitudes, kept = np.empty(TOPK_CHUNK, np.int32), np.empty(TOPK_CHUNK, np.int32)
    half_bits = np.empty(1, np.uint32)
    half_value = half_bits.view(np.float32)
    for chunk in range(values_CE.shape[0]):
        for i in range(TOPK_CHUNK):
            sums[i] = values_CE[chunk, i] + residual_CE[chunk, i]
            residual_CE[chunk, i] = sums[i]
        _largest_of(sums_bits, magnitudes, keep, kept)
        for place in range(keep):
            i = kept[place]
            bits = uint32(sums_bits[i])
            # Round to nearest even, except that a value that would round to infinity becomes the largest finite number.
            half = uint32(bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
            if half & uint32(0x7FFF) >= uint32(0x7F80):
                half -= uint32(1)
            half_bits[0] = half << uint32(16)
            indices_CK[chunk, place] = i
            halves_CK[chunk, place] = half
            residual_CE[chunk, i] = sums[i] - half_value[0]


@kernel
def topk_indices_hold(indices_CK: U16, num_elements: int) -> bool:
    """Whether every chunk's indices rise and stay below `num_elements`."""
    for chunk in range(indices_CK.shape[0]):
        previous = np.int64(-1)
        for i in range(indices_CK.shape[1]):
            index = np.int64(indices_CK[chunk, i])
            if index <= previous:
                return False
            previous = index
        if previous >= num_elements:
            return False
    return True


@kernel
def topk_add(indices_CK: U16, halves_CK: U16, out_CE: F32) -> None:
    """Add the values: out[index] += value. The indices must have been checked."""
    half_bits = np.empty(1, np.uint32)
    half_value = half_bits.view(np.float32)
    for chunk in range(indices_CK.shape[0]):
        for i in range(indices_CK.shape[1]):
            half_bits[0] = uint32(halves_CK[chunk, i]) << uint32(16)
            out_CE[chunk, indices_CK[chunk, i]] += half_value[0]


@kernel
def topk_sum(
    indices_M: U16,
    halves_M: U16,
    high_N: I32,
    low_N: I32,
    tops_B: I8,
    needs: I8,
    factors: F32,
    base: Any,
) -> None:
    """Add the values to the digits of a fragment's sum in fixed point, as `fixed_point` adds the decoded fragment.

    Only the blocks of these elements are touched. The indices must have been checked. `needs` and `factors` are of the
    `Grid`, `base` is 2**width. M counts the elements of all chunks.
    """
    value_bits = np.empty(1, np.uint32)
    value = value_bits.view(np.float32)
    for m in range(len(indices_M)):
        half = uint32(halves_M[m])
        place = m // _GROUP * TOPK_CHUNK + np.int64(indices_M[m])
        block = int(place // BLOCK)
        top = int32(needs[(half & uint32(0x7FFF)) >> uint32(7)])
        if top > tops_B[block]:
            for i in range(block * BLOCK, min((block + 1) * BLOCK, len(high_N))):
                low_N[i] = high_N[i] if top == tops_B[block] + 1 else int32(0)
                high_N[i] = 0
            tops_B[block] = top
        top = int32(tops_B[block])
        if top == NOT_FINITE:
            continue
        value_bits[0] = half << uint32(16)
        units = value[0] * factors[top]
        whole = np.rint(units)
        high_N[place] += int32(whole)
        low_N[place] += int32(np.rint((units - whole) * base))


def preload() -> None:
    """Compile every kernel, or load it from the cache."""
    values_BE, residual_BE = np.ones((1, BLOCK), np.float32), np.zeros((1, BLOCK), np.float32)
    scales_B, signs_BY = np.empty(1, np.float32), np.empty((1, BLOCK // 8), np.uint8)
    sum_is_finite(values_BE, residual_BE)
    sign_encode(values_BE, residual_BE, scales_B, signs_BY)
    sign_decode(scales_B, signs_BY, residual_BE, True)
    values_CE, residual_CE = np.ones((1, TOPK_CHUNK), np.float32), np.zeros((1, TOPK_CHUNK), np.float32)
    indices_CK, halves_CK = np.empty((1, 64), np.uint16), np.empty((1, 64), np.uint16)
    topk_encode(values_CE, residual_CE, indices_CK, halves_CK)
    topk_indices_hold(indices_CK, TOPK_CHUNK)
    topk_add(indices_CK, halves_CK, residual_CE)
    smallest = grid(2)
    digits_N, tops_B = np.zeros((2, TOPK_CHUNK), np.int32), np.full(TOPK_CHUNK // BLOCK, NOT_FINITE, np.int8)
    base = np.float32(2.0**smallest.width)
    topk_sum(indices_CK[0], halves_CK[0], digits_N[0], digits_N[1], tops_B, smallest.tops, smallest.factors, base)
