"""Files of a base on any file system: hashed once in a process, copied once if they are remote, read as safetensors.

Hash and copy of a file are cached by its size, change time and inode. A file that replaces it under the same name is
hashed and copied again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from gradstream.core.errors import CheckpointError, ConfigError, one_line
from gradstream.core.foreign import parsing
from gradstream.core.storage import files
from gradstream.core.storage.paths import AllowedPaths

SPARE_BYTES = 256 << 20
"""Bytes that a copy of a remote file must leave free on the disk of temporary files."""
MAX_SMALL_FILE_BYTES = 256 << 20
"""Largest file beside the weights that is read: tokenizers and configs."""

_lock = threading.RLock()
_digests: dict[str, tuple[object, str]] = {}
_copies: dict[str, tuple[object, str]] = {}
_directory: tempfile.TemporaryDirectory[str] | None = None


@dataclass(frozen=True, slots=True)
class Digest:
    """The size and hash of a file."""

    num_bytes: int
    sha256: str


def digest(path: str) -> Digest:
    """The size and hash of a file, which is read only if it has changed since this process last hashed it.

    Raises CheckpointError when the file cannot be read.
    """
    with _lock:
        try:
            state, num_bytes = _state(path)
            known = _digests.get(path)
            if known is None or known[0] != state:
                if files.is_local(path):
                    with files.open_file(path) as stream:
                        _digests[path] = (state, files.digest(stream))
                else:
                    _copy(path, state, num_bytes)
            return Digest(num_bytes, _digests[path][1])
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from None


def local_path(path: str) -> str:
    """The path at which this process can map a file: its own, or that of a copy that lasts as long as the process.

    Raises CheckpointError.
    """
    if files.is_local(path):
        return files.file_system(path)[1]
    with _lock:
        try:
            state, num_bytes = _state(path)
            known = _copies.get(path)
            if known is None or known[0] != state:
                _copy(path, state, num_bytes)
            return _copies[path][1]
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error})") from None


def read_small(directory: str, name: str) -> bytes:
    """Read a file beside the weights. Raises CheckpointError for an unreadable file, ConfigError for a large one."""
    path = files.join(directory, name)
    try:
        fs, inner = files.file_system(path)
        if fs.size(inner) > MAX_SMALL_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_SMALL_FILE_BYTES >> 20} MiB; get the right file")
        return files.read_bytes(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None


def read_json(directory: str, name: str) -> dict[str, Any]:
    """Read a JSON object beside the weights. Raises as `read_small`, and ConfigError when it is not a JSON object."""
    return _json_object(files.join(directory, name), read_small(directory, name))


def _json_object(path: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({one_line(error)}); get the file again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object; get the file again")
    return value


def is_there(directory: str) -> bool:
    """Whether a directory has files that this process may read."""
    try:
        AllowedPaths.of_environment().check("the base's tokenizer", directory)
        return bool(files.list_names(directory))
    except Exception:  # each fsspec backend raises its own error types
        return False


class SmallFiles:
    """The files beside the weights in one directory. If hashes were recorded, only the recorded files can be read."""

    def __init__(self, directory: str, recorded: Mapping[str, str] | None = None):
        """`recorded` has the hex sha256 of each file by its name, which may begin with a subdirectory."""
        self.directory = directory
        self._recorded = recorded

    def names(self, below: str = "") -> list[str]:
        """The names in the directory, or in its subdirectory `below`, sorted. Raises the errors of the file system."""
        if self._recorded is None:
            return files.list_names(files.join(self.directory, below) if below else self.directory)
        prefix = f"{below}/" if below else ""
        found = {name[len(prefix) :].partition("/")[0] for name in self._recorded if name.startswith(prefix)}
        return sorted(found)

    def read(self, name: str) -> bytes:
        """Read a file. Raises as `read_small`, and CheckpointError when it is not the recorded file."""
        if self._recorded is None:
            return read_small(self.directory, name)
        try:
            content = read_small(self.directory, name)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; restore the file") from None
        if hashlib.sha256(content).hexdigest() != self._recorded.get(name):
            raise CheckpointError(
                f"{files.join(self.directory, name)} has changed since the base was found; restore the file, or begin "
                f"again with the base as it is"
            )
        return content

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object. Raises as `read`, and ConfigError when it is not a JSON object."""
        return _json_object(files.join(self.directory, name), self.read(name))

    def hashes(self, names: Iterable[str]) -> dict[str, str]:
        """The hashes of these files, to be recorded. Raises as `read`."""
        return {name: hashlib.sha256(self.read(name)).hexdigest() for name in names}


def open_safetensors(path: str, expected: Digest | None = None) -> Any:
    """Map a safetensors file into memory, with tensors of torch. With `expected`, the file must have that digest.

    Raises CheckpointError for any other file, and ConfigError as `files.open_file`.
    """
    from safetensors import safe_open

    def refused(cause: str) -> CheckpointError:
        return CheckpointError(
            f"{path} is truncated or not a safetensors file ({cause}); get the file again from where it came from"
        )

    local = local_path(path)
    if not files.is_local(path):
        with parsing(refused):
            return safe_open(local, framework="pt")
    # The path may lead to another file by now: map the descriptor that was checked and hashed.
    try:
        with files.open_local(local) as stream:
            if expected is not None and _digest_of(path, stream) != expected.sha256:
                raise CheckpointError(f"{path} has changed since it was verified; restore the file")
            with parsing(refused):
                return safe_open(f"/proc/self/fd/{stream.fileno()}", framework="pt")
    except OSError as error:
        raise refused(str(error)) from None


def _state(path: str) -> tuple[object, int]:
    """A value that changes whenever the file changes, and the file's size in bytes."""
    fs, inner = files.file_system(path)
    if files.is_local(path):
        status = os.stat(inner)
        return _local_state(status), status.st_size
    fs.invalidate_cache()
    info = fs.info(inner)
    return str(sorted(info.items(), key=lambda item: item[0])), int(info["size"])


def _local_state(status: os.stat_result) -> object:
    # The change time is included because, unlike the modification time, it cannot be set back.
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _digest_of(path: str, stream: BinaryIO) -> str:
    """The hash of an open local file; the cached hash of `path`, if `path` is the opened file."""
    with _lock:
        known = _digests.get(path)
    return known[1] if known and known[0] == _local_state(os.fstat(stream.fileno())) else files.digest(stream)


def _copy(path: str, state: object, num_bytes: int) -> None:
    """Copy and hash a remote file in one pass, and remove an older copy of it."""
    global _directory
    if _directory is None:
        _directory = tempfile.TemporaryDirectory(prefix="gradstream-base-", ignore_cleanup_errors=True)
    stale = _copies.pop(path, None)
    if stale is not None:
        os.unlink(stale[1])
    free = shutil.disk_usage(_directory.name).free
    if free < num_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"{path} has {num_bytes} bytes, and {_directory.name}, where it would be copied to, has {free} free; "
            f"set TMPDIR to a larger disk"
        )
    sha256 = hashlib.sha256()
    handle, local = tempfile.mkstemp(suffix=".safetensors", dir=_directory.name)
    copied = 0
    with os.fdopen(handle, "wb") as stream:
        for piece in files.pieces(path):
            copied += len(piece)
            if copied > num_bytes:
                break  # the file has grown: never write more than the free space was checked for
            sha256.update(piece)
            stream.write(piece)
    if copied != num_bytes:
        os.unlink(local)
        raise CheckpointError(f"{path} changed while it was read; try again when no process writes to it")
    _digests[path] = (state, sha256.hexdigest())
    _copies[path] = (state, local)
