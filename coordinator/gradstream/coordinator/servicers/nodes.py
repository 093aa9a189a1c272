"""CoordinatorService: the calls of nodes. The controller makes the decisions."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.jobs.reports import Reports
from gradstream.coordinator.nodes.membership import KIND_WORDS, SERVER, WORKER
from gradstream.coordinator.nodes.sessions import LEFT, OpenSession
from gradstream.coordinator.state.state import JobRecord
from gradstream.coordinator.timing import unix_ms
from gradstream.core import __version__
from gradstream.core.data.manifest import parse_manifest
from gradstream.core.errors import AccessError, ConfigError, DataError, GradstreamError, ProtocolError, one_line
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.rpc import access
from gradstream.core.rpc.errors import ERROR_CLASS_KEY, answering
from gradstream.core.rpc.token_sources import FileTokens
from gradstream.core.storage import files
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import coordinator_pb2, coordinator_pb2_grpc

PIECE_BYTES = 1 << 20
MAX_READERS = 32
"""Maximum number of data shards that are read for workers at the same time."""
HASHING_SECONDS = 600.0
FIRST_MESSAGE_SECONDS = 10.0
TOKENS_SECONDS = 1.0
"""Maximum time until other processes get a change of the table of tokens."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ADDRESS = re.compile(r"[!-~]{1,255}:[0-9]{1,5}")

