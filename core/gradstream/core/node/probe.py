"""ProbeService, both sides: a service's information about itself, and the speed of the link to it.

A measurement sends at most 64 MiB in at most 5 s, and a server takes one at a time, which bounds their load on a
cluster. The receiver measures the rate over the second half of the time, when TCP has reached its full speed.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import grpc.aio

from gradstream.core import __version__
from gradstream.core.errors import BusyError, ProtocolError
from gradstream.core.machine.facts import DiskDirectory, MachineReader
from gradstream.core.rpc.access import COORDINATOR, FINE_TUNING, SERVER, WORKER
from gradstream.core.rpc.errors import answering
from gradstream.proto.v1 import probe_pb2, probe_pb2_grpc

TITLES = {COORDINATOR: "coordinator", SERVER: "parameter server", WORKER: "worker", FINE_TUNING: "fine-tuning service"}

MAX_TOTAL_BYTES = 64 << 20
MAX_PIECE_BYTES = 1 << 20
MAX_PIECES = 2048
MAX_SECONDS = 5.0
FIRST_PIECE_BYTES = 64 << 10

INFO_SECONDS = 5.0
NUM_ROUND_TRIPS = 5
MEASURE_BYTES = 16 << 20
MEASURE_SECONDS = 1.0

Context = grpc.aio.ServicerContext[Any, Any]


def add_probe(
    server: grpc.aio.Server,
    role: str,
    disk_directory: DiskDirectory = lambda: None,
    clock: Callable[[], float] = time.time,
    version: str = __version__,
) -> None:
    """Add ProbeService to `server`.

    `role` is coordinator, server, worker or fine-tuning. `disk_directory` returns the directory in which the service
    writes at the moment. `clock` is Unix time in seconds.
    """
    probe_pb2_grpc.add_ProbeServiceServicer_to_server(ProbeServicer(role, disk_directory, clock, version), server)


class ProbeServicer(probe_pb2_grpc.ProbeServiceServicer):
    """The servicer of ProbeService for one service."""

    def __init__(self, role: str, disk_directory: DiskDirectory, clock: Callable[[], float], version: str):
        self._role = role
        self._clock = clock
        self._version = version
        self._machine = MachineReader(disk_directory)
        self._began = time.monotonic()
        self._measuring = False

    async def GetInfo(self, request: probe_pb2.GetInfoRequest, context: Context) -> probe_pb2.GetInfoResponse:
        machine = (await self._machine.read()).to_proto()
        # Read the clock last: the caller assumes that it was read in the middle of the call.
        return probe_pb2.GetInfoResponse(
            version=self._version,
            role=self._role,
            uptime_ms=int(1000 * (time.monotonic() - self._began)),
            machine=machine,
            unix_ms=int(1000 * self._clock()),
        )

    async def MeasureUp(
        self, request_iterator: AsyncIterator[probe_pb2.MeasureUpRequest], context: Context
    ) -> probe_pb2.MeasureUpResponse:
        arrivals: list[tuple[float, int]] = []
        async with answering(context):
            with self._alone():
                total = 0
                try:
                    async with asyncio.timeout(MAX_SECONDS):
                        async for request in request_iterator:
                            num_bytes = len(request.payload)
                            total += num_bytes
                            if not 0 < num_bytes <= MAX_PIECE_BYTES or len(arrivals) == MAX_PIECES:
                                raise ProtocolError(
                                    f"a measurement has 1 to {MAX_PIECES} pieces of 1 to {MAX_PIECE_BYTES} bytes"
                                )
                            if total > MAX_TOTAL_BYTES:
                                raise ProtocolError(f"a measurement sends at most {MAX_TOTAL_BYTES} bytes")
                            arrivals.append((time.perf_counter(), num_bytes))
                except TimeoutError:
                    # A slow link is a valid result: report the bytes that have arrived.
                    pass
        counted_bytes, counted_seconds = settled(arrivals)
        return probe_pb2.MeasureUpResponse(
            num_bytes=sum(num_bytes for _, num_bytes in arrivals),
            counted_bytes=counted_bytes,
            counted_microseconds=int(1e6 * counted_seconds),
        )

    async def MeasureDown(  # type: ignore[override]
        self, request: probe_pb2.MeasureDownRequest, context: Context
    ) -> None:
        async with answering(context):
            if not 0 < request.num_bytes <= MAX_TOTAL_BYTES:
                raise ProtocolError(f"a measurement asks for 1 to {MAX_TOTAL_BYTES} bytes")
            with self._alone():
                try:
                    async with asyncio.timeout(MAX_SECONDS):
                        for piece in pieces(request.num_bytes):
                            await context.write(probe_pb2.MeasureDownResponse(payload=piece))
                except TimeoutError:
                    pass

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self._measuring:
            raise BusyError(
                f"the link to this {TITLES.get(self._role, self._role)} is being measured by another caller; "
                f"try again in {MAX_SECONDS:.0f} s"
            )
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False


# ---- The caller's side -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """The duration of a small call, and the lead of the peer's clock, whose error is at most that duration."""

    seconds: float
    clock_ahead_seconds: float


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Payload bytes a second to the service, and from the service."""

    up_bytes_per_second: float
    down_bytes_per_second: float


async def ask_info(
    stub: Any, num_round_trips: int = NUM_ROUND_TRIPS, clock: Callable[[], float] = time.time
) -> tuple[probe_pb2.GetInfoResponse, RoundTrip]:
    """Get a service's information, and the fastest of some round trips to it. Raises AioRpcError."""
    # The first call opens the connection and does not count.
    info: probe_pb2.GetInfoResponse = await stub.GetInfo(probe_pb2.GetInfoRequest(), timeout=INFO_SECONDS)
    best: RoundTrip | None = None
    for _ in range(num_round_trips):
        began, began_unix = time.perf_counter(), clock()
        info = await stub.GetInfo(probe_pb2.GetInfoRequest(), timeout=INFO_SECONDS)
        seconds = time.perf_counter() - began
        if best is None or seconds < best.seconds:
            best = RoundTrip(seconds, info.unix_ms / 1000 - (began_unix + seconds / 2))
    assert best is not None
    return info, best


