"""Streams to neighbours in a pipeline: each message is kept until the neighbour has taken it, within its credit."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import grpc.aio

from gradstream.core.codecs import Payload
from gradstream.core.errors import ProtocolError
from gradstream.core.rpc.access import WORKER
from gradstream.core.rpc.channel import open_channel
from gradstream.core.rpc.transport import PLAIN, Transport
from gradstream.core.wire.frames import frame, frames
from gradstream.core.wire.stubs import WorkerStub
from gradstream.proto.v1 import worker_pb2 as pb
from gradstream.worker.outbound import Call, Outbound


@dataclass(frozen=True)
class Outgoing:
    """One message of a stream: a header, and the payload of a tensor or a reduction."""

    header: pb.StageHeader
    payloads: list[Payload]

    @property
    def attempt_number(self) -> int:
        kind = self.header.WhichOneof("content")
        if kind == "tensor":
            return self.header.tensor.attempt_number
        if kind == "reduction":
            return self.header.reduction.attempt_number
        return self.header.begin.number if kind == "begin" else self.header.abandon.number


class Link(Outbound[Outgoing]):
    """Sends messages to one neighbour in one direction; it holds at most those of one attempt."""

    kind = "a neighbour"

    def __init__(self, title: str, address: str, hello: pb.StageHello, transport: Transport = PLAIN):
        super().__init__(title)
        self._hello = hello
        channel = open_channel(address, WORKER, transport)
        self._channel: grpc.aio.Channel | None = channel
        self._stub = WorkerStub(channel)
        self._num_taken = 0  # of this stream
        self._num_sent = 0
        self._window = 0
        self._flushed = asyncio.Event()

    def forget_before(self, number: int) -> None:
        """Drop messages of earlier attempts that were not sent yet."""
        self._waiting = deque(message for message in self._waiting if message.attempt_number >= number)
        self._flushed.set()

    async def flush(self) -> None:
        """Wait until all messages are under way."""
        while self._waiting:
            self._flushed.clear()
            await self._flushed.wait()

    async def close(self) -> None:
        """Close the channel; `run` must have ended. Idempotent."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)

    # -- Outbound --------------------------------------------------------------------------------------------------

    def _begin(self) -> Iterable[bytes]:
        self._num_taken = self._num_sent = self._window = 0
        return (frame(pb.StageHeader(hello=self._hello).SerializeToString()),)

    def _open(self, messages: AsyncIterator[bytes]) -> Call:
        return self._stub.Stream(messages)

    def _heard(self, response: pb.StageResponse) -> None:
        if not self._num_taken <= response.num_taken <= self._num_sent:
            raise ProtocolError(f"{self.title} took {response.num_taken} messages, but {self._num_sent} were sent")
        for _ in range(response.num_taken - self._num_taken):
            self._under_way.popleft()
        self._num_taken, self._window = response.num_taken, response.window

    def _may_send(self, message: Outgoing) -> bool:
        # Only tensors use credit.
        if not message.header.HasField("tensor"):
            return True
        return sum(other.header.HasField("tensor") for other in self._under_way) < self._window

    def _sending(self, message: Outgoing) -> Iterable[bytes]:
        self._flushed.set()
        self._num_sent += 1
        self.sent_bytes += message.header.payload_bytes
        return frames(message.header, message.payloads)
