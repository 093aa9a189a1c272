"""From a file of examples to its rows, each with the file and line it comes from; and which format they have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradstream.core.errors import ConfigError, DataError, GradstreamError, nearest, one_line, plain_line
from gradstream.core.finetuning_recipe import ExamplesConfig
from gradstream.core.source_rows import PARQUET_ROWS, BadLine, jsonl_rows, read_unpacked
from gradstream.core.sources import SourceFile

Format = Literal["prompt-completion", "chat", "text"]
SHOWN_FIELDS = 8
MAX_FILE_BYTES = 4 << 30
"""Of a file that is compressed, once it is unpacked: examples are in memory all at once, and a small file can unpack to
any size."""
# Files that hold rows, but not one a line: taken for text, a model would learn their syntax.
NOT_TEXT = {".json": "write one JSON object a line, as .jsonl", ".csv": "convert it to .jsonl or .parquet"}


class BadRowError(Exception):
    """A row that cannot be used; its message is the reason, for people: one plain line, whatever the row holds."""

    def __init__(self, reason: str):
        super().__init__(plain_line(reason))


@dataclass(frozen=True, slots=True)
class Row:
    """A row: its fields by name, or `reason` where it has none."""

    origin: str
    values: dict[str, Any]
    fields: Sequence[str] = ()
    """The names of all fields there are; `values` may have fewer."""
    reason: str = ""

    def text(self, field: str) -> str:
        """The text in a field. Raises BadRowError."""
        value = self.value(field)
        if not isinstance(value, str):
            raise BadRowError(f"field '{field}' holds {type_name(value)}, not text")
        return checked_text(value, f"field '{field}'")

    def value(self, field: str) -> Any:
        """What is in a field. Raises BadRowError when the row has none of that name."""
        if field not in self.values:
            raise BadRowError(f"no field '{field}'{nearest(field, self.fields)} (fields: {listed(self.fields)})")
        return self.values[field]


def read_rows(file: SourceFile, config: ExamplesConfig) -> Iterator[Row]:
    """The rows of one file, in order. A text file is one row; blank lines and blank text files are none.

    Of a Parquet file only the columns that `config` names are read. Raises DataError when the file cannot be read.
    """
    try:
        match file.kind:
            case "jsonl":
                yield from _jsonl(file)
            case "parquet":
                yield from _parquet(
                    file, (config.prompt_field, config.completion_field, config.messages_field, config.text_field)
                )
            case _:
                yield from _text(file, config.text_field)
    except GradstreamError:
        raise
    except Exception as error:  # every backend and compression raises its own kind
        raise DataError(f"{file.name} cannot be read ({one_line(error)}); restore the file") from None


def resolve_format(config: ExamplesConfig, file: SourceFile, row: Row) -> Format:
    """The format that `config` gives or, if it leaves that open, that the fields of `row` tell.

    Raises ConfigError when nothing fits, and for a text file where rows are wanted.
    """
    if file.kind == "text":
        suffix = next((suffix for suffix in NOT_TEXT if file.path.lower().endswith(suffix)), None)
        if suffix and config.format != "text":
            raise ConfigError(f"{file.name}: {suffix} files are not read; {NOT_TEXT[suffix]}")
        if config.format not in ("auto", "text"):
            raise ConfigError(
                f"{file.name} is plain text by its name, which has no rows of data.format {config.format}; "
                f"name a .jsonl or .parquet file"
            )
        return "text"
    if config.format != "auto":
        return config.format
    if config.prompt_field in row.fields and config.completion_field in row.fields:
        return "prompt-completion"
    if config.messages_field in row.fields:
        return "chat"
    if config.text_field in row.fields:
        return "text"
    raise ConfigError(
        f"{row.origin}: no fields '{config.prompt_field}' and '{config.completion_field}', no "
        f"'{config.messages_field}' and no '{config.text_field}' (fields: {listed(row.fields)}); name those there are "
        f"with data.prompt_field and data.completion_field, data.messages_field or data.text_field"
    )


def listed(fields: Sequence[str]) -> str:
    """The first names of fields, for people."""
    shown = ", ".join(shortened(str(field)) for field in fields[:SHOWN_FIELDS])
    return (shown + (", …" if len(fields) > SHOWN_FIELDS else "")) or "none"


def shortened(text: str, num_characters: int = 40) -> str:
    """Text of a row on one line and short enough for a message."""
    line = " ".join(text[: num_characters * 4].split())
    return line if len(line) <= num_characters else line[:num_characters] + "…"


def type_name(value: object) -> str:
    """The type of a value, in the words of JSON."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def checked_text(text: str, what: str) -> str:
    """`text`, if it has a UTF-8 encoding: JSON can spell half of a character. Raises BadRowError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"{what} holds half of a surrogate pair, which is no character") from None
    return text


def _jsonl(file: SourceFile) -> Iterator[Row]:
    for number, row in jsonl_rows(file, MAX_FILE_BYTES):
        origin = f"{file.name}:{number}"
        yield Row(origin, {}, reason=row.reason) if isinstance(row, BadLine) else Row(origin, row, tuple(row))


def _parquet(file: SourceFile, fields: Sequence[str]) -> Iterator[Row]:
    import pyarrow.parquet as parquet

    with file.filesystem.open(file.path, "rb") as handle:
        table = parquet.ParquetFile(handle)
        names = tuple(table.schema_arrow.names)
        # With none of them, one column still counts the rows.
        columns = [name for name in names if name in fields] or list(names[:1])
        number = num_bytes = 0
        for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
            num_bytes += batch.nbytes
            if num_bytes > MAX_FILE_BYTES:
                raise DataError(f"{file.name} unpacks to more than {MAX_FILE_BYTES >> 20} MiB; split it")
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{file.name}:{number}", values, names)


def _text(file: SourceFile, text_field: str) -> Iterator[Row]:
    content = read_unpacked(file, MAX_FILE_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Row(f"{file.name}:{line}", {}, reason="not UTF-8")
        return
    if text.strip():
        yield Row(f"{file.name}:1", {text_field: text}, (text_field,))
