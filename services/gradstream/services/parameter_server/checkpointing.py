"""A server's files of checkpoints: snapshots of the version at hand, written in the background, reported.

One checkpoint at a time is written, so at most two snapshots are in memory. A disk that takes none costs no state: the
file is tried again, and makes room for a newer checkpoint's.
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
"""Runs a task in the background; an error in it ends the shard."""
Report: TypeAlias = Callable[[coordinator_pb2.ReportCheckpointRequest], Awaitable[None]]


@dataclass(frozen=True)
class Trouble:
    """Why no checkpoint can be written, and since when (Unix seconds)."""

    cause: str
    since: float


class CheckpointWriter:
    """Writes and reports one server's files of a job's checkpoints."""

    def __init__(self, plan: Plan, server: int, report: Report, spawn: Spawn):
        self.version = plan.start_version
        """The last version whose checkpoint was begun, or was there at the start."""
        self.unwritten: Trouble | None = None
        """Why no checkpoint can be written; None while one can."""
        self._trouble: Trouble | None = None  # the same, until a checkpoint has been written
        self._plan = plan
        self._server = server
        self._report = report
        self._spawn = spawn
        self._writing: asyncio.Task[None] | None = None
        # Reports of files that the coordinator has not taken yet, by version.
        self._unreported: dict[int, asyncio.Task[None]] = {}
        self._saving = False  # whether a snapshot of the version at hand is being made
        # Since when (Unix seconds) a step waits for the checkpoint before to be written.
        self._settling_since: float | None = None

    # -- snapshots -------------------------------------------------------------------------------------------------

    def save(
        self,
        version: int,
        consecutive_skips: int,
        at_hand: Callable[[], bool],
        snapshot: Callable[[], Awaitable[list[FragmentState]]],
    ) -> None:
        """Write a checkpoint of a version as soon as a snapshot of it can be made, while the version is `at_hand`.

        Does nothing where the version has a checkpoint, or while a snapshot is being made.
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
        """Try until the snapshot is made, or another version is at hand: an error costs no state."""
        backoff = Backoff(1.0, 30.0)
        try:
            while wanted():
                try:
                    await self.settle()
                    fragments = await snapshot()
                    # A step may have been decided meanwhile: its update may be in the snapshot.
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
        """Wait until no snapshot is on its way to the disk: one at a time bounds the memory. One that the disk does not
        take makes room for the newer one."""
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
        # In the order of their indices, in whichever bundles they lie.
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
        # On its own: the next checkpoint, and so the step before it, must not wait for the coordinator.
        self._unreported[version] = self._spawn(self._report_file(report))
        await self._drop_oldest(file)

    async def _write_file(
        self, directory: str, file: str, fragments: list[FragmentState]
    ) -> tuple[FileEntry, list[bytes]]:
        """Write this server's file of a checkpoint, retrying without end: an error costs no state."""
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
        """Keep few files that are not reported: nobody removes old checkpoints while the coordinator is away."""
        plan = self._plan
        while len(self._unreported) > max(2, plan.recipe.checkpoint.keep):
            oldest = min(self._unreported)
            self._unreported.pop(oldest).cancel()
            log.info("a checkpoint's file makes room for newer ones, unreported", job=plan.job_id, version=oldest)
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
        """Remember why no checkpoint can be written, for `status`."""
        known = self._trouble
        if known is None or known.cause != cause:
            log.error("a checkpoint cannot be written, trying again", job=self._plan.job_id, cause=cause)
        self._trouble = self.unwritten = Trouble(cause, known.since if known is not None else time.time())

    def waiting(self) -> tuple[str, float] | None:
        """What a checkpoint waits for and since when (Unix seconds), if it keeps the shard waiting or fails."""
        if self.unwritten is not None:
            return f"the disk to take its checkpoint: {self.unwritten.cause}", self.unwritten.since
        if self._settling_since is not None:
            return "the disk to take its last checkpoint", self._settling_since
        return None


def _remove(directory: str, file: str) -> None:
    """Remove a file that was not reported, and its directory if that is empty then."""
    with suppress(OSError):
        files.remove(files.join(directory, file))
        os.rmdir(directory)