Context = grpc.aio.ServicerContext[Any, Any]


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Serves the calls of nodes."""

    def __init__(self, controller: Controller, reports: Reports, tokens: FileTokens | None = None):
        """Create the service. `tokens` is the table of tokens to send to other processes; None without credentials."""
        self._controller = controller
        self._reports = reports
        self._tokens = tokens
        self._reading = StorageThreads(max_threads=MAX_READERS, max_threads_a_place=MAX_READERS)
        # The first request for a file waits until the whole file has been hashed.
        self._hashing = StorageThreads(HASHING_SECONDS, max_threads=MAX_READERS, max_threads_a_place=MAX_READERS)

    async def Register(
        self, request: coordinator_pb2.RegisterRequest, context: Context
    ) -> coordinator_pb2.RegisterResponse:
        async with answering(context):
            try:
                check_registration(request)
                check_role(request.kind)
                node = self._controller.register(request)
            except GradstreamError as error:
                self._refuse(request, error)
                raise
            timing = self._controller.timing
            return coordinator_pb2.RegisterResponse(
                node_id=node.node_id, heartbeat_seconds=timing.heartbeat_seconds, lease_seconds=timing.lease_seconds
            )

    def _refuse(self, request: coordinator_pb2.RegisterRequest, error: GradstreamError) -> None:
        """Remember a node that was refused, if it has a name that can be shown."""
        if request.kind in KIND_WORDS and _NAME.fullmatch(request.name):
            self._controller.members.refuse(request, one_line(error), unix_ms())

    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[coordinator_pb2.SessionRequest], context: Context
    ) -> AsyncIterator[bytes]:
        """Yield serialized SessionResponse messages: `add_coordinator` registers this call without a serializer."""
        # --- the first heartbeat identifies the node
        try:
            first = await asyncio.wait_for(anext(request_iterator), FIRST_MESSAGE_SECONDS)
        except (StopAsyncIteration, TimeoutError):
            return
        async with answering(context):
            known = self._controller.members.get(first.node_id)
            if known is not None:
                check_role(known.kind)
        session = self._controller.open_session(first.node_id)
        if session is None:
            # ABORTED without an error class makes the node register again instead of giving up.
            await context.abort(grpc.StatusCode.ABORTED, "this node is not registered here; register again")
            return
        # --- send directives while heartbeats arrive
        reader = asyncio.create_task(self._read(session, first, request_iterator))
        try:
            while (directive := await session.next()) is not None:
                yield directive
        finally:
            reader.cancel()
            self._controller.close_session(session, "its stream ended")
        # --- end the session with its reason
        why = session.ended
        if isinstance(why, GradstreamError):
            context.set_trailing_metadata(((ERROR_CLASS_KEY, type(why).__name__),))
            await context.abort(why.status, str(why))
        elif why and why != LEFT:
            await context.abort(grpc.StatusCode.ABORTED, f"{why}; register again")

    async def _read(
        self,
        session: OpenSession,
        first: coordinator_pb2.SessionRequest,
        requests: AsyncIterator[coordinator_pb2.SessionRequest],
    ) -> None:
        why = "its stream ended"
        try:
            message: coordinator_pb2.SessionRequest | None = first
            while message is not None:
                if not self._controller.nodes.heartbeat(session, message.activity, self._controller.clock()):
                    why = "this session has been superseded"
                    break
                if message.HasField("vitals"):
                    self._controller.nodes.note_vitals(session, message.vitals)
                if message.log:
                    self._log(session, message)
                if message.leaving:
                    why = LEFT
                    break
                message = await anext(requests, None)
        finally:
            # Close at once, without waiting for the writer: slots must not wait for a dead worker.
            self._controller.close_session(session, why)

    def _log(self, session: OpenSession, message: coordinator_pb2.SessionRequest) -> None:
        node = self._controller.members.get(session.node_id)
        if node is not None:
            try:
                self._reports.log_lines(node, list(message.log))
            except GradstreamError:
                # If the state cannot be read, only log lines are lost; the node keeps its lease.
                pass

    async def ReportStep(
        self, request: coordinator_pb2.ReportStepRequest, context: Context
    ) -> coordinator_pb2.ReportStepResponse:
        async with answering(context):
            await self._reports.step(request)
        return coordinator_pb2.ReportStepResponse()

    async def ReportValidation(
        self, request: coordinator_pb2.ReportValidationRequest, context: Context
    ) -> coordinator_pb2.ReportValidationResponse:
        async with answering(context):
            await self._reports.validation(request)
        return coordinator_pb2.ReportValidationResponse()

    async def ReportCheckpoint(
        self, request: coordinator_pb2.ReportCheckpointRequest, context: Context
    ) -> coordinator_pb2.ReportCheckpointResponse:
        async with answering(context):
            await self._reports.checkpoint(request)
        return coordinator_pb2.ReportCheckpointResponse()

    async def ReportResidual(
        self, request: coordinator_pb2.ReportResidualRequest, context: Context
    ) -> coordinator_pb2.ReportResidualResponse:
        async with answering(context):
            await self._reports.residual(request)
        return coordinator_pb2.ReportResidualResponse()

    async def ReportStorage(
        self, request: coordinator_pb2.ReportStorageRequest, context: Context
    ) -> coordinator_pb2.ReportStorageResponse:
        async with answering(context):
            self._controller.storage.take(request)
        return coordinator_pb2.ReportStorageResponse()

    async def ReportTimeline(
        self, request: coordinator_pb2.ReportTimelineRequest, context: Context
    ) -> coordinator_pb2.ReportTimelineResponse:
        async with answering(context):
            self._reports.timeline(request)
        return coordinator_pb2.ReportTimelineResponse()

    async def ReportFailure(
        self, request: coordinator_pb2.ReportFailureRequest, context: Context
    ) -> coordinator_pb2.ReportFailureResponse:
        async with answering(context):
            await self._reports.failure(request)
        return coordinator_pb2.ReportFailureResponse()

    async def FetchDataShard(
        self, request: coordinator_pb2.FetchDataShardRequest, context: Context
    ) -> AsyncIterator[coordinator_pb2.FetchDataShardResponse]:
        async with answering(context):
            record = self._controller.state.get_job(request.job_id)
            if record is None:
                raise ProtocolError(f"there is no job '{request.job_id[:100]}' here")
            path, num_bytes, sha256 = data_file(record, request.file)
            try:
                stream = await self._hashing.call(path, files.open_verified, path, sha256, num_bytes)
                try:
                    while piece := await self._reading.call(path, stream.read, PIECE_BYTES):
                        yield coordinator_pb2.FetchDataShardResponse(payload=piece)
                finally:
                    # In a thread that is not awaited: if the storage hangs, the stream closes once the storage answers.
                    threading.Thread(target=stream.close, daemon=True).start()
            except GradstreamError:
                raise
            except Exception as error:  # every fsspec backend raises its own kind
                raise DataError(
                    f"data shard {path} cannot be read ({one_line(error)}); restore it or prepare the data again"
                ) from None

    async def WatchTokens(
        self, request: coordinator_pb2.WatchTokensRequest, context: Context
    ) -> AsyncIterator[coordinator_pb2.WatchTokensResponse]:
        if self._tokens is None:
            return
        sent = None
        while True:
            table = self._tokens.table
            if table is not sent:
                sent = table
                yield coordinator_pb2.WatchTokensResponse(table_json=table.serialize())
            await asyncio.sleep(TOKENS_SECONDS)


def add_coordinator(servicer: CoordinatorServicer, server: grpc.aio.Server) -> None:
    """Register the service. Its Session yields bytes, because a directive to many nodes is serialized once."""
    service = coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"].full_name
    session = grpc.stream_stream_rpc_method_handler(servicer.Session, coordinator_pb2.SessionRequest.FromString, None)
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(servicer, server)
    # The handler that is registered last serves a call.
    server.add_registered_method_handlers(service, {"Session": session})  # type: ignore[attr-defined]


def check_registration(request: coordinator_pb2.RegisterRequest) -> None:
    """Raise ConfigError for a node that cannot take part, ProtocolError for a malformed registration."""
    if request.version != __version__:
        raise ConfigError(
            f"node {request.name[:63]} runs gradstream {request.version[:32] or 'of no version'}, the coordinator "
            f"{__version__}; install the same version on both"
        )
    if request.kind not in (SERVER, WORKER):
        raise ProtocolError("a registration must say whether the node is a parameter server or a worker")
    if not _NAME.fullmatch(request.name):
        raise ConfigError(
            f"'{request.name[:63]}' is not a node name; use letters, digits, '.', '_' and '-' (at most 63)"
        )
    if not 1 <= len(request.incarnation) <= 64:
        raise ProtocolError("a registration must carry the incarnation of its process")
    if not _ADDRESS.fullmatch(request.address):
        raise ConfigError(
            f"{KIND_WORDS[request.kind]} {request.name} gave the address '{request.address[:100]}', which is not "
            f"host:port; listen on the one that workers can reach (--listen)"
        )
    if request.memory_bytes >= 2**63:
        raise ProtocolError("a registration's memory_bytes is impossibly large")
    if len(request.machine_id) > 64:
        raise ProtocolError("a registration's machine_id is longer than 64 characters")
    if not 0 <= request.flops_per_second < 1e18:
        raise ProtocolError("a registration's flops_per_second is not a possible speed")


def check_role(kind: coordinator_pb2.NodeKind.ValueType) -> None:
    """Raise AccessError when the caller's credentials are not for this kind of node."""
    caller = access.caller.get()
    role = access.SERVER if kind == SERVER else access.WORKER
    if caller is not None and caller.role != role:
        raise AccessError(
            f"credentials of a {caller.role} cannot be used by a {KIND_WORDS[kind]}; start it with credentials of a "
            f"{role}"
        )


def data_file(record: JobRecord, file: str) -> tuple[str, int | None, str]:
    """Look up a file of the job's data set; return its path, its size if the manifest has one, and its hash.

    Raises DataError for a name that is not in the manifest.
    """
    manifest = parse_manifest(record.manifest_json)
    known: dict[str, tuple[int | None, str]] = {manifest.tokenizer_file: (None, manifest.tokenizer_sha256)}
    for shard in manifest.shards:
        known[shard.file] = (shard.num_bytes, shard.sha256)
        known[shard.index_file] = (None, shard.index_sha256)
    if file not in known:
        raise DataError(
            f"the data set of job {record.job_id} has no file '{file[:100]}'; ask for a name in its manifest"
        )
    return files.join(parse_recipe(record.recipe_json).data.path, file), *known[file]
