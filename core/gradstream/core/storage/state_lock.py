"""The lock of a state directory, which one process holds at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from gradstream.core.errors import ConfigError
from gradstream.core.storage import files


def lock_directory(directory: Path, role: str) -> IO[str]:
    """Lock a state directory until the returned file is closed or the process ends. Makes the directory if missing.

    Raises ConfigError when another process holds the lock, which the message calls a `role`, or when the directory
    cannot be written.
    """
    path = directory / "lock"
    try:
        files.make_local_directory(directory)
        lock = path.open("a+")
    except OSError as error:
        raise ConfigError(f"the state directory {directory} cannot be written ({error}); choose another") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise ConfigError(
            f"another {role} (process {holder}) holds the state directory {directory}; stop it or choose another"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock
