"""Writes a server's files of checkpoints in the background, bundle by bundle, and reports them.

One checkpoint at a time is written. Steps go on meanwhile: a bundle is copied before a step updates it (`snapshot.py`).
If the disk takes no file, no state is lost: the server retries the file while it holds the version whole, until a newer
checkpoint takes its place or a step needs the memory.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TypeAlias

from gradstream.core.checkpoint.manifest import FileEntry, directory_of, shard_file_name
from gradstream.core.checkpoint.shard import write_shard
from gradstream.core.errors import one_line
from gradstream.core.log import get_logger
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.retry import Backoff
from gradstream.core.storage import files
from gradstream.proto.v1 import coordinator_pb2
from gradstream.services.parameter_server.snapshot import BufferPool, GivenUpError, Snapshot
from gradstream.services.parameter_server.weight_bundle import WeightBundle

log = get_logger()

MAX_WAIT_SECONDS = 60.0
"""Time for which a step waits for a disk that takes nothing, before the checkpoint is given up."""

Spawn: TypeAlias = Callable[[Awaitable[None]], "asyncio.Task[None]"]
"""Runs a task in the background. An error in the task ends the shard."""
Report: TypeAlias = Callable[[coordinator_pb2.ReportCheckpointRequest], Awaitable[None]]


@dataclass(frozen=True)
class Trouble:
    """The reason why no checkpoint can be written, and since when in Unix seconds."""

    cause: str
    since: float


class StalledError(Exception):
    """The disk takes nothing."""


class CheckpointWriter:
    """Writes and reports one server's files of a job's checkpoints.

    `bundles` belongs to the caller and is only read.
    """

    def __init__(
        self,
        plan: Plan,
        server: int,
        bundles: Mapping[int, WeightBundle],
        executor: Executor,
        report: Report,
        spawn: Spawn,
    ):
        self.version = plan.start_version
        """The last version whose checkpoint was begun, or existed at the start."""
        self.unwritten: Trouble | None = None
        """The reason why no checkpoint can be written; None while one can."""
        self._trouble: Trouble | None = None  # the same, kept until a checkpoint has been written
        self._plan = plan
        self._server = server
        self._bundles = bundles
        self._executor = executor
        self._report = report
        self._spawn = spawn
        self._pool = BufferPool(max((state.saved_bytes for state in bundles.values()), default=1))
        self._snapshot: Snapshot | None = None  # the newest version that is being written
        self._writing: asyncio.Task[None] | None = None
        # One thread: files are written one at a time, and a disk that hangs holds no more than this thread.
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._progress = asyncio.Event()
        # By version, reports of files that the coordinator has not taken yet.
        self._unreported: dict[int, asyncio.Task[None]] = {}
        # The number of bundles of a step that wait for the disk, and since when in Unix seconds.
        self._num_waiting = 0
        self._waiting_since = 0.0

    # -- snapshots -------------------------------------------------------------------------------------------------

    def begin(self, version: int, consecutive_skips: int) -> None:
        """Write the version that the bundles hold in the background, then report its file.

        The caller must call `release` before it updates a bundle. A checkpoint that the disk does not take is given up
        for the newer one.
        """
        if self._writing is not None and self.unwritten is not None:
            self._writing.cancel()
            self.unwritten = None
        self.version = version
        loop = asyncio.get_running_loop()

        def progressed() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._note_progress)

        self._snapshot = Snapshot(list(self._bundles.values()), self._pool, progressed)
        self._writing = self._spawn(self._write(version, self._snapshot, consecutive_skips))

    async def release(self, bundle: int) -> None:
        """Return once a bundle may be updated: no checkpoint needs it, or a copy of it is kept.

        Waits for a disk that is slow. A checkpoint that the disk does not take is given up instead, as is one that
        finds no memory, and one whose disk takes nothing for MAX_WAIT_SECONDS: steps go on without it.
        """
        snapshot = self._snapshot
        if snapshot is None:
            return
        try:
            while snapshot.must_keep(bundle):
                if self._pool.reserve():
                    await asyncio.get_running_loop().run_in_executor(self._executor, snapshot.keep, bundle)
                elif self.unwritten is not None:
                    self._give_up(self.unwritten.cause)
                else:
                    await self._wait_for_progress()
        except StalledError as error:
            self._give_up(str(error))
        except Exception as error:
            self._give_up(one_line(error))
        snapshot.updating(bundle)

    async def _wait_for_progress(self) -> None:
        if not self._num_waiting:
            self._waiting_since = time.time()
        self._num_waiting += 1
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await self._progress.wait()
        except TimeoutError:
            raise StalledError(f"it has taken nothing for {MAX_WAIT_SECONDS:g} s") from None
        finally:
            self._num_waiting -= 1

    def _note_progress(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    def _give_up(self, cause: str) -> None:
        """Give up the newest checkpoint: a step needs its bundles."""
        if self._snapshot is None:
            return
        log.error(
            "a checkpoint is given up for the next step", job=self._plan.job_id, version=self.version, cause=cause
        )
        self.note_unwritten(cause)
        self._snapshot.end()
        self._snapshot = None
        if self._writing is not None:
            self._writing.cancel()

    # -- files -----------------------------------------------------------------------------------------------------

    async def _write(self, version: int, snapshot: Snapshot, consecutive_skips: int) -> None:
        plan = self._plan
        directory = directory_of(plan.checkpoint_root, version)
        file = shard_file_name(plan.epoch, self._server, len(plan.servers))
        began = time.monotonic()
        try:
            written = await self._write_file(directory, file, snapshot)
        finally:
            snapshot.end()
            if self._snapshot in (snapshot, None):
                self._snapshot = None
                self._pool.clear()
        if written is None:
            return
        entry, digests = written
        log.info(
            "checkpoint shard written",
            job=plan.job_id,
            version=version,
            file=files.join(directory, file),
            seconds=round(time.monotonic() - began, 2),
        )
        report = coordinator_pb2.ReportCheckpointRequest(
            job_id=plan.job_id,
            epoch=plan.epoch,
            version=version,
            server=self._server,
            file=entry.file,
            num_bytes=entry.num_bytes,
            sha256=entry.sha256,
            fragments=[
                coordinator_pb2.FragmentDigest(fragment=fragment.index, sha256=digest)
                for (fragment, _), digest in zip(snapshot.sizes, digests, strict=True)
            ],
            consecutive_skips=consecutive_skips,
        )
        # In a separate task: the next checkpoint, and so the step before it, must not wait for the coordinator.
        self._unreported[version] = self._spawn(self._report_file(report))
        await self._drop_oldest(file)

    async def _write_file(self, directory: str, file: str, snapshot: Snapshot) -> tuple[FileEntry, list[bytes]] | None:
        """Write this server's file of a checkpoint; retry while the version is whole, and return None when it is not.

        An error loses no state.
        """
        backoff = Backoff(1.0, 30.0)
        while snapshot.begin_attempt():
            try:
                loop = asyncio.get_running_loop()
                written = await loop.run_in_executor(self._thread, self._write_once, directory, file, snapshot)
                self._trouble = self.unwritten = None
                return written
            except GivenUpError:
                return None
            except Exception as error:
                self.note_unwritten(one_line(error))
            await asyncio.sleep(backoff.next())
        log.error("a checkpoint is given up: a step went on over its failed file", job=self._plan.job_id, file=file)
        return None

    def _write_once(self, directory: str, file: str, snapshot: Snapshot) -> tuple[FileEntry, list[bytes]]:
        with closing(snapshot.fragments()) as fragments:
            return write_shard(directory, file, self._plan.tensors, fragments, snapshot.sizes)

    async def _drop_oldest(self, file: str) -> None:
        """Remove the oldest unreported files: while the coordinator is away no one else removes old checkpoints."""
        plan = self._plan
        while len(self._unreported) > max(2, plan.recipe.checkpoint.keep):
            oldest = min(self._unreported)
            self._unreported.pop(oldest).cancel()
            log.info("an unreported checkpoint file is removed for newer ones", job=plan.job_id, version=oldest)
            await asyncio.to_thread(_remove, directory_of(plan.checkpoint_root, oldest), file)

    async def _report_file(self, report: coordinator_pb2.ReportCheckpointRequest) -> None:
        try:
            await self._report(report)
        finally:
            self._unreported.pop(report.version, None)

    async def drain(self) -> None:
        """Wait until a checkpoint that is being written is reported."""
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)
        await asyncio.gather(*self._unreported.values(), return_exceptions=True)

    # -- status ----------------------------------------------------------------------------------------------------

    def note_unwritten(self, cause: str) -> None:
        """Record for `status` why no checkpoint can be written."""
        known = self._trouble
        if known is None or known.cause != cause:
            log.error("a checkpoint cannot be written, trying again", job=self._plan.job_id, cause=cause)
        self._trouble = self.unwritten = Trouble(cause, known.since if known is not None else time.time())

    def waiting(self) -> tuple[str, float] | None:
        """The reason why a checkpoint delays the shard or fails, and since when in Unix seconds; None if neither."""
        if self.unwritten is not None:
            return f"the disk to take its checkpoint: {self.unwritten.cause}", self.unwritten.since
        if self._num_waiting:
            return "the disk to take its checkpoint", self._waiting_since
        return None


def _remove(directory: str, file: str) -> None:
    """Remove a file that was not reported, and its directory if the directory is empty afterwards."""
    with suppress(OSError):
        files.remove(files.join(directory, file))
        os.rmdir(directory)
