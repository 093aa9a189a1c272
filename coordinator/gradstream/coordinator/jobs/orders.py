"""Store people's orders for a job: pause, resume, stop, replan. The controller carries them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gradstream.coordinator.jobs import checkpoints, decisions, plan_making
from gradstream.coordinator.jobs.active import ActiveJob, nothing
from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.jobs.journal import Event
from gradstream.coordinator.jobs.more_steps import with_more_steps
from gradstream.coordinator.jobs.plan_making import Start
from gradstream.coordinator.nodes.membership import SERVER
from gradstream.coordinator.state.state import JobRecord
from gradstream.coordinator.timing import unix_ms
from gradstream.core.errors import CheckpointError, ConfigError, PlanError, nearest
from gradstream.core.job_states import ENDED, FAILED, FINISHED, PAUSED, QUEUED, RUNNING, STATE_WORDS, STOPPED
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.rpc.access import by_caller


class Orders:
    """Takes orders for a job at any time and in any state of the job."""

    def __init__(self, controller: Controller):
        self._controller = controller
        self._journal = controller.journal

    def pause(self, record: JobRecord) -> None:
        """Pause at the next boundary, or at once if the job does not run. Raises ConfigError when the job has ended."""
        if record.state in ENDED:
            raise ConfigError(f"job {record.job_id} is {STATE_WORDS[record.state]}; only a live job can be paused")
        active = self._active_of(record)
        if active is None:
            if record.state == QUEUED:
                event = Event("state", f"paused while queued{by_caller()}")
                self._journal.store(record, [event], state=PAUSED, desired="pause", reason="paused before it had begun")
            return
        if active.record.desired != "pause" and active.state != PAUSED:
            self._controller.transitions.update(
                active,
                Event("state", f"a pause was asked for{by_caller()}"),
                desired="pause",
                **_without_replan(active),
            )
            active.boundary_session = 0
        self._controller.reconcile()

    def stop(self, record: JobRecord, now: bool) -> None:
        """Stop at the next boundary with a checkpoint, or at once. Raises ConfigError when the job has ended."""
        if record.state in ENDED:
            raise ConfigError(f"job {record.job_id} is already {STATE_WORDS[record.state]}")
        active = self._active_of(record)
        if active is None:
            event = Event("state", f"stopped before its turn{by_caller()}")
            reason, ended = "stopped before its turn", unix_ms()
            self._journal.store(record, [event], state=STOPPED, desired="stop", reason=reason, ended_unix_ms=ended)
            return
        asked = Event("state", f"a stop was asked for{by_caller()}")
        if now:
            reason = f"stopped at once at {active.place}{self._controller.transitions.unsaved(active)}"
            self._controller.transitions.end(active, STOPPED, reason, asked, desired="stop")
        elif active.record.desired != "stop":
            self._controller.transitions.update(active, asked, desired="stop", **_without_replan(active))
            active.boundary_session = 0
        self._controller.reconcile()

    async def replan(self, record: JobRecord, without: Sequence[str]) -> None:
        """Replace a running job's plan at the next boundary, on all live servers but those named in `without`.

        Raises ConfigError when the job does not run or nothing would change, PlanError when no plan could be made.
        """
        active = self._replannable(record)
        names = [server.name for server in active.plan.servers] if active.plan is not None else []
        known = {*names, *(node.name for node in self._controller.members.present(SERVER))}
        for name in without:
            if name not in known:
                raise ConfigError(f"there is no parameter server '{name[:100]}'{nearest(name, sorted(known))}")
        nodes = self._controller.plan_making.nodes(active, without)
        for what, _ in decisions.missing_nodes(active.recipe, len(nodes.servers), len(nodes.workers), False):
            raise PlanError(f"job {record.job_id} needs {what}; start one first, or lower cluster.min_servers")
        # Check the memory before the job rests. The version at which the plan starts does not matter for the memory.
        made = await plan_making.make_plan(active, nodes, Start(None, [], nothing))
        if self._replannable(record) is not active:
            raise ConfigError(f"job {record.job_id} was planned meanwhile; look at it and try again")
        offered = [server.name for server in made.plan.servers]
        computes = self._controller.leasing.any_worker(active, self._controller.clock())
        step = active.rounds.steps_at(active.version + computes)
        changes, reason = decisions.judge_replan(names, offered, step)
        if not changes:
            raise ConfigError(reason)
        self._controller.transitions.update(
            active,
            Event("plan", f"{reason}{by_caller()}"),
            desired="replan",
            reason=reason,
            without_servers=tuple(without),
        )
        active.boundary_session = 0
        self._controller.reconcile()

    def _replannable(self, record: JobRecord) -> ActiveJob:
        """The view of a job that can be replanned. Raises ConfigError when it cannot."""
        active = self._active_of(record)
        if active is None or active.state != RUNNING or active.record.desired not in ("run", "replan"):
            state = STATE_WORDS[record.state if active is None else active.state]
            if active is not None and active.state == RUNNING:
                state = f"about to {active.record.desired}"
            raise ConfigError(
                f"job {record.job_id} is {state}; only a running job can be replanned. A job that goes on from a "
                f"checkpoint takes all live servers by itself"
            )
        if active.done:
            raise ConfigError(f"job {record.job_id} has done its last step; there is nothing left to replan for")
        return active

    def checkpoint(self, record: JobRecord) -> int:
        """Request a checkpoint at the next boundary, or of the current version if no worker computes.

        Return a version: the checkpoint will be of a later one. Raises ConfigError when the job does not run.
        """
        active = self._active_of(record)
        if active is None or active.state != RUNNING or active.record.desired != "run":
            raise ConfigError(
                f"job {record.job_id} is {STATE_WORDS[record.state]}; only a running job can be asked for a checkpoint"
            )
        computes = self._controller.leasing.any_worker(active, self._controller.clock())
        after = active.version if computes and active.version in active.checkpoints else active.version - 1
        active.checkpoint_after, active.boundary_session = after, 0
        self._controller.reconcile()
        return after

    def checkpoint_comes(self, record: JobRecord, after: int) -> bool:
        """Whether a job will still write a checkpoint of a later version than `after`."""
        active = self._active_of(record)
        if active is None:
            return False
        if active.state != PAUSED:
            return True
        due = [active.halted_version, active.snapshot_due]
        return any(version is not None and version > after and version not in active.checkpoints for version in due)

    def may_extend(self, record: JobRecord, num_steps: int) -> bool:
        """Whether a job can be extended to `num_steps` steps now; False while its checkpoint is not written yet.

        Raises ConfigError for a job that does not rest.
        """
        active = self._active_of(record)
        if active is None and record.state != QUEUED:
            return True
        if active is None or active.state != PAUSED:
            state = STATE_WORDS[record.state if active is None else active.state]
            raise ConfigError(
                f"job {record.job_id} is {state}; pause it first (`gradstream pause {record.job_id}`), then resume it "
                f"with --steps {num_steps}"
            )
        return active.version in active.checkpoints or active.version == 0

    def extend(self, record: JobRecord, on_disk: Sequence[int], num_steps: int) -> None:
        """Queue a resting or ended job again; it goes on from its last checkpoint to `num_steps` steps in all.

        `may_extend` must hold; the next reconcile takes the job up. Raises ConfigError when there are no steps left to
        do, CheckpointError when the last checkpoint is not there.
        """
        known = self._controller.state.checkpoint_versions(record.job_id)
        root, goes_back = checkpoints.root_of(record.run_directory), record.state == FAILED and bool(on_disk)
        if not goes_back and checkpoints.missing(root, on_disk, known, record.job_id):
            # Without the cure of a job that waits: to go back to an older version.
            raise CheckpointError(checkpoints.missing(root, (), known, record.job_id))
        recipe, line = with_more_steps(
            record.job_id, parse_recipe(record.recipe_json), on_disk[-1] if on_disk else 0, num_steps
        )
        if goes_back:
            self._go_back(record, on_disk)
        changes: dict[str, Any] = {
            "desired": "run",
            "recipe_json": recipe.model_dump_json(),
            "rank": self._first_rank(),
        }
        active = self._active_of(record)
        if active is not None:
            event = Event("state", f"resumed{by_caller()} with more steps")
            self._controller.transitions.leave(active, QUEUED, line, event, **changes)
        else:
            event = Event("state", f"resumed{by_caller()} with more steps: {line}")
            self._journal.store(record, [event], state=QUEUED, reason=line, ended_unix_ms=0, **changes)

    def _first_rank(self) -> int:
        """A rank before those of all other jobs."""
        return self._controller.state.ranks()[0] - 1

    def resume(self, record: JobRecord, on_disk: Sequence[int] = ()) -> None:
        """Resume a paused job, or queue an ended one again. Raises ConfigError when the job is finished.

        `on_disk` has the versions whose checkpoints exist, oldest first. A job that failed, or is held because a newer
        checkpoint is missing, goes on from the newest of them.
        """
        if record.state == FINISHED:
            raise ConfigError(f"job {record.job_id} is finished; give it more steps with --steps")
        active = self._active_of(record)
        if record.state == FAILED or (active is not None and active.planning.hold.cause):
            self._go_back(record, on_disk)
        if active is not None:
            event = Event("state", f"resumed{by_caller()}")
            reason = f"resumed at step {active.rounds.steps_at(active.version)}"
            if active.state == PAUSED:
                self._controller.transitions.set_state(active, RUNNING, reason, event, desired="run")
            elif active.record.desired != "run":
                self._controller.transitions.update(active, event, desired="run", reason=reason)
            # The order is stored now.
            active.halted_version = None
            active.planning.hold = replace(active.planning.hold, until=0.0)
            active.benches.clear()
        elif record.state in (PAUSED, STOPPED, FAILED):
            message = f"resumed{by_caller()}: first in the queue, goes on from its last checkpoint"
            changes: dict[str, Any] = {
                "desired": "run",
                "reason": "resumed; first in the queue, goes on from its last checkpoint",
                "rank": self._first_rank(),
                "ended_unix_ms": 0,
            }
            self._journal.store(record, [Event("state", message)], state=QUEUED, **changes)
        self._controller.reconcile()

    def _go_back(self, record: JobRecord, on_disk: Sequence[int]) -> None:
        """Forget the checkpoints that are later than the newest one on disk. Without one on disk, keep the state."""
        known = self._controller.state.checkpoint_versions(record.job_id)
        if known and on_disk and on_disk[-1] < known[-1]:
            gone = f"the checkpoint of version {known[-1]} is gone"
            event = Event("checkpoint", f"goes back to version {on_disk[-1]}{by_caller()}: {gone}")
            self._controller.state.forget_checkpoints(record.job_id, on_disk[-1], [event.as_item()])
            self._controller.notifier.changed(record.job_id)

    def _active_of(self, record: JobRecord) -> ActiveJob | None:
        active = self._controller.active
        return active if active is not None and active.job_id == record.job_id else None


def _without_replan(active: ActiveJob) -> dict[str, Any]:
    """The changes of a job's record when another order supersedes an order to replan."""
    record = active.record
    if record.desired != "replan":
        return {}
    return {"reason": f"epoch {record.epoch} from {active.rounds.version_text(record.start_version)}"}
