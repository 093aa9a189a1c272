"""A writer of safetensors files that writes tensor by tensor.

The library's own writer joins all tensors in one buffer and holds the interpreter lock meanwhile: 0.6 s without a
heartbeat for each GB. This writer takes each tensor from its own memory, and other threads run while it writes. The
format equals the library's, and for fp32 the bytes as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy.typing as npt

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1}
"""Bytes of an element, by safetensors' name for the type."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, type (a key of ITEM_BYTES) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def bytes_of(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of an array, copied only if the array is not contiguous."""
    import numpy as np

    return array.reshape(-1).view(np.uint8).data


class TensorStream:
    """Writes a safetensors file tensor by tensor, in the order of `specs`, and computes its sha256 on the way."""

    def __init__(self, stream: BinaryIO, specs: Sequence[TensorSpec], metadata: Mapping[str, str]):
        head, self.num_bytes = _head_in_order(specs, metadata)
        self._stream = stream
        self._digest = hashlib.sha256()
        self._left = iter(specs)
        self._put(memoryview(head))

    def write(self, array: npt.NDArray[Any]) -> None:
        """Write the next tensor. Raises ValueError when its size is not that of its spec."""
        spec, view = next(self._left), bytes_of(array)
        if view.nbytes != spec.num_bytes:
            raise ValueError(f"tensor '{spec.name}' has {view.nbytes} bytes instead of the {spec.num_bytes} announced")
        self._put(view)

    def end(self) -> tuple[int, str]:
        """Return the file's size in bytes and its hex sha256. Raises ValueError when a tensor is missing."""
        missing = next(self._left, None)
        if missing is not None:
            raise ValueError(f"tensor '{missing.name}' was announced and not written")
        return self.num_bytes, self._digest.hexdigest()

    def _put(self, view: memoryview) -> None:
        # Both calls release the interpreter lock.
        self._digest.update(view)
        self._stream.write(view)


def write_tensors(
    stream: BinaryIO,
    specs: Sequence[TensorSpec],
    contents: Callable[[str], npt.NDArray[Any]],
    metadata: Mapping[str, str],
) -> tuple[int, str]:
    """Write a safetensors file in the library's order; return its size in bytes and its hex sha256.

    `contents` returns the elements of a tensor by name. It is called for one tensor at a time, in the file's order, so
    only one tensor needs to be in memory. Raises ValueError for contents that differ in size from their spec.
    """
    ordered = _in_order(specs)
    written = TensorStream(stream, ordered, metadata)
    for spec in ordered:
        written.write(contents(spec.name))
    return written.end()


def head_of(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, list[TensorSpec], int]:
    """The head of a safetensors file, as (bytes before the elements, tensors in the file's order, size of the file)."""
    ordered = _in_order(specs)
    head, num_bytes = _head_in_order(ordered, metadata)
    return head, ordered, num_bytes


def _in_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """In the library's order, by element size, then name: a tensor begins at a multiple of its element's size."""
    return sorted(specs, key=lambda spec: (-ITEM_BYTES[spec.dtype], spec.name))


def _head_in_order(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The head of a file with the tensors in this order, and the size of the file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.num_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end
