"""Read the documents of source files. A document is a text file, or a row of a JSON or Parquet file."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, Literal

from gradstream.coordinator.data.pieces import Extent, split_document
from gradstream.core.data.rows import (
    MISSING,
    PARQUET_ROWS,
    PROBE_BYTES,
    BadLine,
    Kind,
    OpenSource,
    field_names,
    field_value,
    json_rows,
    open_source,
)
from gradstream.core.data.sources import WITHOUT_ROWS, SourceFile
from gradstream.core.errors import DataError, nearest

Format = Literal["auto", "text", "jsonl", "json", "parquet"]

# Reasons for which a file, or a part of it, is not in the data set.
NOT_TEXT = "files that are not UTF-8 text"
BLANK = "blank documents"
BEYOND_LIMIT = "files beyond max_bytes"
KIND_NAMES: dict[Kind, str] = {"text": "text", "jsonl": "JSON lines", "json": "JSON", "parquet": "Parquet"}
TABLE_SUFFIXES = (".csv", ".tsv")


class NotTextError(Exception):
    """A file that is not UTF-8 text. The file is left out and counted; people never see this error."""


@dataclass(slots=True)
class Tally:
    """Counts of files: read ones by format, left-out ones by reason, and notes for people."""

    read_as: Counter[str] = dataclass_field(default_factory=Counter)
    left_out: Counter[str] = dataclass_field(default_factory=Counter)
    notes: Counter[str] = dataclass_field(default_factory=Counter)


def read_documents(
    file: SourceFile, text_field: str, limit: int | None = None, fmt: Format = "auto", tally: Tally | None = None
) -> Iterator[str]:
    """Yield the documents of one file, as text that can be encoded as UTF-8; blank documents as "".

    At most `limit` bytes of a text file are read; rows are read until the caller stops. `fmt` is the format of the
    file; "auto" takes it from the file's name, else from its content. Raises NotTextError for a text file that is not
    UTF-8, DataError (with the line) for any other error in the file.
    """
    with open_source(file, fmt, (text_field,)) as source:
        if tally is not None:
            _count_kind(file, source, tally)
        if source.kind == "text":
            yield _read_text(source, limit)
            return
        for text in (_parquet_rows if source.kind == "parquet" else _json_texts)(source, text_field):
            # A lone surrogate, which JSON can contain, has no UTF-8 encoding; a tokenizer would refuse it.
            whole = text.encode("utf-8", "replace").decode("utf-8")
            if tally is not None and whole != text:
                tally.notes["documents hold half of a surrogate pair, which became '?'"] += 1
            yield whole if whole.strip() else ""


def _count_kind(file: SourceFile, source: OpenSource, tally: Tally) -> None:
    how = " by their content" if source.by_content else ""
    tally.read_as[f"{KIND_NAMES[source.kind]}{how}"] += 1
    if source.odd:
        tally.notes[f"{file.suffix} files were read as text ({source.odd})"] += 1
    elif source.kind == "text" and file.suffix in TABLE_SUFFIXES:
        tally.notes[f"{file.suffix} files were read as text, a document each; convert rows to .jsonl or .parquet"] += 1


def _read_text(source: OpenSource, limit: int | None) -> str:
    head = source.stream.read(PROBE_BYTES if limit is None else min(limit, PROBE_BYTES))
    if b"\0" in head:  # not in text; a large binary file is then not read to its end
        raise NotTextError(source.name)
    rest = b"".join(source.stream.blocks()) if limit is None else source.stream.read(max(0, limit - len(head)))
    if b"\0" in rest:
        raise NotTextError(source.name)
    raw = head + rest
    cut = limit is not None and len(raw) >= limit
    try:
        # If the limit cuts a character, the incremental decoder drops the character's first bytes.
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=not cut).removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise NotTextError(source.name) from None
    return text if text.strip() else ""


def _json_texts(source: OpenSource, text_field: str) -> Iterator[str]:
    for number, row in json_rows(source):
        where = f"{source.name}:{number}"
        if isinstance(row, BadLine):
            raise DataError(f"{where}: {row.reason}; {row.cure}")
        yield _text_value(row, where, text_field, source.by_content)


def _parquet_rows(source: OpenSource, text_field: str) -> Iterator[str]:
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(source.stored)
    schema = table.schema_arrow
    columns = [name for name in schema.names if text_field.startswith(f"{name}.")]
    column = text_field if text_field in schema.names else next(iter(columns), None)
    if column is None or (column != text_field and not _has_field(schema.field(column).type, text_field, column)):
        names = [name for field in schema for name in (field.name, *_nested_names(field.name, field.type))]
        raise DataError(_no_field(source.name, text_field, names))
    number = 0
    for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            first, last = number + 1, number + batch.num_rows
            raise DataError(
                f"{source.name} rows {first} to {last}: field '{text_field}' is not UTF-8; write the file again"
            ) from None
        for row in rows:
            number += 1
            yield _text_value(row, f"{source.name} row {number}", text_field, by_content=False)


def _nested_names(name: str, kind: Any) -> list[str]:
    """The names of the fields of a column's objects."""
    return [f"{name}.{field.name}" for field in kind] if str(kind).startswith("struct<") else []


