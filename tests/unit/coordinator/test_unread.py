"""Messages that no handler reads: gRPC accepts one window of them and no more."""

from __future__ import annotations

import asyncio
from pathlib import Path

from support.credentials import make_credentials

from gradstream.coordinator.server import Coordinator
from gradstream.core.rpc import access
from gradstream.core.rpc.channel import open_channel
from gradstream.core.rpc.transport import Transport

PIECE = bytes(64 << 10)
QUIET_SECONDS = 2.0


async def test_an_admitted_caller_cannot_fill_a_coordinator_with_what_is_not_read(tmp_path: Path) -> None:
    """A viewer's 64 calls of which nothing more is read held 252 MiB where gRPC measures its links."""
    make_credentials(tmp_path, ("coordinator", "worker"))
    tokens = tmp_path / "coordinator" / "tokens.json"
    coordinator = Coordinator(
        "127.0.0.1:0", tmp_path / "state", transport=Transport(tmp_path / "coordinator"), tokens=tokens
    )
    await coordinator.start()
    sent = 0
    async with open_channel(coordinator.address, access.COORDINATOR, Transport(tmp_path / "worker")) as channel:
        # Its one request is the first message. It goes on until the coordinator ends.
        call = channel.stream_stream("/gradstream.proto.v1.CoordinatorService/WatchTokens")()
        await call.write(b"")
        assert await call.read()

        async def write() -> None:
            nonlocal sent
            while sent < 16 << 20:
                await call.write(PIECE)
                sent += len(PIECE)

        writing = asyncio.create_task(write())
        before = -1
        while before < sent:
            before = sent
            await asyncio.sleep(QUIET_SECONDS)
        writing.cancel()
        call.cancel()
    await coordinator.stop()
    # The window, and what the sender's own side has taken.
    assert sent < 1 << 20
