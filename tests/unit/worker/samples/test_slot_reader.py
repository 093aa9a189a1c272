"""A worker's samples: the right windows of verified data shards, from every source of the files."""

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from gradstream.core.data.manifest import DataShard, Manifest
from gradstream.core.data.sampler import SlotSampler
from gradstream.core.errors import DataError, UnreachableError
from gradstream.worker.samples.data import SlotReader

LENGTH = 16
VOCABULARY = 1000


def make_data(root: Path, dtype: str = "uint16", num_shards: int = 4, top: int = VOCABULARY) -> Manifest:
    """A data set of random token ids below `top`, in `root`."""
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(5)
    shards = []
    for split in ("train", "validation"):
        for number in range(num_shards):
            tokens = generator.integers(0, top, 200 + 17 * number).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
            name = f"{split}-{number:05d}"
            (root / f"{name}.tokens").write_bytes(tokens)
            index = np.array([0, 200 + 17 * number], "<u8").tobytes()
            (root / f"{name}.index").write_bytes(index)
            shards.append(
                DataShard(
                    file=f"{name}.tokens",
                    index_file=f"{name}.index",
                    split=split,  # type: ignore[arg-type]
                    num_tokens=200 + 17 * number,
                    num_documents=1,
                    num_bytes=len(tokens),
                    sha256=sha256(tokens).hexdigest(),
                    index_sha256=sha256(index).hexdigest(),
                )
            )
    return Manifest(
        token_dtype=dtype,  # type: ignore[arg-type]
        vocab_size=VOCABULARY,
        end_of_text_id=0,
        tokenizer_sha256="0" * 64,
        shards=tuple(shards),
    )


def reader(manifest: Manifest, path: Any, cache: Path, **more: Any) -> SlotReader:
    settings: dict[str, Any] = {"slot": 1, "num_slots": 2, "sequence_length": LENGTH, "seed": 3, **more}
    return SlotReader(manifest, str(path), str(cache), **settings)


class Coordinator:
    """Streams files of a directory, and counts; `spoil` may change the bytes."""

    def __init__(self, root: Path, spoil: Any = lambda data: data):
        self.root = root
        self.spoil = spoil
        self.asked: list[str] = []

    async def fetch(self, file: str) -> AsyncIterator[bytes]:
        self.asked.append(file)
        data = self.spoil((self.root / file).read_bytes())
        for begin in range(0, len(data), 100):
            yield data[begin : begin + 100]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
async def test_batches_are_the_windows_the_sampler_names(tmp_path: Path, dtype: str) -> None:
    manifest = make_data(tmp_path / "set", dtype)
    slot = reader(manifest, tmp_path / "set", tmp_path / "cache")
    await slot.prepare()
    sampler = SlotSampler(manifest, "train", 1, 2, LENGTH, 3)
    assert slot.num_samples == sampler.num_samples
    for step in (0, 1, 50):
        batch = slot.batch(step, 4).tokens
        assert batch.shape == (4, LENGTH + 1)
        assert batch.dtype == np.int64
        for row, address in zip(batch, sampler.samples(step, 4), strict=True):
            tokens = np.fromfile(tmp_path / "set" / address.file, np.dtype(dtype).newbyteorder("<"))
            begin = address.window * LENGTH
            np.testing.assert_array_equal(row, tokens[begin : begin + LENGTH + 1])
    assert not (tmp_path / "cache").exists()  # read in place
    slot.close()


async def test_an_epoch_has_every_target_once(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "set")
    targets = []
    for slot in range(2):
        one = reader(manifest, tmp_path / "set", tmp_path / "cache", slot=slot)
        await one.prepare()
        targets += [one.batch(step, 1).targets[0] for step in range(one.num_samples)]
        one.close()
    expected = []
    for shard in manifest.split("train"):
        tokens = np.fromfile(tmp_path / "set" / shard.file, "<u2").astype(np.int64)
        count = (len(tokens) - 1) // LENGTH
        expected += list(tokens[1 : 1 + count * LENGTH].reshape(count, LENGTH))
    assert sorted(map(tuple, targets)) == sorted(map(tuple, expected))


