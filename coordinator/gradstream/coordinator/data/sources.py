"""Sources: from paths, globs, directories and `stdlib:` to a stream of documents.

A document is a text file, or a row of a JSONL or Parquet file. Files of a source come in sorted order, sources in the
order given, and a file that two sources name comes once: the number of a document depends on the input alone.
"""

from __future__ import annotations

import codecs
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstream.core.errors import ConfigError, DataError, GradstreamError, nearest, one_line

STDLIB = "stdlib:"
# Not the library itself: tests, what pip installed, and byte code.
STDLIB_SKIPPED = frozenset(
    # The last two are character tables and one long string, not code.
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
PROBE_BYTES = 8192
PARQUET_ROWS = 512


class NotTextError(Exception):
    """A file that is not UTF-8 text; it is skipped and counted, never shown to people."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read: `name` is for people, `num_bytes` its stored (maybe compressed) size."""

    name: str
    filesystem: Any
    path: str
    num_bytes: int

    @property
    def _stem_and_compression(self) -> tuple[str, str | None]:
        stem, suffix = os.path.splitext(self.path.lower())
        return (stem, COMPRESSIONS[suffix]) if suffix in COMPRESSIONS else (self.path.lower(), None)

    @property
    def compression(self) -> str | None:
        """The fsspec compression that the name tells."""
        return self._stem_and_compression[1]

    @property
    def kind(self) -> str:
        """ "jsonl", "parquet" or "text", by the name."""
        suffix = os.path.splitext(self._stem_and_compression[0])[1]
        return {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}.get(suffix, "text")


def open_filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path inside it. Raises ConfigError when there is none."""
    from fsspec.core import url_to_fs

    try:
        filesystem, inner = url_to_fs(os.path.expanduser(path))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{path}: this kind of path cannot be opened ({one_line(error)})") from None
    return filesystem, str(inner)


def is_local(filesystem: Any) -> bool:
    """Whether paths of an fsspec file system are paths of this machine."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def list_files(sources: Iterable[str]) -> list[SourceFile]:
    """All files that `sources` name, in the order in which they are read.

    Directories are walked without hidden files; a glob takes the files it matches (`**` descends).
    Raises ConfigError when a source names no file.
    """
    found: dict[tuple[str, str], SourceFile] = {}
    for source in sources:
        files = list(_stdlib_files() if source == STDLIB else _files_of(source))
        if not files:
            raise ConfigError(f"source '{source}' matches no file; correct the path or remove it")
        for file in files:
            found.setdefault((str(file.filesystem.protocol), file.path), file)
    return list(found.values())


def _files_of(source: str) -> Iterator[SourceFile]:
    filesystem, path = open_filesystem(source)
    try:
        if filesystem.isdir(path):
            listing = filesystem.find(path, detail=True)
        elif filesystem.exists(path):
            listing = {path: filesystem.info(path)}
        elif any(character in path for character in "*?["):
            listing = filesystem.glob(path, detail=True)
        else:
            listing = {}
    except Exception as error:  # every fsspec backend raises its own kind
        raise ConfigError(
            f"source '{source}' cannot be listed ({one_line(error)}); check the path and the rights"
        ) from None
    local = is_local(filesystem)
    root = path.rstrip("/") + "/"
    for name in sorted(listing):
        info = listing[name]
        if info.get("type") in ("directory", "other"):
            continue
        if any(part.startswith(".") for part in name.removeprefix(root).split("/")) and name != path:
            continue
        label = name if local else str(filesystem.unstrip_protocol(name))
        yield SourceFile(label, filesystem, name, int(info.get("size") or 0))


def _stdlib_files() -> Iterator[SourceFile]:
    from fsspec.implementations.local import LocalFileSystem

    root = Path(sysconfig.get_path("stdlib"))
    paths: list[tuple[str, Path]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_SKIPPED]
        paths += [((Path(folder) / name).relative_to(root).as_posix(), Path(folder) / name) for name in files]
    filesystem = LocalFileSystem()
    for _, path in sorted(paths):
        if path.suffix == ".py" and path.is_file():
            yield SourceFile(str(path), filesystem, str(path), path.stat().st_size)


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
    with file.filesystem.open(file.path, "rb", compression=file.compression) as handle:
        for number, line in enumerate(handle, 1):
            where = f"{file.name}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{where}: not UTF-8; convert the file or leave it out") from None
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({one_line(error)}); correct or remove the line") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: not a JSON object; every line must be an object with '{text_field}'")
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
