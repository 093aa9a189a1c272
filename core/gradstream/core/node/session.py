"""A node's session with the coordinator: registration, heartbeats, directives, and reconnection.

The coordinator is not in the path of a step. While it is away the node keeps working, and retries without end, with
jittered backoff. Reports are sent until the coordinator has taken them; a node that is asked to end sends them first.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc.aio

from gradstream.core import __version__
from gradstream.core.errors import AccessError, ConfigError, GradstreamError, ProtocolError, UnreachableError, one_line
from gradstream.core.log import LogBuffer, get_logger
from gradstream.core.machine.facts import DiskDirectory, machine_id
from gradstream.core.node.vitals import VitalsWatch
from gradstream.core.rpc.access import COORDINATOR
from gradstream.core.rpc.channel import UNARY_TIMEOUT_SECONDS, open_channel
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.core.rpc.reach import why_unreachable
from gradstream.core.rpc.retry import Backoff, cancelling
from gradstream.core.rpc.transport import PLAIN, Transport
from gradstream.core.storage import shared_storage
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import coordinator_pb2, coordinator_pb2_grpc

log = get_logger()

GRACE_SECONDS = 20.0
"""Time for a node that ends to send its reports and to finish its work (`drain`)."""


@dataclass
class NodeIdentity:
    """A node's identity, as it registers with the coordinator."""

    kind: coordinator_pb2.NodeKind.ValueType
    name: str
    address: str
    memory_bytes: int
    device: str
    flops_per_second: float = 0.0
    machine_id: str = field(default_factory=machine_id)
    incarnation: str = field(default_factory=lambda: secrets.token_hex(8))
    disk_directory: DiskDirectory = lambda: None
    """Returns the directory in which the node writes, for `gradstream doctor`."""


@dataclass(frozen=True)
class SessionSettings:
    """The settings of a session: the coordinator, the log lines of heartbeats, and the grace time at the end."""

    coordinator_address: str
    log_buffer: LogBuffer | None = None
    transport: Transport = PLAIN
    grace_seconds: float = GRACE_SECONDS


