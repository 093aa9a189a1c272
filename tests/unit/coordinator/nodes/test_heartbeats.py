"""A node whose heartbeat cannot be made fails with its own error, instead of ending as if it had been cancelled."""

from __future__ import annotations

import asyncio

import pytest
from coordinator_fakes import SERVER, Cluster

from gradstream.proto.v1 import coordinator_pb2


async def test_an_error_in_a_heartbeat_is_the_sessions_error(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> coordinator_pb2.Activity:
        raise TypeError("no activity")

    node = cluster.node(SERVER, "ps")
    await node.session.registered.wait()
    monkeypatch.setattr(node.session, "_activity", broken)
    node.session.heartbeat_soon()
    with pytest.raises(TypeError, match="no activity"):
        await asyncio.wait_for(asyncio.shield(node.task), 10)
    cluster.nodes.remove(node)  # it has ended
    await node.session.channel.close()
