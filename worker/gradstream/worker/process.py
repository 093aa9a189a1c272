"""The worker's process: registers with the coordinator and computes the job that the coordinator assigns."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from gradstream.core.errors import ProtocolError
from gradstream.core.log import LogBuffer, get_logger
from gradstream.core.machine import memory
from gradstream.core.machine.speed import measure_flops
from gradstream.core.model.model import preload
from gradstream.core.node import probe, process
from gradstream.core.node.faults import Faults
from gradstream.core.node.session import GRACE_SECONDS, NodeIdentity, NodeSession, SessionSettings
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.access import WORKER
from gradstream.core.rpc.token_sources import FollowingServer
from gradstream.core.rpc.transport import Transport
from gradstream.core.telemetry.sampling import Sampling
from gradstream.core.wire.stubs import add_worker
from gradstream.proto.v1 import coordinator_pb2, plan_pb2
from gradstream.worker.held_slots import RoundSlots
from gradstream.worker.job import WorkerJob
from gradstream.worker.pipeline.place import Place
from gradstream.worker.pipeline.servicer import WorkerServicer
from gradstream.worker.stage_build import pick_device

log = get_logger()

DROP_SECONDS = 10.0
"""Time that a worker which ends gives its computation to stop."""


class Worker:
    """Carries out the coordinator's directives: one job at a time."""

    def __init__(
        self,
        settings: SessionSettings,
        identity: NodeIdentity,
        device: torch.device,
        cache_directory: Path,
        faults: Faults,
    ):
        self.session = NodeSession(settings, identity, self._activity, self._held, self._on_directive, self._drain)
        self._device = device
        self._cache_directory = cache_directory
        self._faults = faults
        self.servicer = WorkerServicer()
        self._plan: Plan | None = None
        self._sampling = Sampling()
        self._job: WorkerJob | None = None
        self._task: asyncio.Task[None] | None = None
        self._process = psutil.Process()

    async def run(self) -> None:
        """Work until the session ends. Raises the coordinator's error when the coordinator refuses this node."""
        try:
            await self.session.run()
        finally:
            try:
                # A device or a storage that does not answer blocks a thread without end.
                async with asyncio.timeout(DROP_SECONDS):
                    await self._drop()
            except TimeoutError:
                log.warning("the computation did not stop in time; the worker ends without it", seconds=DROP_SECONDS)

    async def _on_directive(self, directive: coordinator_pb2.SessionResponse) -> None:
        kind = directive.WhichOneof("directive")
        if kind == "plan":
            plan = Plan.from_proto(directive.plan)
            held = self._plan
            if held is not None and (held.job_id, held.epoch) == (plan.job_id, plan.epoch):
                return
            await self._drop()
            log.info("takes part in a job", job=plan.job_id, epoch=plan.epoch, device=str(self._device))
            self._plan, self._sampling = plan, Sampling()
            if not plan.has_pipeline:
                self._begin(plan, None)
        elif kind == "leases" and self._plan is not None:
            table, plan = directive.leases, self._plan
            if (table.job_id, table.epoch) == (plan.job_id, plan.epoch):
                await self._take_leases(plan, table)
        elif kind == "work" and self._job is not None:
            work, plan = directive.work, self._job.plan
            if (work.job_id, work.epoch) == (plan.job_id, plan.epoch):
                slots = tuple(slot for slot in work.slots if slot < plan.num_slots)
                self._job.take_round(RoundSlots(work.version, slots, tuple(work.copies)))
        elif kind == "sampling" and self._plan is not None:
            wanted, plan = directive.sampling, self._plan
            if (wanted.job_id, wanted.epoch) == (plan.job_id, plan.epoch):
                self._sampling = Sampling.from_proto(wanted)
                if self._job is not None:
                    self._job.take_sampling(self._sampling)
        elif kind == "release" and self._plan is not None and self._plan.job_id == directive.release.job_id:
            log.info("the job was released", job=directive.release.job_id, reason=directive.release.reason)
            await self._drop()

    async def _take_leases(self, plan: Plan, table: plan_pb2.LeaseTable) -> None:
        place = place_in(table.replicas, self.session.node_id)
        if place is not None:
            if len(place.replica.workers) != plan.replica_size:
                raise ProtocolError(f"lease table {table.number} has a replica of {len(place.replica.workers)} workers")
            if self._job is not None and self._job.worker != place.index:
                # Another place has other stages: nothing that this worker has loaded is of use.
                await self._drop()
                self._plan = plan
            if self._job is None:
                log.info("takes a place in a replica", job=plan.job_id, place=place.index, table=place.replica.number)
                self._begin(plan, place)
        if self._job is not None:
            self._job.take_leases(table.number, table.holders, place)

    def _begin(self, plan: Plan, place: Place | None) -> None:
        self._job = WorkerJob(
            plan, self.session, self._device, self._cache_directory, self._faults, self.servicer, place
        )
        self._job.take_sampling(self._sampling)
        self._task = asyncio.create_task(self._run_job(self._job))

    async def _run_job(self, job: WorkerJob) -> None:
        try:
            await job.run()
        except Exception as error:
            if self._job is job:
                # The worker no longer holds the plan: to retry the job, the coordinator sends it again.
                self._job = self._plan = None
            memory.give_back()
            await self.session.report_failure(job.plan.job_id, job.plan.epoch, error)

    async def _drain(self) -> None:
        """Finish the residuals that are being written for a checkpoint."""
        if self._job is not None:
            await self._job.drain()

    async def _drop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._job is not None:
            self._job = None
            memory.give_back()
        self._plan = None

    def _activity(self) -> coordinator_pb2.Activity:
        activity = coordinator_pb2.Activity(phase="idle") if self._job is None else self._job.activity()
        activity.resident_bytes = self._process.memory_info().rss
        return activity

    def _held(self) -> list[coordinator_pb2.HeldJob]:
        plan = self._plan
        if plan is None:
            return []
        version = max(0, self._job.version) if self._job is not None else 0
        return [coordinator_pb2.HeldJob(job_id=plan.job_id, epoch=plan.epoch, version=version)]


