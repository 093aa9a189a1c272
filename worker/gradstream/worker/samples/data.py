"""Reads a slot's samples: makes the data shards of its group available on this machine, verifies and reads them.

Where the worker sees the data set on a local path, it reads the data shards in place. Otherwise it copies them to its
cache: from the fsspec path if it can reach that, else with `fetch` from the coordinator. A cached file is named by its
sha256. So jobs and slots share it, and a data set that was prepared again cannot be confused with the old one.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gradstream.core.data.manifest import NO_TARGET, ROW_PLANES, DataShard, Manifest
from gradstream.core.data.sampler import SampleAddress, SlotSampler
from gradstream.core.errors import DataError, GradstreamError, one_line

Split = Literal["train", "validation"]
Fetch = Callable[[str], AsyncIterator[bytes]]
BLOCK_BYTES = 1 << 20
INDEX_ENTRY_BYTES = 8


IGNORED = -100
"""Stands in a batch for a target that does not count; the default `ignore_index` of torch's losses."""


@dataclass(frozen=True, slots=True)
class _File:
    """The manifest's facts about a file."""

    name: str
    num_bytes: int
    sha256: str


def _tokens(shard: DataShard) -> _File:
    return _File(f"data shard {shard.file}", shard.num_bytes, shard.sha256)


def _index(shard: DataShard) -> _File:
    return _File(f"index {shard.index_file}", (shard.num_documents + 1) * INDEX_ENTRY_BYTES, shard.index_sha256)


