"""The fine-tuning service's process: state, fine-tunings, engine, health, signals."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from gradstream.core import __version__
from gradstream.core.errors import AccessError, UnreachableError, one_line
from gradstream.core.log import get_logger
from gradstream.core.node import probe, process
from gradstream.core.rpc import access
from gradstream.core.rpc.audit import AuditLog
from gradstream.core.rpc.token_sources import FollowingServer
from gradstream.core.rpc.transport import Transport
from gradstream.core.storage import files
from gradstream.proto.v1 import fine_tuning_pb2, fine_tuning_pb2_grpc
from gradstream.services.fine_tuning.coordinator_jobs import CoordinatorJobs
from gradstream.services.fine_tuning.fine_tunings import FineTunings
from gradstream.services.fine_tuning.generation.serving import Serving, import_libraries
from gradstream.services.fine_tuning.servicer import FineTuningServicer
from gradstream.services.fine_tuning.store import Store

HEALTH_SERVICE = fine_tuning_pb2.DESCRIPTOR.services_by_name["FineTuningService"].full_name

log = get_logger()


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
    """Run a fine-tuning service until SIGTERM or SIGINT.

    `ready_file` gets one line, host:port, once the service listens. `credentials` is the directory of its credentials.
    `root` is the directory that stands for the one in which a recipe is submitted (gradstream.core.recipe.roots); empty
    means none. Raises ConfigError when address, device or state directory cannot be used.
    """
    process.configure_log()
    async with AsyncExitStack() as stack:
        # 1. Open the address, the state directory and the device, each of which may be refused.
        transport = Transport(credentials)
        door = FollowingServer(transport, listen_address, AuditLog(state_directory).note, takes_bulk=False)
        server, address = door.server, door.address
        store = Store(state_directory)
        stack.callback(store.close)
        jobs = CoordinatorJobs(coordinator, transport)
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
        # Here, and not in the first request: with other work on the machine the imports take seconds.
        await asyncio.to_thread(import_libraries)
        health = process.Health(server, HEALTH_SERVICE)
        await health.set(False)
        await stack.enter_async_context(door.following(jobs.channel, f"coordinator {coordinator}"))
        await server.start()
        stack.push_async_callback(server.stop, process.STOP_GRACE_SECONDS)
        fine_tunings.start()
        health_task = asyncio.create_task(health.watch(_HealthCheck(store, jobs).check))
        stack.callback(health_task.cancel)
        log.info("fine-tuning service ready", address=address, state=str(state_directory), version=__version__)
        ready = process.ReadyFile(ready_file)
        stack.callback(ready.remove)
        ready.write(address)
        # 3. Wait for a signal.
        await process.until_signal()
        log.info("stopping; jobs go on, and the next service follows them")
        await health.shut_down()


class _HealthCheck:
    """Health check: SERVING means that fine-tunings can be recorded and submitted, not only that the process runs."""

    def __init__(self, store: Store, jobs: CoordinatorJobs):
        self._store = store
        self._jobs = jobs
        self._was_healthy: bool | None = None

    async def check(self) -> bool:
        """Return whether the service can do its work. A change is logged."""
        cause = await _ailment(self._store, self._jobs)
        healthy = not cause
        if healthy != self._was_healthy:
            self._was_healthy = healthy
            log.info("healthy") if healthy else log.error("not healthy", cause=cause)
        return healthy


async def _ailment(store: Store, jobs: CoordinatorJobs) -> str:
    """Return why the service cannot do its work; empty if it can."""
    try:
        await asyncio.to_thread(files.write_atomic, str(store.temporary / "alive"), lambda stream: stream.write(b""))
    except OSError as error:
        return f"the state directory cannot be written ({error})"
    try:
        await jobs.check()
    except (UnreachableError, AccessError) as error:
        return one_line(error)
    return ""
