"""Fused CPU kernels of the codecs: one pass over memory, one thread, without the interpreter lock.

numba compiles a kernel at its first call and caches the result beside this file. `preload` compiles them ahead of time,
because compilation holds the interpreter lock for seconds. The kernels use IEEE operations in a fixed order (no
fast-math, no contraction), so their bits are those of the expressions in the docstrings. They take only whole blocks,
as 2-D arrays: with a constant inner length the compiler vectorizes every loop.

Shape legend: B blocks, E elements a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import int32, uint32

from gradstream.core.kernels.blocks import BLOCK
from gradstream.core.kernels.compiled import F32, I32, INFINITY_BITS, MAGNITUDE_BITS, U8, U16, kernel

BF16_BLOCK = 1024


_SIGN_BIT = 0x80000000


@kernel
def int8_encode(values_BE: F32, bits_BE: I32, scales_B: F32, quotients_BE: npt.NDArray[Any]) -> None:
    """Encode as int8: scale = max |x| / 127 of each block of 256, q = round_half_even(x / scale) in ±127.

    `bits_BE` is `values_BE` viewed as int32. The largest magnitude is found on the bit patterns: as integers they have
    the order of the magnitudes, with infinity and NaN largest. A block that is not finite gets q = 0, which its scale
    turns into NaN. A block of zeros gets q = 0 as well.
    """
    largest_bits = np.empty(1, np.int32)
    largest = largest_bits.view(np.float32)
    for block in range(values_BE.shape[0]):
        magnitude = int32(0)
        for i in range(BLOCK):
            magnitude = max(magnitude, bits_BE[block, i] & int32(MAGNITUDE_BITS))
        largest_bits[0] = magnitude
        scale = largest[0] / np.float32(127.0)
        scales_B[block] = scale
        if magnitude >= int32(INFINITY_BITS) or scale == np.float32(0.0):
            for i in range(BLOCK):
                quotients_BE[block, i] = 0
        else:
            for i in range(BLOCK):
                # The quotient exceeds 127 only if the scale is a subnormal number that was rounded.
                quotient = min(max(np.rint(values_BE[block, i] / scale), np.float32(-127.0)), np.float32(127.0))
                quotients_BE[block, i] = np.int8(int32(quotient))


@kernel
def int8_decode(scales_B: F32, quotients_BE: npt.NDArray[np.int8], out_BE: F32) -> None:
    """Decode int8: out = q * scale."""
    for block in range(out_BE.shape[0]):
        scale = scales_B[block]
        for i in range(BLOCK):
            out_BE[block, i] = np.float32(quotients_BE[block, i]) * scale


@kernel
def int8_decode_add(scales_B: F32, quotients_BE: npt.NDArray[np.int8], out_BE: F32) -> None:
    """Decode int8 and add: out = out + q * scale, with the product rounded before the addition."""
    for block in range(out_BE.shape[0]):
        scale = scales_B[block]
        for i in range(BLOCK):
            out_BE[block, i] += np.float32(quotients_BE[block, i]) * scale


@kernel
def int8_encode_delta(values_BE: F32, held_BE: F32, scales_B: F32, quotients_BE: npt.NDArray[np.int8]) -> None:
    """Encode values - held as `int8_encode`, and add the decoded result to held, in one pass over memory."""
    delta_E = np.empty(BLOCK + 1, np.float32)
    bits_E = delta_E.view(np.int32)
    for block in range(values_BE.shape[0]):
        magnitude = int32(0)
        for i in range(BLOCK):
            delta_E[i] = values_BE[block, i] - held_BE[block, i]
        for i in range(BLOCK):
            magnitude = max(magnitude, bits_E[i] & int32(MAGNITUDE_BITS))
        bits_E[BLOCK] = magnitude
        scale = delta_E[BLOCK] / np.float32(127.0)
        scales_B[block] = scale
        if magnitude >= int32(INFINITY_BITS) or scale == np.float32(0.0):
            for i in range(BLOCK):
                quotients_BE[block, i] = 0
        else:
            for i in range(BLOCK):
                quotient = min(max(np.rint(delta_E[i] / scale), np.float32(-127.0)), np.float32(127.0))
                quotients_BE[block, i] = np.int8(int32(quotient))
        for i in range(BLOCK):
            held_BE[block, i] += np.float32(quotients_BE[block, i]) * scale


@kernel
def bf16_decode_add(halves_BE: npt.NDArray[np.uint16], out_BE: F32) -> None:
    """Decode bf16 and add: out = out + float32(half).

    The halves are widened in a scratch block that stays in the first-level cache.
    """
    scratch_bits = np.empty(BF16_BLOCK, np.uint32)
    scratch = scratch_bits.view(np.float32)
    for block in range(out_BE.shape[0]):
        for i in range(BF16_BLOCK):
            scratch_bits[i] = uint32(halves_BE[block, i]) << uint32(16)
        for i in range(BF16_BLOCK):
            out_BE[block, i] += scratch[i]


@kernel
def _int4_quantize(
    values_E: F32,
    bits_E: I32,
    quotients_E: npt.NDArray[np.int8],
    pairs_H: U16,
    scales_B: F32,
    packed_BH: U8,
    block: int,
) -> None:
    """Write one block's scale and nibbles.

    `bits_E` is the memory of `values_E`, with one more element. `pairs_H` is the memory of `quotients_E`.
    """
    magnitude = int32(0)
    for i in range(BLOCK):
        magnitude = max(magnitude, bits_E[i] & int32(MAGNITUDE_BITS))
    bits_E[BLOCK] = magnitude
    scale = values_E[BLOCK] / np.float32(7.0)
    scales_B[block] = scale
    if magnitude >= int32(INFINITY_BITS) or scale == np.float32(0.0):
        for i in range(BLOCK // 2):
            packed_BH[block, i] = 0
    else:
        for i in range(BLOCK):
            quotient = min(max(np.rint(values_E[i] / scale), np.float32(-7.0)), np.float32(7.0))
            quotients_E[i] = np.int8(int32(quotient))
        # Two neighbouring quotients at a time, as the halves of a 16-bit number.
        for i in range(BLOCK // 2):
            packed_BH[block, i] = np.uint8((pairs_H[i] & 0x0F) | ((pairs_H[i] >> 4) & 0xF0))


@kernel
def _int4_dequantize(
    scales_B: F32, packed_BH: U8, block: int, quotients_E: npt.NDArray[np.int8], pairs_H: U16, values_E: F32
) -> None:
    """Write the values of one block. `pairs_H` is the memory of the scratch array `quotients_E`."""
    scale = scales_B[block]
    for i in range(BLOCK // 2):
        byte = np.uint16(packed_BH[block, i])
        pairs_H[i] = (byte & np.uint16(0x0F)) | ((byte & np.uint16(0xF0)) << np.uint16(4))
    for i in range(BLOCK):
        # Sign extension of a four-bit two's complement: flip the sign bit and subtract its weight.
        values_E[i] = np.float32((int32(quotients_E[i]) ^ int32(8)) - int32(8)) * scale


@kernel
def int4_encode(values_BE: F32, scales_B: F32, packed_BH: U8) -> None:
    """Encode as int4: scale = max |x| / 7 of each block of 256, q = round_half_even(x / scale) in ±7.

    A byte holds two quotients, the first one in its lower half.

    Blocks that are not finite and blocks of zeros are encoded as in `int8_encode`. H is 128, the bytes of a block.
    """
    values_E, quotients_E = np.empty(BLOCK + 1, np.float32), np.empty(BLOCK, np.int8)
    bits_E, pairs_H = values_E.view(np.int32), quotients_E.view(np.uint16)
    for block in range(values_BE.shape[0]):
        for i in range(BLOCK):
            values_E[i] = values_BE[block, i]
        _int4_quantize(values_E, bits_E, quotients_E, pairs_H, scales_B, packed_BH, block)


@kernel
def int4_decode(scales_B: F32, packed_BH: U8, out_BE: F32) -> None:
    """Decode int4: out = q * scale."""
    values_E, quotients_E = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int8)
    pairs_H = quotients_E.view(np.uint16)
    for block in range(out_BE.shape[0]):
        _int4_dequantize(scales_B, packed_BH, block, quotients_E, pairs_H, values_E)
        for i in range(BLOCK):
            out_BE[block, i] = values_E[i]


@kernel
def int4_decode_add(scales_B: F32, packed_BH: U8, out_BE: F32) -> None:
    """Decode int4 and add: out = out + q * scale, with the product rounded before the addition."""
    values_E, quotients_E = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.int8)
    pairs_H = quotients_E.view(np.uint16)
    for block in range(out_BE.shape[0]):
        _int4_dequantize(scales_B, packed_BH, block, quotients_E, pairs_H, values_E)
        for i in range(BLOCK):
            out_BE[block, i] += values_E[i]


@kernel
def int4_encode_delta(values_BE: F32, held_BE: F32, scales_B: F32, packed_BH: U8) -> None:
    """Encode values - held as `int4_encode`, and add the decoded result to held, in one pass over memory."""
    values_E, quotients_E = np.empty(BLOCK + 1, np.float32), np.empty(BLOCK, np.int8)
    bits_E, pairs_H = values_E.view(np.int32), quotients_E.view(np.uint16)
    for block in range(values_BE.shape[0]):
        for i in range(BLOCK):
            values_E[i] = values_BE[block, i] - held_BE[block, i]
        _int4_quantize(values_E, bits_E, quotients_E, pairs_H, scales_B, packed_BH, block)
        _int4_dequantize(scales_B, packed_BH, block, quotients_E, pairs_H, values_E)
        for i in range(BLOCK):
            held_BE[block, i] += values_E[i]


@kernel
def _mix(x: Any) -> Any:
    """Hash a 32-bit number: two rounds of multiply and shift, with the constants of Wellons' lowbias32."""
    x = uint32(x ^ (x >> uint32(16)))
    x = uint32(x * uint32(0x7FEB352D))
    x = uint32(x ^ (x >> uint32(15)))
    x = uint32(x * uint32(0x846CA68B))
    return uint32(x ^ (x >> uint32(16)))


