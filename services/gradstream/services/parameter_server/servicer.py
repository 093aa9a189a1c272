"""ParameterServerService: decodes requests, calls the shard and encodes its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from gradstream.core.errors import ProtocolError, StaleEpochError
from gradstream.core.rpc.errors import answering
from gradstream.core.wire.frames import Assembler, frame, parse, verify
from gradstream.core.wire.stream_limits import max_streams_a_host
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.streams import Stream, Streams

if TYPE_CHECKING:
    from gradstream.services.parameter_server.shard import Shard

Context = grpc.aio.ServicerContext[Any, Any]


class ParameterServerServicer:
    """Serves the shard that `current` returns, which is None while the server holds no shard."""

    def __init__(self, current: Callable[[], Shard | None]):
        self._current = current
        self._streams = Streams(self._num_workers, self._contribution_bytes)

    def _num_workers(self) -> int:
        """The number of workers that can share the current job; 0 without a job."""
        shard = self._current()
        return shard.plan.max_workers if shard is not None else 0

    def _contribution_bytes(self) -> int:
        """The size of the current job's largest contribution to this server; 0 without a job."""
        shard = self._current()
        return shard.traffic.contribution_bytes if shard is not None else 0

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the requests of all workers' pulls, which may wait for a version at the same time."""
        shard = self._current()
        return max_streams_a_host(shard.plan.max_workers) * shard.traffic.request_bytes if shard is not None else 0

    def _shard(self, job_id: str, epoch: int) -> Shard:
        """The current shard. Raises StaleEpochError when the shard belongs to another plan."""
        shard = self._current()
        if shard is None:
            raise StaleEpochError(f"plan {job_id} epoch {epoch} is not in force here: this server holds no job yet")
        shard.check_epoch(job_id, epoch)
        return shard

    async def Push(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[pb.PushResponse]:
        """Receive contributions; acknowledge each."""
        async with answering(context):
            with self._streams.admit(context.peer(), "push") as stream:
                assembler: Assembler[pb.ContributionHeader] = Assembler()
                yield pb.PushResponse(window_bytes=self._streams.push_window_bytes)
                try:
                    while (message := await self._read(messages, stream)) is not None:
                        response = self._take(message, assembler, stream)
                        message = None  # or an idle peer would keep it in memory
                        if response is not None:
                            # The next message is read only when gRPC has taken the acknowledgement. So a peer that
                            # does not read acknowledgements cannot send more contributions.
                            yield response
                    if not assembler.idle:
                        raise ProtocolError("the push stream ended inside a payload")
                finally:
                    # An error's traceback keeps this frame alive until the next garbage collection.
                    message = None
                    del assembler

    def _take(
        self, message: bytes, assembler: Assembler[pb.ContributionHeader], stream: Stream
    ) -> pb.PushResponse | None:
        """Take a message; return the acknowledgement if it completed a contribution. Raises ProtocolError."""
        encoded, piece = parse(message)
        if encoded is not None:
            header = _header(encoded)
            self._shard(header.job_id, header.epoch).check(header)
            assembler.begin(header)
            # The header counts too: it is kept as long as the contribution and may be as large as a message.
            stream.begin(len(encoded) + header.payload_bytes)
        whole = assembler.add(piece)
        if whole is None:
            return None
        stream.finish()
        header, payload = whole
        verify(header, payload, f"contribution to bundle {header.bundle} from slot {header.slot}")
        return pb.PushResponse(
            window_bytes=self._streams.push_window_bytes,
            result=self._shard(header.job_id, header.epoch).offer(header, payload),
            step=header.step,
            slot=header.slot,
            bundle=header.bundle,
            part=header.part,
        )

    async def _read(self, messages: AsyncIterator[bytes], stream: Stream) -> bytes | None:
        """Read the next message, None at the end, once there is room for it.

        Raises the reason if the server has ended the stream.
        """
        try:
            if (shard := self._current()) is not None:
                await shard.room()
            return await anext(messages, None)
        except asyncio.CancelledError:
            error = stream.interrupted()
            if error is None:
                raise
        raise error

    async def Pull(self, request: pb.PullRequest, context: Context) -> AsyncIterator[bytes]:
        """Stream the weights of one version, bundle by bundle, as each is published."""
        async with answering(context):
            with self._streams.admit(context.peer(), "pull"):
                shard = self._shard(request.job_id, request.epoch)
                unknown = [index for index in request.bundles if index not in shard.bundles]
                if unknown:
                    raise ProtocolError(f"pull of bundle {unknown[0]}, which server {shard.index} does not hold")
                if request.HasField("measured"):
                    shard.measured(context.peer(), request.measured)
                sent: set[int] = set()
                if request.early and request.HasField("held_version"):
                    upcoming = request.held_version + 1
                    coming = shard.early(request.job_id, request.epoch, upcoming, request.bundles)
                    async for index, published in coming:
                        sent.add(index)
                        for message in published.messages:
                            yield message
                        shard.sent_bytes += published.num_bytes
                version = await shard.wait_version(request.job_id, request.epoch, request.min_version)
                holds = request.HasField("held_version") and request.held_version + 1 == version
                if not holds or shard.skipped:
                    sent.clear()
                first = pb.WeightsHeader(
                    version=version,
                    push_codec=shard.push_codec.wire,
                    checkpoint=shard.checkpointed,
                    early_void=not sent,
                )
                yield frame(first.SerializeToString())
                for index in shard.pulled(version, request.bundles):
                    if index in sent:
                        continue
                    later = await shard.published(request.job_id, request.epoch, index, version, holds)
                    if later is None:
                        await context.abort(
                            grpc.StatusCode.ABORTED, f"version {version} was overtaken during the pull; pull again"
                        )
                        return
                    for message in later.messages:
                        yield message
                    shard.sent_bytes += later.num_bytes

    async def CompleteStep(self, request: pb.CompleteStepRequest, context: Context) -> pb.CompleteStepResponse:
        """Take another server's report that it has completed a step, on the leader; answer with the decision."""
        async with answering(context):
            shard = self._shard(request.job_id, request.epoch)
            if shard.leader is None:
                raise ProtocolError(f"server {shard.index} is not the leader of {request.job_id} epoch {request.epoch}")
            return (await shard.leader.complete(request)).to_proto()
        raise AssertionError("answering() aborts the call")

    async def CompleteSlots(self, request: pb.CompleteSlotsRequest, context: Context) -> pb.CompleteSlotsResponse:
        """Take another server's report that it has a slot whole, on the leader; answer with the slots that count."""
        async with answering(context):
            shard = self._shard(request.job_id, request.epoch)
            if shard.slot_leader is None:
                raise ProtocolError(f"server {shard.index} decides on no slots of {request.job_id}")
            slots = await shard.slot_leader.complete(request)
            return pb.CompleteSlotsResponse(step=request.step, slots=slots)
        raise AssertionError("answering() aborts the call")

    async def GetServerStatus(self, request: pb.GetServerStatusRequest, context: Context) -> pb.GetServerStatusResponse:
        """Report what the server holds of a job."""
        shard = self._current()
        if shard is None or shard.plan.job_id != request.job_id:
            return pb.GetServerStatusResponse()
        return shard.status()


def _header(encoded: memoryview) -> pb.ContributionHeader:
    try:
        return pb.ContributionHeader.FromString(bytes(encoded))
    except DecodeError:
        raise ProtocolError("a contribution's header is not a valid message") from None
