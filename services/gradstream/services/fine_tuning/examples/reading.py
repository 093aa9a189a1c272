"""Reads the rows of a file of examples, each with the file and line that it comes from, and finds their format."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gradstream.core.data.rows import (
    MISSING,
    PARQUET_ROWS,
    BadLine,
    OpenSource,
    field_names,
    field_value,
    json_rows,
    open_source,
)
from gradstream.core.data.sources import SourceFile
from gradstream.core.errors import ConfigError, DataError, nearest, plain_line
from gradstream.core.recipe.fine_tuning_recipe import ExamplesConfig

Format = Literal["prompt-completion", "chat", "text", "alpaca"]
SHAREGPT_FIELD = "conversations"
ALPACA_FIELDS = ("instruction", "input", "output", "system", "history")
# Fields that are read from a Parquet file besides those that the recipe names.
OTHER_FIELDS = (SHAREGPT_FIELD, *ALPACA_FIELDS, "tools", "weight", "train")
SHOWN_FIELDS = 24
MAX_FILE_BYTES = 4 << 30
"""Maximum size of a compressed file once it is unpacked: all examples are in memory at once, and a small file can
unpack to any size."""
# Files that hold rows, but not one a line. Read as text they would teach a model their syntax.
NOT_TEXT = {
    ".json": "it holds neither JSON objects nor a list of them; write one object a line",
    ".csv": ".csv files are not read; convert it to .jsonl or .parquet",
    ".tsv": ".tsv files are not read; convert it to .jsonl or .parquet",
}


class BadRowError(Exception):
    """A row cannot be used. The message is the reason: one plain line for people, whatever the row holds."""

    def __init__(self, reason: str):
        super().__init__(plain_line(reason))


class UnknownFieldsError(BadRowError):
    """No field of a row tells the format. Other rows may: some files begin with a row about the file."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row: its fields by name, or `reason` where it has none."""

    origin: str
    values: dict[str, Any]
    fields: Sequence[str] = ()
    """The names of all fields of the row; `values` may have fewer."""
    reason: str = ""
    kind: Literal["rows", "text"] = "rows"
    """With "text", the row is a whole text file."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Fields of the file that are not read, and in how many rows they are. Set in the file's first row."""

    def text(self, field: str) -> str:
        """The text in a field. Raises BadRowError."""
        value = self.value(field)
        if not isinstance(value, str):
            raise BadRowError(f"field '{field}' holds {type_name(value)}, not text")
        return checked_text(value, f"field '{field}'")

    def value(self, field: str) -> Any:
        """The value of a field; "meta.text" means field "text" of the object in "meta".

        Raises BadRowError when the row has no such field.
        """
        found = field_value(self.values, field)
        if found is MISSING:
            names = [*self.fields, *(name for name in field_names(self.values) if name not in self.fields)]
            raise BadRowError(f"no field '{field}'{nearest(field, names)} (fields: {listed(names)})")
        return found

    def has(self, field: str) -> bool:
        """Return whether the row has a field, as `value` finds it."""
        return field in self.fields or field_value(self.values, field) is not MISSING

    def says(self, field: str) -> bool:
        """Return whether the row has a field that is not null: in a file of mixed rows every row has all fields."""
        return field_value(self.values, field) not in (MISSING, None)


def read_rows(file: SourceFile, config: ExamplesConfig) -> Iterator[Row]:
    """Read the rows of one file, in order. A text file is one row; blank lines and blank text files give none.

    JSON is also recognized by its content, under any file name. Of a Parquet file only the columns that examples can be
    made of are read. Raises DataError when the file cannot be read or is damaged.
    """
    # With format text, a file with a single object may itself be the text.
    fields = (config.text_field,) if config.format == "text" else ()
    with open_source(file, fields=fields, max_bytes=MAX_FILE_BYTES) as source:
        match source.kind:
            case "jsonl" | "json":
                yield from _json(source)
            case "parquet":
                named = (config.prompt_field, config.completion_field, config.messages_field, config.text_field)
                yield from _parquet(source, (*named, *OTHER_FIELDS))
            case "text":
                yield from _text(source, config.text_field)


