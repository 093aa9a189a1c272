"""Paths on any fsspec file system: the few operations that checkpoints need, atomic where the file system allows it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gradstream.core.errors import CheckpointError, ConfigError, DataError
from gradstream.core.storage.paths import AllowedPaths, check_scheme

PIECE_BYTES = 1 << 20
MAX_READ_BYTES = 1 << 30
"""Of a file that is read as a whole: manifests, tokenizers."""
MAX_KNOWN = 4096
"""Files whose hash is remembered."""

RACY_SECONDS = 2.0
Identity = tuple[int, int, int, int, int]
"""Device, inode, size, times of modification and change in ns: the content is another where any of them is."""

_known: OrderedDict[Identity, str] = OrderedDict()
_known_lock = threading.Lock()


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path and the path inside it. Raises ConfigError for a URL that this service must not
    open."""
    import fsspec  # not above: commands that read no data must not wait for the import

    check_scheme(path)
    fs, inner = fsspec.core.url_to_fs(path)
    return fs, str(inner)


def is_local(path: str) -> bool:
    """Whether the path is on a file system mounted here."""
    protocol = file_system(path)[0].protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def join(directory: str, *names: str) -> str:
    """Join path parts, for URLs as for local paths."""
    return "/".join([directory.rstrip("/"), *names])


def make_directory(path: str) -> None:
    """Make a directory and its parents; nothing happens when it is there. New ones outlive a power failure."""
    fs, inner = file_system(path)
    if is_local(path):
        make_local_directory(Path(inner))
    else:
        fs.makedirs(inner, exist_ok=True)


