"""Credentials that change while calls are under way, over real TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from support.credentials import make_credentials
from support.shards import until

from gradstream.core.credentials.authority import Authority
from gradstream.core.rpc import access, transport
from gradstream.core.rpc.channel import listen, new_server, open_channel
from gradstream.core.rpc.transport import Transport

BOUND_SECONDS = 20.0


async def echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[int]:
    """Of a server that sends back what comes."""
    make_credentials(tmp_path, ("coordinator", "worker"))
    server = new_server()
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    found = listen(server, "127.0.0.1:0", Transport(tmp_path / "coordinator"))
    await server.start()
    yield found
    await server.stop(None)


def num_connections(port: int) -> int:
    """From this process to its server."""
    found = psutil.Process().net_connections("tcp")
    return sum(bool(each.raddr) and each.raddr.port == port and each.status == "ESTABLISHED" for each in found)


class Echo:
    """A stream that is kept open."""

    def __init__(self, channel: grpc.aio.Channel):
        self.call = channel.stream_stream("/test/Echo")()

    async def says(self, message: bytes) -> bytes:
        async with asyncio.timeout(BOUND_SECONDS):
            await self.call.write(message)
            return bytes(await self.call.read())

    async def end(self) -> None:
        await self.call.done_writing()
        assert await self.call.read() is grpc.aio.EOF


async def test_a_stream_outlives_any_number_of_changes(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "LOOK_SECONDS", 0.0)
    async with open_channel(f"127.0.0.1:{port}", access.COORDINATOR, Transport(tmp_path / "worker")) as channel:
        streams = [Echo(channel)]
        assert await streams[0].says(b"first") == b"first"
        for number in range(3):
            with Authority.open(tmp_path / "authority") as authority:
                authority.renew(tmp_path / "worker")
            streams.append(Echo(channel))
            words = f"after change {number}".encode()
            assert [await stream.says(words) for stream in streams] == [words] * len(streams)
            assert num_connections(port) == len(streams)
        # Each connection goes with its last call; that of the newest credentials stays.
        while streams:
            await streams.pop().end()
        await until(lambda: num_connections(port) == 1)
        assert await Echo(channel).says(b"last") == b"last"
        assert num_connections(port) == 1