async def test_validation_is_in_stored_order(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "set")
    slot = reader(manifest, tmp_path / "set", tmp_path / "cache", split="validation")
    await slot.prepare()
    tokens = np.fromfile(tmp_path / "set" / "validation-00001.tokens", "<u2")
    np.testing.assert_array_equal(slot.validation_batch(2).tokens[1], tokens[LENGTH : 2 * LENGTH + 1])
    assert len(slot.validation_batch(10_000)) == slot.num_samples
    slot.close()


async def test_reading_in_threads_gives_the_same(tmp_path: Path) -> None:
    slot = reader(make_data(tmp_path / "set"), tmp_path / "set", tmp_path / "cache")
    await slot.prepare()
    with ThreadPoolExecutor(4) as pool:
        batches = list(pool.map(lambda step: slot.batch(step, 3).tokens, range(40)))
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch, slot.batch(step, 3).tokens)
    slot.close()


async def test_a_corrupt_byte_is_found(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "set")
    path = tmp_path / "set" / "train-00003.tokens"
    good = path.read_bytes()
    path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    slot = reader(manifest, tmp_path / "set", tmp_path / "cache")
    message = (
        r"^data shard train-00003\.tokens is corrupt: sha256 [0-9a-f]{12}… differs from the manifest's "
        r"[0-9a-f]{12}…; prepare the data again or restore the file$"
    )
    with pytest.raises(DataError, match=message):
        await slot.prepare()
    path.write_bytes(good)  # the cure helps, without a restart
    await slot.prepare()
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match=r"size 501 differs from the manifest's 502 bytes"):
        await reader(manifest, tmp_path / "set", tmp_path / "cache").prepare()
    slot.close()


async def test_a_corrupt_index_is_found(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "set")
    path = tmp_path / "set" / "train-00003.index"
    path.write_bytes(bytes(16))
    with pytest.raises(DataError, match=r"^index train-00003\.index is corrupt: sha256 .*; prepare the data again or"):
        await reader(manifest, tmp_path / "set", tmp_path / "cache").prepare()


async def test_hashes_are_taken_once_a_process(tmp_path: Path) -> None:
    """With the same size and time, changed bytes are not read again: the second reader trusts the first."""
    manifest = make_data(tmp_path / "set")
    first = reader(manifest, tmp_path / "set", tmp_path / "cache")
    await first.prepare()
    path = tmp_path / "set" / "train-00001.tokens"
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = reader(manifest, tmp_path / "set", tmp_path / "cache")
    await second.prepare()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(DataError, match="is corrupt"):
        await reader(manifest, tmp_path / "set", tmp_path / "cache").prepare()
    first.close()
    second.close()


async def test_a_missing_file_without_anyone_to_ask(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "set")
    (tmp_path / "set" / "train-00001.tokens").unlink()
    with pytest.raises(DataError, match=r"data shard train-00001\.tokens cannot be read from .*set \(no such file\); "):
        await reader(manifest, tmp_path / "set", tmp_path / "cache").prepare()


@pytest.mark.parametrize("path", ["/nowhere/set", "memory://nowhere/set", "nope://bucket/set"])
async def test_fetched_when_the_path_cannot_be_seen_and_then_cached(tmp_path: Path, path: str) -> None:
    manifest = make_data(tmp_path / "set")
    coordinator = Coordinator(tmp_path / "set")
    slot = reader(manifest, path, tmp_path / "cache", fetch=coordinator.fetch)
    await slot.prepare()
    assert coordinator.asked == ["train-00001.tokens", "train-00003.tokens"]  # the slot's own and no others
    here = reader(manifest, tmp_path / "set", tmp_path / "unused")
    await here.prepare()
    np.testing.assert_array_equal(slot.batch(7, 4).tokens, here.batch(7, 4).tokens)
    assert sorted(os.listdir(tmp_path / "cache")) == sorted(
        f"{shard.sha256}.tokens" for shard in manifest.split("train")[1::2]
    )
    again = reader(manifest, path, tmp_path / "cache", fetch=coordinator.fetch)
    await again.prepare()
    assert len(coordinator.asked) == 2
    for opened in (slot, here, again):
        opened.close()