@kernel
def _flip_signs(bits_E: I32, key: int, block: int) -> None:
    """Multiply by the block's random signs: the upper bit of a hash of (key, block, element)."""
    block_key = _mix(uint32(key) ^ _mix(uint32(block)))
    for i in range(BLOCK):
        bits_E[i] ^= int32(_mix(uint32(block_key + uint32(i))) & uint32(_SIGN_BIT))


@kernel
def _hadamard(values_E: F32, scratch_E: F32) -> None:
    """Transform in place: values = H values, with the orthonormal Walsh-Hadamard matrix H of order 256.

    H is in natural order and its own inverse.

    Each of the eight levels pairs the halves and writes sum and difference side by side (constant geometry, Pease
    1968), so all levels vectorize alike. Values are first divided by 16, which is exact and keeps sums in range.
    """
    half = BLOCK // 2
    for i in range(BLOCK):
        values_E[i] *= np.float32(0.0625)
    for _ in range(4):
        for i in range(half):
            first, second = values_E[i], values_E[half + i]
            scratch_E[2 * i], scratch_E[2 * i + 1] = first + second, first - second
        for i in range(half):
            first, second = scratch_E[i], scratch_E[half + i]
            values_E[2 * i], values_E[2 * i + 1] = first + second, first - second


@kernel
def hadamard_encode(values_BE: F32, scales_B: F32, packed_BH: U8, key: int) -> None:
    """Encode H D x as `int4_encode`, where D has the block's random signs for the 32-bit number `key`."""
    values_E, scratch_E = np.empty(BLOCK + 1, np.float32), np.empty(BLOCK, np.float32)
    quotients_E = np.empty(BLOCK, np.int8)
    bits_E, pairs_H = values_E.view(np.int32), quotients_E.view(np.uint16)
    for block in range(values_BE.shape[0]):
        for i in range(BLOCK):
            values_E[i] = values_BE[block, i]
        _flip_signs(bits_E, key, block)
        _hadamard(values_E, scratch_E)
        _int4_quantize(values_E, bits_E, quotients_E, pairs_H, scales_B, packed_BH, block)


