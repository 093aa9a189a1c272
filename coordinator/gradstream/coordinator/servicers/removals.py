"""Removal of a job: its files are set aside, its record is deleted, its files are removed."""

from __future__ import annotations

from gradstream.coordinator.jobs import checkpoints, removal
from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.jobs.removal import JobFiles
from gradstream.coordinator.state.state import JobRecord
from gradstream.core.errors import ConfigError
from gradstream.core.job_states import LIVE
from gradstream.core.log import get_logger
from gradstream.core.rpc.access import by_caller
from gradstream.core.storage.pool import StorageThreads

log = get_logger()


class Removals:
    """Removes jobs that have ended."""

    def __init__(self, controller: Controller, storage: StorageThreads):
        self._controller = controller
        self._storage = storage

    async def remove(self, record: JobRecord, dry_run: bool) -> JobFiles:
        """Remove a job, or only find out what would go. Raises ConfigError when it must stay.

        The death of the coordinator in between leaves the record, so that the call can be made again, or files that
        were set aside and are no job's any more.
        """
        root = checkpoints.root_of(record.run_directory)
        async with self._controller.pins.choosing(root):
            self._check(record)
            files = await self._storage.call(root, removal.survey, record.run_directory)
            if dry_run:
                return files
            await self._storage.finish(root, removal.set_aside, record.run_directory)
            try:
                self._check(record)
                self._controller.state.delete_job(record.job_id)
            except BaseException:
                await self._storage.finish(root, removal.put_back, record.run_directory)
                raise
        self._controller.timelines.forget(record.job_id)
        self._controller.notifier.changed(record.job_id)
        log.info("removed a job", job=record.job_id, num_bytes=files.num_bytes, by=by_caller().strip() or "anybody")
        await self._storage.finish(root, removal.remove_files, record.run_directory)
        return files

    def _check(self, record: JobRecord) -> None:
        state = self._controller.state
        now = state.get_job(record.job_id)
        if now is None:
            raise ConfigError(f"job {record.job_id} was removed meanwhile")
        pinned = self._controller.pins.of(checkpoints.root_of(record.run_directory))
        may_go, reason = removal.judge_removal(now, state.list_jobs(LIVE), pinned)
        if not may_go:
            raise ConfigError(reason)
