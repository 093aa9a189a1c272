"""The parameter server's process: registers with the coordinator, loads plans, serves one shard at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio
import psutil

from gradstream.core.errors import ProtocolError, StaleEpochError, one_line
from gradstream.core.log import LogBuffer, get_logger
from gradstream.core.machine import memory, open_files
from gradstream.core.machine.facts import arithmetic_threads
from gradstream.core.node import probe, process
from gradstream.core.node.faults import Faults
from gradstream.core.node.session import GRACE_SECONDS, NodeIdentity, NodeSession, SessionSettings
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.access import SERVER
from gradstream.core.rpc.channel import UNARY_TIMEOUT_SECONDS, open_channel
from gradstream.core.rpc.errors import error_from_rpc, refused_for_good
from gradstream.core.rpc.retry import Backoff
from gradstream.core.rpc.token_sources import FollowingServer
from gradstream.core.rpc.transport import Transport
from gradstream.core.wire.stream_limits import MAX_STREAM_MESSAGE_BYTES
from gradstream.core.wire.stubs import ParameterServerStub, add_parameter_server
from gradstream.proto.v1 import coordinator_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.servicer import ParameterServerServicer

if TYPE_CHECKING:
    from gradstream.services.parameter_server.commit import Decision
    from gradstream.services.parameter_server.shard import Shard

T = TypeVar("T")

log = get_logger()

MAX_UNREPORTED_STEPS = 65_536
HEALTH_SERVICE = "gradstream.proto.v1.ParameterServerService"


class ParameterServer:
    """Holds the current shard and carries out the coordinator's directives."""

    def __init__(
        self,
        settings: SessionSettings,
        identity: NodeIdentity,
        num_threads: int,
    ):
        self.shard: Shard | None = None
        self.servicer = ParameterServerServicer(lambda: self.shard)
        self.session = NodeSession(settings, identity, self._activity, self._held, self._on_directive, self._drain)
        self._executor = ThreadPoolExecutor(num_threads, "tensor")
        # A future in the queue is a marker: it is done when all reports before it are sent.
        self._step_reports: asyncio.Queue[coordinator_pb2.ReportStepRequest | asyncio.Future[None]] = asyncio.Queue(
            MAX_UNREPORTED_STEPS
        )
        self._loading: asyncio.Task[None] | None = None
        self._leader_channel: grpc.aio.Channel | None = None
        self._faults = Faults()
        self._process = psutil.Process()

    @property
    def checkpoint_directory(self) -> Path | None:
        """The directory that checkpoints are written to; None without a job, or if it is not on this machine."""
        root = "" if self.shard is None else self.shard.plan.checkpoint_root
        return Path(root) if root.startswith("/") else None

    async def run(self) -> None:
        """Serve until the session ends. Raises the coordinator's error when the coordinator refuses this node."""
        reporter = asyncio.create_task(self._report_steps())
        try:
            await self.session.run()
        finally:
            reporter.cancel()
            await self._drop("this server is going down")
            self._executor.shutdown(wait=False, cancel_futures=True)

    # -- directives ------------------------------------------------------------------------------------------------

    async def _on_directive(self, directive: coordinator_pb2.SessionResponse) -> None:
        kind = directive.WhichOneof("directive")
        if kind == "plan":
            plan = Plan.from_proto(directive.plan)
            held = self.shard
            if held is not None and (held.plan.job_id, held.plan.epoch) == (plan.job_id, plan.epoch):
                return
            await self._drop(f"{plan.job_id} epoch {plan.epoch} replaces the plan that was in force here")
            index = plan.server_index(self.session.node_id)
            if index is not None:
                self._loading = asyncio.create_task(self._take_up(plan, index))
        elif kind == "release":
            if self.shard is not None and self.shard.plan.job_id == directive.release.job_id:
                await self._drop(f"{directive.release.job_id} was released: {directive.release.reason}")
        elif kind == "boundary":
            shard, request = self.shard, directive.boundary
            if shard is not None and (shard.plan.job_id, shard.plan.epoch) == (request.job_id, request.epoch):
                shard.request_boundary()
        elif kind == "snapshot":
            shard, asked = self.shard, directive.snapshot
            if shard is not None and (shard.plan.job_id, shard.plan.epoch) == (asked.job_id, asked.epoch):
                shard.request_snapshot(asked.version)

    async def _take_up(self, plan: Plan, index: int) -> None:
        report_failure = partial(self.session.report_failure, plan.job_id, plan.epoch)
        peers = f"up to {plan.max_workers} workers and {len(plan.servers)} servers"
        short = open_files.shortage(open_files.max_open_files(), plan.max_workers + len(plan.servers), peers)
        if short:
            log.warning(f"this server {short}", job=plan.job_id)
        try:
            shard = (await asyncio.to_thread(_shard_class))(
                plan,
                index,
                self._executor,
                self._complete_at_leader,
                self._complete_slots_at_leader,
                self._step_reports.put,
                self._send_checkpoint,
                report_failure,
                self._faults,
            )
            self.shard = shard
            await shard.load()
        except Exception as error:
            await report_failure(error)
            return
        self.session.heartbeat_soon()

    async def _drop(self, reason: str) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
            self._loading = None
        if self.shard is not None:
            shard, self.shard = self.shard, None
            await shard.close(reason)
            log.info("shard dropped", job=shard.plan.job_id, epoch=shard.plan.epoch, reason=reason)
            del shard
            memory.give_back()
        if self._leader_channel is not None:
            await self._leader_channel.close(None)
            self._leader_channel = None

    # -- reports ---------------------------------------------------------------------------------------------------

    async def _complete_at_leader(self, report: pb.CompleteStepRequest) -> Decision:
        """Send a report of a step to the leader; return its decision."""
        from gradstream.services.parameter_server.commit import Decision

        return Decision.from_proto(await self._ask_leader(lambda stub: stub.CompleteStep(report)), report.step)

    async def _complete_slots_at_leader(self, request: pb.CompleteSlotsRequest) -> Sequence[int]:
        """Send a report of a slot to the leader; return the slots that count. Raises ProtocolError."""
        answer = await self._ask_leader(lambda stub: stub.CompleteSlots(request))
        if answer.step != request.step:
            raise ProtocolError(f"the leader decided on the slots of step {answer.step}, not of step {request.step}")
        return list(answer.slots)

    async def _ask_leader(self, call: Callable[[ParameterServerStub], Awaitable[T]]) -> T:
        """Call the leader until it answers with its decision.

        The wait for the other servers has no deadline, but `status` shows its reason. Raises ProtocolError when the
        leader refuses this server's report for a reason that does not pass.
        """
        shard = self.shard
        if shard is None:
            raise StaleEpochError("the shard was dropped")
        leader = shard.plan.servers[shard.plan.leader]
        if self._leader_channel is None:
            self._leader_channel = open_channel(leader.address, SERVER, self.session.transport)
        stub = ParameterServerStub(self._leader_channel)
        backoff = Backoff()
        while True:
            try:
                return await call(stub)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, f"the leader, {leader.title},")
                if refused_for_good(error):
                    raise error from None
                # The leader may not have loaded the plan yet, or may be lost: the coordinator's next directive tells.
                log.debug("the leader does not answer", cause=one_line(error))
            await asyncio.sleep(backoff.next())

    async def _report_steps(self) -> None:
        while True:
            report = await self._step_reports.get()
            if isinstance(report, asyncio.Future):
                report.set_result(None)
                continue
            await self.session.deliver(partial(self.session.stub.ReportStep, report, timeout=UNARY_TIMEOUT_SECONDS))

    async def _send_checkpoint(self, report: coordinator_pb2.ReportCheckpointRequest) -> None:
        await self.session.deliver(partial(self.session.stub.ReportCheckpoint, report, timeout=UNARY_TIMEOUT_SECONDS))

    async def _drain(self) -> None:
        """Finish the checkpoint that is being written, and send the step reports so far.

        Steps go on in the meantime, because other servers may have to commit one for their own checkpoint.
        """
        if self.shard is not None:
            await self.shard.drain()
        mark: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._step_reports.put(mark)
        await mark

    # -- status ----------------------------------------------------------------------------------------------------

    def _activity(self) -> coordinator_pb2.Activity:
        shard = self.shard
        activity = coordinator_pb2.Activity(phase="idle") if shard is None else shard.activity()
        activity.resident_bytes = self._process.memory_info().rss
        return activity

    def _held(self) -> list[coordinator_pb2.HeldJob]:
        shard = self.shard
        if shard is None or not shard.loaded or shard.failed:
            return []
        return [coordinator_pb2.HeldJob(job_id=shard.plan.job_id, epoch=shard.plan.epoch, version=shard.version)]


