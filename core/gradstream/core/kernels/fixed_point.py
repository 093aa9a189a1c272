"""Kernels that add contributions up in fixed point: the sum has the same bits in every order of the additions.

A sum in fp32 depends on the order, because each addition rounds. Here each value is first cut into two digits on a grid
that does not depend on the other contributions, and the digits are added as integers, which is associative. The method
is that of indexed sums (Demmel and Nguyen, "Parallel Reproducible Summation", 2015; ReproBLAS), with integer digits and
one index for a block of 256 elements.

The grid has bins of `width` bits. Bin j has the unit 2**(width * j). The top bin of a block is the lowest one in which
all magnitudes are below 2**(width - 1) units. An element x of the block is kept as
    x ~ high * unit(top) + low * unit(top - 1),   |high| and |low| <= 2**(width - 1),
so 2**(31 - width) contributions fit in two int32. When a contribution needs a higher top, the high digits take the
place of the low ones, which are dropped. That is what would stand there if the top had been the higher one from the
beginning: there the element's high digit is zero, and its low digit is the high one of before. So the sum is a function
of the set of contributions alone.

What is lost: a contribution is rounded by at most half a unit of the lower bin. That is at most 2**(1 - width) times
the largest magnitude among the contributions to the block; how much less depends on where this magnitude lies in its
bin. In int8 and int4 256 times the block's scale stands for the magnitude, so that no pass looks for it. The sum of the
digits is exact. It is rounded once, to fp32.

Shape legend: B blocks, T blocks of a tile, E elements a block, H bytes of a block in int4, F fragments,
C contributions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, float32, float64, int32, int64, uint32

from gradstream.core.kernels import codec, two_bits
from gradstream.core.kernels.blocks import BLOCK
from gradstream.core.kernels.compiled import F32, I8, I32, MAGNITUDE_BITS, U8, U16, U32, kernel, pointer
from gradstream.core.kernels.dense import BF16, FP32, HADAMARD, I64, INT2, INT4, INT8, _num_blocks
from gradstream.core.kernels.grid import EMPTY, F64, NOT_FINITE, _raise_top, grid

TILE = 4
"""Blocks that stay in the first-level cache while several contributions are added to them."""


# -- add ---------------------------------------------------------------------------------------------------------------


@kernel
def _add_int8(
    scales_T: F32,
    bits_T: I32,
    quotients_TE: I8,
    high_TE: I32,
    low_TE: I32,
    tops_T: I8,
    needs: I8,
    factors: F32,
    base: Any,
) -> None:
    """Add blocks of int8. `bits_T` is the memory of the scales, `needs` is `Grid.scaled_tops`, `base` is 2**width."""
    for block in range(quotients_TE.shape[0]):
        top = int32(needs[(bits_T[block] & int32(MAGNITUDE_BITS)) >> 23])
        if top > tops_T[block]:
            _raise_top(high_TE, low_TE, tops_T, block, top)
        top = int32(tops_T[block])
        if top == NOT_FINITE:
            continue
        scale = scales_T[block] * factors[top]
        for i in range(BLOCK):
            units = float32(quotients_TE[block, i]) * scale
            whole = np.rint(units)
            high_TE[block, i] += int32(whole)
            low_TE[block, i] += int32(np.rint((units - whole) * base))


@kernel
def _add_values(
    values_TE: F32,
    bits_TE: I32,
    high_TE: I32,
    low_TE: I32,
    tops_T: I8,
    first: int,
    needs: I8,
    factors: F32,
    base: Any,
) -> None:
    """Add blocks of fp32 to the digits from block `first` on. `bits_TE` is the memory of the values."""
    for row in range(values_TE.shape[0]):
        block = first + row
        magnitude = int32(0)
        for i in range(BLOCK):
            magnitude = max(magnitude, bits_TE[row, i] & int32(MAGNITUDE_BITS))
        top = int32(needs[magnitude >> 23])
        if top > tops_T[block]:
            _raise_top(high_TE, low_TE, tops_T, block, top)
        top = int32(tops_T[block])
        if top == NOT_FINITE:
            continue
        factor = factors[top]
        for i in range(BLOCK):
            units = values_TE[row, i] * factor
            whole = np.rint(units)
            high_TE[block, i] += int32(whole)
            low_TE[block, i] += int32(np.rint((units - whole) * base))


@kernel
def _widen(halves_TE: U16, bits_TE: U32) -> None:
    """Decode blocks of bf16. `bits_TE` is the memory of the values."""
    for block in range(halves_TE.shape[0]):
        for i in range(BLOCK):
            bits_TE[block, i] = uint32(halves_TE[block, i]) << uint32(16)


@kernel
def _add_int4(
    scales_T: F32,
    scale_bits_T: I32,
    packed_TH: U8,
    first: int,
    key: int,
    rotated: bool,
    scratch: int,
    high_TE: I32,
    low_TE: I32,
    tops_T: I8,
    needs: I8,
    factors: F32,
    base: Any,
) -> None:
    """Add blocks of int4, rotated ones as in `codec.hadamard_decode`. `first` is the number of the first block."""
    spare, quotients = scratch + 4 * BLOCK, scratch + 8 * BLOCK
    values_E, bits_E = carray(pointer(scratch), BLOCK, np.float32), carray(pointer(scratch), BLOCK, np.int32)
    spare_E = carray(pointer(spare), BLOCK, np.float32)
    quotients_E = carray(pointer(quotients), BLOCK, np.int8)
    pairs_H = carray(pointer(quotients), BLOCK // 2, np.uint16)
    for block in range(packed_TH.shape[0]):
        top = int32(needs[(scale_bits_T[block] & int32(MAGNITUDE_BITS)) >> 23])
        if top > tops_T[block]:
            _raise_top(high_TE, low_TE, tops_T, block, top)
        top = int32(tops_T[block])
        if top == NOT_FINITE:
            continue
        codec._int4_dequantize(scales_T, packed_TH, block, quotients_E, pairs_H, values_E)
        if rotated:
            codec._hadamard(values_E, spare_E)
            codec._flip_signs(bits_E, key, first + block)
        factor = factors[top]
        for i in range(BLOCK):
            units = values_E[i] * factor
            whole = np.rint(units)
            high_TE[block, i] += int32(whole)
            low_TE[block, i] += int32(np.rint((units - whole) * base))


@kernel
def _add_int2(
    levels_T: U32,
    packed_TQ: U8,
    scratch: int,
    high_TE: I32,
    low_TE: I32,
    tops_T: I8,
    needs: I8,
    factors: F32,
    base: Any,
) -> None:
    """Add blocks of int2. The larger level of a block stands for its largest magnitude."""
    values_E, bits_E = carray(pointer(scratch), BLOCK, np.float32), carray(pointer(scratch), BLOCK, np.int32)
    words_Q = carray(pointer(scratch + 4 * BLOCK), BLOCK // 4, np.uint32)
    codes_E = carray(pointer(scratch + 4 * BLOCK), BLOCK, np.uint8)
    for block in range(packed_TQ.shape[0]):
        top = int32(needs[two_bits._largest_level(levels_T[block]) >> 7])
        if top > tops_T[block]:
            _raise_top(high_TE, low_TE, tops_T, block, top)
        top = int32(tops_T[block])
        if top == NOT_FINITE:
            continue
        two_bits._decode_block(levels_T[block], packed_TQ, block, codes_E, words_Q, bits_E)
        factor = factors[top]
        for i in range(BLOCK):
            units = values_E[i] * factor
            whole = np.rint(units)
            high_TE[block, i] += int32(whole)
            low_TE[block, i] += int32(np.rint((units - whole) * base))


@kernel
def _decode_rest(kind: int, elements: int, payload: int, values_E: F32) -> None:
    """Decode the last, short block of a payload. Zeros follow."""
    blocks = _num_blocks(elements)
    begin = (blocks - 1) * BLOCK
    count = elements - begin
    values_E[:] = np.float32(0.0)
    if kind == FP32:
        values_E[:count] = carray(pointer(payload), elements, np.float32)[begin:]
    elif kind == BF16:
        values_E.view(np.uint32)[:count] = carray(pointer(payload), elements, np.uint16)[begin:]
        values_E.view(np.uint32)[:count] <<= uint32(16)
    elif kind == INT2:
        levels = carray(pointer(payload), blocks, np.uint32)[blocks - 1]
        codes_Q = carray(pointer(payload + 4 * blocks), (elements + 3) // 4, np.uint8)[begin // 4 :]
        bits_E = values_E.view(np.int32)
        for i in range(count):
            bits_E[i] = two_bits._bits_of(levels, int32(codes_Q[i // 4] >> (2 * (i % 4))) & 3)
    else:
        scale = carray(pointer(payload), blocks, np.float32)[blocks - 1]
        body = payload + 4 * blocks
        if kind == INT8:
            values_E[:count] = carray(pointer(body), elements, np.int8)[begin:] * scale
            return
        packed_H = carray(pointer(body), (elements + 1) // 2, np.uint8)[begin // 2 :]
        for i in range(count):
            nibble = int32(packed_H[i // 2] >> (4 * (i % 2))) & 15
            values_E[i] = np.float32((nibble ^ 8) - 8) * scale


@kernel
def _add_rest(
    kind: int,
    elements: int,
    payloads_C: I64,
    high: int,
    low: int,
    tops_1: I8,
    tops: I8,
    factors: F32,
    base: Any,
    scratch: int,
) -> None:
    """Add to the last, short block of a fragment, on a copy of its digits that zeros follow."""
    begin = (_num_blocks(elements) - 1) * BLOCK
    count = elements - begin
    high_N, low_N = carray(pointer(high), elements, np.int32), carray(pointer(low), elements, np.int32)
    high_1E = carray(pointer(scratch + 4 * BLOCK), (1, BLOCK), np.int32)
    low_1E = carray(pointer(scratch + 8 * BLOCK), (1, BLOCK), np.int32)
    high_1E[:], low_1E[:] = 0, 0
    high_1E[0, :count], low_1E[0, :count] = high_N[begin:], low_N[begin:]
    values_E, values_1E = carray(pointer(scratch), BLOCK, np.float32), carray(pointer(scratch), (1, BLOCK), np.float32)
    bits_1E = carray(pointer(scratch), (1, BLOCK), np.int32)
    for c in range(len(payloads_C)):
        _decode_rest(kind, elements, payloads_C[c], values_E)
        _add_values(values_1E, bits_1E, high_1E, low_1E, tops_1, 0, tops, factors, base)
    high_N[begin:], low_N[begin:] = high_1E[0, :count], low_1E[0, :count]


@kernel
def _add_fragment(
    kind: int,
    elements: int,
    key: int,
    payloads_C: I64,
    high: int,
    low: int,
    top: int,
    tops: I8,
    scaled_tops: I8,
    factors: F32,
    width: int,
    scratch: int,
) -> None:
    """Add contributions to a fragment, tile by tile, so that the digits pass through memory once.

    `scratch` is the address of TILE blocks of fp32.
    """
    base = np.float32(2.0**width)
    full, blocks = elements // BLOCK, _num_blocks(elements)
    for begin in range(0, blocks, TILE):
        whole = min(TILE, full - begin)
        high_TE = carray(pointer(high + 4 * BLOCK * begin), (TILE, BLOCK), np.int32)
        low_TE = carray(pointer(low + 4 * BLOCK * begin), (TILE, BLOCK), np.int32)
        tops_T = carray(pointer(top + begin), TILE, np.int8)
        for c in range(len(payloads_C)):
            payload = payloads_C[c]
            scales, body = payload + 4 * begin, payload + 4 * blocks
            scales_T = carray(pointer(scales), whole, np.float32)
            bits_T = carray(pointer(scales), whole, np.int32)
            if kind == INT8:
                quotients_TE = carray(pointer(body + BLOCK * begin), (whole, BLOCK), np.int8)
                _add_int8(scales_T, bits_T, quotients_TE, high_TE, low_TE, tops_T, scaled_tops, factors, base)
                continue
            if kind in (INT4, HADAMARD):
                packed_TH = carray(pointer(body + BLOCK // 2 * begin), (whole, BLOCK // 2), np.uint8)
                _add_int4(
                    scales_T,
                    bits_T,
                    packed_TH,
                    begin,
                    key,
                    kind == HADAMARD,
                    scratch,
                    high_TE,
                    low_TE,
                    tops_T,
                    scaled_tops,
                    factors,
                    base,
                )
                continue
            if kind == INT2:
                levels_T = carray(pointer(scales), whole, np.uint32)
                packed_TQ = carray(pointer(body + BLOCK // 4 * begin), (whole, BLOCK // 4), np.uint8)
                _add_int2(levels_T, packed_TQ, scratch, high_TE, low_TE, tops_T, tops, factors, base)
                continue
            values = payload + 4 * BLOCK * begin
            if kind == BF16:
                halves_TE = carray(pointer(payload + 2 * BLOCK * begin), (whole, BLOCK), np.uint16)
                values = scratch
                _widen(halves_TE, carray(pointer(values), (whole, BLOCK), np.uint32))
            values_TE = carray(pointer(values), (whole, BLOCK), np.float32)
            _add_values(
                values_TE,
                carray(pointer(values), (whole, BLOCK), np.int32),
                high_TE,
                low_TE,
                tops_T,
                0,
                tops,
                factors,
                base,
            )
    if full < blocks:
        _add_rest(
            kind, elements, payloads_C, high, low, carray(pointer(top + full), 1, np.int8), tops, factors, base, scratch
        )


@kernel
def add(
    kinds_F: I64,
    elements_F: I64,
    keys_F: I64,
    payloads_FC: I64,
    highs_F: I64,
    lows_F: I64,
    tops_F: I64,
    tops: I8,
    scaled_tops: I8,
    factors: F32,
    width: int,
) -> int:
    """Add contributions, encoded as in `kernels.dense`, to the digits of each fragment.

    `highs_F`, `lows_F` and `tops_F` are addresses of the fragments' digits (int32) and tops (int8, one a block). The
    last four arguments are of the `Grid`. Returns the size of the scratch memory, in rows.
    """
    scratch_SE = np.empty((TILE, BLOCK), np.float32)
    for f in range(len(kinds_F)):
        _add_fragment(
            kinds_F[f],
            elements_F[f],
            keys_F[f],
            payloads_FC[f],
            highs_F[f],
            lows_F[f],
            tops_F[f],
            tops,
            scaled_tops,
            factors,
            width,
            scratch_SE.ctypes.data,
        )
    # This use keeps the array alive while the code above has only its address.
    return len(scratch_SE)


# -- finish ------------------------------------------------------------------------------------------------------------


@kernel
def finish(elements_F: I64, highs_F: I64, lows_F: I64, tops_F: I64, lower_units: F64, width: int) -> None:
    """Write each fragment's sum as fp32 to the place of its high digits.

    The sum of a block is NaN if a contribution to it was not finite, and infinite where it exceeds fp32.
    """
    for f in range(len(elements_F)):
        elements = elements_F[f]
        high_N = carray(pointer(highs_F[f]), elements, np.int32)
        low_N = carray(pointer(lows_F[f]), elements, np.int32)
        tops_B = carray(pointer(tops_F[f]), _num_blocks(elements), np.int8)
        sums_N = carray(pointer(highs_F[f]), elements, np.float32)
        for block in range(len(tops_B)):
            top = int32(tops_B[block])
            begin, end = block * BLOCK, min((block + 1) * BLOCK, elements)
            if top in (NOT_FINITE, EMPTY):
                sums_N[begin:end] = np.float32(np.nan) if top == NOT_FINITE else np.float32(0.0)
                continue
            unit = lower_units[top]
            for i in range(begin, end):
                units = (int64(high_N[i]) << int64(width)) + int64(low_N[i])
                sums_N[i] = float32(float64(units) * unit)


def preload() -> None:
    """Compile every kernel of this file, or load it from the cache."""
    none_F, smallest = np.zeros(1, np.int64), grid(2)
    tables = smallest.tops, smallest.scaled_tops, smallest.factors, smallest.width
    add(none_F, none_F, none_F, np.zeros((1, 1), np.int64), none_F, none_F, none_F, *tables)
    finish(none_F, none_F, none_F, none_F, smallest.lower_units, smallest.width)
