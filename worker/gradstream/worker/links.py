"""Streams to neighbours in a pipeline: each message until the neighbour has taken it, within its credit."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc.aio

from gradstream.core.access import WORKER
from gradstream.core.codecs import Payload
from gradstream.core.errors import ProtocolError, one_line
from gradstream.core.log import get_logger
from gradstream.core.rpc import Backoff, error_from_rpc, open_channel, refused_for_good
from gradstream.core.transport import PLAIN, Transport
from gradstream.core.wire import WorkerStub, frame, frames
from gradstream.proto.v1 import worker_pb2 as pb

log = get_logger()


@dataclass(frozen=True)
class Outgoing:
    """One message of a stream: a header, and the payload of a tensor."""

    header: pb.StageHeader
    payloads: list[Payload]

    @property
    def try_number(self) -> int:
        kind = self.header.WhichOneof("content")
        if kind == "tensor":
            return self.header.tensor.try_number
        return self.header.begin.number if kind == "begin" else self.header.abandon.number


class Link:
    """Delivers messages to one neighbour in one direction, in order, each until the neighbour has taken it."""

    def __init__(self, title: str, address: str, hello: pb.StageHello, transport: Transport = PLAIN):
        self.title = title
        self.unreachable_since: float | None = None
        self.sent_bytes = 0
        self._hello = hello
        channel = open_channel(address, WORKER, transport)
        self._channel: grpc.aio.Channel | None = channel
        self._stub = WorkerStub(channel)
        self._waiting: deque[Outgoing] = deque()
        self._under_way: deque[Outgoing] = deque()
        self._num_taken = 0  # of this stream
        self._num_sent = 0
        self._window = 0
        self._changed = asyncio.Event()
        self._flushed = asyncio.Event()
        self._num_streams = 0

    def put(self, message: Outgoing) -> None:
        """Queue a message. There are at most those of one try."""
        self._waiting.append(message)
        self._changed.set()

    @property
    def empty(self) -> bool:
        """Whether the neighbour has taken everything."""
        return not self._waiting and not self._under_way

    def forget_before(self, number: int) -> None:
        """Drop what belongs to earlier tries and was not sent yet."""
        self._waiting = deque(message for message in self._waiting if message.try_number >= number)
        self._flushed.set()

    async def flush(self) -> None:
        """Wait until everything is under way."""
        while self._waiting:
            self._flushed.clear()
            await self._flushed.wait()

    async def run(self) -> None:
        """Keep a stream open. Raises ProtocolError when the neighbour refuses a message for good."""
        backoff = Backoff()
        while True:
            try:
                await self._stream(backoff)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, self.title)
                if refused_for_good(error):
                    raise error from None
                if self.unreachable_since is None:
                    self.unreachable_since = time.time()
                    log.warning("a neighbour does not answer", neighbour=self.title, cause=one_line(error))
            # What was not taken goes again; the neighbour drops what it has.
            self._waiting.extendleft(reversed(self._under_way))
            self._under_way.clear()
            await asyncio.sleep(backoff.next())

    async def close(self) -> None:
        """Close the channel; `run` must have ended. A second time does nothing."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)

    async def _stream(self, backoff: Backoff) -> None:
        self._num_taken = self._num_sent = self._window = 0
        call = self._stub.Stream(self._messages(self._num_streams))
        try:
            async for response in call:
                if self.unreachable_since is not None:
                    log.info("a neighbour answers again", neighbour=self.title)
                    self.unreachable_since = None
                backoff.reset()
                if not self._num_taken <= response.num_taken <= self._num_sent:
                    raise ProtocolError(f"{self.title} took {response.num_taken} messages of {self._num_sent}")
                for _ in range(response.num_taken - self._num_taken):
                    self._under_way.popleft()
                self._num_taken, self._window = response.num_taken, response.window
                self._changed.set()
        finally:
            call.cancel()
            # gRPC leaves the iterator of a call that broke suspended; it must not take what the next stream shall send.
            self._num_streams += 1
            self._changed.set()

    def _may_send(self) -> bool:
        """Whether there is a message that the neighbour has room for. What is no tensor takes none."""
        if not self._waiting:
            return False
        if self._waiting[0].header.WhichOneof("content") != "tensor":
            return True
        return sum(message.header.HasField("tensor") for message in self._under_way) < self._window

    async def _messages(self, number: int) -> AsyncIterator[bytes]:
        yield frame(pb.StageHeader(hello=self._hello).SerializeToString())
        while True:
            while number == self._num_streams and not self._may_send():
                self._changed.clear()
                await self._changed.wait()
            if number != self._num_streams:
                return
            message = self._waiting.popleft()
            self._flushed.set()
            self._under_way.append(message)
            self._num_sent += 1
            self.sent_bytes += message.header.payload_bytes
            for piece in frames(message.header, message.payloads):
                yield piece
