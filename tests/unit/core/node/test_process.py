"""The common duties of every role's process, besides its work."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest

from gradstream.core.node import process
from gradstream.core.node.health import ask
from gradstream.core.node.process import Health, ReadyFile, until_signal


@pytest.fixture
async def server() -> AsyncIterator[tuple[grpc.aio.Server, str]]:
    made = grpc.aio.server()
    port = made.add_insecure_port("127.0.0.1:0")
    yield made, f"127.0.0.1:{port}"
    await made.stop(None)


async def test_its_health_follows_a_check_and_ends_for_good(
    server: tuple[grpc.aio.Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "HEALTH_CHECK_SECONDS", 0.01)
    made, address = server
    health = Health(made)
    await health.set(False)
    await made.start()
    is_healthy, num_checks = True, 0

    async def check() -> bool:
        nonlocal num_checks
        num_checks += 1
        return is_healthy

    async def checked() -> str:
        before = num_checks
        while num_checks < before + 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return await asyncio.to_thread(ask, address, "worker")

    assert await asyncio.to_thread(ask, address, "worker") == "NOT_SERVING"
    watching = asyncio.create_task(health.watch(check))
    assert await checked() == "SERVING"
    is_healthy = False
    assert await checked() == "NOT_SERVING"
    is_healthy = True
    await health.shut_down()
    assert await checked() == "NOT_SERVING"
    watching.cancel()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_waits_for_a_signal(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM)
    waiting = asyncio.create_task(until_signal())
    await asyncio.sleep(0)
    os.kill(os.getpid(), number)
    await asyncio.wait_for(waiting, 10)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_ready_file_is_written_and_removed_if_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ready"
    file = ReadyFile(path)
    file.remove()
    file.write("127.0.0.1:7000")
    assert path.read_text() == "127.0.0.1:7000\n"
    file.remove()
    assert not path.exists()
    nowhere = ReadyFile(None)
    nowhere.write("127.0.0.1:7000")
    nowhere.remove()
