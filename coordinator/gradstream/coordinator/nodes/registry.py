"""The nodes and the streams to them: how they arrive, what they are sent, how they depart.

Knows nothing of jobs but the plan that a node is sent or made to forget. What a departure means for a job is decided by
the caller.
"""

from __future__ import annotations

from gradstream.coordinator.nodes.membership import Membership, NodeEntry
from gradstream.coordinator.nodes.sessions import Hub, OpenSession
from gradstream.coordinator.timing import Timing, unix_ms
from gradstream.core.log import get_logger
from gradstream.proto.v1 import coordinator_pb2, plan_pb2

log = get_logger()


class NodeRegistry:
    """Owns the membership and the open streams. Times are seconds of the steady clock that the caller reads."""

    def __init__(self, timing: Timing, now: float):
        self._timing = timing
        self.members = Membership(timing.heartbeat_seconds, timing.lease_seconds)
        self._hub = Hub()
        self._looked_at = now

    # --- arrival ----------------------------------------------------------------------------------------------------

    def register(self, request: coordinator_pb2.RegisterRequest, now: float) -> NodeEntry:
        """Enter a node that was checked. Raises ConfigError when another live process has its name, BusyError while
        that is not known."""
        node = self.members.register(request, now, unix_ms())
        log.info("registered", node=node.node_id, address=node.address, holds=dict(node.holds))
        return node

    def open_session(self, node_id: str, in_force: plan_pb2.Plan | None) -> tuple[NodeEntry, OpenSession] | None:
        """Begin a node's stream, and release the plans that it holds besides the one in force; None when the node is
        not registered."""
        node = self.members.open_session(node_id)
        if node is None:
            return None
        session = self._hub.open(node)
        for job_id, epoch in list(node.holds.items()):
            if in_force is None or (in_force.job_id, in_force.epoch) != (job_id, epoch):
                self.release(node, job_id, "the coordinator has no such job running under this epoch")
        return node, session

    def heartbeat(self, session: OpenSession, activity: coordinator_pb2.Activity, now: float) -> bool:
        """Renew a node's lease; False when the stream has been superseded."""
        return self.members.heartbeat(session.node_id, session.number, activity, now, unix_ms())

    def note_vitals(self, session: OpenSession, vitals: coordinator_pb2.Vitals) -> None:
        """Keep what a node reports of its machine."""
        self.members.note_vitals(session.node_id, vitals)

    # --- directives -------------------------------------------------------------------------------------------------

    def send(self, node: NodeEntry, directive: coordinator_pb2.SessionResponse) -> None:
        """Queue a directive for a node, if it has a stream."""
        self._hub.send(node, directive)

    def send_plan(self, node: NodeEntry, plan: plan_pb2.Plan) -> None:
        """Send a node the plan, unless it holds it."""
        if node.holds.get(plan.job_id) != plan.epoch:
            self._hub.send(node, coordinator_pb2.SessionResponse(plan=plan))
            node.holds[plan.job_id] = plan.epoch

    def release(self, node: NodeEntry, job_id: str, reason: str) -> None:
        """Tell a node to forget a job."""
        self._hub.release(node, job_id, reason)

    # --- departure --------------------------------------------------------------------------------------------------

    def close_session(self, session: OpenSession, why: str) -> NodeEntry | None:
        """Note that a stream has ended. Return the node, which is silent now; None when it has another stream."""
        self._hub.close(session, why)
        return self.members.close_session(session.node_id, session.number)

    def expire(self, now: float) -> list[NodeEntry]:
        """End the nodes whose lease ran out, with their streams; return them."""
        expired = self.members.expire(now)
        for node in expired:
            self._hub.end(node.node_id, "its lease ran out")
        return expired

    def forgive_own_stall(self, now: float) -> float:
        """Extend all leases by the time for which this process itself stood still (a large import, a suspended
        machine). Return it in seconds; 0 when it did not."""
        stall = now - self._looked_at - self._timing.tick_seconds
        self._looked_at = now
        if stall <= self._timing.heartbeat_seconds:
            return 0.0
        self.members.forgive(stall, now)
        return stall

    def end_all(self) -> None:
        """End all streams without a reason: the nodes will look for the next coordinator."""
        self._hub.end_all()
