"""The worker's process: registers with the coordinator and works on the job that it is given."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import torch

from gradstream.core import log as logging
from gradstream.core import memory
from gradstream.core.model import preload
from gradstream.core.plan import Plan
from gradstream.core.ready import write_ready_file
from gradstream.core.session import NodeIdentity, NodeSession
from gradstream.proto.v1 import coordinator_pb2
from gradstream.worker.compute import pick_device
from gradstream.worker.faults import Faults
from gradstream.worker.job import JobRun

log = logging.get_logger()


class Worker:
    """Carries out the coordinator's directives: one job at a time."""

    def __init__(
        self,
        coordinator: str,
        identity: NodeIdentity,
        device: torch.device,
        cache_directory: Path,
        faults: Faults,
        log_buffer: logging.LogBuffer,
    ):
        self.session = NodeSession(coordinator, identity, self._activity, self._held, self._on_directive, log_buffer)
        self._device = device
        self._cache_directory = cache_directory
        self._faults = faults
        self._job: JobRun | None = None
        self._task: asyncio.Task[None] | None = None
        self._process = psutil.Process()

    async def run(self) -> None:
        """Work until the session is left. Raises the coordinator's error when it refuses this node."""
        try:
            await self.session.run()
        finally:
            await self._drop()

    async def _on_directive(self, directive: coordinator_pb2.SessionResponse) -> None:
        kind = directive.WhichOneof("directive")
        if kind == "plan":
            plan = Plan.from_proto(directive.plan)
            held = self._job
            if held is not None and (held.plan.job_id, held.plan.epoch) == (plan.job_id, plan.epoch):
                return
            await self._drop()
            log.info("takes part in a job", job=plan.job_id, epoch=plan.epoch, device=str(self._device))
            self._job = JobRun(plan, self.session, self._device, self._cache_directory, self._faults)
            self._task = asyncio.create_task(self._run_job(self._job))
        elif kind == "leases" and self._job is not None:
            table, plan = directive.leases, self._job.plan
            if (table.job_id, table.epoch) == (plan.job_id, plan.epoch):
                self._job.take_leases(table.number, table.holders)
        elif kind == "release" and self._job is not None and self._job.plan.job_id == directive.release.job_id:
            log.info("the job was released", job=directive.release.job_id, reason=directive.release.reason)
            await self._drop()

    async def _run_job(self, job: JobRun) -> None:
        try:
            await job.run()
        except Exception as error:
            await self.session.report_failure(job.plan.job_id, job.plan.epoch, error)

    async def _drop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._job is not None:
            self._job = None
            memory.give_back()

    def _activity(self) -> coordinator_pb2.Activity:
        activity = coordinator_pb2.Activity(phase="idle") if self._job is None else self._job.activity()
        activity.resident_bytes = self._process.memory_info().rss
        return activity

    def _held(self) -> list[coordinator_pb2.HeldJob]:
        if self._job is None:
            return []
        plan = self._job.plan
        return [coordinator_pb2.HeldJob(job_id=plan.job_id, epoch=plan.epoch, version=max(0, self._job.version))]


async def serve(
    coordinator: str, name: str, cache_directory: Path, memory_bytes: int, device: str, ready_file: Path | None
) -> None:
    """Run a worker until SIGTERM or SIGINT. Raises GradstreamError when it cannot start or is refused."""
    log_buffer = logging.LogBuffer()
    logging.configure(os.environ.get("GRADSTREAM_LOG_LEVEL", "info"), log_buffer)
    preload()
    memory.settle()
    picked = pick_device(device)
    described = f"{picked} ({torch.cuda.get_device_name(picked)})" if picked.type == "cuda" else str(picked)
    identity = NodeIdentity(coordinator_pb2.NODE_KIND_WORKER, name, "", memory_bytes, described)
    node = Worker(coordinator, identity, picked, cache_directory, Faults(), log_buffer)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, node.session.leave)
    if ready_file is not None:
        write_ready_file(ready_file, name)
    await node.run()
