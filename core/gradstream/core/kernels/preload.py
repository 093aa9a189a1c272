"""A command that compiles every kernel or loads it from the cache, for images and installations."""

from __future__ import annotations

import numpy as np

from gradstream.core.kernels.blocks import BLOCK
from gradstream.core.kernels.codec import (
    BF16_BLOCK,
    bf16_decode_add,
    hadamard_decode,
    hadamard_encode,
    int4_decode,
    int4_decode_add,
    int4_encode,
    int4_encode_delta,
    int8_decode,
    int8_decode_add,
    int8_encode,
    int8_encode_delta,
    join_planes,
    split_planes,
    squared_norm,
)


def preload() -> None:
    """Compile the kernels of all modules, or load them from the cache."""
    from gradstream.core.kernels import dense, fixed_point, moments, residual, two_bits

    values_BE = np.ones((1, BLOCK), np.float32)
    scales_B, quotients_BE = np.empty(1, np.float32), np.empty((1, BLOCK), np.int8)
    int8_encode(values_BE, values_BE.view(np.int32), scales_B, quotients_BE)
    int8_decode(scales_B, quotients_BE, values_BE)
    int8_decode_add(scales_B, quotients_BE, values_BE)
    bf16_decode_add(np.zeros((1, BF16_BLOCK), np.uint16), np.zeros((1, BF16_BLOCK), np.float32))
    int8_encode_delta(values_BE, values_BE, scales_B, quotients_BE)
    packed_BH = np.empty((1, BLOCK // 2), np.uint8)
    int4_encode_delta(values_BE, values_BE, scales_B, packed_BH)
    int4_encode(values_BE, scales_B, packed_BH)
    int4_decode(scales_B, packed_BH, values_BE)
    int4_decode_add(scales_B, packed_BH, values_BE)
    hadamard_encode(values_BE, scales_B, packed_BH, 0)
    hadamard_decode(scales_B, packed_BH, values_BE, 0, True)
    squared_norm(values_BE[0])
    for words_N in (np.zeros(8, np.uint16), np.zeros(8, np.uint32)):
        planes_PN = np.empty((words_N.itemsize, 8), np.uint8)
        split_planes(words_N, planes_PN)
        join_planes(planes_PN, words_N)
    dense.preload()
    fixed_point.preload()
    moments.preload()
    residual.preload()
    two_bits.preload()


if __name__ == "__main__":
    preload()
