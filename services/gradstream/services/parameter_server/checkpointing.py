"""Writes a server's files of checkpoints from snapshots of the current version, in the background, and reports them.

One checkpoint at a time is written, so at most two snapshots are in memory. If the disk takes no file, no state is
lost: the server retries the file, until a newer checkpoint takes its place.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
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
from gradstream.services.parameter_server.bundle_state import FragmentState

log = get_logger()

Spawn: TypeAlias = Callable[[Awaitable[None]], "asyncio.Task[None]"]
"""Runs a task in the background. An error in the task ends the shard."""
Report: TypeAlias = Callable[[coordinator_pb2.ReportCheckpointRequest], Awaitable[None]]


@dataclass(frozen=True)
class Trouble:
    """The reason why no checkpoint can be written, and since when in Unix seconds."""

    cause: str
    since: float


class CheckpointWriter:
    """Writes and reports one server's files of a job's checkpoints."""

    def __init__(self, plan: Plan, server: int, report: Report, spawn: Spawn):
        self.version = plan.start_version
        """The last version whose checkpoint was begun, or existed at the start."""
        self.unwritten: Trouble | None = None
        """The reason why no checkpoint can be written; None while one can."""
        self._trouble: Trouble | None = None  # the same, kept until a checkpoint has been written
        self._plan = plan
        self._server = server
        self._report = report
        self._spawn = spawn
        self._writing: asyncio.Task[None] | None = None
        # By version, reports of files that the coordinator has not taken yet.
        self._unreported: dict[int, asyncio.Task[None]] = {}
        self._saving = False  # whether a snapshot of the current version is being made
        # Unix time in seconds since which a step waits for the last checkpoint to be written.
        self._settling_since: float | None = None

    # -- snapshots -------------------------------------------------------------------------------------------------

    def save(
        self,
        version: int,
        consecutive_skips: int,
        at_hand: Callable[[], bool],
        snapshot: Callable[[], Awaitable[list[FragmentState]]],
    ) -> None:
        """Write a checkpoint of a version as soon as a snapshot can be made.

        Gives up when `at_hand()` turns false: the server no longer holds that version. Does nothing if the version
        already has a checkpoint, or while a snapshot is being made.
        """

        def wanted() -> bool:
            return at_hand() and version > self.version

        if wanted() and not self._saving:
            self._saving = True
            self._spawn(self._save(version, consecutive_skips, wanted, snapshot))

    async def _save(
        self,
        version: int,
        consecutive_skips: int,
        wanted: Callable[[], bool],
        snapshot: Callable[[], Awaitable[list[FragmentState]]],
    ) -> None:
        """Retry until the snapshot is made or the server holds another version. An error loses no state."""
        backoff = Backoff(1.0, 30.0)
        try:
            while wanted():
                try:
                    await self.settle()
                    fragments = await snapshot()
                    # A step may have been decided in the meantime, and the snapshot may contain its update.
                    if wanted():
                        self.begin(version, fragments, consecutive_skips)
                except Exception as error:
                    self.note_unwritten(one_line(error))
                    await asyncio.sleep(backoff.next())
        finally:
            self._saving = False
            if self.version < version:
                self.unwritten = None

    async def settle(self) -> None:
        """Wait until no snapshot is being written: one at a time bounds the memory.

        A snapshot that the disk does not take is given up for the newer one.
        """
        if self._writing is not None and self.unwritten is not None:
            self._writing.cancel()
            self.unwritten = None
        if self._writing is not None:
            self._settling_since = time.time()
            await asyncio.gather(self._writing, return_exceptions=True)
            self._settling_since = None

    # -- files -----------------------------------------------------------------------------------------------------

    def begin(self, version: int, fragments: list[FragmentState], consecutive_skips: int) -> None:
        """Write a snapshot of a version in the background, then report its file."""
        self.version = version
        self._writing = self._spawn(self._write(version, fragments, consecutive_skips))

    async def _write(self, version: int, fragments: list[FragmentState], consecutive_skips: int) -> None:
        plan = self._plan
        # Sorted by index, regardless of their bundles.
        fragments.sort(key=lambda held: held[0].index)
        directory = directory_of(plan.checkpoint_root, version)
        file = shard_file_name(plan.epoch, self._server, len(plan.servers))
        began = time.monotonic()
        entry, digests = await self._write_file(directory, file, fragments)
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
                for (fragment, _), digest in zip(fragments, digests, strict=True)
            ],
            consecutive_skips=consecutive_skips,
        )
        # In a separate task: the next checkpoint, and so the step before it, must not wait for the coordinator.
        self._unreported[version] = self._spawn(self._report_file(report))
        await self._drop_oldest(file)

    async def _write_file(
        self, directory: str, file: str, fragments: list[FragmentState]
    ) -> tuple[FileEntry, list[bytes]]:
        """Write this server's file of a checkpoint; retry without end. An error loses no state."""
        backoff = Backoff(1.0, 30.0)
        while True:
            try:
                written = await asyncio.to_thread(write_shard, directory, file, self._plan.tensors, fragments)
                self._trouble = self.unwritten = None
                return written
            except Exception as error:
                self.note_unwritten(one_line(error))
            await asyncio.sleep(backoff.next())

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
        if self._settling_since is not None:
            return "the disk to take its last checkpoint", self._settling_since
        return None


def _remove(directory: str, file: str) -> None:
    """Remove a file that was not reported, and its directory if the directory is empty afterwards."""
    with suppress(OSError):
        files.remove(files.join(directory, file))
        os.rmdir(directory)
