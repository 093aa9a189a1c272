"""The worker's process as a whole."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from gradstream.core import log
from gradstream.core.node.faults import Faults
from gradstream.core.node.session import NodeIdentity, SessionSettings
from gradstream.proto.v1 import coordinator_pb2
from gradstream.worker import process
from gradstream.worker.process import Worker


async def test_a_worker_whose_device_hangs_ends_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "DROP_SECONDS", 0.2)
    identity = NodeIdentity(coordinator_pb2.NODE_KIND_WORKER, "w", "127.0.0.1:1", 1 << 30, "cpu")
    worker = Worker(SessionSettings("127.0.0.1:9", log.LogBuffer()), identity, torch.device("cpu"), tmp_path, Faults())
    computed = threading.Event()

    async def computes() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.to_thread(computed.wait)

    worker._task = asyncio.create_task(computes())
    await asyncio.sleep(0)
    worker.session.leave()
    try:
        await asyncio.wait_for(worker.run(), 30)
    finally:
        computed.set()
