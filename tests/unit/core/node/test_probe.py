"""ProbeService on real servers: its answers, its measurements and its refusals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from gradstream.core import __version__
from gradstream.core.machine import facts
from gradstream.core.machine.facts import Machine, MachineReader
from gradstream.core.node import probe
from gradstream.core.rpc import access
from gradstream.core.rpc.channel import listen, new_server, open_channel
from gradstream.proto.v1 import probe_pb2, probe_pb2_grpc


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[Any]:
    """A stub of a probed server whose clock is 100 s ahead."""
    server = new_server()
    probe.add_probe(server, access.WORKER, lambda: tmp_path / "cache", clock=lambda: time.time() + 100)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    channel = open_channel(f"127.0.0.1:{port}")
    yield probe_pb2_grpc.ProbeServiceStub(channel)
    await channel.close(None)
    await server.stop(None)


async def test_info_and_clock(stub: Any, tmp_path: Path) -> None:
    info, round_trip = await probe.ask_info(stub)
    assert (info.version, info.role) == (__version__, "worker")
    told = Machine.from_proto(info.machine)
    assert told.disk_directory == str(tmp_path / "cache")
    assert told.free_disk_bytes is not None
    assert 0 < told.available_memory_bytes < told.total_memory_bytes
    assert 0 < round_trip.seconds < 1
    assert round_trip.clock_ahead_seconds == pytest.approx(100, abs=1)


async def test_bandwidth(stub: Any) -> None:
    bandwidth = await probe.measure_bandwidth(stub, num_bytes=8 << 20)
    # Any loopback is faster than 80 Mb/s and slower than 1 TB/s.
    assert 1e7 < bandwidth.up_bytes_per_second < 1e12
    assert 1e7 < bandwidth.down_bytes_per_second < 1e12


def test_the_latter_half_counts() -> None:
    slow_start = [(0.0, 10), (1.0, 10), (1.9, 10), (3.0, 100), (4.0, 100)]
    assert probe.settled(slow_start) == (200, pytest.approx(2.1))
    assert probe.settled([(0.0, 10), (2.0, 50)]) == (50, 2.0)
    assert probe.settled([(0.0, 10)]) == (0, 0.0)
    assert probe.settled([]) == (0, 0.0)


@pytest.mark.parametrize("num_bytes", [1, 65536, 65537, 5 << 20, 64 << 20])
def test_pieces(num_bytes: int) -> None:
    sizes = [len(piece) for piece in probe.pieces(num_bytes)]
    assert sum(sizes) == num_bytes
    assert sizes[0] <= 64 << 10
    assert max(sizes) <= probe.MAX_PIECE_BYTES
    assert len(sizes) <= probe.MAX_PIECES


async def _send(*payloads: bytes) -> AsyncIterator[probe_pb2.MeasureUpRequest]:
    for payload in payloads:
        yield probe_pb2.MeasureUpRequest(payload=payload)


@pytest.mark.parametrize(
    ("payloads", "message"),
    [
        ([b""], "pieces of 1 to 1048576 bytes"),
        ([bytes((1 << 20) + 1)], "pieces of 1 to 1048576 bytes"),
        ([b"x"] * 2049, "1 to 2048 pieces"),
        ([bytes(1 << 20)] * 65, "at most 67108864 bytes"),
    ],
)
async def test_too_much_up_is_refused(stub: Any, payloads: list[bytes], message: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.MeasureUp(_send(*payloads), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert message in str(caught.value.details())


@pytest.mark.parametrize("num_bytes", [0, (64 << 20) + 1, 2**64 - 1])
async def test_too_much_down_is_refused(stub: Any, num_bytes: int) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="asks for 1 to 67108864 bytes"):
        await stub.MeasureDown(probe_pb2.MeasureDownRequest(num_bytes=num_bytes), timeout=10).read()


async def test_one_at_a_time_and_never_for_long(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a caller that sends nothing nor one that reads nothing holds others up for longer than the limit."""
    monkeypatch.setattr(probe, "MAX_SECONDS", 0.5)
    never = asyncio.Event()

    async def nothing() -> AsyncIterator[probe_pb2.MeasureUpRequest]:
        yield probe_pb2.MeasureUpRequest(payload=b"x")
        await never.wait()

    # 1. One that stays silent: others are refused meanwhile, with a reason, and GetInfo is answered.
    silent = stub.MeasureUp(nothing(), timeout=10)
    await silent.wait_for_connection()
    await asyncio.sleep(0.1)
    with pytest.raises(
        grpc.aio.AioRpcError, match="the link to this worker is being measured by another caller"
    ) as caught:
        await stub.MeasureDown(probe_pb2.MeasureDownRequest(num_bytes=1), timeout=10).read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await stub.GetInfo(probe_pb2.GetInfoRequest(), timeout=5)
    answer = await silent
    assert (answer.num_bytes, answer.counted_bytes) == (1, 0)
    # 2. One that does not read.
    deaf = stub.MeasureDown(probe_pb2.MeasureDownRequest(num_bytes=64 << 20), timeout=10)
    await deaf.wait_for_connection()
    await asyncio.sleep(0.1)
    with pytest.raises(grpc.aio.AioRpcError, match="being measured"):
        await stub.MeasureUp(_send(b"x"), timeout=5)
    deadline = time.monotonic() + 5
    while True:
        try:
            await stub.MeasureUp(_send(b"x", b"x"), timeout=5)
            break
        except grpc.aio.AioRpcError:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    deaf.cancel()
    # 3. One that goes away frees it at once.
    gone = stub.MeasureUp(nothing(), timeout=10)
    await gone.wait_for_connection()
    monkeypatch.setattr(probe, "MAX_SECONDS", 30)
    gone.cancel()
    bandwidth = await _until_free(stub)
    assert bandwidth.up_bytes_per_second > 0


