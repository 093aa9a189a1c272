"""WorkerService: decodes and checks the messages that neighbours in a pipeline stream to this worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from gradstream.core.errors import ProtocolError, StaleEpochError, UnreachableError, one_line
from gradstream.core.log import get_logger
from gradstream.core.rpc.errors import answering
from gradstream.core.wire.frames import Assembler, parse
from gradstream.proto.v1 import worker_pb2 as pb
from gradstream.worker.pipeline.checks import has_payload
from gradstream.worker.pipeline.inbound import Inbound, InboundStream
from gradstream.worker.pipeline.neighbours import Neighbours, check_hello

log = get_logger()

MAX_EARLY_STREAMS = 64
"""Streams that may wait until this worker has received the lease table that made their senders its neighbours."""
EARLY_SECONDS = 30.0

Context = grpc.aio.ServicerContext[Any, Any]


class WorkerServicer:
    """Serves the neighbours that were set last."""

    def __init__(self) -> None:
        self._neighbours: Neighbours | None = None
        self._changed = asyncio.Event()
        self._num_early = 0

    def set(self, neighbours: Neighbours | None) -> None:
        """Serve these neighbours from now on. Streams of others end."""
        before, self._neighbours = self._neighbours, neighbours
        for inbound in before.inbounds.values() if before is not None else ():
            inbound.tell()
        self._changed.set()
        self._changed = asyncio.Event()

    async def Stream(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[pb.StageResponse]:
        """Receive a neighbour's attempts, abandons, tensors and reductions; answer with credit."""
        async with answering(context):
            hello = await _hello(messages)
            neighbours = await self._await(hello)
            inbound = check_hello(neighbours, hello)
            stream = inbound.open()
            reader = asyncio.create_task(self._read_from(messages, neighbours, inbound, stream))
            reader.add_done_callback(lambda _: stream.changed.set())
            try:
                while True:
                    stream.changed.clear()
                    yield pb.StageResponse(num_taken=stream.num_taken, window=inbound.window)
                    await stream.changed.wait()
                    if reader.done():
                        reader.result()
                        return
                    if self._neighbours is not neighbours:
                        raise StaleEpochError("the replica was formed again; take up the lease table that formed it")
                    if inbound.stream is not stream:
                        raise StaleEpochError(f"{inbound.title} has opened another stream since")
            finally:
                if not reader.done() and self._neighbours is neighbours and inbound.stream is stream:
                    log.warning("a neighbour's stream broke", neighbour=inbound.title)
                reader.cancel()

    async def _read_from(
        self, messages: AsyncIterator[bytes], neighbours: Neighbours, inbound: Inbound, stream: InboundStream
    ) -> None:
        """Call `_read`, and name the neighbour in its errors."""
        try:
            await self._read(messages, neighbours, inbound, stream)
        except ProtocolError as error:
            log.error("a neighbour broke the protocol", neighbour=inbound.title, cause=one_line(error))
            if inbound.title in str(error):
                raise
            raise ProtocolError(f"{inbound.title}: {error}") from None

    async def _read(
        self, messages: AsyncIterator[bytes], neighbours: Neighbours, inbound: Inbound, stream: InboundStream
    ) -> None:
        assembler: Assembler[pb.StageHeader] = Assembler()
        wanted = False
        while (message := await anext(messages, None)) is not None:
            if inbound.stream is not stream:
                return
            encoded, piece = parse(message)
            if encoded is not None:
                header = _header(encoded)
                wanted = neighbours.check(inbound, header)
                assembler.begin(header)
            whole = assembler.add(piece)
            if whole is None:
                continue
            header, payload = whole
            if wanted or not has_payload(header):
                await neighbours.take(inbound, header, payload)
            stream.num_taken += 1
            if not wanted:
                stream.changed.set()  # otherwise the neighbour is told once the payload was used

    async def _await(self, hello: pb.StageHello) -> Neighbours:
        """Wait for the neighbours that a stream is for: the sender may have the lease table before this worker."""
        if self._is_early(hello):
            if self._num_early >= MAX_EARLY_STREAMS:
                raise UnreachableError(f"{MAX_EARLY_STREAMS} streams wait here already; try again later")
            self._num_early += 1
            try:
                async with asyncio.timeout(EARLY_SECONDS):
                    while self._is_early(hello):
                        await self._changed.wait()
            except TimeoutError:
                pass
            finally:
                self._num_early -= 1
        if self._neighbours is None:
            raise StaleEpochError("this worker has no neighbours")
        return self._neighbours

    def _is_early(self, hello: pb.StageHello) -> bool:
        if self._neighbours is None:
            return True
        plan, number = self._neighbours.plan, self._neighbours.place.replica.number
        if hello.job_id != plan.job_id:
            return True
        return (hello.epoch, hello.table) > (plan.epoch, number)


async def _hello(messages: AsyncIterator[bytes]) -> pb.StageHello:
    message = await anext(messages, None)
    encoded = None if message is None else parse(message)[0]
    header = pb.StageHeader() if encoded is None else _header(encoded)
    if not header.HasField("hello"):
        raise ProtocolError("a stream must begin with a hello")
    return header.hello


def _header(encoded: memoryview) -> pb.StageHeader:
    try:
        return pb.StageHeader.FromString(bytes(encoded))
    except DecodeError:
        raise ProtocolError("a header that is not a valid message") from None
