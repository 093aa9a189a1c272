"""Requests for a checkpoint between two steps: to the leader, or to all servers when no worker computes."""

from __future__ import annotations

from collections.abc import Callable

from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.jobs.leasing import Leasing
from gradstream.coordinator.nodes.membership import Membership, NodeEntry
from gradstream.core.job_states import RUNNING
from gradstream.proto.v1 import coordinator_pb2

SNAPSHOT_SECONDS = 1.0
"""Between two requests for a checkpoint of the current version."""


class Boundaries:
    """Sends the requests. Each reconcile checks their conditions again, so a broken session loses no request."""

    def __init__(
        self, members: Membership, leasing: Leasing, send: Callable[[NodeEntry, coordinator_pb2.SessionResponse], None]
    ):
        self._members = members
        self._leasing = leasing
        self._send = send

    def ask_for_boundary(self, active: ActiveJob, now: float) -> None:
        """Request a checkpoint at the leader's next commit, once per session, if an order or a person waits for one."""
        wanted = active.record.desired != "run" or active.checkpoint_wanted
        runs = active.state == RUNNING and not active.resting
        if not wanted or active.plan is None or not runs:
            return
        leader = self._members.get(active.plan.servers[active.plan.leader].node_id)
        if leader is None or not leader.present or leader.session == active.boundary_session:
            return
        if self._leasing.any_worker(active, now):
            boundary = coordinator_pb2.BoundaryRequest(job_id=active.job_id, epoch=active.record.epoch)
            self._send(leader, coordinator_pb2.SessionResponse(boundary=boundary))
            active.boundary_session = leader.session

    def ask_for_snapshot(self, active: ActiveJob, now: float) -> str:
        """Request a checkpoint of the current version from all servers; return a line for the history if it is new.

        The request is repeated, because a server ignores it while it still applies the last step, and a server that
        came back did not get it.
        """
        assert active.plan is not None
        known = active.snapshot == active.version
        if known and now < active.snapshot_at + SNAPSHOT_SECONDS:
            return ""
        active.snapshot, active.snapshot_at = active.version, now
        wanted = coordinator_pb2.SnapshotRequest(
            job_id=active.job_id, epoch=active.record.epoch, version=active.version
        )
        for server in active.plan.servers:
            node = self._members.get(server.node_id)
            if node is not None and node.present:
                self._send(node, coordinator_pb2.SessionResponse(snapshot=wanted))
        if known:
            return ""
        step = "round" if active.rounds.is_round(active.version) else "step"
        return f"no worker computes the next {step}; the servers write a checkpoint of {active.place} now"
