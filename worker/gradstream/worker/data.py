"""A slot's samples: the data shards of its group made available on this machine, verified, and read window by window.

Where the worker sees the data set on a local path, it reads the data shards in place. Otherwise it copies them to its
cache, from the fsspec path where it can reach that, else by `fetch` (from the coordinator). A cached file is named by
its sha256, so jobs and slots share it and a data set prepared anew cannot be confused with the old one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gradstream.core.data import DataShard, Manifest, SampleAddress, SlotSampler, slot_group
from gradstream.core.errors import DataError, GradstreamError, one_line

Split = Literal["train", "validation"]
Fetch = Callable[[str], AsyncIterator[bytes]]
BLOCK_BYTES = 1 << 20


class SlotReader:
    """Reads the samples of slot `slot` of `num_slots`: a pure function of (manifest, seed, step), whoever reads.

    `path`: the data set's directory, on any fsspec path. `cache_directory`: where copies go. `fetch`: streams the named
    file of the data set when `path` cannot be seen from here; None when there is nobody to ask.
    `sequence_length`: target tokens a sample.

    `prepare` must have ended before the first batch. The other methods are synchronous and may be called from threads.
    Raises DataError when the manifest contradicts itself or the slot's group has no sample.
    """

    def __init__(
        self,
        manifest: Manifest,
        path: str,
        cache_directory: str,
        slot: int,
        num_slots: int,
        sequence_length: int,
        seed: int,
        split: Split = "train",
        fetch: Fetch | None = None,
    ):
        self._sampler = SlotSampler(manifest, split, slot, num_slots, sequence_length, seed)
        self._dtype = np.dtype(manifest.token_dtype).newbyteorder("<")
        self._vocab_size = manifest.vocab_size
        self._sequence_length = sequence_length
        self._path = path
        self._cache_directory = cache_directory
        self._fetch = fetch
        used = set(self._sampler.files)
        self._shards = [shard for shard in slot_group(manifest, split, slot, num_slots) if shard.file in used]
        for shard in self._shards:
            if shard.num_bytes != shard.num_tokens * self._dtype.itemsize:
                raise DataError(
                    f"the manifest gives data shard {shard.file} {shard.num_bytes} bytes for {shard.num_tokens} tokens "
                    f"of {manifest.token_dtype}; prepare the data again"
                )
        self._descriptors: dict[str, int] = {}

    @property
    def num_samples(self) -> int:
        """Samples of the slot's group: the length of its epoch."""
        return self._sampler.num_samples

    async def prepare(self) -> None:
        """Make the slot's data shards available and verify size and sha256 of each, once a process and file.

        Raises DataError with the file, the cause and the cure. May be called again, for instance after an error.
        """
        for shard in self._shards:
            if shard.file not in self._descriptors:
                path = await self._locate(shard)
                self._descriptors[shard.file] = await asyncio.to_thread(_open, path, shard)

    def batch(self, step: int, count: int) -> npt.NDArray[np.int64]:
        """The slot's `count` samples of step `step`: token ids of shape (count, sequence_length + 1).

        Raises DataError when a data shard has become unreadable or holds an id outside the vocabulary.
        """
        return self._read(self._sampler.samples(step, count))

    def validation_batch(self, count: int) -> npt.NDArray[np.int64]:
        """The first `count` samples in stored order, or all if there are fewer: (n, sequence_length + 1).

        Raises DataError as `batch` does.
        """
        return self._read(self._sampler.first(count))

    def close(self) -> None:
        """Close the files. `prepare` opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _read(self, addresses: list[SampleAddress]) -> npt.NDArray[np.int64]:
        if len(self._descriptors) < len(self._shards):
            raise RuntimeError("SlotReader.prepare() has not been awaited")
        tokens = np.empty((len(addresses), self._sequence_length + 1), np.int64)
        size = tokens.shape[1] * self._dtype.itemsize
        for row, address in enumerate(addresses):
            # pread, not a memory map: if the file shrinks under us this is an error to show, where a map is a SIGBUS.
            begin = address.window * self._sequence_length
            try:
                raw = os.pread(self._descriptors[address.file], size, begin * self._dtype.itemsize)
            except OSError as error:
                raise DataError(
                    f"data shard {address.file} cannot be read ({one_line(error)}); restore the file"
                ) from None
            if len(raw) != size:
                raise DataError(
                    f"data shard {address.file} ends before token {begin + tokens.shape[1]}, it was truncated while in "
                    f"use; prepare the data again or restore the file"
                )
            tokens[row] = np.frombuffer(raw, self._dtype)
            largest = int(tokens[row].max())
            if largest >= self._vocab_size:
                raise DataError(
                    f"data shard {address.file} holds token id {largest} near token {begin}, outside the vocabulary of "
                    f"{self._vocab_size}; prepare the data again with the model's tokenizer"
                )
        return tokens

    async def _locate(self, shard: DataShard) -> str:
        """A verified local file with the shard's content."""
        filesystem, inner, local = await asyncio.to_thread(_file_system, self._path, shard.file)
        if local and await asyncio.to_thread(os.path.exists, inner):
            await asyncio.to_thread(_verify, inner, shard)
            return str(inner)
        cached = os.path.join(self._cache_directory, f"{shard.sha256}.tokens")
        if await asyncio.to_thread(_is_intact, cached, shard):
            return cached
        cause = "no such file"
        if filesystem is not None and not local:
            try:
                await asyncio.to_thread(_copy, filesystem, inner, cached, shard)
                return cached
            except GradstreamError:
                raise
            except Exception as error:  # every fsspec backend raises its own kind; the coordinator may see the file
                cause = one_line(error)
        if self._fetch is None:
            raise DataError(
                f"data shard {shard.file} cannot be read from {self._path} ({cause}); prepare the data again, restore "
                f"the file or mount the path on this worker"
            )
        await self._fetch_to(cached, shard, self._fetch)
        return cached

    async def _fetch_to(self, cached: str, shard: DataShard, fetch: Fetch) -> None:
        incoming = await asyncio.to_thread(_Incoming, cached, shard)
        try:
            async for block in fetch(shard.file):
                await asyncio.to_thread(incoming.write, block)
            await asyncio.to_thread(incoming.keep)
        finally:
            incoming.discard()


