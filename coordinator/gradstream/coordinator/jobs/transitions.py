"""The transitions of the active job, each in the same order: stored, then seen in memory, then sent to the nodes.

What could not be stored raises UnreachableError, and then nothing has changed: the same transition is due again.
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
from gradstream.core.job_states import FAILED, PLANNING, STATE_WORDS
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, plan_pb2


class Transitions:
    """Owns the active job: nobody else makes a job the active one, or ends it."""

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

    # --- into the cluster -------------------------------------------------------------------------------------------

    def load(self, record: JobRecord) -> ActiveJob | None:
        """The view of a job; None when its record cannot be read any more, which ends it. Raises UnreachableError."""
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
        # What an earlier turn left on nodes was released.
        changes: dict[str, Any] = {"state": PLANNING, "reason": "its turn has come", "plan_held": False}
        active = self.load(replace(record, plan_held=False))
        if active is None:
            return None
        self.update(active, Event("state", "planning: its turn has come"), **changes)
        active.progress_at = self._clock()
        self.active = active
        return active

    def adopt(self, active: ActiveJob) -> None:
        """Make the active job one that an earlier process of the coordinator had under way."""
        self.active = active

    # --- while it is active -----------------------------------------------------------------------------------------

    def update(self, active: ActiveJob, *events: Event, plan: bytes | None = None, **changes: Any) -> None:
        """Store a transition of the active job. Raises UnreachableError, and then nothing has changed."""
        active.record = self._journal.store(active.record, events, plan, **changes)

    def set_state(
        self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str, *before: Event, **changes: Any
    ) -> None:
        """Move the active job to another state that it lives in. Raises UnreachableError."""
        event = Event("state", f"{STATE_WORDS[state]}: {reason}")
        self.update(active, *before, event, state=state, reason=reason, **changes)
        active.progress_at = self._clock()

    def take_plan(self, active: ActiveJob, made: MadePlan) -> None:
        """Make a plan the job's, and send it to its nodes. Raises UnreachableError."""
        plan, message = made.plan, made.plan.to_proto()
        totals = self._state.step_totals(active.job_id, plan.epoch, plan.start_version)
        events = made.events(active.record, active.version)
        self.update(active, *events, plan=message.SerializeToString(), **made.changes(active.record))
        active.take_plan(message, plan)
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
        """Send the job back to planning although its plan stands. Every step must be in a checkpoint. Raises
        UnreachableError."""
        self.set_state(active, PLANNING, reason, plan_held=False)
        active.plan = active.plan_message = None

    def take_leases(self, active: ActiveJob, proposal: Proposal, now: float) -> None:
        """Make a proposal the lease table in force, and send it to the workers. Raises UnreachableError."""
        number = active.lease_number + 1
        table = self._leasing.table(active, proposal, number)
        self.update(
            active,
            Event("leases", proposal.reason.removeprefix("leases: ")),
            leases=table.SerializeToString(),
            decisions={**active.record.decisions, "leases": proposal.reason},
        )
        active.take_leases(number, proposal.holders, proposal.replicas, proposal.reason, now)
        for node in self._nodes.members.present(WORKER):
            self.send_plan(node, active)
            if active.job_id in node.holds:
                self._nodes.send(node, coordinator_pb2.SessionResponse(leases=table))

    def send_plan(self, node: NodeEntry, active: ActiveJob) -> None:
        """Send a node the plan, unless it holds it or has failed with it. The job must have one."""
        assert active.plan_message is not None
        if not active.benches.failed(node.node_id):
            self._nodes.send_plan(node, active.plan_message)

    # --- out of the cluster -----------------------------------------------------------------------------------------

    def unsaved(self, active: ActiveJob) -> str:
        """What a job that ends now leaves of its steps, as the end of a sentence; empty when all of them."""
        last = max(self._state.checkpoint_versions(active.job_id), default=0)
        if last >= active.version:
            return ""
        return f"; its last checkpoint is of version {last}" if last else "; it has no checkpoint"

    def end(
        self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str, *before: Event, **changes: Any
    ) -> None:
        """End the active job; every node forgets it. Raises UnreachableError."""
        self.leave(active, state, reason, *before, ended_unix_ms=unix_ms(), **changes)

    def leave(
        self, active: ActiveJob, state: jobs_pb2.JobState.ValueType, reason: str, *before: Event, **changes: Any
    ) -> None:
        """Free the cluster of the active job, whether it has ended or not; every node forgets it. Raises
        UnreachableError."""
        table = plan_pb2.LeaseTable(job_id=active.job_id, epoch=active.record.epoch, number=active.lease_number)
        kind = "failure" if state == FAILED else "state"
        self.update(
            active,
            *before,
            Event(kind, f"{STATE_WORDS[state]}: {reason}"),
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
