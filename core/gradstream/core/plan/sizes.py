"""The sizes of encoded slices for each codec: pure arithmetic without torch, for the codecs and for plans."""

from __future__ import annotations

import math

from gradstream.core.kernels.blocks import BLOCK, TOPK_CHUNK, TOPK_PART

MAX_ENCODED_SLOTS = 2
"""Maximum number of slots of which a worker holds encoded gradients that servers have not acknowledged."""

Shape = tuple[int, ...]
"""The shape of a slice: (rows, columns) or (elements,)."""

POWERSGD_RANK = 4
PLANES = {"fp32-zstd": 4, "bf16-zstd": 2}
"""Number of bytes of an element. The bytes of each significance are compressed separately."""
PLANE_HEADER_BYTES = 4


def encoded_bytes(name: str, shape: Shape) -> int:
    """The bytes of a slice's payload in the codec `name`; the maximum for a codec of variable length.

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
        case "int2":
            return scales + -(-elements // 4)
        case "fp32-zstd" | "bf16-zstd":
            return PLANES[name] * (PLANE_HEADER_BYTES + elements)
        case "topk":
            return 4 * topk_kept(elements)
        case "sparse":
            kept = topk_kept(elements)
            return 4 * -(-elements // TOPK_CHUNK) + -(-12 * kept // 8) + -(-kept // 4)
        case "sign":
            return scales + -(-elements // 8)
        case "powersgd":
            rank, rows, columns = powersgd_form(shape)
            return 4 * (rank * (rows + columns) if rank else elements)
        case "factored":
            return 4 * sum(shape) if is_factored(shape) else 2 * elements
    raise KeyError(name)


def is_factored(shape: Shape) -> bool:
    """Whether the codec factored sends a slice of this shape by the means of its rows and columns."""
    return len(shape) == 2 and min(shape) > 1


def sum_bytes(num_elements: int) -> int:
    """Bytes of a fragment's fixed-point sum: two digits of 4 bytes an element, and a byte a block."""
    return 8 * num_elements + -(-num_elements // BLOCK)


def topk_kept(elements: int) -> int:
    """Number of elements that topk and sparse send: 64 of a whole chunk, one of every 64 or fewer of a short one."""
    whole, rest = divmod(elements, TOPK_CHUNK)
    return whole * (TOPK_CHUNK // TOPK_PART) + -(-rest // TOPK_PART)


def powersgd_form(shape: Shape) -> tuple[int, int, int]:
    """(rank, rows, columns) of a slice's matrix in PowerSGD. Rank 0: the slice is too small to gain and sent as fp32.

    A slice without two dimensions is treated as a nearly square matrix, padded with zeros at its end.
    """
    elements = math.prod(shape)
    if len(shape) == 2:
        rows, columns = shape
    else:
        rows = math.isqrt(max(elements - 1, 0)) + 1
        columns = -(-elements // rows)
    rank = min(POWERSGD_RANK, rows, columns)
    return (rank if rank * (rows + columns) < elements else 0), rows, columns
