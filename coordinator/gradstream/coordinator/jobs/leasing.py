"""Choose the workers that may hold slots of the active job, find stuck ones, and propose the lease table.

This module reads the membership and the job, and stores nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

from gradstream.coordinator.jobs import decisions, stalls
from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.nodes.benches import find_stuck, stuck_workers
from gradstream.coordinator.nodes.membership import WORKER, Membership, NodeEntry
from gradstream.coordinator.planning import needs
from gradstream.coordinator.telemetry.timelines import Timelines
from gradstream.coordinator.timing import Timing
from gradstream.core.plan.leases import Replica, form_replicas
from gradstream.core.plan.plan import Plan
from gradstream.proto.v1 import plan_pb2

MIN_MEASURED_STEPS = 8


@dataclass(frozen=True)
class Proposal:
    """A lease table that is not yet stored."""

    holders: list[str]
    replicas: list[Replica]
    reason: str


class Leasing:
    """Proposes lease tables for the active job."""

    def __init__(self, members: Membership, timing: Timing, timelines: Timelines):
        self._members = members
        self._timing = timing
        self._timelines = timelines

    def workers(self, active: ActiveJob) -> list[NodeEntry]:
        """The live workers with enough memory for the active job, oldest first."""
        present = self._members.present(WORKER)
        plan = active.plan
        if plan is None:
            return present
        need = min(needs.stage_need(plan, place) for place in range(plan.replica_size))
        return [node for node in present if needs.fits(node.memory_bytes, need)]

    def candidates(self, active: ActiveJob, now: float) -> list[str]:
        """The workers that may hold slots, expected ones first. Benched ones are used only if there are no others."""
        expected = self._expected(active, now)
        able = list(dict.fromkeys([*expected, *(node.node_id for node in self.workers(active))]))
        able = [node_id for node_id in able if not active.benches.failed(node_id)]
        free = [node_id for node_id in able if not active.benches.benched(node_id)]
        return free or able

    def any_worker(self, active: ActiveJob, now: float) -> bool:
        """Whether slots can be computed. A pipeline needs a whole replica."""
        plan, workers = active.plan, self.candidates(active, now)
        return bool(self._form(active, plan, workers)[0] if plan is not None and plan.has_pipeline else workers)

    def can_end_step(self, active: ActiveJob, now: float) -> bool:
        """Whether the step under way can end: its slots can be computed, and not all workers are stuck."""
        return self.any_worker(active, now) and not self._all_stuck(active, now)

    def _all_stuck(self, active: ActiveJob, now: float) -> bool:
        """Whether the step under way cannot end because none of its workers makes progress."""
        sights = stalls.worker_sights(active, self._members, now)
        stuck = stuck_workers(sights, stalls.slot_seconds(active), self._timing)
        return bool(stuck) and len(stuck) >= len(self.candidates(active, now))

    def bench_stuck(self, active: ActiveJob, now: float) -> None:
        """Bench workers that heartbeat without progress or cannot reach a peer. Other workers get their slots."""
        if active.resting:
            return
        sights = stalls.worker_sights(active, self._members, now)
        num_able = len(self.candidates(active, now))
        for node_id, reason in find_stuck(sights, num_able, stalls.slot_seconds(active), self._timing):
            node = self._members.get(node_id)
            if node is not None:
                active.benches.bench(node_id, node.title, reason, False, now)

    def propose(self, active: ActiveJob, now: float) -> Proposal:
        """Propose the lease table for the live workers, with its reason."""
        workers = self.candidates(active, now)
        names = {node_id: self._members.name_of(node_id) for node_id in workers}
        plan, replicas, formed = active.plan, active.replicas, ""
        if plan is not None and plan.has_pipeline:
            replicas, formed = self._form(active, plan, workers)
            names = {chain.workers[0]: " → ".join(map(self._members.name_of, chain.workers)) for chain in replicas}
            workers = [chain.workers[0] for chain in replicas]
        costs = active.rounds.slot_lengths
        if len(set(costs)) > 1:
            slot_seconds: dict[str, float] | None = self._inner_step_seconds(active, workers, costs)
        else:
            slot_seconds = self._slot_seconds(active, workers) if not formed else None
        holders, reason = decisions.lease_slots(
            active.holders, workers, active.resting, names, formed, slot_seconds, costs
        )
        benched = active.benches.line()
        return Proposal(holders, replicas, f"{reason}; {benched}" if benched else reason)

    def _slot_seconds(self, active: ActiveJob, workers: list[str]) -> dict[str, float]:
        """Each worker's time for a slot, 0 if not measured; empty before enough steps were measured."""
        steps = self._timelines.steps(active.job_id)
        if steps is None or steps.measured.num_steps < MIN_MEASURED_STEPS:
            return {}
        by_name = {worker.name: worker.slot_seconds for worker in steps.measured.workers}
        return {worker: by_name.get(self._members.name_of(worker), 0.0) for worker in workers}

    def _inner_step_seconds(self, active: ActiveJob, workers: list[str], costs: Sequence[int]) -> dict[str, float]:
        """Each worker's time for an inner step of a slot.

        Before each worker was measured in rounds with the slots that it holds now, the time follows from the speeds
        with which the workers registered: the fastest one takes 1.
        """
        steps = self._timelines.steps(active.job_id)
        held = Counter(active.holders)
        if steps is not None and steps.measured.round_steps and steps.measured.num_steps >= MIN_MEASURED_STEPS:
            measured = {worker.name: worker for worker in steps.measured.workers}
            found = {}
            for worker in workers:
                parts = measured.get(self._members.name_of(worker))
                if parts is None or not held[worker] or parts.num_slots != held[worker]:
                    break
                own = sum(cost for cost, holder in zip(costs, active.holders, strict=True) if holder == worker)
                found[worker] = parts.slot_seconds * held[worker] / own
            else:
                return found
        nodes = {worker: self._members.get(worker) for worker in workers}
        speeds = {worker: node.flops_per_second if node is not None else 0.0 for worker, node in nodes.items()}
        fastest = max(speeds.values(), default=0.0)
        return {worker: fastest / speed if speed else 0.0 for worker, speed in speeds.items()}

    def table(self, active: ActiveJob, proposal: Proposal, number: int) -> plan_pb2.LeaseTable:
        """A proposal as a message for workers, with its number."""
        return plan_pb2.LeaseTable(
            job_id=active.job_id,
            epoch=active.record.epoch,
            number=number,
            holders=proposal.holders,
            reason=proposal.reason,
            replicas=[
                plan_pb2.Replica(
                    number=replica.number, workers=[self._describe(active, worker) for worker in replica.workers]
                )
                for replica in proposal.replicas
            ],
        )

    def standing_table(self, active: ActiveJob) -> plan_pb2.LeaseTable:
        """The lease table in force, as a message."""
        standing = Proposal(active.holders, active.replicas, active.lease_reason)
        return self.table(active, standing, active.lease_number)

    def _describe(self, active: ActiveJob, node_id: str) -> plan_pb2.PipelineWorker:
        node = self._members.get(node_id)
        # A worker that has not registered again since this process started has its old address: it is the same process.
        address = node.address if node is not None else active.addresses.get(node_id, "")
        return plan_pb2.PipelineWorker(node_id=node_id, name=self._members.name_of(node_id), address=address)

    def _expected(self, active: ActiveJob, now: float) -> Collection[str]:
        """Holders that count as live although they have no session.

        These are the workers that have registered and are about to open their session and, for a time after a restart
        of the coordinator, those that have not registered since.
        """
        waiting = now < active.expect_holders_until
        expected = []
        for holder in active.members:
            node = self._members.get(holder)
            if (waiting and node is None) or (node is not None and node.alive and not node.present):
                expected.append(holder)
        return expected

    def _form(self, active: ActiveJob, plan: Plan, workers: list[str]) -> tuple[list[Replica], str]:
        """Form the replicas of the next lease table; return them and the reason."""
        return form_replicas(
            active.replicas, workers, plan.replica_size, active.lease_number + 1, partial(self._fits, plan)
        )

    def _fits(self, plan: Plan, worker: str, place: int) -> bool:
        """Whether a place of a replica fits a worker's memory. A worker that is about to come back fitted before."""
        node = self._members.get(worker)
        return node is None or needs.fits(node.memory_bytes, needs.stage_need(plan, place))
