"""Messages leaving over a stream: in order, each until the peer has taken it, sent again after a break.

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
from gradstream.core.rpc.errors import error_from_rpc, refused_for_good
from gradstream.core.rpc.retry import Backoff

log = get_logger()
M = TypeVar("M")
Call: TypeAlias = "grpc.aio.StreamStreamCall[Any, Any]"


class Outbound(ABC, Generic[M]):
    """Delivers messages to the peer `title`. What is a message, and how far the peer lets one go, is the subclass's."""

    kind: ClassVar[str]
    """What the peer is to this worker, for the log."""

    def __init__(self, title: str):
        self.title = title
        self.unreachable_since: float | None = None
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
        """Since when (Unix seconds) the peer could not be reached for what waits for it; None when nothing waits."""
        return None if self.empty else self.unreachable_since

    async def run(self) -> None:
        """Keep a stream open. Raises ProtocolError when the peer refuses a message for good."""
        backoff = Backoff()
        while True:
            await self._until_wanted()
            try:
                await self._stream(backoff)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, self.title)
                if refused_for_good(error):
                    raise error from None
                if self.unreachable_since is None:
                    self.unreachable_since = time.time()
                    log.warning(
                        f"the stream to {self.kind} broke, trying again", peer=self.title, cause=one_line(error)
                    )
            # Exactly what was not taken goes again; the peer drops what it has.
            self._waiting.extendleft(reversed(self._under_way))
            self._under_way.clear()
            await asyncio.sleep(backoff.next())

    async def _stream(self, backoff: Backoff) -> None:
        call = self._open(self._messages(self._num_streams))
        try:
            async for response in call:
                if self.unreachable_since is not None:
                    self.unreachable_since = None
                    log.info(f"the stream to {self.kind} is back", peer=self.title)
                backoff.reset()
                self._heard(response)
                self._changed.set()
        finally:
            call.cancel()
            # gRPC leaves the iterator of a call that broke suspended; it must not take what the next stream shall send.
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
        """Wait until there is a use for a stream."""

    @abstractmethod
    def _begin(self) -> Iterable[bytes]:
        """A stream begins, with nothing under way; return the frames that come first."""

    @abstractmethod
    def _open(self, messages: AsyncIterator[bytes]) -> Call:
        """Open a stream of these messages."""

    @abstractmethod
    def _heard(self, response: Any) -> None:
        """Take a response: remove what the peer has taken from `_under_way`. Raises ProtocolError."""

    @abstractmethod
    def _may_send(self, message: M) -> bool:
        """Whether the peer has room for the next message."""

    @abstractmethod
    def _sending(self, message: M) -> Iterable[bytes]:
        """Note that a message, in `_under_way` by now, is on its way; return its frames."""
