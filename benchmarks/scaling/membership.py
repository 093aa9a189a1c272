"""Cases `deaths`, `joins` and `restart`: what changes of the membership cost a job with 1,000 workers.

The workers take plans and lease tables, and compute nothing, so that their steps do not take the processor from the
coordinator. The job has a slot for each of the 1,000 workers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from report import Result, at_most, fail, result

from gradstream.client import AsyncClient, Event
from gradstream.coordinator.timing import Timing
from gradstream.core.rpc.access import COORDINATOR
from gradstream.core.rpc.channel import open_channel
from scaling.cluster import ScaleCluster, cluster, recipe_of
from scaling.workers import SimulatedWorker, SimulatedWorkers

NUM_STEPS = 1000
PATIENCE_SECONDS = 60.0
LOOK_SECONDS = 0.02
SETTLE_SECONDS = 2.0
"""Rest between the submission and the measurement."""


class Calls:
    """Makes small calls to the coordinator all the time: the longest one shows how long its loop stalled."""

    def __init__(self, running: ScaleCluster):
        self.longest_seconds = 0.0
        self.own_lag_seconds = 0.0
        """The longest delay of this process itself, which `longest_seconds` contains."""
        self.peak_bytes = 0
        self._running = running
        self._cpu_before = 0.0
        self._tasks = [asyncio.create_task(self._call()), asyncio.create_task(self._watch_own_lag())]

    def reset(self) -> None:
        """Forget the calls so far."""
        self.longest_seconds = self.own_lag_seconds = 0.0
        self._cpu_before = self._running.usage("coordinator").cpu_seconds

    async def close(self) -> None:
        """Stop calling."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _call(self) -> None:
        channel = open_channel(self._running.address, COORDINATOR, self._running.transport)
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            while True:
                began = time.monotonic()
                # While the coordinator is killed no call counts.
                with suppress(grpc.aio.AioRpcError, psutil.NoSuchProcess):
                    await stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS)
                    self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
                    self.peak_bytes = max(self.peak_bytes, self._running.usage("coordinator").resident_bytes)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            await channel.close(None)

    async def _watch_own_lag(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)
            self.own_lag_seconds = max(self.own_lag_seconds, time.monotonic() - began - LOOK_SECONDS)

    @property
    def line(self) -> str:
        """The figures since the last `reset`, for people."""
        cpu_seconds = self._running.usage("coordinator").cpu_seconds - self._cpu_before
        return (
            f"longest call {self.longest_seconds:.2f} s (this process was late by up to {self.own_lag_seconds:.2f} s), "
            f"coordinator {self.peak_bytes / 2**20:.0f} MiB at most, {cpu_seconds:.1f} CPU s"
        )


@dataclass
class RunningJob:
    """A job whose slots are all held."""

    running: ScaleCluster
    workers: SimulatedWorkers
    client: AsyncClient
    job_id: str
    calls: Calls
    num_slots: int

    @property
    def table(self) -> int:
        """The number of the newest lease table that a worker has."""
        return max(worker.table for worker in self.workers.running)

    def received_bytes(self, workers: list[SimulatedWorker]) -> int:
        """Bytes of the directives that these workers got."""
        return sum(worker.received_bytes for worker in workers)

    async def num_gone(self) -> int:
        """How often the history says that a worker is gone."""
        items = self.client.watch(self.job_id, follow=False, kinds=["event"], event_kinds=["node"])
        return sum([isinstance(item, Event) and " is gone" in item.message async for item in items])

    @property
    def num_held(self) -> int:
        """The number of slots that running workers hold."""
        return sum(len(worker.slots) for worker in self.workers.running)


async def until(what: str, condition: Callable[[], bool]) -> float:
    """Wait until a condition holds; return the seconds. Ends the process if it takes PATIENCE_SECONDS."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > PATIENCE_SECONDS:
            fail("scale", f"not within {PATIENCE_SECONDS:g} s: {what}")
        await asyncio.sleep(LOOK_SECONDS)
    return time.monotonic() - began


@asynccontextmanager
async def _job(
    data: Path, directory: Path, num_workers: int, num_slots: int, num_servers: int, memory: str, secure: bool = False
) -> AsyncIterator[RunningJob]:
    async with (
        cluster(directory, num_servers, memory, secure) as running,
        SimulatedWorkers(running.address, running.transport, computes=False) as workers,
        running.client() as client,
    ):
        calls = Calls(running)
        try:
            await workers.start(num_workers)
            calls.reset()
            limits = {"min_workers": num_workers}
            job = await client.submit(recipe_of(data, directory, num_slots, NUM_STEPS, num_servers, cluster=limits))
            held = RunningJob(running, workers, client, job.job_id, calls, num_slots)
            await until("all slots are held", lambda: held.num_held == num_slots)
            sent = held.received_bytes(workers.running) / 1e6
            print(f"submitted with {num_workers} workers: {sent:.1f} MB sent; {calls.line}", flush=True)
            await asyncio.sleep(SETTLE_SECONDS)
            yield held
        finally:
            await calls.close()


async def deaths(
    data: Path, directory: Path, num_workers: int, num_servers: int, memory: str, secure: bool = False
) -> list[Result]:
    """Kill a tenth of the workers at once."""
    async with _job(data, directory, num_workers, num_workers, num_servers, memory, secure) as job:
        before, sent, gone = job.table, job.received_bytes(job.workers.running), await job.num_gone()
        dead = job.workers.running[::10]
        sent -= job.received_bytes(dead)
        job.calls.reset()
        job.workers.kill(dead)
        seconds = await until("other workers hold the slots", lambda: job.num_held == job.num_slots)
        # A lease that was lost through a stall would have run out by then.
        await asyncio.sleep(Timing().lease_seconds + 1.0)
        lost = await job.num_gone() - gone - len(dead)
        kept = 1 - lost / len(job.workers.running)
        sent = job.received_bytes(job.workers.running) - sent
        detail = f"{len(dead)} of {num_workers} die; {job.table - before} tables, {sent / 1e6:.1f} MB; {job.calls.line}"
    print(detail, flush=True)
    return [
        at_most("deaths_seconds", seconds, 2.0, detail),
        at_most("deaths_longest_call", job.calls.longest_seconds, 1.0, "seconds"),
        result("deaths_others_kept", kept, 1.0, "share of the other workers"),
        at_most("deaths_mib", job.calls.peak_bytes / 2**20, 500.0, "of the coordinator, at most"),
    ]


async def joins(
    data: Path, directory: Path, num_workers: int, num_servers: int, memory: str, secure: bool = False
) -> list[Result]:
    """Let 0.3 times as many workers join a job of 0.7 times as many."""
    num_joining = num_workers * 3 // 10
    async with _job(data, directory, num_workers - num_joining, num_workers, num_servers, memory, secure) as job:
        before, sent = job.table, job.received_bytes(job.workers.running)
        job.calls.reset()
        began = time.monotonic()
        newcomers = await job.workers.start(num_joining)
        await until("the newcomers hold slots", lambda: all(worker.slots for worker in newcomers))
        seconds = time.monotonic() - began
        sent = job.received_bytes(job.workers.running) - sent
        detail = f"{num_joining} join; {job.table - before} tables, {sent / 1e6:.1f} MB; {job.calls.line}"
    print(detail, flush=True)
    return [at_most("joins_seconds", seconds, 3.0, detail), at_most("joins_mb", sent / 1e6, 30.0, "sent in all")]


async def restart(data: Path, directory: Path, num_workers: int, num_servers: int, memory: str) -> list[Result]:
    """Kill the coordinator and start it again, with credentials; the workers come back by themselves."""
    async with _job(data, directory, num_workers, num_workers, num_servers, memory, secure=True) as job:
        before, waiting = job.table, list(job.workers.running)
        job.running.kill_coordinator()
        await until("the workers notice", lambda: all(worker.session.unreachable_since for worker in waiting))
        began = time.monotonic()
        await job.running.start_coordinator()
        job.calls.reset()
        ready_seconds = time.monotonic() - began
        await until("all are back", lambda: not any(worker.session.unreachable_since for worker in waiting))
        seconds = time.monotonic() - began
        await asyncio.sleep(SETTLE_SECONDS)
        detail = f"with TLS; it listens after {ready_seconds:.1f} s; {job.table - before} tables; {job.calls.line}"
        held = job.num_held
    print(detail, flush=True)
    return [
        at_most("restart_seconds", seconds, 15.0, detail),
        result("restart_held", held / num_workers, 1.0, "share of the slots that are held afterwards"),
    ]