async def test_copied_from_an_fsspec_path(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "set")
    remote = "memory://slot-reader/set"
    filesystem = fsspec.filesystem("memory")
    for file in (tmp_path / "set").iterdir():
        filesystem.pipe_file(f"{remote}/{file.name}", file.read_bytes())
    coordinator = Coordinator(tmp_path / "set")
    slot = reader(manifest, remote, tmp_path / "cache", fetch=coordinator.fetch)
    await slot.prepare()
    assert coordinator.asked == []
    assert len(os.listdir(tmp_path / "cache")) == 2
    slot.close()
    filesystem.pipe_file(f"{remote}/train-00001.tokens", b"short")
    with pytest.raises(DataError, match=r"train-00001\.tokens is corrupt: size 5"):
        await reader(manifest, remote, tmp_path / "other").prepare()
    assert os.listdir(tmp_path / "other") == []


async def test_a_damaged_cache_is_fetched_again(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "set")
    coordinator = Coordinator(tmp_path / "set")
    await reader(manifest, "/nowhere", tmp_path / "cache", fetch=coordinator.fetch).prepare()
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"rot")
    slot = reader(manifest, "/nowhere", tmp_path / "cache", fetch=coordinator.fetch)
    await slot.prepare()
    assert len(coordinator.asked) == 4
    assert slot.batch(0, 2).tokens.shape == (2, LENGTH + 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-1], "size 399"),
        (lambda data: data + b"more", "size 404 or more"),
        (lambda data: data[:-1] + b"\xff", "sha256"),
        (lambda data: b"", "size 0"),
    ],
)
async def test_fetched_bytes_are_not_trusted(tmp_path: Path, spoil: Any, message: str) -> None:
    manifest = make_data(tmp_path / "set")
    coordinator = Coordinator(tmp_path / "set", spoil)
    with pytest.raises(DataError, match=r"train-0000[0-3]\.tokens is corrupt: " + message):
        await reader(manifest, "/nowhere", tmp_path / "cache", fetch=coordinator.fetch, slot=0, num_slots=4).prepare()
    assert os.listdir(tmp_path / "cache") == []


async def test_a_failed_or_cancelled_fetch_leaves_nothing(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "set")
    started = asyncio.Event()

    async def failing(file: str) -> AsyncIterator[bytes]:
        yield b"some"
        raise UnreachableError("the coordinator does not answer")

    async def hanging(file: str) -> AsyncIterator[bytes]:
        yield b"some"
        started.set()
        await asyncio.Event().wait()

    with pytest.raises(UnreachableError):
        await reader(manifest, "/nowhere", tmp_path / "cache", fetch=failing).prepare()
    assert os.listdir(tmp_path / "cache") == []
    task = asyncio.create_task(reader(manifest, "/nowhere", tmp_path / "cache", fetch=hanging).prepare())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert os.listdir(tmp_path / "cache") == []


async def test_an_unwritable_cache_is_one_line(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "set")
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be cached in .*cache \(.*\); free some space or give the worker"):
        await reader(manifest, "/nowhere", tmp_path / "cache", fetch=Coordinator(tmp_path / "set").fetch).prepare()


async def test_an_id_outside_the_vocabulary(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "set", top=60_000)
    slot = reader(manifest, tmp_path / "set", tmp_path / "cache")
    await slot.prepare()
    with pytest.raises(DataError, match=r"train-0000[13]\.tokens holds token id \d+ near token \d+, outside the vocab"):
        slot.batch(0, 1)
    slot.close()


async def test_a_file_that_shrinks_under_us_is_an_error_not_a_crash(tmp_path: Path) -> None:
    slot = reader(make_data(tmp_path / "set"), tmp_path / "set", tmp_path / "cache")
    await slot.prepare()
    for file in (tmp_path / "set").iterdir():
        os.truncate(file, 10)
    with pytest.raises(DataError, match=r"ends before token \d+, it was truncated while in use; prepare"):
        slot.batch(0, 1)
    slot.close()


def test_a_manifest_that_contradicts_itself(tmp_path: Path) -> None:
    manifest = make_data(tmp_path / "set")
    wide = manifest.model_copy(update={"token_dtype": "uint32"})
    with pytest.raises(DataError, match=r"train-00001\.tokens 434 bytes for 217 tokens of uint32; prepare"):
        reader(wide, tmp_path / "set", tmp_path / "cache")


def test_a_batch_needs_prepare(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="prepare"):
        reader(make_data(tmp_path / "set"), tmp_path / "set", tmp_path / "cache").batch(0, 1)
