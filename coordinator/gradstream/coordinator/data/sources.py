"""From the files of the sources to a stream of documents: a document is a text file, or a row of a JSONL or Parquet
file."""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from gradstream.core.errors import DataError, GradstreamError, nearest, one_line
from gradstream.core.source_rows import PARQUET_ROWS, BadLine, jsonl_rows
from gradstream.core.sources import SourceFile

PROBE_BYTES = 8192


class NotTextError(Exception):
    """A file that is not UTF-8 text; it is skipped and counted, never shown to people."""


def read_documents(file: SourceFile, text_field: str, limit: int | None = None) -> Iterator[str]:
    """The documents of one file, as text that encodes to UTF-8; blank ones come as "".

    Of a text file, at most `limit` bytes are read; rows are read until the caller stops.
    Raises NotTextError for a text file that is not UTF-8, DataError (with the line) for anything else that is wrong.
    """
    reader = {"jsonl": _jsonl_rows, "parquet": _parquet_rows}.get(file.kind)
    try:
        if reader is None:
            yield _read_text(file, limit)
        else:
            for text in reader(file, text_field):
                # A lone surrogate (JSON can spell one) has no UTF-8; a tokenizer would refuse it.
                yield text.encode("utf-8", "replace").decode("utf-8") if text.strip() else ""
    except (GradstreamError, NotTextError):
        raise
    except Exception as error:  # every backend and compression raises its own kind
        raise DataError(f"{file.name} cannot be read ({one_line(error)}); restore the file or leave it out") from None


def _read_text(file: SourceFile, limit: int | None) -> str:
    with file.filesystem.open(file.path, "rb", compression=file.compression) as handle:
        head = handle.read(PROBE_BYTES if limit is None else min(limit, PROBE_BYTES))
        if b"\0" in head:  # text has none; saves reading a large binary file to its end
            raise NotTextError(file.name)
        rest = handle.read() if limit is None else handle.read(max(0, limit - len(head)))
    raw = head + rest
    cut = limit is not None and len(raw) >= limit
    try:
        # Where the limit cuts a character, the incremental decoder leaves its first bytes out.
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=not cut).removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise NotTextError(file.name) from None
    return text if text.strip() else ""


def _jsonl_rows(file: SourceFile, text_field: str) -> Iterator[str]:
    for number, row in jsonl_rows(file):
        where = f"{file.name}:{number}"
        if isinstance(row, BadLine):
            raise DataError(f"{where}: {row.reason}; {row.cure}")
        if text_field not in row:
            raise DataError(_no_field(where, text_field, list(row)))
        yield _text_value(row[text_field], where, text_field)


def _parquet_rows(file: SourceFile, text_field: str) -> Iterator[str]:
    import pyarrow.parquet as parquet

    with file.filesystem.open(file.path, "rb") as handle:
        table = parquet.ParquetFile(handle)
        if text_field not in table.schema_arrow.names:
            raise DataError(_no_field(file.name, text_field, table.schema_arrow.names))
        number = 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield _text_value(value, f"{file.name} row {number}", text_field)


def _text_value(value: object, where: str, text_field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field '{text_field}' holds {type(value).__name__}, not text; name another with --text-field"
        )
    return value


def _no_field(where: str, text_field: str, fields: list[str]) -> str:
    shown = ", ".join(fields[:8]) or "none"
    return (
        f"{where}: no field '{text_field}'{nearest(text_field, fields)} (fields: {shown}); "
        f"name the one that holds the text with --text-field or data.prepare.text_field"
    )


class Corpus:
    """The documents of several files, in order, with what has been read so far. Blank documents are left out.

    `max_bytes`: stop at so many bytes of text; the document that crosses the line is cut.
    """

    def __init__(self, files: list[SourceFile], text_field: str, max_bytes: int | None = None):
        self._files = files
        self._text_field = text_field
        self._max_bytes = max_bytes
        self.num_bytes = 0
        """bytes of text read"""
        self.num_skipped_files = 0
        """files that are not UTF-8 text"""
        self.stored_bytes_done = 0
        """stored bytes of the files read to their end, and what is known of the current one"""

    @property
    def stored_bytes(self) -> int:
        """What `stored_bytes_done` grows to: a measure of progress, exact for uncompressed text."""
        total = sum(file.num_bytes for file in self._files)
        return total if self._max_bytes is None else min(total, self._max_bytes)

    def __iter__(self) -> Iterator[str]:
        finished = 0
        for file in self._files:
            before = self.num_bytes
            try:
                for text in read_documents(file, self._text_field, self._remaining()):
                    text = self._cut(text)
                    self.num_bytes += len(text.encode("utf-8"))
                    # Text can be larger than its compressed file; never report more than the file.
                    self.stored_bytes_done = finished + min(file.num_bytes, self.num_bytes - before)
                    if text:
                        yield text
                    if self._full():
                        return
            except NotTextError:
                self.num_skipped_files += 1
            finished += file.num_bytes
            self.stored_bytes_done = finished

    def _remaining(self) -> int | None:
        return None if self._max_bytes is None else max(0, self._max_bytes - self.num_bytes)

    def _full(self) -> bool:
        # A cut leaves out up to three bytes of a character: what is left then is no room for a document.
        remaining = self._remaining()
        return remaining is not None and remaining < 4

    def _cut(self, text: str) -> str:
        remaining = self._remaining()
        if remaining is None or len(text) * 4 <= remaining:
            return text
        return text.encode("utf-8")[:remaining].decode("utf-8", "ignore")