async def _until_free(stub: Any) -> probe.Bandwidth:
    for _ in range(100):
        try:
            return await probe.measure_bandwidth(stub, num_bytes=1 << 20)
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.02)
    raise AssertionError("never free")


# ---- The machine -----------------------------------------------------------------------------------------------------


def test_a_containers_memory_is_its_limit(tmp_path: Path) -> None:
    total, available = facts.read_memory(tmp_path)
    assert 0 < available < total
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert facts.read_memory(tmp_path)[0] == total
    (tmp_path / "memory.max").write_text("100000\n")
    assert facts.read_memory(tmp_path) == (100_000, 99_000)
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 400\n")
    assert facts.read_memory(tmp_path) == (100_000, 99_400)
    (tmp_path / "memory.current").write_text("200000\n")
    assert facts.read_memory(tmp_path) == (100_000, 0)


def test_a_containers_memory_of_the_older_kind(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("70000")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("30000")
    assert facts.read_memory(tmp_path) == (70_000, 40_000)


def test_disk_of_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    assert facts.free_disk_bytes(tmp_path / "a" / "b") == pytest.approx(facts.free_disk_bytes(tmp_path), rel=0.1)


async def test_a_disk_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(facts, "READ_SECONDS", 0.1)
    free = facts.free_disk_bytes
    calls = 0

    def hangs(directory: Path) -> int | None:
        nonlocal calls
        calls += 1
        time.sleep(0.5)
        return free(directory)

    monkeypatch.setattr(facts, "free_disk_bytes", hangs)
    reader = MachineReader(lambda: tmp_path)
    began = time.monotonic()
    assert (await reader.read()).free_disk_bytes is None
    assert (await reader.read()).free_disk_bytes is None
    assert time.monotonic() - began < 0.45
    assert calls == 1
    await asyncio.sleep(0.4)
    assert (await reader.read()).free_disk_bytes is not None
    assert calls == 1
