"""ParameterServerService: decode, call the shard, encode."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from gradstream.core.codecs import codec_on_wire
from gradstream.core.errors import ProtocolError, StaleEpochError
from gradstream.core.rpc import answering
from gradstream.core.wire import Assembler, frames, parse, verify
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.shard import Shard

WINDOW_BYTES = 64 << 20

Context = grpc.aio.ServicerContext[Any, Any]


class ParameterServerServicer:
    """Serves the shard that `current` returns (None while the server holds nothing)."""

    def __init__(self, current: Callable[[], Shard | None]):
        self._current = current

    def _shard(self, job_id: str, epoch: int) -> Shard:
        shard = self._current()
        if shard is None:
            raise StaleEpochError(f"plan {job_id} epoch {epoch} is not in force here: this server holds no job yet")
        return shard

    async def Push(self, messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[pb.PushResponse]:
        """Contributions in, acknowledgements out, one for one."""
        async with answering(context):
            assembler: Assembler[pb.ContributionHeader] = Assembler()
            yield pb.PushResponse(window_bytes=WINDOW_BYTES)
            async for message in messages:
                encoded, piece = parse(message)
                if encoded is not None:
                    header = _header(encoded)
                    self._shard(header.job_id, header.epoch).check(header)
                    assembler.begin(header)
                whole = assembler.add(piece)
                if whole is None:
                    continue
                header, payload = whole
                verify(header, payload, f"contribution to fragment {header.fragment} from slot {header.slot}")
                result = self._shard(header.job_id, header.epoch).offer(header, payload)
                yield pb.PushResponse(
                    window_bytes=WINDOW_BYTES,
                    result=result,
                    step=header.step,
                    slot=header.slot,
                    fragment=header.fragment,
                    part=header.part,
                )
            if not assembler.idle:
                raise ProtocolError("the push stream ended inside a payload")

    async def Pull(self, request: pb.PullRequest, context: Context) -> AsyncIterator[bytes]:
        """The weights of one version, fragment by fragment, as each is published."""
        async with answering(context):
            shard = self._shard(request.job_id, request.epoch)
            codec = codec_on_wire(request.codec)
            if codec is not shard.pull_codec:
                raise ProtocolError(f"pull with codec {codec.name}, but the recipe says {shard.pull_codec.name}")
            unknown = [index for index in request.fragments if index not in shard.fragments]
            if unknown:
                raise ProtocolError(f"pull of fragment {unknown[0]}, which server {shard.index} does not hold")
            version = await shard.wait_version(request.job_id, request.epoch, request.min_version)
            for message in frames(pb.WeightsHeader(version=version), b""):
                yield message
            for index in request.fragments:
                state = await shard.wait_published(request.job_id, request.epoch, index, version)
                if state is None:
                    await context.abort(
                        grpc.StatusCode.ABORTED, f"version {version} was overtaken during the pull; pull again"
                    )
                    return
                payload = state.published
                header = pb.WeightsHeader(
                    version=version,
                    fragment=index,
                    codec=codec.wire,
                    payload_bytes=payload.nbytes,
                    crc32c=state.published_crc32c,
                )
                for message in frames(header, payload):
                    yield message
                shard.sent_bytes += payload.nbytes

    async def CompleteStep(self, request: pb.CompleteStepRequest, context: Context) -> pb.CompleteStepResponse:
        """On the leader: another server is done with a step."""
        async with answering(context):
            shard = self._shard(request.job_id, request.epoch)
            shard.check_epoch(request.job_id, request.epoch)
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
