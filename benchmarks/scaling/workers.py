"""Simulated workers: many in one process, each with real connections and the real protocol. For bench-scale and tests.

A simulated worker has the worker's own session, pulls, push streams and reports. Only its arithmetic is left out: its
contributions are zeros that were encoded once for all workers. It has no data and no model. Each worker opens one
connection to the coordinator and one to every server of the plan, all from one address, so a server sees what it would
see of workers behind one NAT address.

To simulate a cluster in a case of bench-scale:

    async with SimulatedWorkers(address) as workers:
        await workers.start(1000)            # returns when all have registered
        workers.kill(workers.running[:100])  # closes their connections without a farewell
        await workers.start(300)             # others join

Every worker tells what it has: `slots`, `table` (the number of its lease table), `version`, `num_plans`, `num_tables`
and `received_bytes` of directives. `failures` of the group are the errors with which workers ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from gradstream.core.codecs.payloads import CodecBook
from gradstream.core.node.faults import Faults
from gradstream.core.node.session import NodeIdentity, NodeSession, SessionSettings
from gradstream.core.plan.bundles import first_push_codec
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.access import SERVER
from gradstream.core.rpc.channel import open_channel
from gradstream.core.rpc.transport import PLAIN, Transport
from gradstream.core.telemetry.sampling import Sampling
from gradstream.core.telemetry.timeline import SpanKind
from gradstream.core.wire.frames import checksum
from gradstream.core.wire.stubs import ParameterServerStub
from gradstream.proto.v1 import coordinator_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.worker.backlog import Backlog
from gradstream.worker.held_slots import HeldSlots
from gradstream.worker.pull import Puller
from gradstream.worker.push import Contribution, PushStream
from gradstream.worker.status import Reports, Status
from gradstream.worker.timeline import Timeline, clock_ns
from gradstream.worker.weights import Inbox

MEMORY_BYTES = 1 << 30
SLOT_TOKENS = 8
ADDRESS = "127.0.0.1:1"
"""Simulated workers listen nowhere: only neighbours in a pipeline would connect to them."""


class Contributions:
    """The contributions of a plan: zeros, encoded once for all of its simulated workers."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self._book = CodecBook(plan.tensors, plan.recipe.codec.embedding)
        self._encoded = cache(self._encode)

    def _encode(self, bundle: int, codec_name: str) -> tuple[Any, list[int], Any, int]:
        held = self.plan.bundles[bundle]
        codec = self._book.of(held, codec_name)
        sizes = [each.encoded_bytes(item.shape) for each, item in zip(codec.codecs, held.fragments, strict=True)]
        payload = np.zeros(sum(sizes), dtype=np.uint8)
        return codec.codec.wire, sizes, payload, checksum(payload)

    def make(self, step: int, slot: int, bundle: int, codec_name: str) -> Contribution:
        """The contribution of a slot of a step to a bundle, in a codec of fixed size."""
        wire, sizes, payload, crc32c = self._encoded(bundle, codec_name)
        header = pb.ContributionHeader(
            job_id=self.plan.job_id,
            epoch=self.plan.epoch,
            step=step,
            slot=slot,
            bundle=bundle,
            codec=wire,
            fragment_bytes=sizes,
            payload_bytes=payload.nbytes,
            crc32c=crc32c,
            slot_tokens=SLOT_TOKENS,
            slot_samples=1,
            slot_loss_sum=1.0,
        )
        return Contribution(header, [payload])


