"""Safetensors files that are generated while they are read.

Only one piece of a model's tensors is in memory at a time, and no temporary file is needed to write or send them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradstream.core.storage.pool import StorageThreads
from gradstream.core.storage.tensor_files import TensorSpec, head_of

Buffer = bytes | bytearray | memoryview
PIECE_BYTES = 1 << 20
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights. `pieces` generates its bytes at each call, and blocks."""

    name: str
    num_bytes: int
    pieces: Callable[[], Iterator[Buffer]]


def weights_files(
    tensors: Sequence[TensorSpec], read: Callable[[str], Iterator[Buffer]], max_bytes: int
) -> list[WeightsFile]:
    """The files of a Hugging Face model with these tensors, and their index if there are several.

    Each file has at most `max_bytes`, unless a single tensor is larger. `read` returns the bytes of a tensor in pieces.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return [safetensors_file("model.safetensors", groups[0], read)]
    weight_map: dict[str, str] = {}
    made = []
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        made.append(safetensors_file(name, group, read))
        weight_map.update((tensor.name, name) for tensor in group)
    total = sum(tensor.num_bytes for tensor in tensors)
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1).encode()
    return [*made, WeightsFile(INDEX_NAME, len(index), lambda: iter((index,)))]


def safetensors_file(name: str, tensors: Sequence[TensorSpec], read: Callable[[str], Iterator[Buffer]]) -> WeightsFile:
    """A safetensors file of these tensors. Reading it raises ValueError when a tensor of `read` has another size."""
    head, ordered, file_bytes = head_of(tensors, {"format": "pt"})

    def pieces() -> Iterator[Buffer]:
        yield head
        for tensor in ordered:
            num_bytes = 0
            for piece in read(tensor.name):
                num_bytes += len(piece)
                yield piece
            if num_bytes != tensor.num_bytes:
                raise ValueError(f"tensor '{tensor.name}' is not the {tensor.dtype} {tensor.shape} that was announced")

    return WeightsFile(name, file_bytes, pieces)


def write_weights(made: Sequence[WeightsFile], destination: Path) -> None:
    """Write the files into a directory."""
    for file in made:
        with (destination / file.name).open("wb") as stream:
            for piece in file.pieces():
                stream.write(piece)


async def sent_pieces(
    made: Sequence[WeightsFile], storage: StorageThreads, place: str
) -> AsyncIterator[tuple[str, int, bytes]]:
    """Generate the files in pieces: (name, size of the whole file, at most 1 MiB of content).

    Each piece is generated in a thread, from the storage at `place`. Raises UnreachableError when that storage does not
    answer.
    """
    for file in made:
        pieces = _cut(file.pieces())
        while (piece := await storage.call(place, next, pieces, None)) is not None:
            yield file.name, file.num_bytes, piece


def _cut(pieces: Iterator[Buffer]) -> Iterator[bytes]:
    for piece in pieces:
        view = memoryview(piece)
        for begin in range(0, len(view), PIECE_BYTES):
            yield bytes(view[begin : begin + PIECE_BYTES])
