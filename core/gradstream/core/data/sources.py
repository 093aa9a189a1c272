"""Sources of a data set: the files behind paths, globs, directories and `stdlib:`.

Links are followed, as `cat` follows them: a link counts as a file or directory under its own name. Files of a source
come in sorted order, sources in the order given, and a path that two sources name comes once. The number of a document
or row therefore depends only on the input. Files that a source names but that are not read are counted by reason.
"""

from __future__ import annotations

import os
import re
import stat
import sysconfig
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

from gradstream.core.errors import ConfigError, one_line
from gradstream.core.storage.files import open_local
from gradstream.core.storage.paths import check_scheme

STDLIB = "stdlib:"
# Directories that are not the library itself: tests, packages that pip installed, and byte code.
STDLIB_SKIPPED = frozenset(
    # The last two hold character tables and one long string, not code.
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
COMPRESSIONS = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".bgz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
}
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".parquet": "parquet", ".pq": "parquet"}

# The reasons why something that a source names is not read.
HIDDEN = "hidden files and directories"
SPECIAL = "pipes, sockets and devices"
GLOBBED_DIRECTORIES = "directories that a glob matches (** descends)"
REPEATED_DIRECTORIES = "links to a directory that is read already"
WITHOUT_ROWS = "files without any row"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read.

    `name` is for people and can always be encoded as UTF-8. `num_bytes` is the stored size, compressed or not.
    """

    name: str
    filesystem: Any
    path: str
    num_bytes: int

    def open(self) -> BufferedIOBase:
        """Open the stored bytes.

        Raises the errors of the file system, and ConfigError for a file outside the paths of GRADSTREAM_PATHS.
        """
        if is_local(self.filesystem):  # fsspec would resolve ".." in the text, without following links
            return cast(BufferedIOBase, open_local(self.path))
        return cast(BufferedIOBase, self.filesystem.open(self.path, "rb"))

    @property
    def _stem_and_compression(self) -> tuple[str, str | None]:
        stem, suffix = os.path.splitext(self.path.lower())
        return (stem, COMPRESSIONS[suffix]) if suffix in COMPRESSIONS else (self.path.lower(), None)

    @property
    def compression(self) -> str | None:
        """The compression by the file's name."""
        return self._stem_and_compression[1]

    @property
    def suffix(self) -> str:
        """The name's suffix in lower case, without a compression's suffix: ".json" for a.JSON.gz."""
        return os.path.splitext(self._stem_and_compression[0])[1]

    @property
    def kind(self) -> str:
        """The kind by the file's name: "jsonl", "parquet" or "text"."""
        return KINDS.get(self.suffix, "text")


@dataclass(slots=True)
class FoundFiles:
    """The files of sources, in reading order. `left_out` counts the files that are not read, by reason."""

    files: list[SourceFile] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    num_repeated: int = 0
    """number of files that are links to an earlier file; their documents are read again"""


