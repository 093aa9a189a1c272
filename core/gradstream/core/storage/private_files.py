"""Small local files that hold secrets: read with a size limit, written atomically, readable by their owner alone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gradstream.core.errors import ConfigError

_LOCK_SECONDS = 1.0
_LOCK_PAUSE_SECONDS = 0.001


def read_private(path: Path, max_bytes: int) -> bytes:
    """Read a whole file of at most `max_bytes`.

    Raises FileNotFoundError when there is none, and ConfigError when it is not a regular file, too large or unreadable.
    """
    try:
        # The type is checked first, and the file opened without blocking: a pipe in its place must not hang the reader.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"{path} is not a file; remove it")
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
            data = stream.read(max_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(str(path)) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); let user {os.geteuid()} read it, or choose another directory"
        ) from None
    if len(data) > max_bytes:
        raise ConfigError(f"{path} has more than {max_bytes} bytes, which gradstream never writes; restore the file")
    return data


def read_together(directory: Path, names: Sequence[str], max_bytes: int) -> dict[str, bytes]:
    """Read files of a directory, all from before or all from after a concurrent `write_private`.

    Raises FileNotFoundError, whose `filename` is the name of the missing file, and ConfigError.
    """
    contents: dict[str, bytes] = {}
    with _locked(directory, fcntl.LOCK_SH):
        for name in names:
            try:
                contents[name] = read_private(directory / name, max_bytes)
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None
    return contents


def write_private(directory: Path, contents: Mapping[str, bytes], mode: int = 0o600) -> None:
    """Write the files of `contents` into `directory` atomically. Makes the directory (0700) if it is missing.

    All files are on the disk before the first one is renamed into place, and `read_together` never sees old and new
    files mixed. Where root writes into another user's directory, the files belong to that user. Raises ConfigError when
    a file cannot be written.
    """
    temporary = {name: directory / f".{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}" for name in contents}
    try:
        make_private_directory(directory)
        for name, content in contents.items():
            _write_synced(temporary[name], content, mode, directory.stat())
        with _locked(directory, fcntl.LOCK_EX):
            for name in contents:
                os.replace(temporary[name], directory / name)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written ({error.strerror}); let user {os.geteuid()} write it, or choose another"
        ) from None
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()


def make_private_directory(directory: Path) -> None:
    """Make a directory that only its owner may enter, and its parents. An existing directory keeps its mode.

    Raises OSError.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory)) from None


def readable_by_others(path: Path) -> bool:
    """Whether others than the owner have any right to a file; False when there is no such file."""
    try:
        return bool(path.stat().st_mode & 0o077)
    except OSError:
        return False


@contextlib.contextmanager
def _locked(directory: Path, kind: int) -> Iterator[None]:
    """Hold a lock on the directory itself, which needs no right to write there.

    The lock is held only while a few small files are read or written. If it cannot be taken, the block runs without it:
    on a file system without locks, or when another process has held the lock for a second, which gradstream never does.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # reading or writing the files gives a better message
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            held.callback(os.close, descriptor)
            _try_lock(descriptor, kind)
        yield


def _try_lock(descriptor: int, kind: int) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_SECONDS)


def _write_synced(path: Path, content: bytes, mode: int, directory: os.stat_result) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as stream:
        if os.geteuid() == 0 and directory.st_uid != 0:
            os.fchown(descriptor, directory.st_uid, directory.st_gid)
        stream.write(content)
        stream.flush()
        os.fsync(descriptor)
