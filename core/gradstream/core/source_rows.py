"""From the bytes of a source file to the rows of a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gradstream.core.errors import DataError, one_line
from gradstream.core.sources import SourceFile

MAX_LINE_BYTES = 64 << 20
BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 512
"""Rows of a Parquet file that are in memory at once."""


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no JSON object: why, and what to do about it."""

    reason: str
    cure: str


def read_unpacked(file: SourceFile, most_bytes: int) -> bytes:
    """All of a file. Raises DataError when it is compressed and unpacks to more than `most_bytes`, and what the file
    system raises when it cannot be read."""
    limit = most_bytes if file.compression else None
    with file.filesystem.open(file.path, "rb", compression=file.compression) as handle:
        content: bytes = handle.read() if limit is None else handle.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise DataError(_too_large(file, limit))
    return content


def _lines(file: SourceFile, most_bytes: int | None) -> Iterator[bytes]:
    """The lines of a file. Read in blocks: a line, like what a small file unpacks to, may be as long as it likes."""
    held, num_lines, num_bytes = b"", 0, 0
    with file.filesystem.open(file.path, "rb", compression=file.compression) as handle:
        while block := handle.read(BLOCK_BYTES):
            num_bytes += len(block)
            if file.compression and most_bytes is not None and num_bytes > most_bytes:
                raise DataError(_too_large(file, most_bytes))
            *lines, held = (held + block).split(b"\n")
            yield from lines
            num_lines += len(lines)
            if len(held) > MAX_LINE_BYTES:
                raise DataError(
                    f"{file.name}:{num_lines + 1}: the line has more than {MAX_LINE_BYTES >> 20} MiB; is every row "
                    f"on a line of its own?"
                )
    if held:
        yield held


def _too_large(file: SourceFile, most_bytes: int) -> str:
    return f"{file.name} unpacks to more than {most_bytes >> 20} MiB; split it, or unpack it first"


def jsonl_rows(file: SourceFile, most_bytes: int | None = None) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """The objects of a JSONL file with their line numbers, from 1 on; blank lines are left out.

    Raises DataError for a line of more than MAX_LINE_BYTES and for a compressed file that unpacks to more than
    `most_bytes`, and what the file system raises when the file cannot be read.
    """
    for number, line in enumerate(_lines(file, most_bytes), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield number, BadLine("not UTF-8", "convert the file or leave it out")
            continue
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield number, BadLine(f"not JSON ({one_line(error)})", "correct or remove the line")
            continue
        yield number, row if isinstance(row, dict) else BadLine("not a JSON object", "every line must be an object")
