"""Sessions of nodes: a bounded queue of directives for each.

Directives are queued as serialized messages, so a directive to many nodes is one bytes object in all queues.
"""

from __future__ import annotations

import asyncio

from gradstream.coordinator.nodes.membership import NodeEntry
from gradstream.core.errors import GradstreamError
from gradstream.proto.v1 import coordinator_pb2

MAX_QUEUED = 64
LEFT = "it left"
"""The reason of a session that its node ended itself."""


class OpenSession:
    """One node's session. A node that does not read its directives loses the session; the next one sends them again."""

    def __init__(self, node_id: str, number: int):
        self.node_id = node_id
        self.number = number
        # Why the session ended. A GradstreamError is sent to the node; a text makes the node register again.
        self.ended: GradstreamError | str | None = None
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_QUEUED + 1)

    def send(self, directive: bytes) -> bool:
        """Queue a serialized SessionResponse; return False when the session is over or the node does not keep up."""
        if self.ended is not None or self._queue.qsize() >= MAX_QUEUED:
            return False
        self._queue.put_nowait(directive)
        return True

    def end(self, why: GradstreamError | str = "") -> None:
        """End the session after the queued directives."""
        if self.ended is None:
            self.ended = why
            self._queue.put_nowait(None)

    @property
    def num_queued(self) -> int:
        """Number of directives that wait for the node."""
        return self._queue.qsize()

    async def next(self) -> bytes | None:
        """The next directive, serialized; None when the session is over."""
        return await self._queue.get()


class Hub:
    """The open sessions, one for each node."""

    def __init__(self) -> None:
        self._sessions: dict[str, OpenSession] = {}

    def open(self, node: NodeEntry) -> OpenSession:
        """Begin a node's session; an older one ends."""
        self.end(node.node_id, "a newer stream took its place")
        session = self._sessions[node.node_id] = OpenSession(node.node_id, node.session)
        return session

    def close(self, session: OpenSession, why: str) -> None:
        """Note a session that has ended by itself."""
        session.end(why)
        if self._sessions.get(session.node_id) is session:
            del self._sessions[session.node_id]

    def end(self, node_id: str, why: GradstreamError | str) -> None:
        """End a node's session, if it has one, and send it the reason."""
        session = self._sessions.pop(node_id, None)
        if session is not None:
            session.end(why)

    def end_all(self) -> None:
        """End all sessions without a reason. The nodes then connect to the next coordinator."""
        for session in self._sessions.values():
            session.end()

    def send(self, node: NodeEntry, directive: bytes) -> None:
        """Queue a serialized SessionResponse for a node, if it has a session."""
        session = self._sessions.get(node.node_id)
        if session is not None and not session.send(directive):
            self.end(node.node_id, "the node does not read its directives")

    @property
    def num_queued(self) -> int:
        """Number of directives that wait for their nodes."""
        return sum(session.num_queued for session in self._sessions.values())

    def release(self, node: NodeEntry, job_id: str, reason: str) -> None:
        """Tell a node to forget a job."""
        release = coordinator_pb2.ReleaseJob(job_id=job_id, reason=reason)
        self.send(node, coordinator_pb2.SessionResponse(release=release).SerializeToString())
        node.holds.pop(job_id, None)
