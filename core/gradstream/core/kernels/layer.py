"""What a decoder's layers compute element by element, in one pass over memory each; as the codecs' kernels are made.

The products and sums of one element are those of the model's own PyTorch, in the same order, so the bits are the same.
Sums over many elements are left to torch, whose order depends on the processor.

Shape legend: N tokens, D elements each; B samples, H heads, T tokens a sample. Arguments are addresses of fp32 values,
contiguous where nothing else is said.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from gradstream.core.kernels.compiled import kernel, pointer


@kernel
def squares(elements: int, values: int, out: int) -> None:
    """out = value²."""
    values_N, out_N = carray(pointer(values), elements, np.float32), carray(pointer(out), elements, np.float32)
    for n in range(elements):
        out_N[n] = values_N[n] * values_N[n]


@kernel
def norm(tokens: int, size: int, eps: float, values: int, scales: int, weight: int, out: int) -> None:
    """out = weight · (value · scale of its token). The scale, 1 / √(mean square + ε), takes the place of the sum of
    squares."""
    values_ND = carray(pointer(values), (tokens, size), np.float32)
    scales_N, weight_D = carray(pointer(scales), tokens, np.float32), carray(pointer(weight), size, np.float32)
    out_ND = carray(pointer(out), (tokens, size), np.float32)
    for n in range(tokens):
        scale = np.float32(1.0) / np.sqrt(scales_N[n] / np.float32(size) + np.float32(eps))
        scales_N[n] = scale
        for d in range(size):
            out_ND[n, d] = weight_D[d] * (values_ND[n, d] * scale)


@kernel
def norm_products(
    tokens: int, size: int, gradient: int, values: int, scales: int, weight: int, of_scales: int, of_weight: int
) -> None:
    """What sums up to the gradient of each token's scale, and to that of the weight."""
    gradient_ND = carray(pointer(gradient), (tokens, size), np.float32)
    values_ND = carray(pointer(values), (tokens, size), np.float32)
    scales_N, weight_D = carray(pointer(scales), tokens, np.float32), carray(pointer(weight), size, np.float32)
    of_scales_ND = carray(pointer(of_scales), (tokens, size), np.float32)
    of_weight_ND = carray(pointer(of_weight), (tokens, size), np.float32)
    for n in range(tokens):
        scale = scales_N[n]
        for d in range(size):
            of_scales_ND[n, d] = (gradient_ND[n, d] * weight_D[d]) * values_ND[n, d]
            of_weight_ND[n, d] = gradient_ND[n, d] * (values_ND[n, d] * scale)


@kernel
def norm_backward(
    tokens: int,
    size: int,
    gradient: int,
    values: int,
    scales: int,
    weight: int,
    of_scales: int,
    as_scaled: int,
    by_square: int,
) -> None:
    """The gradient of the values in two parts: as what is scaled, and by the mean square that the scale is made of."""
    gradient_ND = carray(pointer(gradient), (tokens, size), np.float32)
    values_ND = carray(pointer(values), (tokens, size), np.float32)
    scales_N, weight_D = carray(pointer(scales), tokens, np.float32), carray(pointer(weight), size, np.float32)
    of_scales_N = carray(pointer(of_scales), tokens, np.float32)
    as_scaled_ND = carray(pointer(as_scaled), (tokens, size), np.float32)
    by_square_ND = carray(pointer(by_square), (tokens, size), np.float32)
    for n in range(tokens):
        scale = scales_N[n]
        of_square = (np.float32(-0.5) * of_scales_N[n]) * ((scale * scale) * scale) / np.float32(size)
        for d in range(size):
            as_scaled_ND[n, d] = (gradient_ND[n, d] * weight_D[d]) * scale
            by_square_ND[n, d] = of_square * (np.float32(2.0) * values_ND[n, d])


@kernel
def rotate(
    shape: tuple[int, ...],
    values: int,
    strides: tuple[int, ...],
    cos: int,
    sin: int,
    table_strides: tuple[int, ...],
    out: int,
    out_strides: tuple[int, ...],
    backward: bool,
) -> None:
    """A rotary embedding, or its gradient: value · cos ± the other half's value · sin. The shape is B, H, T, D; the
    strides are those of B, H and T, in elements, and for the tables of cos and sin those of B and T."""
    samples, heads, tokens, size = shape
    half = size // 2
    for b in range(samples):
        for t in range(tokens):
            at = 4 * (b * table_strides[0] + t * table_strides[1])
            cos_D = carray(pointer(cos + at), size, np.float32)
            sin_D = carray(pointer(sin + at), size, np.float32)
            for h in range(heads):
                at = 4 * (b * strides[0] + h * strides[1] + t * strides[2])
                values_D = carray(pointer(values + at), size, np.float32)
                at = 4 * (b * out_strides[0] + h * out_strides[1] + t * out_strides[2])
                out_D = carray(pointer(out + at), size, np.float32)
                if backward:
                    for d in range(half):
                        out_D[d] = values_D[d] * cos_D[d] + values_D[half + d] * sin_D[half + d]
                        out_D[half + d] = values_D[half + d] * cos_D[half + d] - values_D[d] * sin_D[d]
                else:
                    for d in range(half):
                        out_D[d] = values_D[d] * cos_D[d] - values_D[half + d] * sin_D[d]
                        out_D[half + d] = values_D[half + d] * cos_D[half + d] + values_D[d] * sin_D[half + d]


def preload() -> None:
    """Compile every kernel, or load it from the cache."""
    array = np.ones(2, np.float32)
    at = int(array.ctypes.data)
    squares(1, at, at)
    norm(1, 1, 1e-5, at, at, at, at)
    norm_products(1, 1, at, at, at, at, at, at)
    norm_backward(1, 1, at, at, at, at, at, at, at)
    rotate((1, 1, 1, 2), at, (2, 2, 2), at, at, (2, 2), at, (2, 2, 2), False)
