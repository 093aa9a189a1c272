"""Writers of a data set: the directory, which appears whole or not at all, and its data shards."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal

from gradstream.core.data.manifest import MANIFEST_NAME, DataShard, Manifest
from gradstream.core.data.sources import is_local, open_filesystem
from gradstream.core.errors import ConfigError, DataError, GradstreamError, one_line

Split = Literal["train", "validation"]
CURES = {
    errno.ENOSPC: "free some space or choose another path",
    errno.EDQUOT: "free some space or choose another path",
    errno.EMFILE: "prepare fewer data shards or raise `ulimit -n`",
}


class HashingFile:
    """A file being written, with the sha256 and the size of the bytes written so far."""

    def __init__(self, handle: Any, sync: bool):
        self._handle = handle
        self._sync = sync
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> None:
        self._handle.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)

    def close(self) -> str:
        """Finish the file, flush it to the disk if it is local, and return its sha256."""
        if self._sync:
            self._handle.flush()
            os.fsync(self._handle.fileno())
        self._handle.close()
        return self._hash.hexdigest()

    def discard(self) -> None:
        """Close the file and ignore errors: the file is about to be removed."""
        try:
            # An upload to an object store is aborted, not completed.
            getattr(self._handle, "discard", self._handle.close)()
        except Exception:  # the error that led here is the one to show
            pass


class Output:
    """The directory of a new data set, as a context manager. Without `publish`, leaving it removes all files.

    On a local path the files are written to a sibling directory, which is renamed into place. Other file systems have
    no atomic rename: files are written in place, and the manifest last. Without a manifest there is no data set.

    Raises ConfigError when the path cannot be written, is taken, or holds a data set and `force` is not given.
    """

    def __init__(self, out: str, force: bool = False):
        self._out = out
        self._force = force
        self._filesystem, path = open_filesystem(out)
        self._path = path.rstrip("/")
        self._local = is_local(self._filesystem)
        self._staging = self._path
        self._files: list[tuple[str, HashingFile]] = []
        self._published = False

    def __enter__(self) -> Output:
        with self._explained(ConfigError):
            self._check_free()
            if self._local:
                os.makedirs(os.path.dirname(self._path), exist_ok=True)
                self._staging = f"{self._path}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
                os.mkdir(self._staging)
            else:
                if self._force and self._filesystem.exists(f"{self._path}/{MANIFEST_NAME}"):
                    # The old manifest goes first: it must never stand over new data shards.
                    self._filesystem.rm_file(f"{self._path}/{MANIFEST_NAME}")
                self._filesystem.makedirs(self._path, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._published:
            self._abort()

    def create(self, name: str) -> HashingFile:
        """Start the file `name`. Raises DataError when it cannot be written."""
        with self.explained():
            path = f"{self._staging}/{name}"
            handle = self._filesystem.open(path, "wb")
            file = HashingFile(handle, sync=self._local)
            self._files.append((path, file))
            return file

    def publish(self, manifest: Manifest) -> None:
        """Write the manifest as the last file, and move the data set into place. Raises DataError."""
        file = self.create(MANIFEST_NAME)
        with self.explained():
            file.write(manifest.model_dump_json(indent=1).encode("utf-8") + b"\n")
            file.close()
            if self._local:
                _sync_directory(self._staging)
                self._rename_into_place()
            self._published = True

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn an error while writing into a DataError with one line."""
        with self._explained(DataError):
            yield

    @contextmanager
    def _explained(self, kind: type[GradstreamError]) -> Iterator[None]:
        try:
            yield
        except GradstreamError:
            raise
        except Exception as error:  # each fsspec backend raises its own error types
            cure = CURES.get(getattr(error, "errno", None) or 0, "choose a path that can be written")
            raise kind(f"cannot write the data set to {self._out} ({one_line(error)}); {cure}") from None

    def _check_free(self) -> None:
        if not self._filesystem.exists(self._path):
            return
        if self._filesystem.exists(f"{self._path}/{MANIFEST_NAME}"):
            if not self._force:
                raise ConfigError(
                    f"{self._out} already holds a data set; choose another path or replace it with --force"
                )
        elif not self._filesystem.isdir(self._path) or self._filesystem.ls(self._path):
            # Even --force does not remove a directory that gradstream did not make.
            raise ConfigError(f"{self._out} exists and is not a data set; choose another path or remove it")

    def _rename_into_place(self) -> None:
        self._check_free()  # again: another process may have made the directory meanwhile
        old = None
        if os.path.exists(f"{self._path}/{MANIFEST_NAME}"):
            # A directory cannot be renamed onto a full one.
            old = f"{self._path}.old-{secrets.token_hex(4)}"
            os.rename(self._path, old)
        try:
            os.rename(self._staging, self._path)
        except OSError:
            if old:
                os.rename(old, self._path)
            raise
        _sync_directory(os.path.dirname(self._path))
        if old:
            shutil.rmtree(old, ignore_errors=True)

    def _abort(self) -> None:
        for _, file in self._files:
            file.discard()
        if self._local:
            shutil.rmtree(self._staging, ignore_errors=True)
            return
        for path, _ in self._files:
            try:
                self._filesystem.rm_file(path)
            except Exception:  # missing, or not removable: the first error is the one to show
                pass
        try:
            self._filesystem.rmdir(self._path)
        except Exception:
            pass


class ShardWriter:
    """A token file and its index, number `number` of a split."""

    def __init__(self, output: Output, split: Split, number: int):
        self._name = f"{split}-{number:05d}"
        self._split: Split = split
        self._tokens = output.create(f"{self._name}.tokens")
        self._index = output.create(f"{self._name}.index")
        self._num_tokens = 0
        self._num_documents = 0

    def add(self, data: bytes, num_tokens: int, offsets: Sequence[int] = (0,)) -> None:
        """Append `data`, which holds `num_tokens` tokens and documents that begin at `offsets`, in tokens."""
        self._index.write(b"".join(struct.pack("<Q", self._num_tokens + offset) for offset in offsets))
        self._tokens.write(data)
        self._num_tokens += num_tokens
        self._num_documents += len(offsets)

    def close(self) -> DataShard:
        """Finish both files and return their entry for the manifest."""
        self._index.write(struct.pack("<Q", self._num_tokens))
        return DataShard(
            file=f"{self._name}.tokens",
            index_file=f"{self._name}.index",
            split=self._split,
            num_tokens=self._num_tokens,
            num_documents=self._num_documents,
            num_bytes=self._tokens.num_bytes,
            sha256=self._tokens.close(),
            index_sha256=self._index.close(),
        )


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
