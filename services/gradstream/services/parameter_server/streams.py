"""Bounds the memory that peers can use on a server: the number of open streams, and the half-sent contributions' bytes.

A stream costs the server at most one contribution in assembly or one bundle being written, and the few messages that
gRPC's flow control admits. So a bound on streams bounds memory. The bounds follow from the number of workers that the
plan lets share the job, and from its largest contribution (gradstream.core.wire.stream_limits). Pushes and pulls are
counted apart. At the bound on streams a new peer is told to retry. At the bound on half-sent contributions, which the
plan's workers cannot reach, the oldest one is dropped: an honest peer would send it again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradstream.core.errors import GradstreamError, UnreachableError
from gradstream.core.wire.stream_limits import (
    MAX_DATA_STREAMS_A_CONNECTION,
    StreamKind,
    max_half_sent_bytes,
    max_streams,
    max_streams_a_host,
    push_window,
)


class Stream:
    """An admitted push or pull, and the task that serves it."""

    def __init__(self, streams: Streams, peer: str):
        self._streams = streams
        self._peer = peer
        self._task = asyncio.current_task()
        self.half_sent_bytes = 0
        self.ended: GradstreamError | None = None

    def begin(self, num_bytes: int) -> None:
        """Count a contribution of `num_bytes` that is going to be assembled."""
        self._streams.make_room(self, num_bytes)
        self.half_sent_bytes = num_bytes

    def finish(self) -> None:
        """Stop counting the contribution: it is complete."""
        self.half_sent_bytes = 0
        self._streams.half_sent.pop(self, None)

    def end(self) -> None:
        """Interrupt the task, which is waiting for the rest of a contribution."""
        held = f"{self.half_sent_bytes} bytes of a contribution from {self._peer} were half sent"
        self.ended = UnreachableError(f"{held} while others needed the room; send it again")
        self.finish()
        if self._task is not None:
            self._task.cancel()

    def interrupted(self) -> GradstreamError | None:
        """The reason why `end` cancelled the task, or None if something else did. Clears a cancellation by `end`."""
        if self.ended is not None and self._task is not None:
            self._task.uncancel()
        return self.ended


class Streams:
    """All streams of a server."""

    def __init__(
        self,
        num_workers: Callable[[], int] = lambda: 0,
        contribution_bytes: Callable[[], int] = lambda: 0,
        max_a_connection: int = MAX_DATA_STREAMS_A_CONNECTION,
    ):
        """`num_workers` returns the number of workers that can share the current job; 0 without a job.

        `contribution_bytes` returns the size of the job's largest contribution to this server.
        """
        self.half_sent: dict[Stream, None] = {}  # streams with a half-sent contribution, oldest first
        self._num_workers = num_workers
        self._contribution_bytes = contribution_bytes
        self._max_a_connection = max_a_connection
        self._counts: Counter[tuple[str, str]] = Counter()  # by (kind or "", whose)

    @property
    def num_open(self) -> int:
        """Number of open streams of both kinds."""
        return self._counts["push", _ALL] + self._counts["pull", _ALL]

    @property
    def push_window_bytes(self) -> int:
        """Payload bytes that a push stream may have under way without acknowledgement."""
        return push_window(self._counts["push", _ALL])

    @contextmanager
    def admit(self, peer: str, kind: StreamKind = "pull") -> Iterator[Stream]:
        """Count a stream of `peer` (gRPC's name for the peer) while it is open.

        Raises UnreachableError when a bound is reached.
        """
        num_workers = self._num_workers()
        limits = {
            (kind, _ALL): max_streams(num_workers),
            (kind, _host(peer)): max_streams_a_host(num_workers),
            ("", _connection(peer)): self._max_a_connection,
        }
        for (of_kind, whose), limit in limits.items():
            if self._counts[of_kind, whose] >= limit:
                detail = f" for a {kind}" if of_kind else ""
                raise UnreachableError(
                    f"{whose} already has {limit} streams open here{detail}; close some or try again later"
                )
        stream = Stream(self, peer)
        self._counts.update(limits.keys())
        try:
            yield stream
        finally:
            stream.finish()
            self._counts.subtract(limits.keys())
            for key in limits:
                if not self._counts[key]:
                    del self._counts[key]

    def make_room(self, stream: Stream, num_bytes: int) -> None:
        """Count a contribution that begins; end the oldest ones while there are too many half-sent bytes."""
        self.half_sent[stream] = None
        total = num_bytes + sum(other.half_sent_bytes for other in self.half_sent)
        most = max_half_sent_bytes(self._num_workers(), self._contribution_bytes())
        while total > most:
            oldest = next(iter(self.half_sent))
            if oldest is stream:
                return  # a single contribution may exceed the bound, but is at most a bundle
            total -= oldest.half_sent_bytes
            oldest.end()


_ALL = "all hosts together"


def _connection(peer: str) -> str:
    return f"connection {peer}"


def _host(peer: str) -> str:
    """The peer without its port, the part after the last colon in "ipv4:10.0.0.7:41234" or "ipv6:[::1]:41234"."""
    return f"host {peer.rpartition(':')[0] or peer}"
