"""What a decoder's layers compute with the exponential function: the loss, gates and GELU, in few passes.

The exponential is our own: a polynomial of degree 6 after the usual reduction to ±ln 2 / 2 (Cody and Waite, "Software
Manual for the Elementary Functions", 1980), within one unit in the last place. torch's takes twice as long here and
differs between processors; this one has fused multiply-adds where the source says so and nowhere else, so its bits are
the same wherever it runs. Only the order of a long sum is the processor's, as in torch.

Shape legend: N tokens or elements, V vocabulary. Arguments are addresses of contiguous fp32 values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, int32, njit, types
from numba.extending import intrinsic

from gradstream.core.kernels.compiled import kernel, pointer

IGNORED = -100
"""As a target: the token does not count."""

_F = np.float32
_LOG2_E = _F(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = _F(0.693359375), _F(-2.12194440e-4)  # the first times an exponent is exact
_ROUNDER = _F(12582912.0)
"""1.5 · 2^23: what is added to it is rounded to a whole number, which then lies in the lowest bits."""
_LOWEST, _HIGHEST = _F(-87.0), _F(88.0)
"""Between them e^x is a normal number."""
# e^r = 1 + r + r² · (C0 + C1 r + …), fitted for the least relative error.
_C0, _C1, _C2 = _F(0.4999999403953552), _F(0.1666652113199234), _F(0.04166838899254799)
_C3, _C4 = _F(0.00836874544620514), _F(0.0013814539415761828)
_SUM_BLOCK = 512
_SQRT_8_BY_PI = _F(1.5957691216057308)
_GELU_CUBE = _F(0.044715)


@intrinsic  # type: ignore[untyped-decorator]
def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _bits(typing_context: Any, value: Any) -> Any:
    """A float's bits as an integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _float(typing_context: Any, bits: Any) -> Any:
    """The float that an integer's bits are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def _exp(x: Any) -> Any:
    """e^x; 1.6e-38 and 1.7e38 for what is below -87 and above 88. NaN stays NaN."""
    x = _LOWEST if x < _LOWEST else x
    x = _HIGHEST if x > _HIGHEST else x
    shifted = _fma(x, _LOG2_E, _ROUNDER)
    exponent = shifted - _ROUNDER
    r = _fma(exponent, -_LN2_LOW, _fma(exponent, -_LN2_HIGH, x))
    series = _fma(r, _fma(r, _fma(r, _fma(r, _C4, _C3), _C2), _C1), _C0)
    mantissa = _F(1.0) + _fma(r * r, series, r)
    return _float(_bits(mantissa) + (_bits(shifted) << int32(23)))


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def _sigmoid(x: Any) -> Any:
    return _F(1.0) / (_F(1.0) + _exp(-x))


# --- the loss ---------------------------------------------------------------------------------------------------------


@njit(fastmath={"reassoc"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _sum_of_block(values_N: Any) -> Any:
    """In an order that the compiler chooses, by the width of the processor's vectors."""
    total = _F(0.0)
    for n in range(len(values_N)):
        total += values_N[n]
    return total


@njit(error_model="numpy")  # type: ignore[untyped-decorator]
def _sum(values_N: Any) -> Any:
    """Block by block, so that no sum in fp32 has many terms."""
    total = 0.0
    for begin in range(0, len(values_N), _SUM_BLOCK):
        total += np.float64(_sum_of_block(values_N[begin : begin + _SUM_BLOCK]))
    return total


@njit(inline="always", error_model="numpy")  # type: ignore[untyped-decorator]
def _in_order(bits: Any) -> Any:
    """Floats' bits as integers that are ordered as the floats, and back: those of negative ones are turned around."""
    return bits ^ ((bits >> int32(31)) & int32(0x7FFFFFFF))


@kernel
def cross_entropy(tokens: int, size: int, logits: int, targets: int, terms: int, sums: int) -> float:
    """The sum of the tokens' cross entropies. `targets`: int64, each within the vocabulary or IGNORED. For the backward
    pass: terms = e^(logit - the token's largest), and their sums."""
    logits_NV = carray(pointer(logits), (tokens, size), np.float32)
    targets_N, sums_N = carray(pointer(targets), tokens, np.int64), carray(pointer(sums), tokens, np.float32)
    terms_NV = carray(pointer(terms), (tokens, size), np.float32)
    total = 0.0
    for n in range(tokens):
        largest = int32(-0x80000000)
        for v in range(size):
            largest = max(largest, _in_order(_bits(logits_NV[n, v])))
        most = _float(_in_order(largest))
        for v in range(size):
            terms_NV[n, v] = _exp(logits_NV[n, v] - most)
        total_of_terms = _sum(terms_NV[n])
        sums_N[n] = total_of_terms
        if targets_N[n] != IGNORED:
            total += np.log(total_of_terms) + np.float64(most) - np.float64(logits_NV[n, targets_N[n]])
    return total