def _shard_class() -> type[Shard]:
    """Import what only a server with a job needs: torch and the kernels. Takes 2 s at the first call.

    A server at rest has 60 MiB without them, and 370 with them.
    """
    import torch

    from gradstream.core.kernels import preload
    from gradstream.services.parameter_server.shard import Shard

    # Reductions, such as the squared norms, must not depend on the machine's number of cores.
    torch.set_num_threads(1)
    preload.preload()
    memory.settle()
    return Shard


async def serve(
    coordinator: str,
    name: str,
    listen_address: str,
    memory_bytes: int,
    ready_file: Path | None,
    num_threads: int | None = None,
    credentials: Path | None = None,
    grace_seconds: float = GRACE_SECONDS,
    advertise: str | None = None,
) -> None:
    """Run a parameter server until SIGTERM or SIGINT; `credentials` is the directory of its credentials.

    The server ends once a checkpoint that is being written is complete and its reports are sent, after `grace_seconds`
    at the latest. `num_threads` threads do the arithmetic; None means one a core of the machine, at most 8. `advertise`
    is the address (host:port) at which others reach the server; None means the listen address. Raises GradstreamError
    when the server cannot start or is refused.
    """
    log_buffer = LogBuffer()
    process.configure_log(log_buffer)
    transport = Transport(credentials)
    door = FollowingServer(
        transport,
        listen_address,
        max_message_bytes=MAX_STREAM_MESSAGE_BYTES,
        waiting_bytes=lambda: node.servicer.waiting_bytes,
    )
    identity = NodeIdentity(
        coordinator_pb2.NODE_KIND_PARAMETER_SERVER, name, advertise or door.address, memory_bytes, "cpu"
    )
    identity.disk_directory = lambda: node.checkpoint_directory
    settings = SessionSettings(coordinator, log_buffer, transport, grace_seconds)
    node = ParameterServer(settings, identity, num_threads or arithmetic_threads())
    add_parameter_server(node.servicer, door.server)
    probe.add_probe(door.server, SERVER, identity.disk_directory)
    health = process.Health(door.server, HEALTH_SERVICE)
    await door.server.start()
    log.info("parameter server listens", address=door.address, name=name)
    await process.run_node(node, door, health, ready_file, door.address)
