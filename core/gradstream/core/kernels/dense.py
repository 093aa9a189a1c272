"""Kernels of the dense codecs, which encode any number of fragments in one call.

Dense codecs send every element. A model has many small tensors, and a call from Python (views, checks, taking the
interpreter lock back while other threads want it) costs as much as encoding tens of thousands of elements. All
fragments of a bundle are therefore one call, which gets arrays of addresses and runs without the interpreter lock. The
arithmetic is that of `codec`, fragment by fragment: no bit depends on which fragments share a call.

Shape legend: F fragments. Addresses are of contiguous fp32 values, and of payloads that begin at multiples of 4 bytes.
A payload of int8 and int4 has all scales, then all quotients; one of int2 all levels, then all codes. A short last
block is encoded as if zeros followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import carray, uint32

from gradstream.core.kernels import codec, compiled, two_bits
from gradstream.core.kernels.blocks import BLOCK
from gradstream.core.kernels.codec import BF16_BLOCK
from gradstream.core.kernels.compiled import kernel, pointer

I64 = npt.NDArray[np.int64]

FP32, BF16, INT8, INT4, HADAMARD, INT2 = range(6)
"""The kinds of encoding of a fragment."""


def addresses_of(tensors: Sequence[torch.Tensor], elements_F: I64) -> I64:
    """The addresses of tensors in the CPU's memory. The caller must keep the tensors alive.

    Raises ValueError for a tensor that is not contiguous fp32 with its number of elements, because the kernels would
    write past its end.
    """
    for tensor, elements in zip(tensors, elements_F.tolist(), strict=True):
        if tensor.dtype is not torch.float32 or tensor.numel() != elements or not tensor.is_contiguous():
            raise ValueError(
                f"a kernel needs {elements} contiguous fp32 elements, not {tensor.numel()} of {tensor.dtype}"
            )
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)


def address_of(array: npt.NDArray[Any]) -> int:
    """The address of a contiguous array, which the caller must keep alive. Raises ValueError if it is not aligned."""
    address = int(array.__array_interface__["data"][0])
    if address % 4 or not array.flags.c_contiguous:
        raise ValueError("a kernel needs a contiguous array that begins at a multiple of 4 bytes")
    return address


@kernel
def _num_blocks(elements: int) -> int:
    return (elements + BLOCK - 1) // BLOCK


@kernel
def _encode_int8(elements: int, values: int, payload: int) -> None:
    full, rest = elements // BLOCK, elements % BLOCK
    scales_B = carray(pointer(payload), _num_blocks(elements), np.float32)
    body = payload + 4 * _num_blocks(elements)
    codec.int8_encode(
        carray(pointer(values), (full, BLOCK), np.float32),
        carray(pointer(values), (full, BLOCK), np.int32),
        scales_B[:full],
        carray(pointer(body), (full, BLOCK), np.int8),
    )
    if rest:
        last_1E, quotients_1E = np.zeros((1, BLOCK), np.float32), np.empty((1, BLOCK), np.int8)
        last_1E[0, :rest] = carray(pointer(values), elements, np.float32)[full * BLOCK :]
        codec.int8_encode(last_1E, last_1E.view(np.int32), scales_B[full:], quotients_1E)
        carray(pointer(body), elements, np.int8)[full * BLOCK :] = quotients_1E[0, :rest]


@kernel
def _decode_int8(elements: int, payload: int, out: int, add: bool) -> None:
    full = elements // BLOCK
    scales_B = carray(pointer(payload), _num_blocks(elements), np.float32)
    body = payload + 4 * _num_blocks(elements)
    quotients_BE = carray(pointer(body), (full, BLOCK), np.int8)
    out_BE = carray(pointer(out), (full, BLOCK), np.float32)
    if add:
        codec.int8_decode_add(scales_B[:full], quotients_BE, out_BE)
    else:
        codec.int8_decode(scales_B[:full], quotients_BE, out_BE)
    quotients_N, out_N = carray(pointer(body), elements, np.int8), carray(pointer(out), elements, np.float32)
    for i in range(full * BLOCK, elements):
        value = np.float32(quotients_N[i]) * scales_B[full]
        out_N[i] = out_N[i] + value if add else value


@kernel
def _encode_int4(elements: int, values: int, payload: int, key: int, rotated: bool) -> None:
    full, rest = elements // BLOCK, elements % BLOCK
    scales_B = carray(pointer(payload), _num_blocks(elements), np.float32)
    body = payload + 4 * _num_blocks(elements)
    values_BE = carray(pointer(values), (full, BLOCK), np.float32)
    packed_BH = carray(pointer(body), (full, BLOCK // 2), np.uint8)
    if rotated:
        codec.hadamard_encode(values_BE, scales_B[:full], packed_BH, key)
    else:
        codec.int4_encode(values_BE, scales_B[:full], packed_BH)
    if rest:
        last_1E, packed_1H = np.zeros((1, BLOCK), np.float32), np.empty((1, BLOCK // 2), np.uint8)
        last_1E[0, :rest] = carray(pointer(values), elements, np.float32)[full * BLOCK :]
        codec.int4_encode(last_1E, scales_B[full:], packed_1H)
        num_bytes = (rest + 1) // 2
        carray(pointer(body + full * BLOCK // 2), num_bytes, np.uint8)[:] = packed_1H[0, :num_bytes]


@kernel
def _decode_int4(elements: int, payload: int, out: int, key: int, rotated: bool, add: bool) -> None:
    full, rest = elements // BLOCK, elements % BLOCK
    scales_B = carray(pointer(payload), _num_blocks(elements), np.float32)
    body = payload + 4 * _num_blocks(elements)
    packed_BH = carray(pointer(body), (full, BLOCK // 2), np.uint8)
    out_BE = carray(pointer(out), (full, BLOCK), np.float32)
    if rotated:
        codec.hadamard_decode(scales_B[:full], packed_BH, out_BE, key, add)
    elif add:
        codec.int4_decode_add(scales_B[:full], packed_BH, out_BE)
    else:
        codec.int4_decode(scales_B[:full], packed_BH, out_BE)
    if rest:
        packed_1H, last_1E = np.zeros((1, BLOCK // 2), np.uint8), np.empty((1, BLOCK), np.float32)
        num_bytes = (rest + 1) // 2
        packed_1H[0, :num_bytes] = carray(pointer(body + full * BLOCK // 2), num_bytes, np.uint8)
        codec.int4_decode(scales_B[full:], packed_1H, last_1E)
        out_N = carray(pointer(out), elements, np.float32)
        for i in range(rest):
            value = last_1E[0, i]
            out_N[full * BLOCK + i] = out_N[full * BLOCK + i] + value if add else value


@kernel
def _encode_int2(elements: int, values: int, payload: int) -> None:
    full, rest = elements // BLOCK, elements % BLOCK
    levels_B = carray(pointer(payload), _num_blocks(elements), np.uint32)
    body = payload + 4 * _num_blocks(elements)
    two_bits.int2_encode(
        carray(pointer(values), (full, BLOCK), np.float32),
        BLOCK,
        levels_B[:full],
        carray(pointer(body), (full, BLOCK // 4), np.uint8),
    )
    if rest:
        last_1E, packed_1Q = np.zeros((1, BLOCK), np.float32), np.empty((1, BLOCK // 4), np.uint8)
        last_1E[0, :rest] = carray(pointer(values), elements, np.float32)[full * BLOCK :]
        two_bits.int2_encode(last_1E, rest, levels_B[full:], packed_1Q)
        num_bytes = (rest + 3) // 4
        carray(pointer(body + full * BLOCK // 4), num_bytes, np.uint8)[:] = packed_1Q[0, :num_bytes]


@kernel
def _decode_int2(elements: int, payload: int, out: int, add: bool) -> None:
    full, rest = elements // BLOCK, elements % BLOCK
    levels_B = carray(pointer(payload), _num_blocks(elements), np.uint32)
    body = payload + 4 * _num_blocks(elements)
    packed_BQ = carray(pointer(body), (full, BLOCK // 4), np.uint8)
    two_bits.int2_decode(levels_B[:full], packed_BQ, carray(pointer(out), (full, BLOCK), np.float32), add)
    if rest:
        packed_1Q, last_1E = np.zeros((1, BLOCK // 4), np.uint8), np.empty((1, BLOCK), np.float32)
        num_bytes = (rest + 3) // 4
        packed_1Q[0, :num_bytes] = carray(pointer(body + full * BLOCK // 4), num_bytes, np.uint8)
        two_bits.int2_decode(levels_B[full:], packed_1Q, last_1E, False)
        out_N = carray(pointer(out), elements, np.float32)
        for i in range(rest):
            value = last_1E[0, i]
            out_N[full * BLOCK + i] = out_N[full * BLOCK + i] + value if add else value


@kernel
def _encode_bf16(elements: int, values: int, payload: int) -> None:
    bits_N = carray(pointer(values), elements, np.uint32)
    halves_N = carray(pointer(payload), elements, np.uint16)
    for i in range(elements):
        bits = bits_N[i]
        # Add half of the last kept place, or one less if that place is even: ties go to even.
        rounded = uint32(bits + uint32(0x7FFF) + uint32((bits >> uint32(16)) & uint32(1))) >> uint32(16)
        is_nan = (bits & uint32(compiled.MAGNITUDE_BITS)) > uint32(compiled.INFINITY_BITS)
        halves_N[i] = np.uint16(uint32(0x7FC0) if is_nan else rounded)


@kernel
def _decode_bf16(elements: int, payload: int, out: int, add: bool) -> None:
    halves_N = carray(pointer(payload), elements, np.uint16)
    if not add:
        bits_N = carray(pointer(out), elements, np.uint32)
        for i in range(elements):
            bits_N[i] = uint32(halves_N[i]) << uint32(16)
        return
    full = elements // BF16_BLOCK
    codec.bf16_decode_add(
        carray(pointer(payload), (full, BF16_BLOCK), np.uint16), carray(pointer(out), (full, BF16_BLOCK), np.float32)
    )
    out_N = carray(pointer(out), elements, np.float32)
    bits = np.empty(1, np.uint32)
    value = bits.view(np.float32)
    for i in range(full * BF16_BLOCK, elements):
        bits[0] = uint32(halves_N[i]) << uint32(16)
        out_N[i] += value[0]


@kernel
def _copy(elements: int, source: int, target: int, add: bool) -> None:
    source_N, target_N = carray(pointer(source), elements, np.float32), carray(pointer(target), elements, np.float32)
    for i in range(elements):
        target_N[i] = target_N[i] + source_N[i] if add else source_N[i]


@kernel
def _encode_one(kind: int, elements: int, key: int, values: int, payload: int) -> None:
    if kind == INT8:
        _encode_int8(elements, values, payload)
    elif kind == BF16:
        _encode_bf16(elements, values, payload)
    elif kind == FP32:
        _copy(elements, values, payload, False)
    elif kind == INT2:
        _encode_int2(elements, values, payload)
    else:
        _encode_int4(elements, values, payload, key, kind == HADAMARD)


@kernel
def _decode_one(kind: int, elements: int, key: int, payload: int, out: int, add: bool) -> None:
    if kind == INT8:
        _decode_int8(elements, payload, out, add)
    elif kind == BF16:
        _decode_bf16(elements, payload, out, add)
    elif kind == FP32:
        _copy(elements, payload, out, add)
    elif kind == INT2:
        _decode_int2(elements, payload, out, add)
    else:
        _decode_int4(elements, payload, out, key, kind == HADAMARD, add)


@kernel
def encode(kinds_F: I64, elements_F: I64, keys_F: I64, values_F: I64, payloads_F: I64) -> None:
    """Write each fragment's payload. Only HADAMARD uses `keys_F`."""
    for f in range(len(kinds_F)):
        _encode_one(kinds_F[f], elements_F[f], keys_F[f], values_F[f], payloads_F[f])