def _has_field(kind: Any, field: str, name: str) -> bool:
    return any(
        field == inner
        or (field.startswith(f"{inner}.") and _has_field(kind.field(inner[len(name) + 1 :]).type, field, inner))
        for inner in _nested_names(name, kind)
    )


def _text_value(row: Mapping[str, Any], where: str, text_field: str, by_content: bool) -> str:
    value = field_value(row, text_field)
    if value is MISSING:
        raise DataError(_no_field(where, text_field, field_names(row), by_content))
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field '{text_field}' holds {type(value).__name__}, not text; name another with --text-field"
        )
    return value


def _no_field(where: str, text_field: str, fields: list[str], by_content: bool = False) -> str:
    shown = ", ".join(fields[:8]) or "none"
    other = ", or take files by --format text as the text they are" if by_content else ""
    return (
        f"{where}: no field '{text_field}'{nearest(text_field, fields)} (fields: {shown}); "
        f"name the one that holds the text with --text-field or data.prepare.text_field{other}"
    )


class Corpus:
    """The documents of several files, in order, with counts of what has been read. Blank documents are left out.

    Reading stops after `max_bytes` bytes of text; a document that crosses this limit is cut. Documents are split into
    pieces of about `piece_bytes`; 0 splits none.
    """

    def __init__(
        self,
        files: list[SourceFile],
        text_field: str,
        max_bytes: int | None = None,
        fmt: Format = "auto",
        piece_bytes: int = 0,
    ):
        self._files = files
        self._text_field = text_field
        self._max_bytes = max_bytes
        self._format = fmt
        self.piece_bytes = piece_bytes
        self.num_split = 0
        """documents that were split into pieces"""
        self.tally = Tally()
        self.first_not_text = ""
        """the name of the first file that is not UTF-8 text"""
        self.num_bytes = 0
        """bytes of text read"""
        self.stored_bytes_done = 0
        """stored bytes of the files read to their end, plus an estimate for the current file"""

    @property
    def num_skipped_files(self) -> int:
        """Files that are not UTF-8 text."""
        return self.tally.left_out[NOT_TEXT]

    @property
    def stored_bytes(self) -> int:
        """The final value of `stored_bytes_done`, for progress; exact for uncompressed text."""
        total = sum(file.num_bytes for file in self._files)
        return total if self._max_bytes is None else min(total, self._max_bytes)

    def __iter__(self) -> Iterator[str]:
        finished = 0
        for number, file in enumerate(self._files):
            before = self.num_bytes
            tally, any_row = Tally(), False
            try:
                for text in read_documents(file, self._text_field, self._remaining(), self._format, tally):
                    any_row = True
                    if not text:
                        self.tally.left_out[BLANK] += 1
                        continue
                    text = self._cut(text)
                    self.num_bytes += len(text.encode("utf-8"))
                    # Text can be larger than its compressed file; count at most the size of the file.
                    self.stored_bytes_done = finished + min(file.num_bytes, self.num_bytes - before)
                    if text:
                        yield from self._pieces(text)
                    if self._full():
                        break
                self.tally.left_out += Counter({WITHOUT_ROWS: int(not any_row)})
            except NotTextError:
                self.tally.left_out[NOT_TEXT] += 1
                self.first_not_text = self.first_not_text or file.name
                tally = Tally()
            self.tally.read_as += tally.read_as
            self.tally.notes += tally.notes
            if self._full():
                self.tally.left_out += Counter({BEYOND_LIMIT: len(self._files) - number - 1})
                return
            finished += file.num_bytes
            self.stored_bytes_done = finished

    def measure(self, enough: int) -> Extent:
        """Measure the amount of text by reading all documents, or only the first `enough` ones if there are more.

        Raises DataError as iteration does.
        """
        lengths: list[int] = []
        for text in self:
            lengths.append(len(text.encode("utf-8")))
            if len(lengths) >= enough:
                limit = self.stored_bytes
                plain = (file.num_bytes for file in self._files if file.kind == "text" and file.compression is None)
                longest = max(*lengths, *(min(size, limit) for size in plain))
                return Extent(tuple(lengths), limit, longest, whole=False)
        return Extent(tuple(lengths), sum(lengths), max(lengths, default=0), whole=True)

    def _pieces(self, text: str) -> Iterator[str]:
        if not self.piece_bytes:
            yield text
            return
        pieces = list(split_document(text, self.piece_bytes))
        self.num_split += len(pieces) > 1
        yield from pieces

    def _remaining(self) -> int | None:
        return None if self._max_bytes is None else max(0, self._max_bytes - self.num_bytes)

    def _full(self) -> bool:
        # A cut drops up to three bytes of a character; the few bytes that then remain hold no further document.
        remaining = self._remaining()
        return remaining is not None and remaining < 4

    def _cut(self, text: str) -> str:
        remaining = self._remaining()
        if remaining is None or len(text) * 4 <= remaining:
            return text
        return text.encode("utf-8")[:remaining].decode("utf-8", "ignore")