class SimulatedJob:
    """A simulated worker's part of one plan, as `gradstream.worker.job.WorkerJob` without a model."""

    def __init__(self, contributions: Contributions, session: NodeSession):
        plan = contributions.plan
        self.plan = plan
        self.version = -1
        self.held = HeldSlots()
        self._contributions = contributions
        self._session = session
        self._timeline = Timeline()
        self._status = Status()
        self._codec = first_push_codec(plan.recipe.codec)
        self._channels = [open_channel(server.address, SERVER, session.transport) for server in plan.servers]
        stubs = [ParameterServerStub(channel) for channel in self._channels]
        self.streams = [
            PushStream(server, stub, Faults(), self._timeline) for server, stub in zip(plan.servers, stubs, strict=True)
        ]
        self.backlog = Backlog(plan, self._timeline)
        self._puller = Puller(plan, stubs, self._timeline)
        self._reports = Reports(plan, session, self._timeline, self._puller)

    def take_sampling(self, sampling: Sampling) -> None:
        """Report timelines by this rule from now on."""
        self._reports.sampling = sampling

    def activity(self) -> coordinator_pb2.Activity:
        """The worker's activity, for heartbeats."""
        # Of a Pusher Status reads only the streams and the backlog, which is empty here.
        return self._status.activity(self.plan.job_id, self.version, self, self._puller, None, None)  # type: ignore[arg-type]

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for stream in self.streams:
                    group.create_task(stream.run())
                group.create_task(self._walk())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._reports.close()
            await self._puller.stop()
            for channel in self._channels:
                await channel.close(None)

    async def _walk(self) -> None:
        upcoming: asyncio.Task[Inbox] | None = None
        try:
            while True:
                if not self.held.slots:
                    await _cancelled(upcoming)
                    upcoming = None
                    await self._puller.stop()
                    await self._status.wait("slots", self.held.next_change())
                    continue
                if upcoming is None:
                    upcoming = asyncio.create_task(self._puller.next(self.plan.start_version))
                inbox = await upcoming
                upcoming = asyncio.create_task(self._puller.next(inbox.version + 1, inbox.version))
                self._reports.timeline(self._timeline.take(), self.version, None, self.held.last)
                if not await self._work(inbox, upcoming):
                    await _cancelled(upcoming)
                    upcoming = None
        finally:
            await _cancelled(upcoming)

    async def _work(self, inbox: Inbox, upcoming: asyncio.Task[Inbox]) -> bool:
        """Push this version's slots until the next version comes. Returns False if it must be pulled again."""
        version = self.version = inbox.version
        for stream in self.streams:
            stream.forget_before(version)
        self._codec = inbox.push_codec or self._codec
        await self._puller.settled()
        if inbox.failed:
            return False
        done: set[int] = set()
        while not upcoming.done() and self.held.slots:
            change = asyncio.ensure_future(self.held.next_change())
            for slot in self.held.slots:
                if slot not in done and version < self.plan.last_version:
                    self._push(version, slot)
                    done.add(slot)
            try:
                waits = asyncio.wait([upcoming, change], return_when=asyncio.FIRST_COMPLETED)
                await self._status.wait(f"version {version + 1}", waits)
            finally:
                change.cancel()
        return bool(self.held.slots)

    def _push(self, step: int, slot: int) -> None:
        begin_ns = clock_ns()
        for bundle in self.plan.bundles:
            contribution = self._contributions.make(step, slot, bundle.index, self._codec)
            self.streams[bundle.server].put(contribution)
        self._timeline.add(SpanKind.COMPUTE, begin_ns, clock_ns(), slot)


