"""Pushes survive a server that goes away: once the server is back everything is acknowledged, in order."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np

from gradstream.core.errors import UnreachableError
from gradstream.core.node.faults import Faults
from gradstream.core.plan.plan import Server
from gradstream.core.rpc.channel import listen, new_server, open_channel
from gradstream.core.rpc.errors import abort
from gradstream.core.wire.frames import checksum, parse
from gradstream.core.wire.stubs import ParameterServerStub, add_parameter_server
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.worker.outbound import with_refusal
from gradstream.worker.push import Contribution, PushStream
from gradstream.worker.timeline import Timeline


class Receiver:
    """A server's Push alone: takes every contribution of one message and notes it."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.streams = 0

    async def Push(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[pb.PushResponse]:
        self.streams += 1
        yield pb.PushResponse(window_bytes=1 << 20)
        async for message in messages:
            header = pb.ContributionHeader.FromString(bytes(parse(message)[0] or b""))
            self.received.append(header.bundle)
            yield pb.PushResponse(
                window_bytes=1 << 20, result=pb.PUSH_RESULT_ACCEPTED, step=header.step, bundle=header.bundle
            )

    async def Pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[bytes]:
        raise NotImplementedError
        yield b""

    async def CompleteStep(self, request: Any, context: Any) -> None: ...

    async def CompleteSlots(self, request: Any, context: Any) -> None: ...

    async def GetServerStatus(self, request: Any, context: Any) -> None: ...


def contribution(bundle: int) -> Contribution:
    payload = np.full(8, bundle, dtype=np.uint8)
    header = pb.ContributionHeader(bundle=bundle, payload_bytes=8, crc32c=checksum(payload))
    return Contribution(header, [payload])


async def started(receiver: Receiver, address: str) -> tuple[grpc.aio.Server, int]:
    server = new_server()
    add_parameter_server(receiver, server)
    port = listen(server, address)
    await server.start()
    return server, port


async def until_empty(stream: PushStream) -> None:
    async with asyncio.timeout(20):
        while not stream.empty:  # noqa: ASYNC110 - it has no event of its own
            await asyncio.sleep(0.001)


async def test_a_stream_that_broke_takes_nothing_from_the_next_one() -> None:
    """gRPC leaves the iterator of a broken call suspended; awake again, it must not swallow a contribution."""
    receiver = Receiver()
    server, port = await started(receiver, "127.0.0.1:0")
    channel = open_channel(f"127.0.0.1:{port}")
    server_of_plan = Server("n", "server", f"127.0.0.1:{port}")
    stream = PushStream(server_of_plan, ParameterServerStub(channel), Faults(""), Timeline())
    running = asyncio.create_task(stream.run())
    try:
        expected = []
        for turn in range(4):
            for bundle in range(turn * 3, turn * 3 + 3):
                stream.put(contribution(bundle))
                expected.append(bundle)
            await until_empty(stream)
            # Idle now: the iterator waits for more while its server goes away.
            await server.stop(None)
            server, _ = await started(receiver, f"127.0.0.1:{port}")
        assert receiver.received == expected
        assert receiver.streams == 4
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await channel.close(None)
        await server.stop(None)


class Refusing(Receiver):
    """A server that has no room for another stream until `has_room`."""

    has_room = False

    async def Push(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[pb.PushResponse]:
        if not self.has_room:
            await abort(context, UnreachableError("host h already has 32 streams open here for a push; close some"))
        async for response in super().Push(messages, context):
            yield response


async def test_a_refused_stream_is_named_with_the_servers_reason() -> None:
    """Not retried in silence: `status` shows why."""
    receiver = Refusing()
    server, port = await started(receiver, "127.0.0.1:0")
    channel = open_channel(f"127.0.0.1:{port}")
    server_of_plan = Server("n", "server-0", f"127.0.0.1:{port}")
    stream = PushStream(server_of_plan, ParameterServerStub(channel), Faults(""), Timeline())
    running = asyncio.create_task(stream.run())
    try:
        stream.put(contribution(0))
        async with asyncio.timeout(20):
            while stream.cut_off_since is None:  # noqa: ASYNC110 - it has no event of its own
                await asyncio.sleep(0.001)
        named = with_refusal(stream.title, stream.refusal)
        assert named == f"{server_of_plan.title} (host h already has 32 streams open here for a push; close some)"
        receiver.has_room = True
        await until_empty(stream)
        assert not stream.refusal
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await channel.close(None)
        await server.stop(None)