def make_local_directory(path: Path, exist_ok: bool = True) -> None:
    """Make a directory and its missing parents, each noted durably in the directory that it is in.

    Raises FileExistsError when it is there and `exist_ok` is false, or when it is no directory.
    """
    if path.parent != path and not path.parent.is_dir():
        make_local_directory(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        if not exist_ok or not path.is_dir():
            raise
        return
    sync_directory(path.parent)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Flush a local directory's entries to the disk: a new file or directory in it is there after a power failure."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def size_of(path: str) -> int | None:
    """Bytes of a file; None when it is not there. Raises OSError when that cannot be found out."""
    fs, inner = file_system(path)
    try:
        # An object store's listing may be an old one.
        fs.invalidate_cache()
        return int(fs.size(inner))
    except (FileNotFoundError, NotADirectoryError):
        return None


def list_names(directory: str) -> list[str]:
    """Names in a directory, sorted; empty when it does not exist."""
    fs, inner = file_system(directory)
    try:
        return sorted(str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(inner, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def open_file(path: str) -> BinaryIO:
    """Open a file to read it. Raises as `open_local` where it is on a file system of this machine, else what its file
    system raises, and ConfigError for a URL that this service must not open."""
    fs, inner = file_system(path)
    return open_local(inner) if is_local(path) else fs.open(inner, "rb")


def open_local(path: str) -> BinaryIO:
    """Open a regular file of this machine to read it: a pipe would be waited for, and a device has no end.

    Raises OSError, and ConfigError when the file lies where GRADSTREAM_PATHS does not allow, links followed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        AllowedPaths.of_environment().check_opened(path, descriptor)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_verified(path: str, sha256: str, num_bytes: int | None = None) -> BinaryIO:
    """As `open_file`, for a file whose hash, and size if given, were recorded; at its beginning. What is on another
    file system is read twice.

    Raises OSError, ConfigError, and DataError when the file is not the one that was recorded.
    """
    stream = open_file(path)
    try:
        found = digest(stream)
        size = stream.seek(0, os.SEEK_END)
        if found != sha256 or num_bytes not in (None, size):
            raise DataError(
                f"{path} is not the file that was recorded (sha256 {found[:12]}… of {size} bytes, not {sha256[:12]}…); "
                f"restore it, or prepare the data again"
            )
        stream.seek(0)
        return stream
    except BaseException:
        stream.close()
        raise


def read_verified(path: str, sha256: str) -> bytes:
    """A whole file whose hash was recorded. Raises as `open_verified`, and OSError for more than MAX_READ_BYTES."""
    with open_verified(path, sha256) as stream:
        return _whole(stream)


def digest(stream: Any) -> str:
    """Hex sha256 of an open file, which is at its beginning; computed once for as long as a local file is as it was."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, AttributeError, ValueError):  # not a file of this machine
        return hashlib.file_digest(stream, "sha256").hexdigest()
    key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    with _known_lock:
        found = _known.get(key)
    if found is None:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
        if abs(time.time() - status.st_ctime) < RACY_SECONDS:
            return found  # a file system's clock is coarse: one more change might leave the times as they are
        with _known_lock:
            _known[key] = found
            while len(_known) > MAX_KNOWN:
                _known.popitem(last=False)
    return found


def read_bytes(path: str) -> bytes:
    """A whole file. Raises FileNotFoundError, or OSError, also for one of more than MAX_READ_BYTES; ConfigError as
    `open_file`."""
    with open_file(path) as stream:
        return _whole(stream)


def _whole(stream: BinaryIO) -> bytes:
    data = stream.read(MAX_READ_BYTES + 1)
    if len(data) > MAX_READ_BYTES:
        raise OSError(errno.EFBIG, f"it has more than {MAX_READ_BYTES >> 20} MiB")
    return data


def pieces(path: str) -> Iterator[bytes]:
    """A file in pieces of 1 MiB. Raises as `open_file`."""
    with open_file(path) as stream:
        while piece := stream.read(PIECE_BYTES):
            yield piece


async def directory_pieces(directory: Path) -> AsyncIterator[tuple[str, int, bytes]]:
    """The files of a local directory, in order of their names, as (name, bytes of the whole file, a piece of 1 MiB).

    An empty file has one empty piece.
    """
    for path in sorted(directory.iterdir()):
        num_bytes = path.stat().st_size
        stream = await asyncio.to_thread(path.open, "rb")
        try:
            piece = await asyncio.to_thread(stream.read, PIECE_BYTES)
            yield path.name, num_bytes, piece
            while piece and (piece := await asyncio.to_thread(stream.read, PIECE_BYTES)):
                yield path.name, num_bytes, piece
        finally:
            stream.close()


def sha256(path: str) -> str:
    """Lower-case hex sha256 of a file. Raises as `open_file`."""
    with open_file(path) as stream:
        return digest(stream)


def write_atomic(path: str, write: Callable[[BinaryIO], object], judged: bool = False) -> None:
    """Write a file so that it is there whole or not at all: temporary file, fsync, rename.

    On object stores a file appears when its upload is complete, which is the same promise. Raises OSError; of a path
    that is `judged`, which others named, also where the file would lie where GRADSTREAM_PATHS does not allow: a link
    may have been put in its place since it was checked.
    """
    fs, inner = file_system(path)
    if not is_local(path):
        with fs.open(inner, "wb") as stream:
            write(stream)
        return
    temporary = f"{inner}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with open(temporary, "wb") as stream:
            if judged:
                _judge(path, stream)
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, inner)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    sync_directory(os.path.dirname(inner) or ".")


def _judge(path: str, stream: BinaryIO) -> None:
    try:
        AllowedPaths.of_environment().check_opened(path, stream.fileno())
    except ConfigError as error:
        raise PermissionError(errno.EACCES, str(error)) from None


@contextlib.contextmanager
def whole_directory(destination: Path) -> Iterator[Path]:
    """A local directory to fill, which becomes `destination` when the body is done, and never was when it fails.

    Raises CheckpointError when `destination` is not empty or cannot be written.
    """
    try:
        if destination.exists() and any(destination.iterdir()):
            raise CheckpointError(f"{destination} is not empty; choose another directory or remove it")
        make_local_directory(destination.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
        try:
            yield temporary
            if destination.exists():
                destination.rmdir()
            temporary.chmod(0o755)
            os.replace(temporary, destination)
            sync_directory(destination.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written ({error}); choose another directory") from None


def remove(path: str) -> None:
    """Remove a file or a whole directory; nothing happens when it is not there."""
    fs, inner = file_system(path)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(inner, recursive=True)