async def serve(
    coordinator: str,
    name: str,
    listen_address: str,
    cache_directory: Path,
    memory_bytes: int,
    device: str,
    ready_file: Path | None,
    credentials: Path | None = None,
    grace_seconds: float = GRACE_SECONDS,
) -> None:
    """Run a worker until SIGTERM or SIGINT; `credentials` is the directory of its credentials.

    The worker ends once residuals that are being written are complete and its reports are sent, after `grace_seconds`
    at the latest. Raises GradstreamError when it cannot start or is refused.
    """
    log_buffer = LogBuffer()
    process.configure_log(log_buffer)
    # Before the imports that take seconds, so that an error about a port in use comes at once.
    transport = Transport(credentials)
    door = FollowingServer(transport, listen_address)
    preload()
    memory.settle()
    picked = pick_device(device)
    described = f"{picked} ({torch.cuda.get_device_name(picked)})" if picked.type == "cuda" else str(picked)
    flops = await asyncio.to_thread(measure_flops, picked)
    identity = NodeIdentity(coordinator_pb2.NODE_KIND_WORKER, name, door.address, memory_bytes, described, flops)
    identity.disk_directory = lambda: cache_directory
    settings = SessionSettings(coordinator, log_buffer, transport, grace_seconds)
    node = Worker(settings, identity, picked, cache_directory, Faults())
    add_worker(node.servicer, door.server)
    probe.add_probe(door.server, WORKER, identity.disk_directory)
    health = process.Health(door.server)
    await door.server.start()
    await process.run_node(node, door, health, ready_file, name)


def place_in(replicas: Sequence[plan_pb2.Replica], node_id: str) -> Place | None:
    """The worker's place in a lease table's replicas, None if it has none."""
    for replica in replicas:
        for index, member in enumerate(replica.workers):
            if member.node_id == node_id:
                return Place(replica, index)
    return None