@dataclass(frozen=True)
class Batch:
    """Samples: input token ids and the targets after them, both (B, T).

    `examples`, also (B, T), has the number of the example that each token of a packed row belongs to; None where
    samples are not packed.
    """

    inputs: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    examples: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Windows as stored in their data shard, (B, T + 1): the input tokens and the last target."""
        return np.concatenate([self.inputs, self.targets[:, -1:]], axis=1)

    @property
    def num_targets(self) -> int:
        """Number of target tokens that count."""
        return int((self.targets != IGNORED).sum())

    def piece(self, begin: int, end: int) -> Batch:
        """Samples [begin, end)."""
        examples = None if self.examples is None else self.examples[begin:end]
        return Batch(self.inputs[begin:end], self.targets[begin:end], examples)


class SlotReader:
    """Reads the samples of slot `slot` of `num_slots`: a pure function of (manifest, seed, step).

    `path`: the data set's directory, on any fsspec path. `cache_directory`: the directory for copies. `fetch`: streams
    the named file of the data set when this worker cannot see `path`; None when there is no such source.
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
        self._rows = manifest.layout == "rows"
        self._sequence_length = sequence_length
        self._path = path
        self._cache_directory = cache_directory
        self._fetch = fetch
        self._shards = self._sampler.shards
        for shard in self._shards:
            if shard.num_bytes != manifest.num_bytes(shard.num_tokens):
                raise DataError(
                    f"the manifest gives data shard {shard.file} {shard.num_bytes} bytes for {shard.num_tokens} tokens "
                    f"of {manifest.token_dtype}; prepare the data again"
                )
        self._descriptors: dict[str, int] = {}

    @property
    def num_samples(self) -> int:
        """Number of samples in the slot's group: the length of its data epoch."""
        return self._sampler.num_samples

    async def prepare(self) -> None:
        """Make the slot's data shards available; verify size and sha256 of each file once a process.

        Raises DataError with the file, the cause and the remedy. May be called again, for instance after an error.
        """
        for shard in self._shards:
            if shard.file not in self._descriptors:
                path = await self._locate(shard)
                self._descriptors[shard.file] = await asyncio.to_thread(_open, path, shard)

    def batch(self, step: int, count: int) -> Batch:
        """The slot's `count` samples of step `step`.

        Raises DataError when a data shard has become unreadable or holds an id outside the vocabulary.
        """
        return self._read(self._sampler.samples(step, count))

    def validation_batch(self, count: int) -> Batch:
        """The first `count` samples in stored order, or all if there are fewer.

        Raises DataError as `batch` does.
        """
        return self._read(self._sampler.first(count))

    def close(self) -> None:
        """Close the files. `prepare` opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _read(self, addresses: list[SampleAddress]) -> Batch:
        if len(self._descriptors) < len(self._shards):
            raise RuntimeError("SlotReader.prepare() has not been awaited")
        if not self._rows:
            # Windows overlap by one token: the last target of one window is the first input of the next.
            tokens = self._read_at(addresses, self._sequence_length, self._sequence_length + 1)
            self._check_vocabulary(addresses, tokens)
            return Batch(tokens[:, :-1], tokens[:, 1:])
        width = ROW_PLANES * self._sequence_length
        rows = self._read_at(addresses, width, width).reshape(len(addresses), ROW_PLANES, self._sequence_length)
        inputs, targets, examples = rows[:, 0], rows[:, 1], rows[:, 2]
        targets = np.where(targets == NO_TARGET, IGNORED, targets)
        self._check_vocabulary(addresses, inputs)
        self._check_vocabulary(addresses, targets)
        if not (targets != IGNORED).any(axis=1).all():
            raise DataError(f"data shard {addresses[0].file} has a row without a target; prepare the examples again")
        return Batch(inputs, targets, examples)

    def _read_at(self, addresses: list[SampleAddress], stride: int, width: int) -> npt.NDArray[np.int64]:
        """Read samples of `width` numbers, which begin every `stride` numbers: (samples, width)."""
        tokens = np.empty((len(addresses), width), np.int64)
        size = width * self._dtype.itemsize
        for row, address in enumerate(addresses):
            # pread, not a memory map: if the file shrinks, pread gives an error, but a map SIGBUS.
            begin = address.window * stride
            try:
                raw = os.pread(self._descriptors[address.file], size, begin * self._dtype.itemsize)
            except OSError as error:
                raise DataError(
                    f"data shard {address.file} cannot be read ({one_line(error)}); restore the file"
                ) from None
            if len(raw) != size:
                raise DataError(
                    f"data shard {address.file} ends before token {begin + width}, it was truncated while in "
                    f"use; prepare the data again or restore the file"
                )
            tokens[row] = np.frombuffer(raw, self._dtype)
        return tokens

    def _check_vocabulary(self, addresses: list[SampleAddress], tokens: npt.NDArray[np.int64]) -> None:
        largest = tokens.max(axis=1)
        if (largest >= self._vocab_size).any():
            row = int(largest.argmax())
            address = addresses[row]
            raise DataError(
                f"data shard {address.file} holds token id {largest[row]} near token "
                f"{address.window * self._sequence_length}, outside the vocabulary of {self._vocab_size}; prepare the "
                f"data again with the model's tokenizer"
            )

    async def _locate(self, shard: DataShard) -> str:
        """Return the path of a verified local file with the shard's content."""
        filesystem, inner, local = await asyncio.to_thread(_file_system, self._path, shard.file)
        if local and await asyncio.to_thread(os.path.exists, inner):
            await asyncio.to_thread(_verify, inner, _tokens(shard))
            # The index is not read here, but it is verified too: damage in one file suggests damage in others.
            await asyncio.to_thread(_verify, os.path.join(os.path.dirname(inner), shard.index_file), _index(shard))
            return str(inner)
        cached = os.path.join(self._cache_directory, f"{shard.sha256}.tokens")
        if await asyncio.to_thread(_is_intact, cached, _tokens(shard)):
            return cached
        cause = "no such file"
        if filesystem is not None and not local:
            try:
                await asyncio.to_thread(_copy, filesystem, inner, cached, shard)
                return cached
            except GradstreamError:
                raise
            except Exception as error:  # fsspec backends raise errors of their own; the coordinator may see the file
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
    """Writes a data shard into the cache: checks it on arrival, and adds it complete or not at all."""

    def __init__(self, path: str, shard: DataShard):
        self._path = path
        self._shard = shard
        # Another process may be fetching the same file. Each writes its own file, and both rename the same content.
        self._temporary = f"{path}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
        self._hash = hashlib.sha256()
        self._size = 0
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._handle = open(self._temporary, "wb")  # noqa: SIM115  (closed by discard)
        except OSError as error:
            raise self._unwritable(error) from None

    def write(self, block: bytes) -> None:
        """Append a block. Raises DataError when there is no room, or when the file exceeds the manifest's size."""
        self._size += len(block)
        if self._size > self._shard.num_bytes:
            raise _corrupt(_tokens(self._shard), f"size {self._size} or more", f"{self._shard.num_bytes} bytes")
        try:
            self._handle.write(block)
        except OSError as error:
            raise self._unwritable(error) from None
        self._hash.update(block)

    def keep(self) -> None:
        """Verify the file and rename it into place. Raises DataError."""
        _compare(_tokens(self._shard), self._size, self._hash.hexdigest())
        try:
            self._handle.flush()
            os.fsync(self._handle.fileno())
            self._handle.close()
            os.replace(self._temporary, self._path)
        except OSError as error:
            raise self._unwritable(error) from None
        _remember(self._path, self._hash.hexdigest())

    def discard(self) -> None:
        """Remove the temporary file if it was not kept."""
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
    """Return (file system, path inside it, whether it is local). The file system is None if it cannot be opened."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        filesystem, inner = url_to_fs(path)
    except Exception:  # unknown protocol, or missing package or credentials: this worker cannot see the path
        return None, path, False
    return filesystem, f"{str(inner).rstrip('/')}/{name}", isinstance(filesystem, LocalFileSystem)


def _copy(filesystem: Any, source: str, cached: str, shard: DataShard) -> None:
    """Copy a shard from a remote file system into the cache. Raises DataError and the file system's own errors."""
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