async def _cancelled(task: asyncio.Task[Inbox] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class IdleJob:
    """A worker's part of a plan in which it takes lease tables and computes nothing. It connects to no server."""

    version = -1

    def __init__(self, contributions: Contributions, session: NodeSession):
        self.plan = contributions.plan
        self.held = HeldSlots()

    def take_sampling(self, sampling: Sampling) -> None:
        """It has no timelines."""

    def activity(self) -> coordinator_pb2.Activity:
        """The worker's activity, for heartbeats."""
        return coordinator_pb2.Activity(job_id=self.plan.job_id, phase="waiting")

    async def run(self) -> None:
        """Wait until cancelled."""
        await asyncio.Event().wait()


class SimulatedWorker:
    """One simulated worker: its session, and its part of a job while it has one."""

    def __init__(
        self,
        coordinator: str,
        name: str,
        contributions_of: Callable[[Any], Contributions],
        transport: Transport,
        computes: bool = True,
    ):
        self.name = name
        identity = NodeIdentity(coordinator_pb2.NODE_KIND_WORKER, name, ADDRESS, MEMORY_BYTES, "cpu", machine_id=name)
        settings = SessionSettings(coordinator, transport=transport)
        self.session = NodeSession(settings, identity, self._activity, self._held, self._on_directive)
        self.job: SimulatedJob | IdleJob | None = None
        self.num_plans = 0
        self.num_tables = 0
        self.received_bytes = 0
        """Bytes of all directives."""
        self._contributions_of = contributions_of
        self._computes = computes
        self._task: asyncio.Task[None] | None = None

    @property
    def slots(self) -> Sequence[int]:
        return self.job.held.slots if self.job is not None else ()

    @property
    def table(self) -> int:
        """The number of its lease table; 0 without one."""
        return self.job.held.table if self.job is not None else 0

    @property
    def version(self) -> int:
        return self.job.version if self.job is not None else -1

    async def run(self) -> None:
        """Work until the session ends or the task is cancelled; then close all connections."""
        try:
            await self.session.run()
        finally:
            await self._drop()
            await self.session.channel.close(None)

    async def _on_directive(self, directive: coordinator_pb2.SessionResponse) -> None:
        self.received_bytes += directive.ByteSize()
        kind = directive.WhichOneof("directive")
        job = self.job
        if kind == "plan":
            self.num_plans += 1
            if job is None or (job.plan.job_id, job.plan.epoch) != (directive.plan.job_id, directive.plan.epoch):
                await self._drop()
                job_type = SimulatedJob if self._computes else IdleJob
                self.job = job_type(self._contributions_of(directive.plan), self.session)
                self._task = asyncio.create_task(self._run_job(self.job))
        elif kind == "leases" and job is not None:
            self.num_tables += 1
            table = directive.leases
            if (table.job_id, table.epoch) == (job.plan.job_id, job.plan.epoch) and table.number > job.held.table:
                me = self.session.node_id
                job.held.take(table.number, [slot for slot, holder in enumerate(table.holders) if holder == me])
        elif kind == "sampling" and job is not None and directive.sampling.epoch == job.plan.epoch:
            job.take_sampling(Sampling.from_proto(directive.sampling))
        elif kind == "release" and job is not None and job.plan.job_id == directive.release.job_id:
            await self._drop()

    async def _run_job(self, job: SimulatedJob | IdleJob) -> None:
        try:
            await job.run()
        except Exception as error:
            if self.job is job:
                self.job = None
            await self.session.report_failure(job.plan.job_id, job.plan.epoch, error)

    async def _drop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.job = self._task = None

    def _activity(self) -> coordinator_pb2.Activity:
        return coordinator_pb2.Activity(phase="idle") if self.job is None else self.job.activity()

    def _held(self) -> list[coordinator_pb2.HeldJob]:
        if self.job is None:
            return []
        plan = self.job.plan
        return [coordinator_pb2.HeldJob(job_id=plan.job_id, epoch=plan.epoch, version=max(0, self.job.version))]


class SimulatedWorkers:
    """A group of simulated workers of one coordinator. All of them end with the `async with` block."""

    def __init__(self, coordinator: str, transport: Transport = PLAIN, computes: bool = True, first: int = 0):
        """`first` is the number of the first worker.

        Workers that do not compute take plans and lease tables only: the job makes no step.
        """
        self.coordinator = coordinator
        self.failures: list[BaseException] = []
        self.failed = asyncio.Event()
        """Set once a worker has ended with an error."""
        self._transport = transport
        self._computes = computes
        self._tasks: dict[SimulatedWorker, asyncio.Task[None]] = {}
        self._ending: set[Awaitable[Any]] = set()
        self._next_number = first
        self._contributions: dict[tuple[str, int], Contributions] = {}

    async def __aenter__(self) -> SimulatedWorkers:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill(self.running)
        await asyncio.gather(*self._ending, return_exceptions=True)

    @property
    def contributions(self) -> list[Contributions]:
        """The contributions of each plan that a worker has taken, oldest first."""
        return list(self._contributions.values())

    @property
    def running(self) -> list[SimulatedWorker]:
        """The workers that were started and have not ended, oldest first."""
        return list(self._tasks)

    async def start(self, count: int) -> list[SimulatedWorker]:
        """Start workers; return them when all have registered. Raises the error of one that was refused."""
        started = []
        for number in range(self._next_number, self._next_number + count):
            name = f"worker-{number:04d}"
            worker = SimulatedWorker(self.coordinator, name, self._contributions_of, self._transport, self._computes)
            task = self._tasks[worker] = asyncio.create_task(worker.run())
            task.add_done_callback(lambda task, worker=worker: self._ended(worker, task))
            started.append(worker)
        self._next_number += count
        waits = [asyncio.ensure_future(worker.session.registered.wait()) for worker in started]
        all_registered = asyncio.gather(*waits)
        while not all_registered.done():
            await asyncio.wait([all_registered], timeout=0.1)
            if self.failures:
                all_registered.cancel()
                raise self.failures[0]
        return started

    def kill(self, workers: Sequence[SimulatedWorker]) -> None:
        """Close the connections of workers at once, as the kernel does for a killed process."""
        for worker in workers:
            task = self._tasks.pop(worker)
            task.cancel()
            self._ending.add(task)

    def _ended(self, worker: SimulatedWorker, task: asyncio.Task[None]) -> None:
        self._ending.discard(task)
        self._tasks.pop(worker, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures.append(error)
            self.failed.set()

    def _contributions_of(self, message: Any) -> Contributions:
        """The contributions of a plan, parsed once for all workers."""
        key = (message.job_id, message.epoch)
        if key not in self._contributions:
            self._contributions[key] = Contributions(Plan.from_proto(message))
        return self._contributions[key]