async def measure_bandwidth(stub: Any, num_bytes: int = MEASURE_BYTES, seconds: float = MEASURE_SECONDS) -> Bandwidth:
    """Measure the link to a service in both directions, with at most `num_bytes` in about `seconds`.

    A very slow link takes longer. Raises AioRpcError, also when the service is being measured by another caller.
    """
    return Bandwidth(await _measure_up(stub, num_bytes, seconds), await _measure_down(stub, num_bytes, seconds))


async def _measure_up(stub: Any, num_bytes: int, seconds: float) -> float:
    began = time.perf_counter()

    async def requests() -> AsyncIterator[probe_pb2.MeasureUpRequest]:
        for piece in pieces(num_bytes):
            yield probe_pb2.MeasureUpRequest(payload=piece)
            if time.perf_counter() - began > seconds:
                return

    answer = await stub.MeasureUp(requests(), timeout=MAX_SECONDS + INFO_SECONDS)
    if answer.counted_bytes and answer.counted_microseconds:
        return float(answer.counted_bytes / answer.counted_microseconds * 1e6)
    return float(answer.num_bytes / (time.perf_counter() - began))


async def _measure_down(stub: Any, num_bytes: int, seconds: float) -> float:
    arrivals = [(time.perf_counter(), 0)]
    call = stub.MeasureDown(probe_pb2.MeasureDownRequest(num_bytes=num_bytes), timeout=MAX_SECONDS + INFO_SECONDS)
    try:
        async for response in call:
            arrivals.append((time.perf_counter(), len(response.payload)))
            if len(arrivals) > 2 and arrivals[-1][0] - arrivals[0][0] > seconds:
                break
    finally:
        call.cancel()
    counted_bytes, counted_seconds = settled(arrivals)
    return counted_bytes / counted_seconds if counted_seconds else 0.0


def settled(arrivals: Sequence[tuple[float, int]]) -> tuple[int, float]:
    """(bytes, seconds) of the second half of the time over which pieces arrived, each (time in seconds, bytes).

    The first piece only starts the clock. Fewer than two pieces give (0, 0).
    """
    if len(arrivals) < 2:
        return 0, 0.0
    middle = (arrivals[0][0] + arrivals[-1][0]) / 2
    start = max(index for index, (when, _) in enumerate(arrivals[:-1]) if when <= middle)
    return sum(num_bytes for _, num_bytes in arrivals[start + 1 :]), arrivals[-1][0] - arrivals[start][0]


def pieces(num_bytes: int) -> Iterator[bytes]:
    """Random bytes, `num_bytes` in all, in growing pieces: with small pieces first a slow link can be measured too."""
    size, left = FIRST_PIECE_BYTES, num_bytes
    while left > 0:
        yield _noise()[: min(size, left)]
        left -= size
        size = min(2 * size, MAX_PIECE_BYTES)


@cache
def _noise() -> bytes:
    # Random bytes, because some networks compress traffic.
    return os.urandom(MAX_PIECE_BYTES)
