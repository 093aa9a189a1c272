"""Reading source files: decompression, detection of the kind by name and content, and JSON rows.

A file is of one of four kinds: "jsonl" (an object on each line), "json" (a list of objects, or objects one after the
other), "parquet" or "text". The name decides, or else the content: if rows were read as text, the model would learn
their syntax. A file named .jsonl that holds a list, or objects over several lines, is read by its content.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from gradstream.core.data.decompression import DamagedError, compression_of, unpack
from gradstream.core.data.sources import SourceFile
from gradstream.core.errors import DataError, GradstreamError, one_line

Kind = Literal["text", "jsonl", "json", "parquet"]
MAX_LINE_BYTES = 64 << 20
BLOCK_BYTES = 1 << 20
PROBE_BYTES = 64 << 10
PARQUET_ROWS = 512
"""Number of rows of a Parquet file that are in memory at once."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MISSING = object()
"""Returned by `field_value` where a row has no such field."""
_BLANK = b" \t\r\n"
_LIST_OF_OBJECTS = re.compile(rb'\[\s*(?=\{\s*("|\}))')
_EMPTY_LIST = re.compile(rb"\[\s*\]\s*")
_OBJECT = re.compile(rb'\{\s*("|\})')
_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is not a JSON object, with the reason and the cure."""

    reason: str
    cure: str


class ByteStream:
    """The decompressed bytes of a file, read once, with a look-ahead.

    Raises DataError beyond `max_bytes`; None sets no limit.
    """

    def __init__(self, name: str, pieces: Iterator[bytes], max_bytes: int | None = None):
        self._name = name
        self._pieces = pieces
        self._held = b""
        self._most = max_bytes or 0
        self._left = max_bytes

    def peek(self, num_bytes: int) -> bytes:
        """The first bytes that have not been read; fewer than `num_bytes` only at the end."""
        if len(self._held) < num_bytes:
            parts, size = [self._held], len(self._held)
            while size < num_bytes and (piece := next(self._pieces, None)) is not None:
                self._count(piece)
                parts.append(piece)
                size += len(piece)
            self._held = b"".join(parts)
        return self._held[:num_bytes]

    def read(self, num_bytes: int) -> bytes:
        """Read `num_bytes`; fewer only at the end."""
        found = self.peek(num_bytes)
        self._held = self._held[len(found) :]
        return found

    def blocks(self) -> Iterator[bytes]:
        """Read the rest, in pieces."""
        held, self._held = self._held, b""
        if held:
            yield held
        for piece in self._pieces:
            self._count(piece)
            yield piece

    def _count(self, piece: bytes) -> None:
        if self._left is None:
            return
        self._left -= len(piece)
        if self._left < 0:
            raise DataError(f"{self._name} unpacks to more than {self._most >> 20} MiB; split it, or unpack it first")


@dataclass(slots=True)
class OpenSource:
    """An open source file.

    `stream` has its decompressed bytes. A Parquet file is read from `stored` instead, which can seek. `odd` is the
    reason why a file that looks like JSON is read as text; "" for any other file.
    """

    name: str
    kind: Kind
    stream: ByteStream
    stored: Any
    by_content: bool = False
    odd: str = ""


@contextmanager
def open_source(
    file: SourceFile,
    kind: Kind | Literal["auto"] = "auto",
    fields: Sequence[str] = (),
    max_bytes: int | None = None,
) -> Iterator[OpenSource]:
    """Open a file and find out its kind, unless `kind` gives it.

    `fields` are the fields that rows have. A file with a single object that has none of them is text, such as a
    settings file among code. Without `fields` every object is a row. `max_bytes` is the limit on the decompressed size
    of a compressed file.

    An error inside the `with` block becomes a DataError with the file's name; errors of gradstream pass unchanged.
    """
    try:
        with file.open() as stored:
            head = stored.read(BLOCK_BYTES)
            compression = file.compression or (compression_of(head) if file.suffix not in (".parquet", ".pq") else None)
            pieces = _stored_blocks(head, stored)
            if compression is not None:
                pieces = unpack(pieces, compression)
            stream = ByteStream(file.name, pieces, max_bytes if compression else None)
            opened = OpenSource(file.name, "text", stream, stored)
            if kind != "auto":
                opened.kind = kind
            elif file.kind == "parquet":
                opened.kind = "parquet"
            else:
                opened.kind, opened.odd = _kind_by_content(stream, file, fields)
                opened.by_content = opened.kind != "text"
                if file.kind == "jsonl" and opened.kind != "json":  # it holds a list, or objects over several lines
                    opened.kind, opened.by_content = "jsonl", False
            if opened.kind == "parquet":
                if compression is not None:
                    raise DataError(f"{file.name}: compressed Parquet files are not read; unpack it first")
                stored.seek(0)
            yield opened
    except DamagedError as error:
        raise DataError(f"{file.name} is damaged: {error}; restore the file or leave it out") from None
    except GradstreamError:
        raise
    except Exception as error:  # each backend raises its own error types
        if type(error).__module__.startswith("gradstream."):
            raise
        raise DataError(f"{file.name} cannot be read ({one_line(error)}); restore the file or leave it out") from None


def _stored_blocks(head: bytes, stored: Any) -> Iterator[bytes]:
    yield head
    while block := stored.read(BLOCK_BYTES):
        yield block


def _kind_by_content(stream: ByteStream, file: SourceFile, fields: Sequence[str]) -> tuple[Kind, str]:
    """Find the kind of a file by its content; return it, and why a file that looks like JSON is text (else "")."""
    json_by_name = file.suffix == ".json"
    head = stream.peek(PROBE_BYTES)
    if head.startswith(b"PAR1"):
        return "parquet", ""
    start = _first_character(stream, len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0)
    head = stream.peek(start + PROBE_BYTES)[start:]

    def text(why: str) -> tuple[Kind, str]:
        return "text", why if json_by_name and head else ""

    if listed := _LIST_OF_OBJECTS.match(head):
        first, _ = _first_value(stream, start + listed.end())
        return ("json", "") if isinstance(first, dict) else text("not valid JSON")
    if json_by_name and _EMPTY_LIST.fullmatch(head):
        return "json", ""
    if not _OBJECT.match(head):
        return text("not valid JSON" if head.startswith(b"{") else "JSON without objects")
    first, end = _first_value(stream, start)
    if not isinstance(first, dict):
        return text("not valid JSON")
    known = not fields or any(field_value(first, name) is not MISSING for name in fields)
    after = _first_character(stream, end)
    following, on_next_line = stream.peek(after + 1)[after:], b"\n" in stream.peek(after)[end:]
    if not known and following != b"{":
        named = " or ".join(f"'{name}'" for name in fields)
        return text("not valid JSON" if following else f"one JSON object without {named}")
    spans_lines = b"\n" in stream.peek(end)[start:]
    one_line_each = on_next_line or not following or file.kind == "jsonl"
    return ("json" if spans_lines or not one_line_each else "jsonl"), ""


def _first_value(stream: ByteStream, start: int) -> tuple[Any, int]:
    """The JSON value at `start`, and its end; MISSING when no value ends within MAX_LINE_BYTES."""
    size = PROBE_BYTES
    while True:
        head = stream.peek(start + size)
        complete = len(head) < start + size
        text = head[start:].decode("utf-8", "replace" if complete else "ignore")
        try:
            value, end = json.JSONDecoder().raw_decode(text)
            return value, start + len(text[:end].encode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError) as error:
            if complete or size >= MAX_LINE_BYTES or not _may_be_cut(error, text):
                return MISSING, 0
        size *= 4


def _may_be_cut(error: Exception, text: str) -> bool:
    """Whether a JSON error may come only from the end of the text, which may continue."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - 16