def _corrupt(file: _File, found: str, stated: str) -> DataError:
    return DataError(
        f"{file.name} is corrupt: {found} differs from the manifest's {stated}; "
        f"prepare the data again or restore the file"
    )


def _compare(file: _File, num_bytes: int, sha256: str) -> None:
    if num_bytes != file.num_bytes:
        raise _corrupt(file, f"size {num_bytes}", f"{file.num_bytes} bytes")
    if sha256 != file.sha256:
        raise _corrupt(file, f"sha256 {sha256[:12]}…", f"{file.sha256[:12]}…")


def _is_intact(path: str, file: _File) -> bool:
    """Return whether the cache holds the shard intact. A damaged copy will be replaced from its source."""
    if not os.path.exists(path):
        return False
    try:
        _verify(path, file)
    except DataError:
        return False
    return True


# sha256 by (path, mtime in ns, bytes), kept because slots of a process and successive plans read the same files.
_digests: dict[tuple[str, int, int], str] = {}
_digests_lock = threading.Lock()


def _verify(path: str, file: _File) -> None:
    """Compare size and sha256 of a local file with the manifest. Raises DataError."""
    try:
        key = _key(path)
        if key[2] != file.num_bytes:  # no need to read it
            raise _corrupt(file, f"size {key[2]}", f"{file.num_bytes} bytes")
        with _digests_lock:
            digest = _digests.get(key)
        if digest is None:
            with open(path, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
            with _digests_lock:
                _digests[key] = digest
    except OSError as error:
        raise DataError(f"{file.name} cannot be read ({one_line(error)}); restore the file") from None
    _compare(file, key[2], digest)


def _remember(path: str, sha256: str) -> None:
    with suppress(OSError), _digests_lock:
        _digests[_key(path)] = sha256


def _key(path: str) -> tuple[str, int, int]:
    status = os.stat(path)
    return os.path.realpath(path), status.st_mtime_ns, status.st_size
