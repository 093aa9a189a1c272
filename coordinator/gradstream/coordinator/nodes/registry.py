"""The nodes and their sessions: arrival, directives, departure.

Of jobs this module only knows the plan that a node is sent or told to forget. The caller decides what a departure means
for a job.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from gradstream.coordinator.nodes.membership import Membership, NodeEntry
from gradstream.coordinator.nodes.sessions import LEFT, Hub, OpenSession
from gradstream.coordinator.timing import Timing, unix_ms
from gradstream.core.log import get_logger
from gradstream.proto.v1 import coordinator_pb2, plan_pb2

log = get_logger()


class NodeRegistry:
    """Owner of the membership and the open sessions. Times are seconds of the caller's steady clock."""

    def __init__(self, timing: Timing, now: float):
        self._timing = timing
        self.members = Membership(timing.heartbeat_seconds, timing.lease_seconds)
        # Number of nodes, by kind, that went without saying that they leave.
        self.num_lost: Counter[coordinator_pb2.NodeKind.ValueType] = Counter()
        self._hub = Hub()
        self._ticked_at = now
        # The last plan that was sent, and its directive.
        self._plan: tuple[plan_pb2.Plan, bytes] | None = None

    # --- arrival ----------------------------------------------------------------------------------------------------

    def register(self, request: coordinator_pb2.RegisterRequest, now: float) -> NodeEntry:
        """Enter a node whose registration was checked.

        Raises ConfigError when another live process has its name, BusyError while that is not known.
        """
        node = self.members.register(request, now, unix_ms())
        log.info("registered", node=node.node_id, address=node.address, holds=dict(node.holds))
        return node

    def open_session(self, node_id: str, in_force: plan_pb2.Plan | None) -> tuple[NodeEntry, OpenSession] | None:
        """Begin a node's session; release all plans that it holds except the one in force.

        Return None when the node is not registered.
        """
        node = self.members.open_session(node_id)
        if node is None:
            return None
        session = self._hub.open(node)
        for job_id, epoch in list(node.holds.items()):
            if in_force is None or (in_force.job_id, in_force.epoch) != (job_id, epoch):
                self.release(node, job_id, "the coordinator has no such job running under this epoch")
        return node, session

    def heartbeat(self, session: OpenSession, activity: coordinator_pb2.Activity, now: float) -> bool:
        """Renew a node's lease; return False when its session has been superseded."""
        return self.members.heartbeat(session.node_id, session.number, activity, now, unix_ms())

    def note_vitals(self, session: OpenSession, vitals: coordinator_pb2.Vitals) -> None:
        """Store a node's report of its machine."""
        self.members.note_vitals(session.node_id, vitals)

    # --- directives -------------------------------------------------------------------------------------------------

    def send(self, node: NodeEntry, directive: coordinator_pb2.SessionResponse) -> None:
        """Queue a directive for a node, if it has a session."""
        self.send_all([node], directive.SerializeToString())

    def send_all(self, nodes: Iterable[NodeEntry], directive: bytes) -> None:
        """Queue a directive, a serialized SessionResponse, for those of the nodes that have a session."""
        for node in nodes:
            self._hub.send(node, directive)

    def send_plan(self, node: NodeEntry, plan: plan_pb2.Plan) -> bool:
        """Send a node the plan, unless the node holds it; return whether it was sent. The plan must not change."""
        if node.holds.get(plan.job_id) == plan.epoch:
            return False
        if self._plan is None or self._plan[0] is not plan:
            self._plan = (plan, coordinator_pb2.SessionResponse(plan=plan).SerializeToString())
        self._hub.send(node, self._plan[1])
        node.holds[plan.job_id] = plan.epoch
        return True

    def release(self, node: NodeEntry, job_id: str, reason: str) -> None:
        """Tell a node to forget a job."""
        self._hub.release(node, job_id, reason)

    @property
    def num_directives(self) -> int:
        """Number of directives that wait for their nodes."""
        return self._hub.num_queued

    # --- departure --------------------------------------------------------------------------------------------------

    def close_session(self, session: OpenSession, why: str) -> NodeEntry | None:
        """Note that a session has ended. Return the node, which is silent now; None if it has another session."""
        self._hub.close(session, why)
        node = self.members.close_session(session.node_id, session.number)
        if node is not None and why != LEFT:
            self.num_lost[node.kind] += 1
        return node

    def expire(self, now: float) -> list[NodeEntry]:
        """End the nodes whose lease has run out, and their sessions; return the nodes."""
        expired = self.members.expire(now)
        for node in expired:
            self._hub.end(node.node_id, "its lease ran out")
            self.num_lost[node.kind] += 1
        return expired

    def forgive_own_stall(self, now: float) -> float:
        """Extend all leases by the time that the event loop missed since the last tick; return it in seconds.

        Only the task that watches the clock calls this, once a tick: its own delay shows how long the loop did not read
        heartbeats. Many small transitions, a large import or a suspended machine can delay it.
        """
        missed = missed_seconds(self._ticked_at, now, self._timing.tick_seconds)
        self._ticked_at = now
        if missed:
            self.members.forgive(missed, now)
        return missed

    def end_all(self) -> None:
        """End all sessions without a reason. The nodes then connect to the next coordinator."""
        self._hub.end_all()


def missed_seconds(ticked_at: float, now: float, tick_seconds: float) -> float:
    """The time between two ticks in which the loop read no messages. A tick may take twice its time before it counts.

    So a lease ends after at least lease_seconds / (2 * tick_seconds) turns of the loop without a heartbeat, however
    long each turn took.
    """
    return max(0.0, now - ticked_at - 2 * tick_seconds)