def _first_character(stream: ByteStream, begin: int) -> int:
    """Index of the first non-blank byte from `begin` on; the end when there is none within MAX_LINE_BYTES."""
    size = PROBE_BYTES
    while True:
        blanks = stream.peek(begin + size)[begin:]
        rest = blanks.lstrip(_BLANK)
        if rest or len(blanks) < size or size > MAX_LINE_BYTES:
            return begin + len(blanks) - len(rest)
        size *= 4


def json_rows(source: OpenSource) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """The objects of a file of kind "jsonl" or "json", each with the number of its first line, counted from 1.

    Raises DataError for an error after which the rest is unreadable: a line of more than MAX_LINE_BYTES, or a truncated
    list.
    """
    return _jsonl_rows(source) if source.kind == "jsonl" else _json_rows(source)


def _lines(source: OpenSource) -> Iterator[bytes]:
    """The lines of a file, read in blocks, because a single line may be larger than memory."""
    held, num_lines = b"", 0
    for block in source.stream.blocks():
        *lines, held = (held + block).split(b"\n")
        yield from lines
        num_lines += len(lines)
        if len(held) > MAX_LINE_BYTES:
            raise DataError(_too_long(f"{source.name}:{num_lines + 1}: the line"))
    if held:
        yield held


def _too_long(what: str) -> str:
    return f"{what} has more than {MAX_LINE_BYTES >> 20} MiB; is every row on a line of its own?"


