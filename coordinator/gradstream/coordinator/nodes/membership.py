"""Who is there: a table of nodes with leases on life. No I/O, and the clock is an argument.

A node is alive from its registration until its stream ends or its lease runs out; while it is, no other process gets
its name. Its identity follows from its kind, its name and its start (incarnation) alone, so it is the same after the
coordinator has restarted, and a plan that names it stays valid.
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
    """The identity of one process: its name and a digest of what sets it apart from others of that name."""
    return f"{name}.{blake2b(f'{kind}/{name}/{incarnation}'.encode(), digest_size=4).hexdigest()}"


@dataclass
class NodeEntry:
    """One process as the table knows it."""

    node_id: str
    kind: coordinator_pb2.NodeKind.ValueType
    name: str
    address: str
    memory_bytes: int
    device: str
    order: int
    last_heartbeat: float
    last_heartbeat_unix_ms: int
    # When it last told of something that it got done.
    progress_at: float = 0.0
    flops_per_second: float = 0.0
    machine_id: str = ""
    alive: bool = True
    # Number of the open stream; 0 without one.
    session: int = 0
    # It registered again and has not opened its new stream yet: the old one's end is no death.
    returning: bool = False
    # Jobs whose state it holds, with the epoch: as told at registration, then as told by us.
    holds: dict[str, int] = field(default_factory=dict)
    activity: coordinator_pb2.Activity = field(default_factory=coordinator_pb2.Activity)
    # What it last told of itself; None when nothing.
    vitals: coordinator_pb2.Vitals | None = None
    # (clock, job, bytes sent) of the last heartbeats, for rates.
    sent: deque[tuple[float, str, int]] = field(default_factory=lambda: deque(maxlen=NUM_RATE_SAMPLES))

    @property
    def present(self) -> bool:
        """Whether it can be spoken to: alive, and its stream is open."""
        return self.alive and self.session > 0

    @property
    def title(self) -> str:
        """Kind and name, for people."""
        return f"{KIND_WORDS[self.kind]} {self.name}"

    def sent_bytes_per_second(self, job_id: str) -> float:
        """Payload bytes a second that it sent for a job over its last heartbeats."""
        samples = [(when, sent) for when, job, sent in self.sent if job == job_id]
        if len(samples) < 2 or samples[-1][0] <= samples[0][0]:
            return 0.0
        return max(0, samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])


class Membership:
    """The table. Times are seconds of any steady clock."""

    def __init__(self, heartbeat_seconds: float = 1.0, lease_seconds: float = 10.0):
        self.heartbeat_seconds = heartbeat_seconds
        self.lease_seconds = lease_seconds
        self._nodes: dict[str, NodeEntry] = {}
        self._order = 0
        self._sessions = 0
        # When processes first asked for a name that another one has.
        self._knocks: OrderedDict[str, float] = OrderedDict()
        self._refused: OrderedDict[tuple[int, str], jobs_pb2.RefusedNode] = OrderedDict()

    def register(self, request: coordinator_pb2.RegisterRequest, now: float, unix_ms: int) -> NodeEntry:
        """Enter a node. The process that has a name keeps it while it heartbeats.

        Raises ConfigError when another process of its name is known to be live, BusyError while that is not known: a
        machine that lost its power looks alive until its lease runs out.
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
            # Until its first heartbeat.
            held = request.held[-1]
            node.activity = coordinator_pb2.Activity(job_id=held.job_id, step=held.version)
        node.progress_at = now
        self._refused.pop((request.kind, request.name), None)
        return node

    def _refuse_newcomer(self, node_id: str, incumbent: NodeEntry, now: float) -> None:
        first = self._knocks.setdefault(node_id, now)
        while len(self._knocks) > MAX_KNOCKS:
            self._knocks.popitem(last=False)
        # A heartbeat that was under way when the incumbent died may come after the newcomer.
        if incumbent.last_heartbeat >= first + self.heartbeat_seconds:
            raise ConfigError(
                f"another {KIND_WORDS[incumbent.kind]} is live as '{incumbent.name}' (at {incumbent.address}, last "
                f"heartbeat {now - incumbent.last_heartbeat:.1f} s ago); give each one a name of its own (--name)"
            )
        raise BusyError(
            f"another {KIND_WORDS[incumbent.kind]} has registered as '{incumbent.name}' (at {incumbent.address}); this "
            f"one is let in if that one does not heartbeat within its lease of {self.lease_seconds:g} s"
        )

    def _level(self, newcomer: NodeEntry) -> None:
        """Give all nodes on a newcomer's device the best speed that was measured of it, by dead ones too: whatever else
        the machine did in that moment made the others slower."""
        if not newcomer.machine_id:
            return
        device = (newcomer.machine_id, newcomer.device)
        same = [node for node in self._nodes.values() if (node.machine_id, node.device) == device]
        best = max(node.flops_per_second for node in same)
        for node in same:
            if node.flops_per_second:
                node.flops_per_second = best

    def refuse(self, request: coordinator_pb2.RegisterRequest, reason: str, unix_ms: int) -> None:
        """Remember a node that was not let in, for people who wonder where it is."""
        key = (request.kind, request.name)
        self._refused.pop(key, None)
        self._refused[key] = jobs_pb2.RefusedNode(name=request.name, kind=request.kind, reason=reason, unix_ms=unix_ms)
        while len(self._refused) > MAX_REFUSED:
            self._refused.popitem(last=False)

    def refused(self) -> list[jobs_pb2.RefusedNode]:
        """Those not let in and not registered since, the newest first."""
        return list(reversed(self._refused.values()))

    def open_session(self, node_id: str) -> NodeEntry | None:
        """Note a new stream of a live node; an older one of it counts no more. None when it is not registered."""
        node = self._nodes.get(node_id)
        if node is None or not node.alive:
            return None
        self._sessions += 1
        node.session, node.returning = self._sessions, False
        return node

    def heartbeat(
        self, node_id: str, session: int, activity: coordinator_pb2.Activity, now: float, unix_ms: int
    ) -> bool:
        """Renew the lease; False when this stream counts no more."""
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
        """Keep what a node tells of itself."""
        node = self._nodes.get(node_id)
        if node is not None and len(vitals.machine.disk_directory) <= MAX_PATH_CHARACTERS:
            node.vitals = vitals

    def close_session(self, node_id: str, session: int) -> NodeEntry | None:
        """A stream ended. The node that died of it, or None when the stream counted no more."""
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
        """Extend all leases: heartbeats that came meanwhile could not be read, for a reason of our own."""
        for node in self._nodes.values():
            node.last_heartbeat = min(now, node.last_heartbeat + seconds)

    def expire(self, now: float) -> list[NodeEntry]:
        """End the nodes whose lease ran out; return them."""
        dead = [n for n in self._nodes.values() if n.alive and now - n.last_heartbeat > self.lease_seconds]
        for node in dead:
            self._end(node)
        self._prune()
        return dead

    def get(self, node_id: str) -> NodeEntry | None:
        """The node, dead or alive."""
        return self._nodes.get(node_id)

    def present(self, kind: coordinator_pb2.NodeKind.ValueType) -> list[NodeEntry]:
        """The nodes of a kind that can be spoken to, those that came first first."""
        return sorted((n for n in self._nodes.values() if n.kind == kind and n.present), key=lambda n: n.order)

    def everyone_present(self) -> list[NodeEntry]:
        """All nodes that can be spoken to."""
        return [n for n in self._nodes.values() if n.present]

    def all(self) -> Sequence[NodeEntry]:
        """Live nodes first, then by kind and name."""
        return sorted(self._nodes.values(), key=lambda n: (not n.alive, n.kind, n.name))

    def name_of(self, node_id: str) -> str:
        """The name of a node, also of one that is gone: identities start with it."""
        node = self._nodes.get(node_id)
        return node.name if node is not None else node_id.rpartition(".")[0]

    def named(self, kind: coordinator_pb2.NodeKind.ValueType, name: str) -> NodeEntry | None:
        """The live node of a kind and name."""
        return next((n for n in self._nodes.values() if n.alive and (n.kind, n.name) == (kind, name)), None)

    @staticmethod
    def _end(node: NodeEntry) -> None:
        node.alive, node.session, node.returning = False, 0, False
        node.activity = coordinator_pb2.Activity()
        node.sent.clear()

    def _prune(self) -> None:
        """Forget all but the newest of the dead."""
        dead = sorted((n for n in self._nodes.values() if not n.alive), key=lambda n: n.last_heartbeat)
        for node in dead[: max(0, len(dead) - MAX_DEAD_NODES)]:
            del self._nodes[node.node_id]


def _done(activity: coordinator_pb2.Activity) -> tuple[object, ...]:
    """What changes when a node gets something done."""
    moved = (activity.sent_bytes, activity.received_bytes, activity.progress)
    return activity.job_id, activity.step, activity.phase, *moved
