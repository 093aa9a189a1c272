"""The coordinator's process: state, controller, services, health, signals."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import grpc.aio

from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.jobs.reports import Reports
from gradstream.coordinator.readings import readings
from gradstream.coordinator.servicers.jobs import JobsServicer
from gradstream.coordinator.servicers.nodes import CoordinatorServicer, add_coordinator
from gradstream.coordinator.servicers.views import Views
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.coordinator.timing import Timing
from gradstream.core import __version__
from gradstream.core.errors import GradstreamError, one_line
from gradstream.core.job_states import QUEUED
from gradstream.core.log import get_logger
from gradstream.core.metrics.address import MetricsAddress
from gradstream.core.metrics.definition import Reading
from gradstream.core.metrics.endpoint import MetricsEndpoint
from gradstream.core.metrics.role import role_endpoint
from gradstream.core.node import probe, process
from gradstream.core.node.session import GRACE_SECONDS
from gradstream.core.rpc import access, channel
from gradstream.core.rpc.audit import AuditLog
from gradstream.core.rpc.guard import Guard
from gradstream.core.rpc.token_sources import FileTokens
from gradstream.core.rpc.transport import PLAIN, Transport
from gradstream.core.storage.state_lock import lock_directory
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, jobs_pb2_grpc, probe_pb2

TOKENS_NAME = "tokens.json"
HEALTH_SECONDS = 5.0
"""Maximum time of a write of a healthy coordinator's state."""

log = get_logger()


class Coordinator:
    """A coordinator with `start` and `stop`. Only one at a time can use a state directory."""

    def __init__(
        self,
        listen: str,
        state_dir: Path,
        timing: Timing | None = None,
        root: str = "",
        transport: Transport = PLAIN,
        tokens: Path | None = None,
        grace_seconds: float = GRACE_SECONDS,
        metrics: MetricsAddress | None = None,
    ):
        """Create a coordinator.

        `tokens` is the file of the table of tokens, needed when `transport` is secure. `grace_seconds` is the time to
        finish a manifest that is being written when the coordinator stops. `metrics` is where it serves its metrics;
        None: nowhere.
        """
        self._grace_seconds = grace_seconds
        self._listen = listen
        self._state_dir = state_dir
        self._timing = timing
        self._root = root
        self._transport = transport
        self._tokens_path = tokens
        self._metrics_address = metrics
        self._tasks: list[asyncio.Task[None]] = []
        self.address = ""
        self.metrics: MetricsEndpoint | None = None
        """The endpoint for Prometheus, if there is one."""

    async def start(self) -> None:
        """Open the state and serve. Raises ConfigError when the state or the address is in use or unusable."""
        self._lock = lock_directory(self._state_dir, "coordinator")
        try:
            self._state = SqliteState(self._state_dir)
            self.controller = Controller(self._state, self._timing)
            reports = Reports(self.controller)
            views = Views(self.controller)
            tokens, guards = None, []
            if self._transport.is_secure:
                assert self._tokens_path is not None
                tokens = FileTokens(self._tokens_path, lambda: self._transport.credentials().ca)
                guards.append(Guard(tokens, AuditLog(self._state_dir).note))
                self._tasks.append(asyncio.create_task(guards[0].run()))
            self._server = channel.new_server(*guards, takes_bulk=False)
            add_coordinator(CoordinatorServicer(self.controller, reports, tokens), self._server)
            jobs_pb2_grpc.add_JobsServiceServicer_to_server(
                JobsServicer(self.controller, views, self._root, tokens), self._server
            )
            probe.add_probe(self._server, access.COORDINATOR, lambda: self._state_dir)
            self._health = process.Health(self._server, *_service_names())
            if os.environ.get("GRADSTREAM_REFLECTION") == "1":
                _add_reflection(self._server)
            port = channel.listen(self._server, self._listen, self._transport)
            self.address = f"{self._listen.rpartition(':')[0]}:{port}"
            if self._metrics_address is not None:
                self.metrics = role_endpoint(
                    self._metrics_address,
                    access.COORDINATOR,
                    self._transport,
                    guards[0] if guards else None,
                    self._readings,
                    lambda: self._state_dir,
                )
            await self.controller.start()
            await self._health.set(await self._is_healthy())
            await self._server.start()
            if self.metrics is not None:
                await self.metrics.start()
        except BaseException:
            for task in self._tasks:
                task.cancel()
            if self.metrics is not None:
                await self.metrics.close()
            self._lock.close()
            raise
        self._tasks.append(asyncio.create_task(self._health.watch(self._is_healthy, process.HEALTH_CHECK_SECONDS)))

    async def stop(self) -> None:
        """Stop serving. Nodes keep working and register again with the next coordinator."""
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await self._health.shut_down()
        if self.metrics is not None:
            await self.metrics.close()
        await self.controller.stop(self._grace_seconds)
        await self._server.stop(process.STOP_GRACE_SECONDS)
        await self.controller.timelines.close()
        await self.controller.writes.close()
        await self.controller.reads.close()
        self._state.close()
        self._lock.close()

    async def _readings(self) -> list[Reading]:
        num_queued = await self.controller.reads.call(lambda reader: len(reader.list_jobs((QUEUED,))))
        return list(readings(self.controller, num_queued))

    async def _is_healthy(self) -> bool:
        """Whether reports can be stored. SERVING means this, not only that the process runs."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await self.controller.writes.call(lambda state: state.check_writable())
        except GradstreamError as error:
            log.error("not healthy", cause=one_line(error))
            return False
        except TimeoutError:
            log.error("not healthy", cause=f"the state has not been written for {HEALTH_SECONDS:g} s")
            return False
        return True


async def serve(
    listen: str,
    state_dir: Path,
    ready_file: Path | None = None,
    timing: Timing | None = None,
    root: str = "",
    credentials: Path | None = None,
    tokens: Path | None = None,
    grace_seconds: float = GRACE_SECONDS,
    metrics: MetricsAddress | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. `ready_file` gets one line, host:port, once nodes can register.

    `root` is the directory that replaces the one in which a recipe is submitted (gradstream.core.recipe.roots); empty
    for none. `credentials` is the directory of the coordinator's own credentials. `tokens` is the table of tokens, by
    default tokens.json in this directory. `metrics` is where the metrics are served; None: nowhere.
    """
    if credentials is not None and tokens is None:
        tokens = credentials / TOKENS_NAME
    coordinator = Coordinator(listen, state_dir, timing, root, Transport(credentials), tokens, grace_seconds, metrics)
    await coordinator.start()
    async with AsyncExitStack() as stack:
        ready = process.ReadyFile(ready_file)
        stack.callback(ready.remove)
        stack.push_async_callback(coordinator.stop)
        log.info("coordinator ready", address=coordinator.address, state=str(state_dir), version=__version__)
        await asyncio.to_thread(ready.write, coordinator.address)
        await process.until_signal()
        log.info("stopping; nodes stay up and will register with the next coordinator")


def _service_names() -> list[str]:
    return [
        coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"].full_name,
        jobs_pb2.DESCRIPTOR.services_by_name["JobsService"].full_name,
        probe_pb2.DESCRIPTOR.services_by_name["ProbeService"].full_name,
    ]


def _add_reflection(server: grpc.aio.Server) -> None:
    from grpc_reflection.v1alpha import reflection

    reflection.enable_server_reflection([*_service_names(), reflection.SERVICE_NAME], server)
