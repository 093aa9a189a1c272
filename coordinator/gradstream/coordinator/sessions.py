"""Streams to nodes: a bounded queue of directives for each."""

from __future__ import annotations

import asyncio

from gradstream.core.errors import GradstreamError
from gradstream.proto.v1 import coordinator_pb2

MAX_QUEUED = 64


class Session:
    """One stream to a node. A node that does not read what it is sent loses the stream, and gets all anew with the next."""

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
