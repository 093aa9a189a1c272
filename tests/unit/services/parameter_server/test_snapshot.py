"""A checkpoint is of one version although steps go on, in bounded memory, over slow, failing and hanging disks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.shards import Cluster, make_plan, serving, until

from gradstream.core.checkpoint.manifest import directory_of
from gradstream.core.checkpoint.shard import MAX_COPY_BYTES, write_shard
from gradstream.core.machine import memory
from gradstream.core.plan.plan import Plan
from gradstream.services.parameter_server import checkpointing, shard
from gradstream.services.parameter_server.checkpointing import CheckpointWriter
from gradstream.services.parameter_server.snapshot import BufferPool

NUM_BUFFERS = 3


class Disk:
    """Takes fragments while `open` is set; without `works`, it fails at the fragment that comes next."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.works = True
        self.num_begun = 0

    def write_shard(self, directory: str, file: str, tensors: Any, shard: Any, sizes: Any) -> Any:
        def slowly() -> Any:
            for number, fragment in enumerate(shard):
                self.num_begun = number + 1
                self.open.wait(20)
                if not self.works:
                    raise OSError(28, "No space left on device")
                yield fragment

        return write_shard(directory, file, tensors, slowly(), sizes)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk of all servers, which have memory for the copies of few bundles."""
    found = Disk()
    monkeypatch.setattr(checkpointing, "write_shard", found.write_shard)
    monkeypatch.setattr(checkpointing, "BufferPool", lambda num_bytes: BufferPool(num_bytes, NUM_BUFFERS * num_bytes))
    return found


def plan_of(tmp_path: Path) -> Plan:
    (tmp_path / "tokenizer.json").write_text("{}")
    return make_plan(
        1,
        push="int8",
        pull="delta-int8",
        data=str(tmp_path),
        checkpoint_root=str(tmp_path / "checkpoints"),
        training={"num_steps": 4},
        checkpoint={"interval_steps": 2},
    )


@asynccontextmanager
async def at_version_2(tmp_path: Path, disk: Disk) -> AsyncIterator[tuple[Cluster, CheckpointWriter]]:
    """A server that has begun to write version 2, which stands at the first fragment."""
    async with serving(plan_of(tmp_path)) as cluster, asyncio.timeout(60):
        for step in range(2):
            await cluster.push(cluster.all_keys(), step=step)
            await cluster.pull(step + 1)
        await until(lambda: disk.num_begun > 0)
        yield cluster, cluster.shards[0].checkpoints
        disk.open.set()
        await cluster.shards[0].drain()


async def commit_step_2(cluster: Cluster) -> None:
    await cluster.push(cluster.all_keys(), step=2)
    await until(lambda: all(state.published_version == 3 for state in cluster.shards[0].bundles.values()))


async def test_a_file_is_of_its_version_although_the_next_step_is_applied(tmp_path: Path, disk: Disk) -> None:
    disk.open.set()
    (tmp_path / "undisturbed").mkdir()
    async with at_version_2(tmp_path / "undisturbed", disk) as (cluster, _):
        pass
    expected = cluster.checkpoints[0]
    disk.open.clear()
    disk.num_begun = 0
    async with at_version_2(tmp_path, disk) as (cluster, writer):
        step = asyncio.create_task(commit_step_2(cluster))
        # The step waits: there are more bundles than buffers.
        await until(lambda: writer.waiting() is not None)
        assert cluster.shards[0].activity().waiting_for == "the disk to take its checkpoint"
        assert not writer._pool.reserve()
        assert not step.done()
        disk.open.set()
        await step
    assert cluster.checkpoints[0].version == 2
    assert cluster.checkpoints[0].fragments == expected.fragments
    assert cluster.checkpoints[0].sha256 == expected.sha256
    assert writer.waiting() is None


async def test_a_step_is_not_held_up_by_a_disk_that_fails(tmp_path: Path, disk: Disk) -> None:
    disk.works = False
    async with at_version_2(tmp_path, disk) as (cluster, writer):
        disk.open.set()
        await until(lambda: writer.unwritten is not None)
        await commit_step_2(cluster)
        assert "No space left" in cluster.shards[0].activity().waiting_for
    assert cluster.checkpoints == []
    assert list(Path(directory_of(cluster.plan.checkpoint_root, 2)).iterdir()) == []


async def test_a_step_is_not_held_up_for_long_by_a_disk_that_hangs(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpointing, "MAX_WAIT_SECONDS", 0.05)
    async with at_version_2(tmp_path, disk) as (cluster, _):
        await commit_step_2(cluster)
        assert "it has taken nothing for 0.05 s" in cluster.shards[0].activity().waiting_for
    assert cluster.checkpoints == []


async def test_a_version_of_which_a_bundle_is_gone_is_not_tried_again(tmp_path: Path, disk: Disk) -> None:
    async with at_version_2(tmp_path, disk) as (cluster, writer):
        step = asyncio.create_task(commit_step_2(cluster))
        await until(lambda: writer.waiting() is not None)
        disk.works = False
        disk.open.set()
        await step
        await until(lambda: writer._writing is not None and writer._writing.done())
        disk.works = True
    assert cluster.checkpoints == []


async def test_freed_memory_goes_back_once_steps_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for two steps in a row, and not after the job has left."""
    trimmed: list[bool] = []
    monkeypatch.setattr(memory, "trim", lambda: trimmed.append(True))
    monkeypatch.setattr(shard, "PAUSE_SECONDS", 0.5)
    async with serving(make_plan(1)) as cluster:
        for step in range(2):
            await cluster.push(cluster.all_keys(), step=step)
            await cluster.pull(step + 1)
        assert trimmed == []
        await until(lambda: bool(trimmed))
        await cluster.push(cluster.all_keys(), step=2)
        await until(lambda: cluster.shards[0].version == 3 and len(cluster.reports) == 3)
    assert trimmed == [True]


def test_buffers_are_bounded_and_one_is_left_to_the_file() -> None:
    pool = BufferPool(100, 350)
    assert [pool.reserve() for _ in range(3)] == [True, True, False]
    pool.wait()
    assert [pool.take().nbytes for _ in range(3)] == [100] * 3
    assert BufferPool(MAX_COPY_BYTES).reserve()