@kernel
def cross_entropy_backward(tokens: int, size: int, gradient: float, targets: int, sums: int, terms: int) -> None:
    """The logits' gradient takes the place of the terms. All but `gradient`, that of the loss, as `cross_entropy` had
    and left it."""
    targets_N, sums_N = carray(pointer(targets), tokens, np.int64), carray(pointer(sums), tokens, np.float32)
    terms_NV = carray(pointer(terms), (tokens, size), np.float32)
    for n in range(tokens):
        if targets_N[n] == IGNORED:
            for v in range(size):
                terms_NV[n, v] = _F(0.0)
        else:
            factor = _F(gradient) / sums_N[n]
            for v in range(size):
                terms_NV[n, v] *= factor
            terms_NV[n, targets_N[n]] -= _F(gradient)


# --- gates and GELU ---------------------------------------------------------------------------------------------------


@kernel
def gated(elements: int, gates: int, values: int, out: int) -> None:
    """out = SiLU(gate) · value."""
    gates_N, values_N = carray(pointer(gates), elements, np.float32), carray(pointer(values), elements, np.float32)
    out_N = carray(pointer(out), elements, np.float32)
    for n in range(elements):
        out_N[n] = gates_N[n] * _sigmoid(gates_N[n]) * values_N[n]


@kernel
def gated_backward(elements: int, gradient: int, gates: int, values: int, of_gates: int, of_values: int) -> None:
    """The gradients of both."""
    gradient_N = carray(pointer(gradient), elements, np.float32)
    gates_N, values_N = carray(pointer(gates), elements, np.float32), carray(pointer(values), elements, np.float32)
    of_gates_N = carray(pointer(of_gates), elements, np.float32)
    of_values_N = carray(pointer(of_values), elements, np.float32)
    for n in range(elements):
        gate, open_by = gates_N[n], _sigmoid(gates_N[n])
        of_values_N[n] = gradient_N[n] * (gate * open_by)
        of_gates_N[n] = gradient_N[n] * values_N[n] * (open_by * (_F(1.0) + gate * (_F(1.0) - open_by)))


@kernel
def gelu(elements: int, values: int, out: int) -> None:
    """GELU by tanh: x / 2 · (1 + tanh u) = x · sigmoid(2u), with u = √(2/π) · (x + 0.044715 x³)."""
    values_N, out_N = carray(pointer(values), elements, np.float32), carray(pointer(out), elements, np.float32)
    for n in range(elements):
        x = values_N[n]
        out_N[n] = x * _sigmoid(_SQRT_8_BY_PI * (x + _GELU_CUBE * (x * x * x)))


@kernel
def gelu_backward(elements: int, gradient: int, values: int, out: int) -> None:
    """The gradient of the values."""
    gradient_N = carray(pointer(gradient), elements, np.float32)
    values_N, out_N = carray(pointer(values), elements, np.float32), carray(pointer(out), elements, np.float32)
    for n in range(elements):
        x = values_N[n]
        s = _sigmoid(_SQRT_8_BY_PI * (x + _GELU_CUBE * (x * x * x)))
        slope = _SQRT_8_BY_PI * (_F(1.0) + _F(3.0) * _GELU_CUBE * (x * x))
        out_N[n] = gradient_N[n] * (s + x * (s * (_F(1.0) - s)) * slope)


def preload() -> None:
    """Compile every kernel, or load it from the cache."""
    values, targets = np.ones(2, np.float32), np.zeros(1, np.int64)
    at = int(values.ctypes.data)
    cross_entropy(1, 1, at, int(targets.ctypes.data), at, at)
    cross_entropy_backward(1, 1, 1.0, int(targets.ctypes.data), at, at)
    gated(1, at, at, at)
    gated_backward(1, at, at, at, at, at)
    gelu(1, at, at)
    gelu_backward(1, at, at, at)
