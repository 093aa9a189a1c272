"""A table of the nodes and their leases. No I/O, and the clock is an argument.

A node is alive from its registration until its session ends or its lease runs out. During this time no other process
gets its name. Its id depends only on its kind, its name and its incarnation, so the id is the same after a restart of
the coordinator, and a plan with this id stays valid.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from gradstream.core.errors import BusyError, ConfigError
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

SERVER = coordinator_pb2.NODE_KIND_PARAMETER_SERVER
WORKER = coordinator_pb2.NODE_KIND_WORKER
KIND_WORDS = {SERVER: "parameter server", WORKER: "worker"}

MAX_DEAD_NODES = 64
MAX_KNOCKS = 1024
MAX_REFUSED = 64
MAX_PATH_CHARACTERS = 4096
NUM_RATE_SAMPLES = 20


def make_node_id(kind: coordinator_pb2.NodeKind.ValueType, name: str, incarnation: str) -> str:
    """The id of one process: its name, and a digest that differs from that of other processes with this name."""
    return f"{name}.{blake2b(f'{kind}/{name}/{incarnation}'.encode(), digest_size=4).hexdigest()}"


@dataclass
class NodeEntry:
    """The table's entry of one process."""

    node_id: str
    kind: coordinator_pb2.NodeKind.ValueType
    name: str
    address: str
    memory_bytes: int
    device: str
    order: int
    last_heartbeat: float
    last_heartbeat_unix_ms: int
    # When it last reported progress.
    progress_at: float = 0.0
    flops_per_second: float = 0.0
    machine_id: str = ""
    alive: bool = True
    # Number of the open session; 0 without one.
    session: int = 0
    # It registered again and has not opened its new session yet: the end of the old session does not end the node.
    returning: bool = False
    # Jobs whose state it holds, with the epoch: first from its registration, then from the directives sent to it.
    holds: dict[str, int] = field(default_factory=dict)
    activity: coordinator_pb2.Activity = field(default_factory=coordinator_pb2.Activity)
    # Its last report of its machine; None before the first.
    vitals: coordinator_pb2.Vitals | None = None
    # (clock, job, bytes sent) of the last heartbeats, for rates.
    sent: deque[tuple[float, str, int]] = field(default_factory=lambda: deque(maxlen=NUM_RATE_SAMPLES))

    @property
    def present(self) -> bool:
        """Whether it is alive and has an open session."""
        return self.alive and self.session > 0

    @property
    def title(self) -> str:
        """Kind and name, for people."""
        return f"{KIND_WORDS[self.kind]} {self.name}"

    def sent_bytes_per_second(self, job_id: str) -> float:
        """Payload bytes per second that it sent for a job over its last heartbeats."""
        samples = [(when, sent) for when, job, sent in self.sent if job == job_id]
        if len(samples) < 2 or samples[-1][0] <= samples[0][0]:
            return 0.0
        return max(0, samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])


