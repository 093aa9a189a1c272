"""The fine-tuning service's process: state, fine-tunings, engine, health, signals."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gradstream.core import __version__
from gradstream.core import log as logging
from gradstream.core.errors import AccessError, GradstreamError, UnreachableError, one_line
from gradstream.core.node import probe
from gradstream.core.node.ready import write_ready_file
from gradstream.core.rpc import access
from gradstream.core.rpc.audit import AuditLog
from gradstream.core.rpc.token_sources import FollowingServer
from gradstream.core.rpc.transport import Transport
from gradstream.core.storage import files
from gradstream.proto.v1 import fine_tuning_pb2, fine_tuning_pb2_grpc
from gradstream.services.fine_tuning.coordinator_jobs import Jobs
from gradstream.services.fine_tuning.fine_tunings import FineTunings
from gradstream.services.fine_tuning.generation.serving import Serving
from gradstream.services.fine_tuning.servicer import FineTuningServicer
from gradstream.services.fine_tuning.store import Store

HEALTH_SERVICE = fine_tuning_pb2.DESCRIPTOR.services_by_name["FineTuningService"].full_name
HEALTH_CHECK_SECONDS = 5.0
STOP_GRACE_SECONDS = 1.0

log = logging.get_logger()


async def serve(
    coordinator: str,
    listen_address: str,
    state_directory: Path,
    device: str,
    memory_bytes: int,
    ready_file: Path | None = None,
    root: str = "",
    credentials: Path | None = None,
) -> None:
    """Run a fine-tuning service until SIGTERM or SIGINT. `ready_file` gets one line, host:port, once it listens;
    `credentials` is the directory of its own.

    `root`: directory that stands for the one in which a recipe is submitted (gradstream.core.recipe.roots); empty:
    none.

    Raises ConfigError when address, device or state directory cannot be used.
    """
    logging.configure(os.environ.get("GRADSTREAM_LOG_LEVEL", "info"))
    async with AsyncExitStack() as stack:
        # 1. What may be refused.
        transport = Transport(credentials)
        door = FollowingServer(transport, listen_address, AuditLog(state_directory).note, takes_bulk=False)
        server, address = door.server, door.address
        store = Store(state_directory)
        stack.callback(store.close)
        jobs = Jobs(coordinator, transport)
        stack.push_async_callback(jobs.close)
        serving = Serving(device, memory_bytes)
        stack.push_async_callback(serving.close)
        fine_tunings = FineTunings(store, jobs, serving)
        stack.push_async_callback(fine_tunings.close)
        # 2. Serve.
        fine_tuning_pb2_grpc.add_FineTuningServiceServicer_to_server(
            FineTuningServicer(fine_tunings, jobs, serving, root), server
        )
        probe.add_probe(server, access.FINE_TUNING, lambda: state_directory)
        health_servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        for service in ("", HEALTH_SERVICE):
            await health_servicer.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        await stack.enter_async_context(door.following(jobs.channel, f"coordinator {coordinator}"))
        await server.start()
        stack.push_async_callback(server.stop, STOP_GRACE_SECONDS)
        fine_tunings.start()
        health_task = asyncio.create_task(_tell_health(health_servicer, store, jobs))
        stack.callback(health_task.cancel)
        log.info("fine-tuning service ready", address=address, state=str(state_directory), version=__version__)
        if ready_file is not None:
            write_ready_file(ready_file, address)
            stack.callback(ready_file.unlink, missing_ok=True)
        # 3. Until somebody ends it.
        await _signalled()
        log.info("stopping; jobs go on, and the next service follows them")
        with suppress(GradstreamError):
            await health_servicer.enter_graceful_shutdown()


async def _signalled() -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        loop.add_signal_handler(number, ended.set)
    try:
        await ended.wait()
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def _tell_health(servicer: Any, store: Store, jobs: Jobs) -> None:
    """SERVING means that fine-tunings can be noted and submitted, not just that the process runs."""
    healthy: bool | None = None
    while True:
        cause = await _ailment(store, jobs)
        if (not cause) != healthy:
            healthy = not cause
            log.info("healthy") if healthy else log.error("not healthy", cause=cause)
            status = health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
            for service in ("", HEALTH_SERVICE):
                await servicer.set(service, status)
        await asyncio.sleep(HEALTH_CHECK_SECONDS)


async def _ailment(store: Store, jobs: Jobs) -> str:
    """Why the service is of no use; empty when it is."""
    try:
        await asyncio.to_thread(files.write_atomic, str(store.temporary / "alive"), lambda stream: stream.write(b""))
    except OSError as error:
        return f"the state directory cannot be written ({error})"
    try:
        await jobs.check()
    except (UnreachableError, AccessError) as error:
        return one_line(error)
    return ""