def open_filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path inside it. Raises ConfigError when there is none."""
    from fsspec.core import url_to_fs

    check_scheme(path)
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
    """The list of files that `find_files` finds."""
    return find_files(sources).files


def find_files(sources: Iterable[str]) -> FoundFiles:
    """Find all files that `sources` name.

    Hidden files below a directory are left out. A glob matches as in a shell: `**` descends, and only a pattern that
    begins with a dot matches a hidden name. A hidden file or directory that the user names is read.

    Raises ConfigError when a source names no file, for a broken link, and for a directory that cannot be listed.
    """
    found = FoundFiles()
    seen: dict[tuple[Any, str], SourceFile] = {}
    identities: set[tuple[int, int]] = set()
    for source in sources:
        left_out: Counter[str] = Counter()
        files = list(_stdlib_files() if source == STDLIB else _files_of(source, left_out))
        if not files:
            raise ConfigError(
                f"source '{source}' matches no file{_left_out_note(left_out)}; correct the path or remove it"
            )
        found.left_out += left_out
        for file in files:
            key = (file.filesystem, file.path)  # two archives may hold files of the same name
            if key in seen:
                continue
            seen[key] = file
            if is_local(file.filesystem):
                status = os.stat(file.path)
                identity = (status.st_dev, status.st_ino)
                found.num_repeated += identity in identities
                identities.add(identity)
    found.files = list(seen.values())
    return found


def _left_out_note(left_out: Counter[str]) -> str:
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items()) if count)
    return f" (left out: {counts})" if counts else ""


def _files_of(source: str, left_out: Counter[str]) -> Iterator[SourceFile]:
    if not source.strip():
        raise ConfigError("a source is empty; name a file, a glob or a directory")
    path = os.path.expanduser(source)
    if not os.path.lexists(path):  # an existing name is a path, even if it looks like a URL
        filesystem, inner = open_filesystem(source)
        if not is_local(filesystem):
            yield from _remote_files(source, filesystem, inner, left_out)
            return
        path = inner if re.match(r"(file|local):", path) else path
    from fsspec.implementations.local import LocalFileSystem

    filesystem = LocalFileSystem()
    try:
        paths = sorted({_absolute(found) for found in _local_paths(path, left_out)})
        for found in paths:
            yield SourceFile(public_text(found), filesystem, found, os.stat(found).st_size)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"source '{public_text(source)}' cannot be listed ({one_line(error)}); check the path and the rights"
        ) from None


def _absolute(path: str) -> str:
    """An absolute path, with links followed before each ".."."""
    joined = os.path.join(os.getcwd(), path)
    plain = os.path.normpath(joined)
    return plain if ".." not in joined.split("/") or os.path.realpath(plain) == os.path.realpath(joined) else joined


def _local_paths(path: str, left_out: Counter[str]) -> Iterator[str]:
    """The files that a local path or glob names. Raises ConfigError and OSError."""
    if os.path.lexists(path):
        status = _status(path)
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(path, left_out)
        elif stat.S_ISREG(status.st_mode):
            yield path
        else:
            raise ConfigError(f"{path} is a pipe or a device, which cannot be read twice; write it to a file")
    elif any(map(_is_pattern, path.split("/"))):
        root = "/" if path.startswith("/") else ""
        yield from _glob(root, [part for part in path.split("/") if part not in ("", ".")], left_out)


def _is_pattern(part: str) -> bool:
    return any(character in part for character in "*?[")


def _status(path: str) -> os.stat_result:
    """The status of a path, links followed. Raises ConfigError for a broken link."""
    try:
        return os.stat(path)
    except OSError as error:
        if not os.path.islink(path):
            raise
        raise ConfigError(
            f"{path} is a link to {os.readlink(path)}, which cannot be reached ({error.strerror}); restore the file "
            f"or remove the link"
        ) from None


def _entries(folder: str) -> list[str]:
    return sorted(os.listdir(folder or "."))


def _directories(folder: str, left_out: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """A directory and all directories below it, each with its entries. Hidden ones count only if `folder` is hidden.

    Each directory comes once, by its own path before any link to it. Circles of links therefore end.
    """
    seen: set[tuple[int, int]] = set()
    plain, links = deque([folder]), deque[str]()
    while plain or links:
        path = plain.popleft() if plain else links.popleft()
        status = _status(path or ".")
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            left_out[REPEATED_DIRECTORIES] += 1
            continue
        seen.add(identity)
        names = _entries(path)
        yield path, names
        for name in names:
            inner = os.path.join(path, name)
            if not name.startswith(".") and os.path.isdir(inner):
                (links if os.path.islink(inner) else plain).append(inner)


def _walk(folder: str, left_out: Counter[str]) -> Iterator[str]:
    """All files below a directory except hidden ones."""
    for directory, names in _directories(folder, left_out):
        for name in names:
            if name.startswith("."):
                left_out[HIDDEN] += 1
                continue
            path = os.path.join(directory, name)
            mode = _status(path).st_mode
            if stat.S_ISREG(mode):
                yield path
            elif not stat.S_ISDIR(mode):
                left_out[SPECIAL] += 1


def _glob(folder: str, parts: list[str], left_out: Counter[str]) -> Iterator[str]:
    """The files below `folder` that the parts of a pattern match."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        while rest and rest[0] == "**":
            rest = rest[1:]
        if not rest:
            yield from _walk(folder, left_out)
            return
        for directory, names in _directories(folder, left_out):
            left_out[HIDDEN] += sum(
                name.startswith(".") and os.path.isdir(os.path.join(directory, name)) for name in names
            )
            yield from _glob(directory, rest, left_out)
        return
    # An existing name is taken literally: [odd] may be a directory of that name.
    if not _is_pattern(part) or os.path.lexists(os.path.join(folder, part)):
        names = [part] if os.path.lexists(os.path.join(folder, part)) else []
    else:
        matching = [name for name in _entries(folder) if fnmatchcase(name, part)]
        names = [name for name in matching if part.startswith(".") or not name.startswith(".")]
        left_out[HIDDEN] += 0 if rest else len(matching) - len(names)
    for name in names:
        path = os.path.join(folder, name)
        if rest:
            if os.path.isdir(path):
                yield from _glob(path, rest, left_out)
            continue
        mode = _status(path).st_mode
        if stat.S_ISREG(mode):
            yield path
        else:
            left_out[GLOBBED_DIRECTORIES if stat.S_ISDIR(mode) else SPECIAL] += 1


def _remote_files(source: str, filesystem: Any, path: str, left_out: Counter[str]) -> Iterator[SourceFile]:
    """The files that a source on a remote file system or in an archive names."""
    pattern: list[str] = []
    try:
        if filesystem.isdir(path):
            listing = filesystem.find(path, detail=True)
            root = path.rstrip("/") + "/"
        elif filesystem.exists(path):
            listing, root = {path: filesystem.info(path)}, path
        elif _is_pattern(path):
            listing = filesystem.glob(path, detail=True)
            parts = path.split("/")
            fixed = next(number for number, part in enumerate(parts) if _is_pattern(part))
            root = "/".join(parts[:fixed]) + "/"
            pattern = [part for part in parts[fixed:] if part.startswith(".")]
        else:
            listing, root = {}, path
    except Exception as error:  # every fsspec backend raises its own kind
        raise ConfigError(
            f"source '{without_password(source)}' cannot be listed ({one_line(error)}); check the path and the rights"
        ) from None
    for name in sorted(listing):
        info = listing[name]
        inner = name.removeprefix(root).split("/") if name != path else []
        if any(part.startswith(".") and not any(fnmatchcase(part, known) for known in pattern) for part in inner):
            left_out[HIDDEN] += 1
        elif info.get("type") == "directory":
            left_out[GLOBBED_DIRECTORIES] += 1
        elif info.get("type") == "other":
            left_out[SPECIAL] += 1
        else:
            chain = without_password(source.partition("::")[2])  # the archive that holds the file
            label = public_text(str(filesystem.unstrip_protocol(name)))
            yield SourceFile(f"{label}::{chain}" if chain else label, filesystem, name, int(info.get("size") or 0))


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


def public_text(text: str) -> str:
    """`text` in a form that UTF-8 can encode: bytes of a file's name that are not UTF-8 are written as \\xe9."""
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair that does not stand for a byte of a name
        raw = text.encode("utf-8", "backslashreplace")
    return raw.decode("utf-8", "backslashreplace")


def without_password(source: str) -> str:
    """A source as public text: without the user and password of a URL, and encodable as UTF-8."""
    return re.sub(r"(?<=://)[^/@]*@", "", public_text(source))