class Membership:
    """The table of nodes. Times are seconds of any steady clock."""

    def __init__(self, heartbeat_seconds: float = 1.0, lease_seconds: float = 10.0):
        self.heartbeat_seconds = heartbeat_seconds
        self.lease_seconds = lease_seconds
        self._nodes: dict[str, NodeEntry] = {}
        self._order = 0
        self._sessions = 0
        # When each newcomer first asked for a name that another process has.
        self._knocks: OrderedDict[str, float] = OrderedDict()
        self._refused: OrderedDict[tuple[int, str], jobs_pb2.RefusedNode] = OrderedDict()

    def register(self, request: coordinator_pb2.RegisterRequest, now: float, unix_ms: int) -> NodeEntry:
        """Enter a node. A process keeps its name while it heartbeats.

        Raises ConfigError when another process with this name is known to be live, BusyError while that is not known: a
        node whose machine lost power counts as alive until its lease runs out.
        """
        node_id = make_node_id(request.kind, request.name, request.incarnation)
        namesakes = [n for n in self._nodes.values() if (n.kind, n.name) == (request.kind, request.name)]
        for other in namesakes:
            if other.alive and other.node_id != node_id:
                self._refuse_newcomer(node_id, other, now)
        for other in namesakes:
            if other.node_id != node_id:
                del self._nodes[other.node_id]
        self._knocks.pop(node_id, None)
        node = self._nodes.get(node_id)
        if node is None:
            self._order += 1
            node = NodeEntry(
                node_id=node_id,
                kind=request.kind,
                name=request.name,
                address=request.address,
                memory_bytes=request.memory_bytes,
                device=request.device,
                order=self._order,
                last_heartbeat=now,
                last_heartbeat_unix_ms=unix_ms,
            )
            self._nodes[node_id] = node
        else:
            node.returning = node.alive
        node.alive = True
        node.address, node.memory_bytes, node.device = request.address, request.memory_bytes, request.device
        node.machine_id, node.flops_per_second = request.machine_id, request.flops_per_second
        self._level(node)
        node.last_heartbeat, node.last_heartbeat_unix_ms = now, unix_ms
        node.holds = {held.job_id: held.epoch for held in request.held}
        if request.kind == SERVER and request.held:
            # Used until its first heartbeat.
            held = request.held[-1]
            node.activity = coordinator_pb2.Activity(job_id=held.job_id, step=held.version)
        node.progress_at = now
        self._refused.pop((request.kind, request.name), None)
        return node

    def _refuse_newcomer(self, node_id: str, incumbent: NodeEntry, now: float) -> None:
        first = self._knocks.setdefault(node_id, now)
        while len(self._knocks) > MAX_KNOCKS:
            self._knocks.popitem(last=False)
        # A heartbeat that the incumbent sent before its death may arrive after the newcomer.
        if incumbent.last_heartbeat >= first + self.heartbeat_seconds:
            raise ConfigError(
                f"another {KIND_WORDS[incumbent.kind]} is live as '{incumbent.name}' (at {incumbent.address}, last "
                f"heartbeat {now - incumbent.last_heartbeat:.1f} s ago); give each one a name of its own (--name)"
            )
        raise BusyError(
            f"another {KIND_WORDS[incumbent.kind]} has registered as '{incumbent.name}' (at {incumbent.address}); this "
            f"process is admitted if the other does not heartbeat within its lease of {self.lease_seconds:g} s"
        )

    def _level(self, newcomer: NodeEntry) -> None:
        """Set all nodes on a newcomer's device to the best speed that any node, also a dead one, measured of it.

        Lower measurements were disturbed by other work on the machine.
        """
        if not newcomer.machine_id:
            return
        device = (newcomer.machine_id, newcomer.device)
        same = [node for node in self._nodes.values() if (node.machine_id, node.device) == device]
        best = max(node.flops_per_second for node in same)
        for node in same:
            if node.flops_per_second:
                node.flops_per_second = best

    def refuse(self, request: coordinator_pb2.RegisterRequest, reason: str, unix_ms: int) -> None:
        """Remember a node whose registration was refused, to show it to people."""
        key = (request.kind, request.name)
        self._refused.pop(key, None)
        self._refused[key] = jobs_pb2.RefusedNode(name=request.name, kind=request.kind, reason=reason, unix_ms=unix_ms)
        while len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    def refused(self) -> list[jobs_pb2.RefusedNode]:
        """The nodes that were refused and have not registered since, newest first."""
        return list(reversed(self._refused.values()))

    def open_session(self, node_id: str) -> NodeEntry | None:
        """Open a session of a live node; it supersedes an older one. Return None when the node is not registered."""
        node = self._nodes.get(node_id)
        if node is None or not node.alive:
            return None
        self._sessions += 1
        node.session, node.returning = self._sessions, False
        return node

    def heartbeat(
        self, node_id: str, session: int, activity: coordinator_pb2.Activity, now: float, unix_ms: int
    ) -> bool:
        """Renew a node's lease; return False when this session has been superseded."""
        node = self._nodes.get(node_id)
        if node is None or not node.alive or node.session != session:
            return False
        node.last_heartbeat, node.last_heartbeat_unix_ms = now, unix_ms
        if _done(activity) != _done(node.activity):
            node.progress_at = now
        node.activity = activity
        node.sent.append((now, activity.job_id, activity.sent_bytes))
        return True

    def note_vitals(self, node_id: str, vitals: coordinator_pb2.Vitals) -> None:
        """Store a node's report of its machine."""
        node = self._nodes.get(node_id)
        if node is not None and len(vitals.machine.disk_directory) <= MAX_PATH_CHARACTERS:
            node.vitals = vitals

    def close_session(self, node_id: str, session: int) -> NodeEntry | None:
        """Note the end of a session. Return the node that ended with it; None when the session was superseded."""
        node = self._nodes.get(node_id)
        if node is None or not node.alive or node.session != session:
            return None
        if node.returning:
            node.session = 0
            return None
        self._end(node)
        self._prune()
        return node

    def forgive(self, seconds: float, now: float) -> None:
        """Extend all leases by a time in which the coordinator could not read heartbeats."""
        for node in self._nodes.values():
            node.last_heartbeat = min(now, node.last_heartbeat + seconds)

    def expire(self, now: float) -> list[NodeEntry]:
        """End the nodes whose lease has run out; return them."""
        dead = [n for n in self._nodes.values() if n.alive and now - n.last_heartbeat > self.lease_seconds]
        for node in dead:
            self._end(node)
        self._prune()
        return dead

    def get(self, node_id: str) -> NodeEntry | None:
        """The node, dead or alive."""
        return self._nodes.get(node_id)

    def present(self, kind: coordinator_pb2.NodeKind.ValueType) -> list[NodeEntry]:
        """The nodes of a kind with an open session, in the order of their registration."""
        return sorted((n for n in self._nodes.values() if n.kind == kind and n.present), key=lambda n: n.order)

    def everyone_present(self) -> list[NodeEntry]:
        """All nodes with an open session."""
        return [n for n in self._nodes.values() if n.present]

    def all(self) -> Sequence[NodeEntry]:
        """All nodes, live ones first, then by kind and name."""
        return sorted(self._nodes.values(), key=lambda n: (not n.alive, n.kind, n.name))

    def name_of(self, node_id: str) -> str:
        """The name of a node, also of one that is not in the table: a node id starts with the name."""
        node = self._nodes.get(node_id)
        return node.name if node is not None else node_id.rpartition(".")[0]

    def named(self, kind: coordinator_pb2.NodeKind.ValueType, name: str) -> NodeEntry | None:
        """The live node of a kind and name."""
        return next((n for n in self._nodes.values() if n.alive and (n.kind, n.name) == (kind, name)), None)

    def live(self, kind: coordinator_pb2.NodeKind.ValueType) -> dict[str, NodeEntry]:
        """The live nodes of a kind, by name."""
        return {n.name: n for n in self._nodes.values() if n.alive and n.kind == kind}

    @staticmethod
    def _end(node: NodeEntry) -> None:
        node.alive, node.session, node.returning = False, 0, False
        node.activity = coordinator_pb2.Activity()
        node.sent.clear()

    def _prune(self) -> None:
        """Forget all but the newest dead nodes."""
        dead = sorted((n for n in self._nodes.values() if not n.alive), key=lambda n: n.last_heartbeat)
        for node in dead[: max(0, len(dead) - MAX_DEAD_NODES)]:
            del self._nodes[node.node_id]


def _done(activity: coordinator_pb2.Activity) -> tuple[object, ...]:
    """The fields of an activity that change when a node makes progress."""
    moved = (activity.sent_bytes, activity.received_bytes, activity.progress)
    return activity.job_id, activity.step, activity.phase, *moved