@kernel
def hadamard_decode(scales_B: F32, packed_BH: U8, out_BE: F32, key: int, add: bool) -> None:
    """Decode: out = D H (q * scale), the inverse of `hadamard_encode`. With `add` the result is added to `out`."""
    values_E, scratch_E = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    quotients_E = np.empty(BLOCK, np.int8)
    bits_E, pairs_H = values_E.view(np.int32), quotients_E.view(np.uint16)
    for block in range(out_BE.shape[0]):
        _int4_dequantize(scales_B, packed_BH, block, quotients_E, pairs_H, values_E)
        _hadamard(values_E, scratch_E)
        _flip_signs(bits_E, key, block)
        if add:
            for i in range(BLOCK):
                out_BE[block, i] += values_E[i]
        else:
            for i in range(BLOCK):
                out_BE[block, i] = values_E[i]


@kernel
def split_planes(words_N: npt.NDArray[Any], planes_PN: U8) -> None:
    """Split words into planes: planes[p, i] = byte p of word i, the least significant byte first."""
    for plane in range(planes_PN.shape[0]):
        for i in range(words_N.shape[0]):
            planes_PN[plane, i] = np.uint8(words_N[i] >> (8 * plane))


@kernel
def join_planes(planes_PN: U8, words_N: npt.NDArray[Any]) -> None:
    """Join planes into words: the inverse of `split_planes`. The words must be zero before."""
    for plane in range(planes_PN.shape[0]):
        for i in range(words_N.shape[0]):
            words_N[i] |= uint32(planes_PN[plane, i]) << uint32(8 * plane)


@kernel
def squared_norm(values_N: F32) -> float:
    """The sum of squares in fp64: pairwise within blocks of 256, block after block.

    The order of the additions depends only on the length.
    """
    squares_E = np.empty(BLOCK, np.float64)
    whole = len(values_N) // BLOCK * BLOCK
    total = np.float64(0.0)
    for begin in range(0, whole, BLOCK):
        for i in range(BLOCK):
            squares_E[i] = np.float64(values_N[begin + i]) * np.float64(values_N[begin + i])
        # Loops of constant length, which the compiler turns into vector additions.
        for i in range(128):
            squares_E[i] += squares_E[i + 128]
        for i in range(64):
            squares_E[i] += squares_E[i + 64]
        for i in range(32):
            squares_E[i] += squares_E[i + 32]
        for i in range(16):
            squares_E[i] += squares_E[i + 16]
        for i in range(8):
            squares_E[i] += squares_E[i + 8]
        block = np.float64(0.0)
        for i in range(8):
            block += squares_E[i]
        total += block
    for i in range(whole, len(values_N)):
        total += np.float64(values_N[i]) * np.float64(values_N[i])
    return total
