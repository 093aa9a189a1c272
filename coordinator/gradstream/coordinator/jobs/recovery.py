"""Recovery of a job that an earlier process of the coordinator had under way."""

from __future__ import annotations

from gradstream.coordinator.jobs import checkpoints
from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.state.state import State
from gradstream.core.errors import UnreachableError, one_line
from gradstream.core.log import get_logger
from gradstream.core.storage.pool import StorageThreads

log = get_logger()


async def recover(active: ActiveJob, state: State, pins: checkpoints.Pins, disk: StorageThreads) -> None:
    """Complete the view of a job that was loaded from `state`.

    Adds its checkpoints, the pin of the checkpoint from which its plan starts, and a halt that the leader has answered.
    """
    record = active.record
    root = checkpoints.root_of(record.run_directory)
    try:
        active.checkpoints.update(await disk.call(root, checkpoints.versions_on_disk, root))
    except (UnreachableError, OSError) as error:
        # The coordinator must go on with its other jobs. The acknowledged checkpoints are assumed to exist.
        active.checkpoints.update(state.checkpoint_versions(record.job_id))
        log.warning("the checkpoints of a job cannot be listed", job=record.job_id, cause=one_line(error))
    if active.plan is not None and active.plan.checkpoint_path:
        active.release_start = pins.pin(root, record.start_version)
    last = active.totals.last
    if last is not None and last.halted and last.epoch == record.epoch:
        if record.desired == "run":
            # The halt was withdrawn; the workers rest until they get a newer lease table.
            active.leases_due = True
        else:
            active.halted_version = last.step + 1
