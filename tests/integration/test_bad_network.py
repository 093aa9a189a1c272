"""Addresses that cannot be listened on, and a coordinator that goes away while it sends a data shard."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc.aio
import pytest

from gradstream.core.errors import ConfigError, DataError
from gradstream.core.node.session import NodeSession
from gradstream.core.rpc.channel import listen, new_server, open_channel
from gradstream.core.rpc.errors import answering
from gradstream.proto.v1 import coordinator_pb2, coordinator_pb2_grpc
from gradstream.worker.samples.readers import Readers

CONTENT = bytes(range(256)) * 40


class BreakingCoordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Sends a file in pieces of other sizes each time, and goes away after `breaks_after` bytes of each call."""

    def __init__(self, breaks_after: list[int]):
        self.breaks_after = breaks_after
        self.num_calls = 0

    async def FetchDataShard(self, request: coordinator_pb2.FetchDataShardRequest, context: Any) -> AsyncIterator[Any]:
        async with answering(context):
            if request.file == "gone.tokens":
                raise DataError("data shard gone.tokens cannot be read; restore it")
            self.num_calls += 1
            piece_bytes = 1000 * self.num_calls
            for begin in range(0, len(CONTENT), piece_bytes):
                if self.breaks_after and begin >= self.breaks_after[0]:
                    del self.breaks_after[0]
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
                yield coordinator_pb2.FetchDataShardResponse(payload=CONTENT[begin : begin + piece_bytes])


async def fetched(coordinator: BreakingCoordinator, file: str) -> bytes:
    """A file as a worker fetches it from this coordinator."""
    server = new_server()
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(coordinator, server)
    address = f"127.0.0.1:{listen(server, '127.0.0.1:0')}"
    await server.start()
    try:
        async with open_channel(address) as channel:
            stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
            session = SimpleNamespace(stub=stub, peer=f"coordinator {address}")
            plan: Any = SimpleNamespace(job_id="tiny-1")
            readers = Readers(plan, cast(NodeSession, session), Path())
            return b"".join([piece async for piece in readers.fetch(file)])
    finally:
        await server.stop(None)


@pytest.mark.parametrize("breaks_after", [[], [0], [3000], [3000, 4000, 0, 8000], [9000, 100]])
async def test_fetch_goes_on_after_a_break(breaks_after: list[int]) -> None:
    coordinator = BreakingCoordinator(list(breaks_after))
    assert await fetched(coordinator, "train-00000.tokens") == CONTENT
    assert coordinator.num_calls == 1 + len(breaks_after)


async def test_a_file_that_is_gone_is_no_break() -> None:
    with pytest.raises(DataError, match=r"^data shard gone\.tokens cannot be read; restore it$"):
        await fetched(BreakingCoordinator([]), "gone.tokens")


@pytest.mark.parametrize(
    ("address", "cause"),
    [("192.0.2.1:0", "not this machine's"), ("no-such-host.invalid:0", "'no-such-host.invalid' is not a known host")],
)
async def test_address_that_is_not_this_machines(address: str, cause: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=f"^cannot listen on {re.escape(address)}: .*{cause}.*choose another"):
        listen(new_server(), address)
    # gRPC would have put a line of its own before ours.
    assert capfd.readouterr().err == ""
