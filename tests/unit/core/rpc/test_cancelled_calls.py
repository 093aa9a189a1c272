"""A task that retries a call ends when it is cancelled, even where gRPC swallows the cancellation."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from gradstream.core.rpc.channel import open_channel
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.core.wire.stubs import WorkerStub

BOUND_SECONDS = 20.0
NUM_CANCELS = 60
MAX_ROUNDS = 50


@pytest.fixture
def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def knock(stub: WorkerStub, swallowed: list[str]) -> None:
    """As every stream of the cluster is kept up: an error is looked at, and the call made again."""

    async def messages() -> AsyncIterator[bytes]:
        yield b""
        await asyncio.Event().wait()

    while True:
        try:
            async for _ in stub.Stream(messages()):
                pass
        except grpc.aio.AioRpcError as rpc_error:
            task = asyncio.current_task()
            assert task is not None
            if task.cancelling():
                swallowed.append(str(rpc_error.code()))
            error_from_rpc(rpc_error, "the peer")
        await asyncio.sleep(0)


async def test_a_cancelled_task_ends_also_when_its_call_fails_just_then(closed_port: int) -> None:
    swallowed: list[str] = []
    async with open_channel(f"127.0.0.1:{closed_port}") as channel:
        # Until the call failed just then at least once: how soon depends on the machine.
        for turn in [*range(NUM_CANCELS)] * MAX_ROUNDS:
            if turn == 0 and swallowed:
                break
            task = asyncio.create_task(knock(WorkerStub(channel), swallowed))
            for _ in range(turn):  # another moment of the call each time
                await asyncio.sleep(0)
            task.cancel()
            ended, _ = await asyncio.wait([task], timeout=BOUND_SECONDS)
            assert ended, f"cancelled after {turn} turns of the event loop, it goes on"
            assert task.cancelled()
    # Else this test shows nothing: gRPC has been mended, and `error_from_rpc` need not look.
    assert swallowed
