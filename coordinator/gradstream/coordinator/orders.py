"""What people ask of a job: pause, resume, stop. Noted durably; the controller brings it about."""

from __future__ import annotations

from collections.abc import Sequence

from gradstream.coordinator import scheduler
from gradstream.coordinator.active import ActiveJob
from gradstream.coordinator.controller import FAILED, FINISHED, PAUSED, QUEUED, RUNNING, STOPPED, Controller, unix_ms
from gradstream.coordinator.state import JobRecord
from gradstream.core.access import by_caller
from gradstream.core.errors import ConfigError


class Orders:
    """Orders that may come at any time, in any state of a job."""

    def __init__(self, controller: Controller):
        self._controller = controller

    def pause(self, record: JobRecord) -> None:
        """Rest at the next boundary, or at once where nothing runs. Raises ConfigError when the job has ended."""
        if record.state in scheduler.ENDED:
            raise ConfigError(
                f"job {record.job_id} is {scheduler.STATE_WORDS[record.state]}; only a live job can be paused"
            )
        active = self._active_of(record)
        if active is None:
            if record.state == QUEUED:
                self._controller.save(record, state=PAUSED, desired="pause", reason="paused before it had begun")
                self._controller.event(record.job_id, "state", f"paused while queued{by_caller()}")
            return
        if active.record.desired != "pause" and active.state != PAUSED:
            self._controller.update(active, desired="pause")
            self._controller.event(record.job_id, "state", f"a pause was asked for{by_caller()}")
            self._controller.ask_to_halt(active)
        self._controller.reconcile()

    def stop(self, record: JobRecord, now: bool) -> None:
        """End at the next boundary with a checkpoint, or at once. Raises ConfigError when the job has ended."""
        if record.state in scheduler.ENDED:
            raise ConfigError(f"job {record.job_id} is already {scheduler.STATE_WORDS[record.state]}")
        active = self._active_of(record)
        if active is None:
            self._controller.save(
                record, state=STOPPED, desired="stop", reason="stopped before its turn", ended_unix_ms=unix_ms()
            )
            self._controller.event(record.job_id, "state", f"stopped before its turn{by_caller()}")
            return
        if active.record.desired != "stop":
            self._controller.update(active, desired="stop")
            self._controller.event(record.job_id, "state", f"a stop was asked for{by_caller()}")
            self._controller.ask_to_halt(active)
        if now:
            self._controller.end(active, STOPPED, f"stopped at once at version {active.version}")
        self._controller.reconcile()

    def checkpoint(self, record: JobRecord) -> int:
        """The version that a checkpoint asked for now will be later than. Raises ConfigError when the job does not run,
        and so cannot be asked for one."""
        active = self._active_of(record)
        if active is None or active.state != RUNNING or active.record.desired != "run":
            raise ConfigError(
                f"job {record.job_id} is {scheduler.STATE_WORDS[record.state]}; only a running job can be asked for a "
                f"checkpoint"
            )
        return active.version

    def ask_for_checkpoint(self, record: JobRecord, asked: tuple[int, int] | None) -> tuple[int, int] | None:
        """Ask the leader for a checkpoint at the next boundary, once in an epoch and for each of its streams.

        `asked` is what the last call returned, None before the first.
        """
        active = self._active_of(record)
        if active is None:
            return asked
        stream = self._controller.leader_stream(active)
        if stream is None or stream == asked or not self._controller.ask_for_boundary(active):
            return asked
        return stream

    def resume(self, record: JobRecord, on_disk: Sequence[int] = ()) -> None:
        """Go on with a paused job, queue an ended one again. Raises ConfigError when it is finished.

        `on_disk` has the versions whose checkpoints are there, oldest first. Of a job that failed, or is held because a
        newer one is missing, the newest of them is where it goes on.
        """
        if record.state == FINISHED:
            raise ConfigError(f"job {record.job_id} is finished; submit a recipe with more steps instead")
        active = self._active_of(record)
        if record.state == FAILED or (active is not None and active.hold):
            self._go_back(record, on_disk)
        if active is not None:
            active.halted_version = None
            active.held_until = 0.0
            if active.record.desired != "run" or active.state == PAUSED:
                self._controller.update(active, desired="run")
                self._controller.event(record.job_id, "state", f"resumed{by_caller()}")
            if active.state == PAUSED:
                self._controller.set_state(active, RUNNING, "resumed")
        elif record.state in (PAUSED, STOPPED, FAILED):
            rank = min([job.rank for job in self._controller.state.list_jobs()], default=0) - 1
            self._controller.save(record, state=QUEUED, desired="run", reason="resumed", rank=rank, ended_unix_ms=0)
            self._controller.event(
                record.job_id, "state", f"resumed{by_caller()}: first in the queue, goes on from its last checkpoint"
            )
        self._controller.reconcile()

    def _go_back(self, record: JobRecord, on_disk: Sequence[int]) -> None:
        """Forget checkpoints later than the newest that is there. With none there is nothing to go back to."""
        known = self._controller.state.checkpoint_versions(record.job_id)
        if known and on_disk and on_disk[-1] < known[-1]:
            self._controller.state.forget_checkpoints(record.job_id, on_disk[-1])
            self._controller.event(
                record.job_id,
                "checkpoint",
                f"goes back to version {on_disk[-1]}{by_caller()}: the checkpoint of version {known[-1]} is gone",
            )

    def _active_of(self, record: JobRecord) -> ActiveJob | None:
        active = self._controller.active
        return active if active is not None and active.job_id == record.job_id else None