def resolve_format(config: ExamplesConfig, file: SourceFile, row: Row) -> Format:
    """Return the format from `config` or, with `auto`, from the fields of `row`.

    Raises UnknownFieldsError when the fields fit no format, ConfigError for a text file where rows are wanted.
    """
    if row.kind == "text":
        if file.suffix in NOT_TEXT and config.format != "text":
            raise ConfigError(f"{file.name}: {NOT_TEXT[file.suffix]}")
        if config.format not in ("auto", "text"):
            raise ConfigError(
                f"{file.name} is plain text, which has no rows of data.format {config.format}; name a .jsonl or "
                f".parquet file"
            )
        return "text"
    of_messages = all(
        row.says(field) and isinstance(row.value(field), list)
        for field in (config.prompt_field, config.completion_field)
    )
    if config.format == "prompt-completion" and of_messages:
        return "chat"
    if config.format != "auto":
        return config.format
    # Fields that are not null decide. If none does, fields that are null decide: they should have been filled.
    for has in (row.says, row.has):
        if has(config.prompt_field) and has(config.completion_field):
            return "chat" if of_messages else "prompt-completion"
        if has(config.messages_field) or has(SHAREGPT_FIELD):
            return "chat"
        if has("instruction") and has("output"):
            return "alpaca"
        if has(config.text_field):
            return "text"
    raise UnknownFieldsError(
        f"no fields '{config.prompt_field}' and '{config.completion_field}', no '{config.messages_field}' or "
        f"'{SHAREGPT_FIELD}', no 'instruction' and 'output', and no '{config.text_field}' (fields: "
        f"{listed(row.fields)}); name those there are with data.prompt_field and data.completion_field, "
        f"data.messages_field or data.text_field"
    )


def listed(fields: Sequence[str]) -> str:
    """The first names of fields, as text for people."""
    shown = ", ".join(shortened(str(field)) for field in fields[:SHOWN_FIELDS])
    return (shown + (", …" if len(fields) > SHOWN_FIELDS else "")) or "none"


def shortened(text: str, num_characters: int = 40) -> str:
    """Shorten the text of a row to one line for a message."""
    line = " ".join(text[: num_characters * 4].split())
    return line if len(line) <= num_characters else line[:num_characters] + "…"


def type_name(value: object) -> str:
    """The name of a value's JSON type."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def checked_text(text: str, what: str) -> str:
    """Return `text` if it can be encoded as UTF-8. JSON can contain half of a surrogate pair. Raises BadRowError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRowError(f"{what} holds half of a surrogate pair, which is not a character") from None
    return text


def _json(source: OpenSource) -> Iterator[Row]:
    for number, row in json_rows(source):
        origin = f"{source.name}:{number}"
        yield Row(origin, {}, reason=row.reason) if isinstance(row, BadLine) else Row(origin, row, tuple(row))


def _parquet(source: OpenSource, fields: Sequence[str]) -> Iterator[Row]:
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(source.stored)
    names = tuple(table.schema_arrow.names)
    # A field of a column's objects ("meta.text") needs the whole column. If no column is needed, one is read to count
    # the rows.
    needed = [name for name in names if any(field == name or field.startswith(f"{name}.") for field in fields)]
    unread = _unread(table, {name for name in names if name not in (needed or names[:1])})
    number = num_bytes = 0
    for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=needed or list(names[:1])):
        num_bytes += batch.nbytes
        if num_bytes > MAX_FILE_BYTES:
            raise DataError(f"{source.name} unpacks to more than {MAX_FILE_BYTES >> 20} MiB; split it")
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{source.name}:{number}", values, names, unread=unread if number == 1 else {})


def _unread(table: Any, names: Collection[str]) -> dict[str, int]:
    """Count, by column name, the rows that are not null, as far as the file's statistics tell."""
    counts: dict[str, int] = dict.fromkeys(names, 0)
    for number in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(number)
        filled: dict[str, int] = dict.fromkeys(names, 0)
        for index in range(group.num_columns):
            column = group.column(index)
            name = column.path_in_schema.split(".")[0]
            if name in filled:
                known = column.path_in_schema == name and column.statistics and column.statistics.has_null_count
                count = group.num_rows - column.statistics.null_count if known else group.num_rows
                filled[name] = max(filled[name], count)
        counts = {name: counts[name] + filled[name] for name in counts}
    return {name: count for name, count in counts.items() if count}


def _text(source: OpenSource, text_field: str) -> Iterator[Row]:
    content = b"".join(source.stream.blocks())
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield Row(f"{source.name}:{line}", {}, reason="not UTF-8", kind="text")
        return
    if text.strip():
        yield Row(f"{source.name}:1", {text_field: text}, (text_field,), kind="text")
