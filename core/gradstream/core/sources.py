"""Sources: from paths, globs, directories and `stdlib:` to files, and from JSONL files to their rows.

Files of a source come in sorted order, sources in the order given, and a file that two sources name comes once: the
number of a document or row depends on the input alone.
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstream.core.errors import ConfigError, DataError, one_line

STDLIB = "stdlib:"
# Not the library itself: tests, what pip installed, and byte code.
STDLIB_SKIPPED = frozenset(
    # The last two are character tables and one long string, not code.
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
MAX_LINE_BYTES = 64 << 20
BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 512
"""Rows of a Parquet file that are in memory at once."""


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


def without_password(source: str) -> str:
    """A source for what anyone may read: without user and password of a URL."""
    return re.sub(r"(?<=://)[^/@]*@", "", source)


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
