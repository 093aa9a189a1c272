"""ParameterServerService: decode, call the shard, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from gradstream.core.errors import ProtocolError, StaleEpochError
from gradstream.core.rpc.errors import answering
from gradstream.core.wire.frames import Assembler, frame, parse, verify
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.shard import Shard
from gradstream.services.parameter_server.streams import Stream, Streams

WINDOW_BYTES = 64 << 20

Context = grpc.aio.ServicerContext[Any, Any]


class ParameterServerServicer:
    """Serves the shard that `current` returns (None while the server holds nothing)."""

    def __init__(self, current: Callable[[], Shard | None]):
        self._current = current
        self._streams = Streams(self._num_workers)

    def _num_workers(self) -> int:
        """How many workers can share the job in force."""
        shard = self._current()
        return shard.plan.most_workers if shard is not None else 0

    def _shard(self, job_id: str, epoch: int) -> Shard:
        """The shard in force. Raises StaleEpochError when it is of another plan."""
        shard = self._current()
        if shard is None:
            raise StaleEpochError(f"plan {job_id} epoch {epoch} is not in force here: this server holds no job yet")
        shard.check_epoch(job_id, epoch)
        return shard

    async def Push(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[pb.PushResponse]:
        """Contributions in, acknowledgements out, one for one."""
        async with answering(context):
            with self._streams.admit(context.peer()) as stream:
                assembler: Assembler[pb.ContributionHeader] = Assembler()
                yield pb.PushResponse(window_bytes=WINDOW_BYTES)
                try:
                    while (message := await self._read(messages, stream)) is not None:
                        response = self._take(message, assembler, stream)
                        message = None  # a peer that sends nothing more shall not hold it
                        if response is not None:
                            # The next message is read only when gRPC has taken the acknowledgement: a peer that does
                            # not read these is not read from either.
                            yield response
                    if not assembler.idle:
                        raise ProtocolError("the push stream ended inside a payload")
                finally:
                    # This frame lives on in a refusal's traceback until a garbage collection finds it.
                    message = None
                    del assembler

    def _take(
        self, message: bytes, assembler: Assembler[pb.ContributionHeader], stream: Stream
    ) -> pb.PushResponse | None:
        """Take a message; the acknowledgement when it was a contribution's last. Raises ProtocolError."""
        encoded, piece = parse(message)
        if encoded is not None:
            header = _header(encoded)
            self._shard(header.job_id, header.epoch).check(header)
            assembler.begin(header)
            # With its header, which stays as long as the contribution and may be as large as a message.
            stream.begin(len(encoded) + header.payload_bytes)
        whole = assembler.add(piece)
        if whole is None:
            return None
        stream.finish()
        header, payload = whole
        verify(header, payload, f"contribution to bundle {header.bundle} from slot {header.slot}")
        return pb.PushResponse(
            window_bytes=WINDOW_BYTES,
            result=self._shard(header.job_id, header.epoch).offer(header, payload),
            step=header.step,
            slot=header.slot,
            bundle=header.bundle,
            part=header.part,
        )

    async def _read(self, messages: AsyncIterator[bytes], stream: Stream) -> bytes | None:
        """The next message, or None at the end. Raises the error for which the stream was ended meanwhile."""
        try:
            return await anext(messages, None)
        except asyncio.CancelledError:
            error = stream.interrupted()
            if error is None:
                raise
        raise error

    async def Pull(self, request: pb.PullRequest, context: Context) -> AsyncIterator[bytes]:
        """The weights of one version, bundle by bundle, as each is published."""
        async with answering(context):
            with self._streams.admit(context.peer()):
                shard = self._shard(request.job_id, request.epoch)
                unknown = [index for index in request.bundles if index not in shard.bundles]
                if unknown:
                    raise ProtocolError(f"pull of bundle {unknown[0]}, which server {shard.index} does not hold")
                if request.HasField("measured"):
                    shard.measured(context.peer(), request.measured)
                version = await shard.wait_version(request.job_id, request.epoch, request.min_version)
                first = pb.WeightsHeader(
                    version=version, push_codec=shard.push_codec.wire, checkpoint=shard.checkpointed
                )
                yield frame(first.SerializeToString())
                holds = request.HasField("held_version") and request.held_version + 1 == version
                for index in request.bundles:
                    published = await shard.published(request.job_id, request.epoch, index, version, holds)
                    if published is None:
                        await context.abort(
                            grpc.StatusCode.ABORTED, f"version {version} was overtaken during the pull; pull again"
                        )
                        return
                    for message in published.messages:
                        yield message
                    shard.sent_bytes += published.num_bytes

    async def CompleteStep(self, request: pb.CompleteStepRequest, context: Context) -> pb.CompleteStepResponse:
        """On the leader: another server is done with a step."""
        async with answering(context):
            shard = self._shard(request.job_id, request.epoch)
            if shard.leader is None:
                raise ProtocolError(f"server {shard.index} is not the leader of {request.job_id} epoch {request.epoch}")
            return (await shard.leader.complete(request)).to_proto()
        raise AssertionError("answering() aborts the call")

    async def GetServerStatus(self, request: pb.GetServerStatusRequest, context: Context) -> pb.GetServerStatusResponse:
        """What the server holds of a job."""
        shard = self._current()
        if shard is None or shard.plan.job_id != request.job_id:
            return pb.GetServerStatusResponse()
        return shard.status()


def _header(encoded: memoryview) -> pb.ContributionHeader:
    try:
        return pb.ContributionHeader.FromString(bytes(encoded))
    except DecodeError:
        raise ProtocolError("a contribution's header is not a valid message") from None
