"""Gives workers other slots than the lease table's for the round under way: moves and copies.

The decision is `core/plan/round_work.py`; this module makes its input of heartbeats, and sends what it changes. Nothing
is stored: a round's work is a hint. Without it each worker computes the slots that it holds, to the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradstream.coordinator.jobs.active import ActiveJob, GivenWork
from gradstream.coordinator.jobs.journal import Journal
from gradstream.coordinator.nodes.membership import WORKER, Membership, NodeEntry
from gradstream.coordinator.nodes.registry import NodeRegistry
from gradstream.core.job_states import RUNNING
from gradstream.core.log import get_logger
from gradstream.core.plan.round_work import RoundWorker, Share, reasons_text, share_round
from gradstream.proto.v1 import coordinator_pb2

log = get_logger()


@dataclass
class _Begun:
    """A round and the time (the controller's clock) at which it was seen first."""

    key: tuple[str, int, int] = ("", 0, 0)
    at: float = 0.0


class RoundWork:
    """Shares the round under way among the workers that hold slots."""

    def __init__(self, nodes: NodeRegistry, journal: Journal):
        self._nodes = nodes
        self._members: Membership = nodes.members
        self._journal = journal
        self._begun = _Begun()

    def share(self, active: ActiveJob, now: float) -> None:
        """Give workers what the decision changes. Does nothing where a slot's worker shapes its bits, or is a chain."""
        if not shares_rounds(active):
            return
        key = (active.job_id, active.record.epoch, active.version)
        if key != self._begun.key:
            self._begun = _Begun(key, now)
            active.round_line = ""
        missing = self._missing(active)
        if missing is None:
            return
        workers = self._workers(active, now)
        num_steps = [active.rounds.num_slot_steps(active.version, slot) for slot in range(len(active.holders))]
        shares, reasons = share_round(num_steps, missing, workers)
        if reasons:
            active.round_line = f"{active.rounds.commit_text(active.version)}: {reasons_text(reasons)}"
            self._journal.note(active.job_id, "leases", active.round_line)
        for worker in workers:
            self._give(active, worker, shares[worker.node_id])

    def _missing(self, active: ActiveJob) -> set[int] | None:
        """The slots of the round under way that are not complete; None while a server does not say."""
        assert active.plan is not None
        missing: set[int] = set()
        for server in active.plan.servers:
            node = self._members.get(server.node_id)
            activity = node.activity if node is not None and node.present else None
            if activity is None or activity.job_id != active.job_id or activity.step != active.version:
                return None
            if activity.phase != "accumulating":
                return None
            missing.update(slot for slot in activity.missing_slots if slot < len(active.holders))
        counted = active.plan.counted_slots(active.version)
        return missing if counted is None else missing.intersection(counted)

    def _workers(self, active: ActiveJob, now: float) -> list[RoundWorker]:
        """The workers of the round: those that hold slots, and those that still compute one that went elsewhere."""
        held: dict[str, list[int]] = {}
        for slot, holder in enumerate(active.holders):
            held.setdefault(holder, []).append(slot)
        found = []
        for node in self._members.present(WORKER):
            activity, done = node.activity, node.activity.round
            if active.benches.benched(node.node_id) or activity.unreachable:
                continue
            has_version = (
                activity.job_id == active.job_id and activity.HasField("round") and done.version == active.version
            )
            if node.node_id not in held and not (has_version and done.HasField("slot")):
                continue
            found.append(self._worker(active, node, tuple(held.get(node.node_id, ())), has_version, now))
        return found

    def _worker(
        self, active: ActiveJob, node: NodeEntry, holds: tuple[int, ...], has_version: bool, now: float
    ) -> RoundWorker:
        activity, done = node.activity, node.activity.round
        given = active.work_of(node.node_id)
        known = activity.job_id == active.job_id and activity.HasField("round")
        return RoundWorker(
            node_id=node.node_id,
            name=node.name,
            slots=given.slots if given is not None else holds,
            is_told=given is not None,
            holds=holds,
            computed=tuple(done.computed) if has_version else (),
            slot=done.slot if has_version and done.HasField("slot") else None,
            num_done=done.num_done if has_version else 0,
            inner_step_seconds=max(0.0, done.inner_step_seconds) if known else 0.0,
            # It is expected to take as long again as it has taken so far.
            begins_in=0.0 if has_version else now - max(self._begun.at, active.given_at.get(node.node_id, now)),
            kept={
                kept.slot: kept.num_done
                for kept in activity.kept
                if activity.job_id == active.job_id and kept.version == active.version
            },
        )

    def _give(self, active: ActiveJob, worker: RoundWorker, share: Share) -> None:
        """Tell a worker its share, unless it computes just that, or copies are no news to it."""
        node = self._members.get(worker.node_id)
        assert node is not None
        last = active.work.get(worker.node_id)
        # A process that has registered again may follow what an earlier coordinator told it.
        is_known = last is not None and last.session == node.session
        present = set(worker.slots) - set(worker.computed)
        copies = last.copies if worker.is_told and last is not None else ()
        if is_known and present == set(share.slots) and set(copies) == set(share.copies):
            return
        version, epoch = active.version, active.record.epoch
        active.work[worker.node_id] = GivenWork(node.session, epoch, version, share.slots, share.copies)
        work = coordinator_pb2.RoundWork(
            job_id=active.job_id, epoch=epoch, version=version, slots=share.slots, copies=share.copies
        )
        self._nodes.send(node, coordinator_pb2.SessionResponse(work=work))
        log.debug("gave work of a round", job=active.job_id, node=node.node_id, version=version, slots=share.slots)


def shares_rounds(active: ActiveJob) -> bool:
    """Whether the step under way is a round whose slots any worker can compute, to the same bits."""
    return (
        active.plan is not None
        and active.state == RUNNING
        and not active.resting
        and not active.plan.has_pipeline
        and not active.done
        and active.rounds.is_round(active.version)
        and not active.recipe.keeps_slot_state()
    )
