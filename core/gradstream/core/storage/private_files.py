"""Small local files that hold secrets: read with a limit, written whole or not at all and for their owner alone."""

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


def read_private(path: Path, most_bytes: int) -> bytes:
    """A whole file of at most `most_bytes`.

    Raises FileNotFoundError when there is none, and ConfigError when it is no file, too large or cannot be read.
    """
    try:
        # Asked first, and opened without blocking: a pipe in the place of the file must not hang the reader.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"{path} is not a file; remove it")
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
            data = stream.read(most_bytes + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(str(path)) from None
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); let user {os.geteuid()} read it, or choose another directory"
        ) from None
    if len(data) > most_bytes:
        raise ConfigError(f"{path} has more than {most_bytes} bytes; that is not what it should be")
    return data


def read_together(directory: Path, names: Sequence[str], most_bytes: int) -> dict[str, bytes]:
    """Files of a directory, all from before or all from after a `write_private` that goes on meanwhile.

    Raises FileNotFoundError, whose `filename` is the name of the one that is missing, and ConfigError.
    """
    contents: dict[str, bytes] = {}
    with _locked(directory, fcntl.LOCK_SH):
        for name in names:
            try:
                contents[name] = read_private(directory / name, most_bytes)
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None
    return contents


def write_private(directory: Path, contents: Mapping[str, bytes], mode: int = 0o600) -> None:
    """Write files of these names into `directory`, made (0700) if need be, each whole or not at all.

    All are on the disk before the first takes its place, and `read_together` never sees some old and some new. Where
    root writes into the directory of another user, the files are that user's.
    Raises ConfigError when it cannot be done.
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
    """Make a directory that only its owner may enter, and its parents; one that is there stays as it is.

    Raises OSError.
    """
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory)) from None


def readable_by_others(path: Path) -> bool:
    """Whether anybody but the owner may read a file; False when it is not there."""
    try:
        return bool(path.stat().st_mode & 0o077)
    except OSError:
        return False


@contextlib.contextmanager
def _locked(directory: Path, kind: int) -> Iterator[None]:
    """Hold a lock on the directory itself, which needs no right to write there.

    It is held for as long as a few small files take. Where it cannot be had it is done without: on a file system that
    has no locks, or when another has held it for a second, which nothing of ours does.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # which reading or writing the files says better
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
