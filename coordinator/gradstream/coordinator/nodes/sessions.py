"""Streams to nodes: a bounded queue of directives for each."""

from __future__ import annotations

import asyncio

from gradstream.coordinator.nodes.membership import NodeEntry
from gradstream.core.errors import GradstreamError
from gradstream.proto.v1 import coordinator_pb2

MAX_QUEUED = 64


class OpenSession:
    """One stream to a node. A node that does not read what it is sent loses it, and gets all anew with the next."""

    def __init__(self, node_id: str, number: int):
        self.node_id = node_id
        self.number = number
        # Why the stream ended; a GradstreamError reaches the node as such, a text asks it to register again.
        self.ended: GradstreamError | str | None = None
        self._queue: asyncio.Queue[coordinator_pb2.SessionResponse | None] = asyncio.Queue(MAX_QUEUED + 1)

    def send(self, directive: coordinator_pb2.SessionResponse) -> bool:
        """Queue a directive; False when the stream is over or the node does not keep up."""
        if self.ended is not None or self._queue.qsize() >= MAX_QUEUED:
            return False
        self._queue.put_nowait(directive)
        return True

    def end(self, why: GradstreamError | str = "") -> None:
        """End the stream after what is queued."""
        if self.ended is None:
            self.ended = why
            self._queue.put_nowait(None)

    async def next(self) -> coordinator_pb2.SessionResponse | None:
        """The next directive; None when the stream is over."""
        return await self._queue.get()


class Hub:
    """The open streams, one a node."""

    def __init__(self) -> None:
        self._sessions: dict[str, OpenSession] = {}

    def open(self, node: NodeEntry) -> OpenSession:
        """Begin a node's stream; an older one ends."""
        self.end(node.node_id, "a newer stream took its place")
        session = self._sessions[node.node_id] = OpenSession(node.node_id, node.session)
        return session

    def close(self, session: OpenSession, why: str) -> None:
        """A stream has ended by itself."""
        session.end(why)
        if self._sessions.get(session.node_id) is session:
            del self._sessions[session.node_id]

    def end(self, node_id: str, why: GradstreamError | str) -> None:
        """End a node's stream, if it has one, and tell it why."""
        session = self._sessions.pop(node_id, None)
        if session is not None:
            session.end(why)

    def end_all(self) -> None:
        """End all streams without a word: the nodes will look for the next coordinator."""
        for session in self._sessions.values():
            session.end()

    def send(self, node: NodeEntry, directive: coordinator_pb2.SessionResponse) -> None:
        """Queue a directive for a node, if it has a stream."""
        session = self._sessions.get(node.node_id)
        if session is not None and not session.send(directive):
            self.end(node.node_id, "the node does not read its directives")

    def release(self, node: NodeEntry, job_id: str, reason: str) -> None:
        """Tell a node to forget a job."""
        release = coordinator_pb2.ReleaseJob(job_id=job_id, reason=reason)
        self.send(node, coordinator_pb2.SessionResponse(release=release))
        node.holds.pop(job_id, None)
