"""Small local files that hold secrets: read with a limit, written whole or not at all and for their owner alone."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from gradstream.core.errors import ConfigError


def read_private(path: Path, most_bytes: int) -> bytes:
    """A whole file of at most `most_bytes`.

    Raises FileNotFoundError when there is none, and ConfigError when it is no file, too large or cannot be read.
    """
    try:
        # Not blocking: a pipe in the place of the file must not hang the reader.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{path} is not a file; remove it")
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


def write_private(directory: Path, contents: Mapping[str, bytes], mode: int = 0o600) -> None:
    """Write files of these names into `directory`, made (0700) if need be, each whole or not at all.

    All are on the disk before the first takes its place, so that others see old and new beside each other for
    microseconds only. Where root writes into the directory of another user, the files are that user's.
    Raises ConfigError when it cannot be done.
    """
    temporary = {name: directory / f".{name}.tmp-{os.getpid()}-{secrets.token_hex(4)}" for name in contents}
    try:
        make_private_directory(directory)
        for name, content in contents.items():
            _write_synced(temporary[name], content, mode, directory.stat())
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
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=0o700, exist_ok=True)


def readable_by_others(path: Path) -> bool:
    """Whether anybody but the owner may read a file; False when it is not there."""
    try:
        return bool(path.stat().st_mode & 0o077)
    except OSError:
        return False


def _write_synced(path: Path, content: bytes, mode: int, directory: os.stat_result) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as stream:
        if os.geteuid() == 0 and directory.st_uid != 0:
            os.fchown(descriptor, directory.st_uid, directory.st_gid)
        stream.write(content)
        stream.flush()
        os.fsync(descriptor)