def _jsonl_rows(source: OpenSource) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    for number, line in enumerate(_lines(source), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield number, BadLine("not UTF-8", "convert the file or leave it out")
            continue
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=each_key_once)
        except (ValueError, RecursionError) as error:
            yield number, BadLine(f"not JSON ({one_line(error)})", "correct or remove the line")
            continue
        yield number, row if isinstance(row, dict) else BadLine("not a JSON object", "every line must be an object")


def _json_rows(source: OpenSource) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    text = _JsonText(source)
    in_list = text.next_character(_SPACE) == "["
    if in_list:
        text.position += 1
    while following := text.next_character(_SEPARATOR):
        if in_list and following == "]":
            text.position += 1
            if text.next_character(_SPACE):
                raise DataError(f"{source.name}:{text.line}: more follows after the list; remove it")
            return
        line, value = text.line, text.value()
        yield line, value if isinstance(value, dict) else BadLine("not a JSON object", "every row must be an object")
    if in_list:
        raise DataError(f"{source.name}:{text.line}: the file ends in the middle of its list; restore it")


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs. Raises ValueError for a repeated key, of which a value would be lost."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(key for number, (key, _) in enumerate(pairs) if key in dict(pairs[:number]))
        raise ValueError(f"the key '{twice}' comes twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=each_key_once)


class _JsonText:
    """The text of a JSON file. Only the value being read and one block are in memory."""

    def __init__(self, source: OpenSource):
        self._source = source
        self._blocks = source.stream.blocks()
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._held = ""
        self._ended = False
        self.position = 0
        self.line = 1
        """number of the line at `position`"""

    def next_character(self, skipped: re.Pattern[str]) -> str:
        """The next character after what `skipped` matches; "" at the end."""
        while True:
            match = skipped.match(self._held, self.position)
            self._advance(match.end() if match else self.position)
            if self.position < len(self._held) or not self._more(BLOCK_BYTES):
                return self._held[self.position : self.position + 1]

    def value(self) -> Any:
        """Read the value at the current position. Raises DataError when there is none."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._held, self.position)
                if isinstance(value, dict | list | str) or end < len(self._held) or not self._more(BLOCK_BYTES):
                    self._advance(end)
                    return value
            except (ValueError, RecursionError) as error:
                size = len(self._held) - self.position
                if size > MAX_LINE_BYTES:
                    raise DataError(_too_long(f"{self._source.name}:{self.line}: the object")) from None
                # Each time as much as is held already: the object is then parsed again from its beginning.
                if not (_may_be_cut(error, self._held) and self._more(max(size, BLOCK_BYTES))):
                    place = error.pos if isinstance(error, json.JSONDecodeError) else self.position
                    line = self.line + self._held.count("\n", self.position, place)
                    raise DataError(
                        f"{self._source.name}:{line}: not JSON ({one_line(error)}); correct or restore the file"
                    ) from None

    def _advance(self, position: int) -> None:
        self.line += self._held.count("\n", self.position, position)
        self.position = position

    def _more(self, num_bytes: int) -> bool:
        """Read `num_bytes` more; return False at the end of the file."""
        if self._ended:
            return False
        parts, size = [self._held[self.position :]], 0
        self.position = 0
        while size < num_bytes and not self._ended:
            block = next(self._blocks, b"")
            self._ended = not block
            try:
                parts.append(self._decoder.decode(block, final=self._ended))
            except UnicodeDecodeError as error:
                line = self.line + sum(part.count("\n") for part in parts) + error.object.count(b"\n", 0, error.start)
                raise DataError(f"{self._source.name}:{line}: not UTF-8; convert the file or leave it out") from None
            size += len(block)
        self._held = "".join(parts)
        return size > 0


def field_value(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field; MISSING where there is none, None below a null.

    The field "meta.text" is first looked up under that name, then as "text" in "meta".
    """
    if field in row:
        return row[field]
    found: Any = MISSING
    for place, character in enumerate(field):
        if character == "." and field[:place] in row:
            parent = row[field[:place]]
            below = field_value(parent, field[place + 1 :]) if isinstance(parent, Mapping) else MISSING
            if below is not MISSING:
                return below
            if parent is None:
                found = None
    return found


def field_names(row: Mapping[str, Any]) -> list[str]:
    """The names of a row's fields. The fields of an object follow the object's own name, as "meta.text"."""
    names: list[str] = []
    for name, value in row.items():
        names.append(name)
        if isinstance(value, Mapping):
            names += [f"{name}.{inner}" for inner in value]
    return names
