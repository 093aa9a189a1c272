"""How many bytes each codec makes of a slice: pure arithmetic, without torch, for the codecs and for plans alike."""

from __future__ import annotations

import math

from gradstream.core.kernels.blocks import BLOCK, TOPK_CHUNK, TOPK_PART

Shape = tuple[int, ...]
"""Of a slice: (rows, columns) or (elements,)."""

POWERSGD_RANK = 4
PLANES = {"fp32-zstd": 4, "bf16-zstd": 2}
"""Bytes an element, each compressed on its own."""
PLANE_HEADER_BYTES = 4


def encoded_bytes(name: str, shape: Shape) -> int:
    """Bytes of the payload that the codec `name` makes of a slice; of variable-length codecs the most it can be.

    Raises KeyError for an unknown name: recipes are validated before.
    """
    elements = math.prod(shape)
    scales = 4 * -(-elements // BLOCK)
    match name:
        case "fp32":
            return 4 * elements
        case "bf16":
            return 2 * elements
        case "int8":
            return scales + elements
        case "int4" | "int4-hadamard":
            return scales + -(-elements // 2)
        case "fp32-zstd" | "bf16-zstd":
            return PLANES[name] * (PLANE_HEADER_BYTES + elements)
        case "topk":
            return 4 * topk_kept(elements)
        case "sign":
            return scales + -(-elements // 8)
        case "powersgd":
            rank, rows, columns = powersgd_form(shape)
            return 4 * (rank * (rows + columns) if rank else elements)
    raise KeyError(name)


def topk_kept(elements: int) -> int:
    """How many elements topk sends: 64 of every whole chunk, one of every 64 or part of 64 of a short last one."""
    whole, rest = divmod(elements, TOPK_CHUNK)
    return whole * (TOPK_CHUNK // TOPK_PART) + -(-rest // TOPK_PART)


def powersgd_form(shape: Shape) -> tuple[int, int, int]:
    """(rank, rows, columns) of the matrix that PowerSGD makes of a slice. Rank 0: too small to gain, sent as fp32.

    What has no two dimensions is seen as a matrix that is nearly square, its end padded with zeros.
    """
    elements = math.prod(shape)
    if len(shape) == 2:
        rows, columns = shape
    else:
        rows = math.isqrt(max(elements - 1, 0)) + 1
        columns = -(-elements // rows)
    rank = min(POWERSGD_RANK, rows, columns)
    return (rank if rank * (rows + columns) < elements else 0), rows, columns