class _Incoming:
    """A data shard on its way into the cache: checked as it comes, there whole or not at all."""

    def __init__(self, path: str, shard: DataShard):
        self._path = path
        self._shard = shard
        # Another process may be fetching the same file: each writes its own, and the renames agree.
        self._temporary = f"{path}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        self._hash = hashlib.sha256()
        self._size = 0
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._handle = open(self._temporary, "wb")  # noqa: SIM115  (closed by discard)
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, block: bytes) -> None:
        """Append. Raises DataError when there is no room, or more than the manifest says."""
        self._size += len(block)
        if self._size > self._shard.num_bytes:
            raise _corrupt(self._shard, f"size {self._size} or more", f"{self._shard.num_bytes} bytes")
        try:
            self._handle.write(block)
        except OSError as error:
            raise self._unwritable(error) from None
        self._hash.update(block)

    def keep(self) -> None:
        """Verify and rename into place. Raises DataError."""
        _compare(self._shard, self._size, self._hash.hexdigest())
        try:
            self._handle.flush()
            os.fsync(self._handle.fileno())
            self._handle.close()
            os.replace(self._temporary, self._path)
        except OSError as error:
            raise self._unwritable(error) from None
        _remember(self._path, self._hash.hexdigest())

    def discard(self) -> None:
        """Remove what is not kept."""
        with suppress(OSError):
            self._handle.close()
        with suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"data shard {self._shard.file} cannot be cached in {os.path.dirname(self._path)} ({one_line(error)}); "
            f"free some space or give the worker another cache directory"
        )


def _file_system(path: str, name: str) -> tuple[Any, str, bool]:
    """(file system, path inside it, whether it is local); the file system is None when it cannot be opened here."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        filesystem, inner = url_to_fs(path)
    except Exception:  # an unknown protocol, its package or its credentials missing: not visible from this worker
        return None, path, False
    return filesystem, f"{str(inner).rstrip('/')}/{name}", isinstance(filesystem, LocalFileSystem)


def _copy(filesystem: Any, source: str, cached: str, shard: DataShard) -> None:
    """Copy a shard from a remote file system into the cache. Raises DataError, and what the file system raises."""
    with filesystem.open(source, "rb") as handle:
        incoming = _Incoming(cached, shard)
        try:
            while block := handle.read(BLOCK_BYTES):
                incoming.write(block)
            incoming.keep()
        finally:
            incoming.discard()


def _open(path: str, shard: DataShard) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"data shard {shard.file} cannot be opened ({one_line(error)}); restore the file") from None


def _corrupt(shard: DataShard, found: str, stated: str) -> DataError:
    return DataError(
        f"data shard {shard.file} is corrupt: {found} differs from the manifest's {stated}; "
        f"prepare the data again or restore the file"
    )


def _compare(shard: DataShard, num_bytes: int, sha256: str) -> None:
    if num_bytes != shard.num_bytes:
        raise _corrupt(shard, f"size {num_bytes}", f"{shard.num_bytes} bytes")
    if sha256 != shard.sha256:
        raise _corrupt(shard, f"sha256 {sha256[:12]}…", f"{shard.sha256[:12]}…")


def _is_intact(path: str, shard: DataShard) -> bool:
    """Whether the cache holds the shard. A damaged copy counts as none: there is a place to get a good one from."""
    if not os.path.exists(path):
        return False
    try:
        _verify(path, shard)
    except DataError:
        return False
    return True


# sha256 by (path, mtime in ns, bytes): several slots of a process, and every new plan, read the same files.
_digests: dict[tuple[str, int, int], str] = {}
_digests_lock = threading.Lock()


def _verify(path: str, shard: DataShard) -> None:
    """Compare size and sha256 of a local file with the manifest. Raises DataError."""
    try:
        key = _key(path)
        if key[2] != shard.num_bytes:  # no need to read it
            raise _corrupt(shard, f"size {key[2]}", f"{shard.num_bytes} bytes")
        with _digests_lock:
            digest = _digests.get(key)
        if digest is None:
            with open(path, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            with _digests_lock:
                _digests[key] = digest
    except OSError as error:
        raise DataError(f"data shard {shard.file} cannot be read ({one_line(error)}); restore the file") from None
    _compare(shard, key[2], digest)


def _remember(path: str, sha256: str) -> None:
    with suppress(OSError), _digests_lock:
        _digests[_key(path)] = sha256


def _key(path: str) -> tuple[str, int, int]:
    status = os.stat(path)
    return os.path.realpath(path), status.st_mtime_ns, status.st_size
