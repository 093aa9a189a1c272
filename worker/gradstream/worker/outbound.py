"""Messages sent over a stream, in order. Each is kept until the peer has taken it, and sent again after a break.

Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import grpc.aio

from gradstream.core.errors import one_line
from gradstream.core.log import get_logger
from gradstream.core.rpc.errors import error_from_rpc, refusal_of, refused_for_good
from gradstream.core.rpc.retry import Backoff

log = get_logger()
M = TypeVar("M")
Call: TypeAlias = "grpc.aio.StreamStreamCall[Any, Any]"


def with_refusal(title: str, refusal: str) -> str:
    """A peer's title for `status`, with the reason why it refuses, if it does."""
    return f"{title} ({refusal})" if refusal else title


class Outbound(ABC, Generic[M]):
    """Delivers messages to the peer `title`. Subclasses define the messages and the peer's flow control."""

    kind: ClassVar[str]
    """The kind of peer, as log messages name it."""

    def __init__(self, title: str):
        self.title = title
        self.unreachable_since: float | None = None
        self.refusal = ""
        """Why the peer, which answers, does not take the stream; empty if it takes it or does not answer."""
        self.sent_bytes = 0
        self._waiting: deque[M] = deque()
        self._under_way: deque[M] = deque()
        self._changed = asyncio.Event()
        self._num_streams = 0

    def put(self, message: M) -> None:
        """Queue a message."""
        self._waiting.append(message)
        self._changed.set()

    @property
    def empty(self) -> bool:
        """Whether the peer has taken everything."""
        return not self._waiting and not self._under_way

    @property
    def cut_off_since(self) -> float | None:
        """Unix time in seconds since which waiting messages cannot reach the peer; None when none waits."""
        return None if self.empty else self.unreachable_since

    async def run(self) -> None:
        """Keep a stream open. Raises ProtocolError when the peer refuses a message for a reason that does not pass."""
        backoff = Backoff()
        while True:
            await self._until_wanted()
            try:
                await self._stream(backoff)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, self.title)
                if refused_for_good(error):
                    raise error from None
                self.refusal = refusal_of(rpc_error)
                if self.unreachable_since is None:
                    self.unreachable_since = time.time()
                    log.warning(
                        f"the stream to {self.kind} broke, trying again", peer=self.title, cause=one_line(error)
                    )
            # All messages that were not acknowledged are sent again; the peer drops those that it has.
            self._waiting.extendleft(reversed(self._under_way))
            self._under_way.clear()
            await asyncio.sleep(backoff.next())

    async def _stream(self, backoff: Backoff) -> None:
        call = self._open(self._messages(self._num_streams))
        try:
            async for response in call:
                if self.unreachable_since is not None:
                    self.unreachable_since, self.refusal = None, ""
                    log.info(f"the stream to {self.kind} is back", peer=self.title)
                backoff.reset()
                self._heard(response)
                self._changed.set()
        finally:
            call.cancel()
            # gRPC leaves the iterator of a broken call suspended. It must not take messages of the next stream.
            self._num_streams += 1
            self._changed.set()

    async def _messages(self, number: int) -> AsyncIterator[bytes]:
        for piece in self._begin():
            yield piece
        while True:
            while number == self._num_streams and not (self._waiting and self._may_send(self._waiting[0])):
                self._changed.clear()
                await self._changed.wait()
            if number != self._num_streams:
                return
            message = self._waiting.popleft()
            self._under_way.append(message)
            for piece in self._sending(message):
                yield piece

    # -- of the subclass -------------------------------------------------------------------------------------------

    async def _until_wanted(self) -> None:
        """Wait until a stream is needed."""

    @abstractmethod
    def _begin(self) -> Iterable[bytes]:
        """Prepare for a new stream, on which nothing is under way yet. Returns the frames to send first."""

    @abstractmethod
    def _open(self, messages: AsyncIterator[bytes]) -> Call:
        """Open a stream that sends these messages."""

    @abstractmethod
    def _heard(self, response: Any) -> None:
        """Handle a response: remove the messages that the peer has taken from `_under_way`. Raises ProtocolError."""

    @abstractmethod
    def _may_send(self, message: M) -> bool:
        """Whether the peer has room for the next message."""

    @abstractmethod
    def _sending(self, message: M) -> Iterable[bytes]:
        """Record that a message, which is in `_under_way` by now, is being sent; return its frames."""
