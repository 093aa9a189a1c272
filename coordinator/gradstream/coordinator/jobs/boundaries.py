"""Checkpoints between two steps: asked of the leader, or of all servers where nobody computes."""

from __future__ import annotations

from collections.abc import Callable

from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.jobs.leasing import Leasing
from gradstream.coordinator.nodes.membership import Membership, NodeEntry
from gradstream.core.job_states import RUNNING
from gradstream.proto.v1 import coordinator_pb2

SNAPSHOT_SECONDS = 1.0
"""Between requests for a checkpoint of the version at hand."""


class Boundaries:
    """Sends the requests. Each is a condition that is looked at again, so a stream that breaks loses none."""

    def __init__(
        self, members: Membership, leasing: Leasing, send: Callable[[NodeEntry, coordinator_pb2.SessionResponse], None]
    ):
        self._members = members
        self._leasing = leasing
        self._send = send

    def ask_for_boundary(self, active: ActiveJob, now: float) -> None:
        """Ask the leader, once a stream, for a checkpoint at its next commit, if a pause, a stop or a person waits."""
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
        """Ask the servers for a checkpoint of the version at hand; return a line for the history when it is a new one.

        It is asked for again and again: a server that still applied the last step, or one that came back, does nothing
        the first time.
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
        return f"nobody computes the next step; a checkpoint of version {active.version} is written as it is"