@kernel
def decode(kinds_F: I64, elements_F: I64, keys_F: I64, payloads_F: I64, outs_F: I64, add: bool) -> None:
    """Write the payloads' values to `outs_F`, or add them with `add`."""
    for f in range(len(kinds_F)):
        _decode_one(kinds_F[f], elements_F[f], keys_F[f], payloads_F[f], outs_F[f], add)


@kernel
def _in_one_pass(kind: int, elements: int) -> bool:
    return kind in (INT8, INT4) and elements % BLOCK == 0


@kernel
def encode_delta(kinds_F: I64, elements_F: I64, keys_F: I64, values_F: I64, helds_F: I64, payloads_F: I64) -> int:
    """Write the payloads of values - held, and add the decoded payloads to held, in one pass over memory if possible.

    Returns the size of its scratch memory, in elements.
    """
    most = 0
    for f in range(len(kinds_F)):
        if not _in_one_pass(kinds_F[f], elements_F[f]):
            most = max(most, elements_F[f])
    scratch_N = np.empty(most, np.float32)
    for f in range(len(kinds_F)):
        kind, elements, payload = kinds_F[f], elements_F[f], payloads_F[f]
        full = elements // BLOCK
        values_BE = carray(pointer(values_F[f]), (full, BLOCK), np.float32)
        held_BE = carray(pointer(helds_F[f]), (full, BLOCK), np.float32)
        scales_B = carray(pointer(payload), full, np.float32)
        one_pass = _in_one_pass(kind, elements)
        if one_pass and kind == INT8:
            body_BE = carray(pointer(payload + 4 * full), (full, BLOCK), np.int8)
            codec.int8_encode_delta(values_BE, held_BE, scales_B, body_BE)
        elif one_pass:
            body_BH = carray(pointer(payload + 4 * full), (full, BLOCK // 2), np.uint8)
            codec.int4_encode_delta(values_BE, held_BE, scales_B, body_BH)
        else:
            values_N = carray(pointer(values_F[f]), elements, np.float32)
            held_N = carray(pointer(helds_F[f]), elements, np.float32)
            scratch_N[:elements] = values_N - held_N
            _encode_one(kind, elements, keys_F[f], scratch_N.ctypes.data, payload)
            _decode_one(kind, elements, keys_F[f], payload, helds_F[f], True)
    # This use keeps the array alive while the code above has only its address.
    return len(scratch_N)


@kernel
def squared_norms(elements_F: I64, values_F: I64, norms_F: npt.NDArray[np.float64]) -> None:
    """Write the squared norm of each fragment, as `codec.squared_norm`."""
    for f in range(len(elements_F)):
        norms_F[f] = codec.squared_norm(carray(pointer(values_F[f]), elements_F[f], np.float32))


def preload() -> None:
    """Compile every kernel of this file, or load it from the cache."""
    one_F, none_F = np.zeros(1, np.int64), np.zeros(1, np.int64)
    encode(one_F, none_F, one_F, one_F, one_F)
    decode(one_F, none_F, one_F, one_F, one_F, False)
    encode_delta(one_F, none_F, one_F, one_F, one_F, one_F)
    squared_norms(none_F, one_F, np.zeros(1))
