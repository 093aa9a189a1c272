"""File operations on any fsspec file system, atomic where the file system allows it."""

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
from gradstream.core.storage.direct import DirectStream
from gradstream.core.storage.paths import AllowedPaths, check_scheme

PIECE_BYTES = 1 << 20
MAX_READ_BYTES = 1 << 30
"""Largest file that is read as a whole, such as a manifest or a tokenizer."""
MAX_KNOWN = 4096
"""Number of files whose hashes are cached."""

RACY_SECONDS = 2.0
Identity = tuple[int, int, int, int, int]
"""Device, inode, size, modification time and change time in ns. A file whose content changed differs in one of them."""

_known: OrderedDict[Identity, str] = OrderedDict()
_known_lock = threading.Lock()


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path inside it.

    Raises ConfigError for a URL that this service must not open.
    """
    import fsspec  # imported here: commands that read no data must not wait for the import

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
    """Make a directory and its parents unless they exist. New local directories survive a power failure."""
    fs, inner = file_system(path)
    if is_local(path):
        make_local_directory(Path(inner))
    else:
        fs.makedirs(inner, exist_ok=True)


def make_local_directory(path: Path, exist_ok: bool = True) -> None:
    """Make a directory and its missing parents, and flush each new entry to the disk.

    Raises FileExistsError when the directory exists and `exist_ok` is false, or when the path is not a directory.
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
    """Flush a local directory's entries to the disk: new files and directories in it survive a power failure."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def size_of(path: str) -> int | None:
    """Size of a file in bytes; None when there is no such file. Raises OSError when the size cannot be read."""
    fs, inner = file_system(path)
    try:
        # fsspec may have cached an old listing of an object store.
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
    """Open a file for reading.

    Raises as `open_local` for a local file, the errors of the file system for any other, and ConfigError for a URL that
    this service must not open.
    """
    fs, inner = file_system(path)
    return open_local(inner) if is_local(path) else fs.open(inner, "rb")


def open_local(path: str) -> BinaryIO:
    """Open a regular local file for reading. Pipes, which could block the reader, and endless devices are refused.

    Raises OSError, and ConfigError when the file, links followed, lies outside the paths of GRADSTREAM_PATHS.
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
    """Open a file for reading and check its recorded hash, and its size if given. The stream is at its beginning.

    A file that is not local is read twice. Raises as `open_file`, and DataError when the file is not the recorded one.
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
    """Read a whole file and check its recorded hash.

    Raises as `open_verified`, and OSError for more than MAX_READ_BYTES.
    """
    with open_verified(path, sha256) as stream:
        return _whole(stream)


def digest(stream: Any) -> str:
    """Hex sha256 of an open file at its beginning. The hash of a local file is cached until the file changes."""
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
            return found  # a file system's clock is coarse: a further change might leave the times the same
        with _known_lock:
            _known[key] = found
            while len(_known) > MAX_KNOWN:
                _known.popitem(last=False)
    return found


def read_bytes(path: str) -> bytes:
    """Read a whole file.

    Raises FileNotFoundError, OSError, also for more than MAX_READ_BYTES, and ConfigError as `open_file`.
    """
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
    """The files of a local directory, sorted by name, in pieces: (name, size of the file, at most 1 MiB of content).

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


def write_atomic(path: str, write: Callable[[BinaryIO], object], judged: bool = False, large: bool = False) -> None:
    """Write a file atomically: temporary file, fsync, rename.

    On an object store a file appears once its upload is complete, which has the same effect. Set `judged` for a path
    that others named: the path is checked again when the file is open, because a link may have replaced a directory
    since the first check, and `large` for a file of many MiB (gradstream.core.storage.direct).

    Raises OSError, with `judged` also when the file would lie outside the paths of GRADSTREAM_PATHS.
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
            # O_DIRECT needs a file with nothing in its buffer, which a new file has.
            sink: Any = DirectStream(stream.fileno()) if large else stream
            write(sink)
            sink.flush()
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
    """A local directory to fill. It becomes `destination` when the block ends, and is removed when the block fails.

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
    """Remove a file or a whole directory if it exists."""
    fs, inner = file_system(path)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(inner, recursive=True)