class NodeSession:
    """The session of one node, which keeps it registered. `run` returns after `leave`.

    `activity` and `held` are called at each heartbeat and registration. `on_directive` is awaited for each directive in
    order, so a slow one delays the next. `drain` finishes work that the node must complete. It is awaited, while
    heartbeats continue, before the node says that it leaves.
    """

    def __init__(
        self,
        settings: SessionSettings,
        identity: NodeIdentity,
        activity: Callable[[], coordinator_pb2.Activity],
        held: Callable[[], list[coordinator_pb2.HeldJob]],
        on_directive: Callable[[coordinator_pb2.SessionResponse], Awaitable[None]],
        drain: Callable[[], Awaitable[None]] | None = None,
    ):
        self.coordinator_address = settings.coordinator_address
        self.identity = identity
        self.node_id = ""
        self.unreachable_since: float | None = None
        self.registered = asyncio.Event()
        """Set once the coordinator has accepted this node."""
        self._activity = activity
        self._held = held
        self._on_directive = on_directive
        self._log_buffer = settings.log_buffer
        self._wake = asyncio.Event()
        self._leaving = False
        self._left = asyncio.Event()
        self._drain = drain
        self._grace_seconds = settings.grace_seconds
        self._ending: asyncio.Task[None] | None = None
        self._heartbeat_error: Exception | None = None
        self._reports: set[asyncio.Future[None]] = set()
        self.transport = settings.transport
        self.channel = open_channel(self.coordinator_address, COORDINATOR, self.transport)
        self.stub = coordinator_pb2_grpc.CoordinatorServiceStub(self.channel)
        self._storage = StorageThreads()
        self._vitals = VitalsWatch(self.channel, identity.disk_directory)

    @property
    def peer(self) -> str:
        """The coordinator's title, for error messages."""
        return f"coordinator {self.coordinator_address}"

    def leave(self) -> None:
        """Begin to leave: drain and send the reports within the grace time, tell the coordinator, and end `run`.

        A second call has no effect.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        try:
            async with asyncio.timeout(self._grace_seconds):
                if self._drain is not None:
                    await self._drain()
                while self._reports:
                    await asyncio.wait(set(self._reports))
        except TimeoutError:
            log.warning("ends although not all of its reports were taken", grace_seconds=self._grace_seconds)
        except Exception as error:
            log.error("could not finish the work that was under way", cause=one_line(error))
        self._leaving = True
        self._left.set()
        self._wake.set()

    def heartbeat_soon(self) -> None:
        """Send a heartbeat at once instead of at the next interval."""
        self._wake.set()

    async def run(self) -> None:
        """Register and heartbeat until `leave`. Raises the coordinator's error when it refuses this node for good."""
        vitals = asyncio.create_task(self._vitals.run())
        try:
            await self._stay_registered()
        finally:
            vitals.cancel()
        await self.channel.close(None)

    async def _stay_registered(self) -> None:
        backoff = Backoff()
        while not self._leaving:
            try:
                await self._register_and_heartbeat(backoff)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, self.peer)
                if self.unreachable_since is None and isinstance(error, UnreachableError):
                    found = await why_unreachable(self.coordinator_address, COORDINATOR, self.transport)
                    error = found or error
                if isinstance(error, ConfigError | ProtocolError):
                    raise error from None
                # A node that was accepted before waits until its credentials are valid again, as after a rotation.
                if isinstance(error, AccessError) and not self.registered.is_set():
                    raise error from None
                if self.unreachable_since is None:
                    self.unreachable_since = time.time()
                    lost = isinstance(error, UnreachableError)
                    what = "lost the coordinator" if lost else "the coordinator does not take this node yet"
                    log.warning(f"{what}, trying again", cause=one_line(error))
            if not self._leaving:
                try:
                    await asyncio.wait_for(self._left.wait(), backoff.next())
                except TimeoutError:
                    pass

    async def report(self, send: Callable[[], Awaitable[object]]) -> None:
        """Send a report until the coordinator has taken it.

        Raises ProtocolError, which means that the report itself is wrong. After any other refusal it retries.
        """
        backoff, known = Backoff(), ""
        while True:
            try:
                await send()
                return
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, self.peer)
                if isinstance(error, ProtocolError):
                    raise error from None
                line = one_line(error)
                if not isinstance(error, UnreachableError) and line != known:
                    known = line
                    log.warning("a report was not taken, trying again", cause=line)
            await asyncio.sleep(backoff.next())

    async def report_failure(self, job_id: str, epoch: int, error: BaseException) -> None:
        """Report that this node cannot continue with a job, until the coordinator has taken the report."""
        message = one_line(error)
        log.error("cannot take part in the job", job=job_id, cause=message)
        if os.environ.get("GRADSTREAM_DEBUG"):
            log.error("stack trace", job=job_id, exc_info=error)
        report = coordinator_pb2.ReportFailureRequest(job_id=job_id, epoch=epoch, node_id=self.node_id, message=message)
        await self.deliver(lambda: self.stub.ReportFailure(report, timeout=UNARY_TIMEOUT_SECONDS))

    async def deliver(self, send: Callable[[], Awaitable[object]]) -> None:
        """Send a report until the coordinator has taken it. A refusal is logged."""
        try:
            await self.report(send)
        except GradstreamError as error:
            log.warning("the coordinator refused a report", cause=one_line(error))

    def report_later(self, send: Callable[[], Awaitable[object]]) -> None:
        """Send a report in the background, as `deliver`."""
        self._spawn(self.deliver(send))

    async def _check_storage(self, check: coordinator_pb2.StorageCheck) -> None:
        """Check a directory that the nodes of a job must share, and report the result."""
        try:
            problem = await self._storage.call(check.directory, shared_storage.answer, check)
        except GradstreamError as error:
            problem = f"cannot say whether it sees {check.directory} ({one_line(error)})"
        report = coordinator_pb2.ReportStorageRequest(node_id=self.node_id, check_id=check.check_id, problem=problem)
        await self.deliver(lambda: self.stub.ReportStorage(report, timeout=UNARY_TIMEOUT_SECONDS))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _register_and_heartbeat(self, backoff: Backoff) -> None:
        identity = self.identity
        response = await self.stub.Register(
            coordinator_pb2.RegisterRequest(
                kind=identity.kind,
                name=identity.name,
                address=identity.address,
                memory_bytes=identity.memory_bytes,
                device=identity.device,
                flops_per_second=identity.flops_per_second,
                machine_id=identity.machine_id,
                version=__version__,
                held=self._held(),
                incarnation=identity.incarnation,
            ),
            timeout=UNARY_TIMEOUT_SECONDS,
        )
        self.node_id = response.node_id
        self.registered.set()
        if self.unreachable_since is not None:
            log.info("the coordinator is back", away_seconds=round(time.time() - self.unreachable_since, 1))
        else:
            log.info("registered", coordinator=self.coordinator_address, node_id=self.node_id)
        self.unreachable_since = None
        backoff.reset()
        with cancelling(self.stub.Session(self._heartbeats(response.heartbeat_seconds))) as directives:
            try:
                async for directive in directives:
                    if directive.HasField("storage"):
                        self._spawn(self._check_storage(directive.storage))
                    else:
                        await self._on_directive(directive)
            except asyncio.CancelledError:
                # gRPC cancels a call whose requests raise, and drops their error.
                if self._heartbeat_error is not None:
                    raise self._heartbeat_error from None
                raise

    async def _heartbeats(self, interval_seconds: float) -> AsyncIterator[coordinator_pb2.SessionRequest]:
        while True:
            leaving = self._leaving
            try:
                activity = self._activity()
            except Exception as error:
                self._heartbeat_error = error
                raise
            yield coordinator_pb2.SessionRequest(
                node_id=self.node_id,
                activity=activity,
                log=self._log_buffer.take() if self._log_buffer is not None else [],
                leaving=leaving,
                vitals=self._vitals.latest,
            )
            if leaving:
                return
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), interval_seconds)
            except TimeoutError:
                pass
