"""The transitions of the active job. Each is stored, then applied in memory, then sent to the nodes.

A transition that cannot be stored raises UnreachableError and changes nothing: it is due again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.jobs.journal import Event, Journal
from gradstream.coordinator.jobs.leasing import Leasing, Proposal
from gradstream.coordinator.jobs.plan_making import MadePlan
from gradstream.coordinator.nodes.membership import WORKER, NodeEntry
from gradstream.coordinator.nodes.registry import NodeRegistry
from gradstream.coordinator.state.state import JobRecord, State
from gradstream.coordinator.timing import Timing, unix_ms
from gradstream.core.errors import GradstreamError, UnreachableError, one_line
from gradstream.core.job_states import FAILED, PLANNING, STATE_WORDS, after_state
from gradstream.core.plan.leases import moved_workers
from gradstream.core.telemetry.sampling import Sampling
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, plan_pb2


class Transitions:
    """Owner of the active job: only this class makes a job the active one, or ends it."""

    def __init__(
        self,
        state: State,
        journal: Journal,
        nodes: NodeRegistry,
        leasing: Leasing,
        timing: Timing,
        clock: Callable[[], float],
    ):
        self.active: ActiveJob | None = None
        self._state = state
        self._journal = journal
        self._nodes = nodes
        self._leasing = leasing
        self._timing = timing
        self._clock = clock
        # The lease table in force, and its directive. None before the first one is sent.
        self._table: tuple[plan_pb2.LeaseTable, bytes] | None = None

    # --- into the cluster -------------------------------------------------------------------------------------------

    def load(self, record: JobRecord) -> ActiveJob | None:
        """Load the view of a job. End the job and return None if its record cannot be read. Raises UnreachableError."""
        try:
            active = ActiveJob.load(record, self._state)
        except UnreachableError:
            raise
        except GradstreamError as error:
            reason = f"its record cannot be used: {one_line(error)}; submit it again"
            event = Event("failure", f"failed: {reason}")
            self._journal.store(record, [event], state=FAILED, reason=reason, plan_held=False, ended_unix_ms=unix_ms())
            return None
        active.reunion.reunion_seconds = self._timing.reunion_seconds
        active.benches.bench_seconds = self._timing.bench_seconds
        return active

    def begin(self, record: JobRecord) -> ActiveJob | None:
        """Make a queued job the active one; None when its record cannot be read. Raises UnreachableError."""
        # The nodes have released the plan of an earlier turn.
        changes: dict[str, Any] = {"state": PLANNING, "reason": "its turn has come", "plan_held": False}
        active = self.load(replace(record, plan_held=False))
        if active is None:
            return None
        self.update(active, Event("state", "planning: its turn has come"), **changes)
        active.progress_at = self._clock()
        self.active = active
        return active

    def adopt(self, active: ActiveJob) -> None:
        """Make a job the active one that an earlier process of the coordinator had under way."""
        self.active = active

    # --- while it is active -----------------------------------------------------------------------------------------

    def update(self, active: ActiveJob, *events: Event, plan: bytes | None = None, **changes: Any) -> None:
        """Store a transition of the active job. Raises UnreachableError and then changes nothing."""
        active.record = self._journal.store(active.record, events, plan, **changes)

    def set_state(
        self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str, *before: Event, **changes: Any
    ) -> None:
        """Move the active job to another state in which it stays active. Raises UnreachableError."""
        event = Event("state", f"{STATE_WORDS[state]}{after_state(STATE_WORDS[state], reason)}")
        self.update(active, *before, event, state=state, reason=reason, **changes)
        active.progress_at = self._clock()

    def take_plan(self, active: ActiveJob, made: MadePlan) -> None:
        """Put a plan in force and send it to its nodes. Raises UnreachableError."""
        plan, message = made.plan, made.plan.to_proto()
        totals = self._state.step_totals(active.job_id, plan.epoch, plan.start_version)
        events = made.events(active.record, active.version)
        self.update(active, *events, plan=message.SerializeToString(), **made.changes(active.record))
        active.take_plan(message, plan)
        active.take_recipe(plan.recipe)
        active.checkpoints = set(made.versions)
        active.totals = totals
        active.progress_at = self._clock()
        active.leases_due = True
        for node in self._nodes.members.everyone_present():
            if node.kind == WORKER or plan.server_index(node.node_id) is not None:
                self.send_plan(node, active)
            elif active.job_id in node.holds:
                self._nodes.release(node, active.job_id, "the new plan does without it")

    def give_up_plan(self, active: ActiveJob, reason: str) -> None:
        """Return the job to planning although its plan stands. Raises UnreachableError.

        Every step must be in a checkpoint.
        """
        self.set_state(active, PLANNING, reason, plan_held=False)
        active.plan = active.plan_message = None

    def take_leases(self, active: ActiveJob, proposal: Proposal, now: float) -> None:
        """Put a proposed lease table in force and send it to the workers. Raises UnreachableError."""
        number = active.lease_number + 1
        table = self._leasing.table(active, proposal, number)
        self.update(
            active,
            Event("leases", proposal.reason.removeprefix("leases: ")),
            leases=table.SerializeToString(),
            decisions={**active.record.decisions, "leases": proposal.reason},
        )
        moved = moved_workers(active.holders, proposal.holders, active.replicas, proposal.replicas)
        to_all = active.leases_due
        active.take_leases(number, proposal.holders, proposal.replicas, proposal.reason, now)
        self._table = (table, coordinator_pb2.SessionResponse(leases=table).SerializeToString())
        concerned = []
        for node in self._nodes.members.present(WORKER):
            is_new = self.send_plan(node, active)
            if active.job_id in node.holds and (to_all or is_new or node.node_id in moved):
                concerned.append(node)
        self._nodes.send_all(concerned, self._table[1])

    def send_plan(self, node: NodeEntry, active: ActiveJob) -> bool:
        """Send a node the plan, unless it holds it or has failed with it; return whether it was sent.

        The job must have a plan.
        """
        assert active.plan_message is not None
        if active.benches.failed(node.node_id) or not self._nodes.send_plan(node, active.plan_message):
            return False
        if active.sampling != Sampling():
            self._nodes.send(node, _sampling_directive(active))
        return True

    def welcome(self, node: NodeEntry, active: ActiveJob) -> None:
        """Send the plan and the lease table in force to a worker that has opened a session. The job must have a plan.

        A newcomer that the table does not name hears of the first table that names it.
        """
        is_new = self.send_plan(node, active)
        if not is_new and active.sampling != Sampling():
            self._nodes.send(node, _sampling_directive(active))
        # A table that is not stored yet is sent once it is.
        if active.leases_due or active.job_id not in node.holds or (is_new and node.node_id not in active.members):
            return
        key = (active.job_id, active.record.epoch, active.lease_number)
        if self._table is None or (self._table[0].job_id, self._table[0].epoch, self._table[0].number) != key:
            table = self._leasing.standing_table(active)
            self._table = (table, coordinator_pb2.SessionResponse(leases=table).SerializeToString())
        self._nodes.send_all([node], self._table[1])

    def take_sampling(self, active: ActiveJob, sampling: Sampling) -> None:
        """Change which timelines the workers report. It is not stored: another coordinator decides again."""
        active.sampling = sampling
        workers = [node for node in self._nodes.members.present(WORKER) if active.job_id in node.holds]
        self._nodes.send_all(workers, _sampling_directive(active).SerializeToString())

    # --- out of the cluster -----------------------------------------------------------------------------------------

    def unsaved(self, active: ActiveJob) -> str:
        """The end of a sentence on the last checkpoint of a job that ends now; empty if it has every step."""
        last = max(self._state.checkpoint_versions(active.job_id), default=0)
        if last >= active.version:
            return ""
        return f"; its last checkpoint is of {active.rounds.version_text(last)}" if last else "; it has no checkpoint"

    def end(
        self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str, *before: Event, **changes: Any
    ) -> None:
        """End the active job. Every node forgets it. Raises UnreachableError."""
        self.leave(active, state, reason, *before, ended_unix_ms=unix_ms(), **changes)

    def leave(
        self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str, *before: Event, **changes: Any
    ) -> None:
        """Take the active job off the cluster, whether or not it has ended. Raises UnreachableError.

        Every node forgets the job.
        """
        table = plan_pb2.LeaseTable(job_id=active.job_id, epoch=active.record.epoch, number=active.lease_number)
        kind = "failure" if state == FAILED else "state"
        self.update(
            active,
            *before,
            Event(kind, f"{STATE_WORDS[state]}{after_state(STATE_WORDS[state], reason)}"),
            state=state,
            reason=reason,
            plan_held=False,
            leases=table.SerializeToString(),
            **changes,
        )
        task = active.planning.task
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        active.release_start()
        self.active = None
        for node in self._nodes.members.everyone_present():
            self._nodes.release(node, active.job_id, reason)


def _sampling_directive(active: ActiveJob) -> coordinator_pb2.SessionResponse:
    sampling = coordinator_pb2.TimelineSampling(
        job_id=active.job_id,
        epoch=active.record.epoch,
        interval_versions=active.sampling.interval_versions,
        num_groups=active.sampling.num_groups,
    )
    return coordinator_pb2.SessionResponse(sampling=sampling)
