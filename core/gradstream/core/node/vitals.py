"""The vitals that a node sends with its heartbeats: its machine, its clock, and its link to the coordinator."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

import grpc.aio

from gradstream.core.machine.facts import DiskDirectory, MachineReader
from gradstream.core.node.probe import ask_info
from gradstream.proto.v1 import coordinator_pb2, probe_pb2_grpc

INTERVAL_SECONDS = 30.0
NUM_ROUND_TRIPS = 2


class VitalsWatch:
    """Measures the vitals every half minute. `latest` is None until the first measurement."""

    def __init__(
        self, channel: grpc.aio.Channel, disk_directory: DiskDirectory, clock: Callable[[], float] = time.time
    ):
        self.latest: coordinator_pb2.Vitals | None = None
        self._stub: Any = probe_pb2_grpc.ProbeServiceStub(channel)
        self._machine = MachineReader(disk_directory)
        self._clock = clock

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            self.latest = await self.measure()
            # Jittered, because after a restart of the coordinator all nodes begin together.
            await asyncio.sleep(random.uniform(0.5, 1.5) * INTERVAL_SECONDS)

    async def measure(self) -> coordinator_pb2.Vitals:
        """Measure now. The link is left out when the coordinator does not answer."""
        vitals = coordinator_pb2.Vitals(machine=(await self._machine.read()).to_proto())
        try:
            _, round_trip = await ask_info(self._stub, NUM_ROUND_TRIPS, self._clock)
        except grpc.aio.AioRpcError:
            return vitals
        vitals.linked = True
        vitals.round_trip_microseconds = int(1e6 * round_trip.seconds)
        vitals.clock_ahead_ms = -round(1000 * round_trip.clock_ahead_seconds)
        return vitals
