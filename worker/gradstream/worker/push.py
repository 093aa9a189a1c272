"""Gradients leaving: encoded off the compute thread, streamed to the server of each bundle, sent again after a break.

Everything here but `Pusher.submit` runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import grpc.aio
import torch

from gradstream.core.bundles import Bundle, first_push_codec
from gradstream.core.codecs import Payload
from gradstream.core.errors import ProtocolError, one_line
from gradstream.core.log import get_logger
from gradstream.core.payloads import CodecBook
from gradstream.core.plan import Plan, Server
from gradstream.core.rpc import Backoff, error_from_rpc, refused_for_good
from gradstream.core.timeline import SpanKind
from gradstream.core.wire import ParameterServerStub, checksum, frames
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.worker.compute import Emit, SlotTotals
from gradstream.worker.faults import Faults
from gradstream.worker.residuals import SlotResiduals
from gradstream.worker.timeline import Timeline, clock_ns

log = get_logger()

DEFAULT_WINDOW_BYTES = 4 << 20
"""Bytes that may be under way before the server has named its window."""


@dataclass(frozen=True)
class Contribution:
    """One slot's encoded gradient of one bundle."""

    header: pb.ContributionHeader
    payloads: list[Payload]


class PushStream:
    """Delivers contributions to one server, in order, until each is acknowledged."""

    def __init__(self, server: Server, stub: ParameterServerStub, faults: Faults, timeline: Timeline):
        self.server = server
        self.unreachable_since: float | None = None
        self.sent_bytes = 0
        self._stub = stub
        self._faults = faults
        self._timeline = timeline
        self._waiting: deque[Contribution] = deque()
        self._under_way: deque[Contribution] = deque()
        self._begun_ns: deque[int] = deque()  # of those under way
        self._under_way_bytes = 0
        self._window_bytes = DEFAULT_WINDOW_BYTES
        self._changed = asyncio.Event()
        self._num_streams = 0

    def put(self, contribution: Contribution) -> None:
        """Queue a contribution. The queue holds at most the worker's slots of one step."""
        self._waiting.append(contribution)
        self._changed.set()

    def forget_before(self, step: int) -> None:
        """Drop what belongs to committed steps and was not sent yet."""
        self._waiting = deque(c for c in self._waiting if c.header.step >= step)

    @property
    def empty(self) -> bool:
        """Whether everything was acknowledged."""
        return not self._waiting and not self._under_way

    async def run(self) -> None:
        """Keep a stream open. Raises ProtocolError when the server refuses a contribution for good."""
        backoff = Backoff()
        while True:
            while not self._waiting:
                self._changed.clear()
                await self._changed.wait()
            try:
                await self._stream(backoff)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, self.server.title)
                if refused_for_good(error):
                    raise error from None
                if self.unreachable_since is None:
                    self.unreachable_since = time.time()
                    log.warning("push stream broke, trying again", server=self.server.name, cause=one_line(error))
            # Exactly what was not acknowledged goes again; the server drops what it has.
            self._waiting.extendleft(reversed(self._under_way))
            self._under_way.clear()
            self._begun_ns.clear()
            self._under_way_bytes = 0
            await asyncio.sleep(backoff.next())

    async def _stream(self, backoff: Backoff) -> None:
        call = self._stub.Push(self._messages(self._num_streams))
        try:
            async for response in call:
                self._window_bytes = response.window_bytes
                self.unreachable_since = None
                backoff.reset()
                if response.result == pb.PUSH_RESULT_UNSPECIFIED:
                    self._changed.set()
                    continue
                if not self._under_way or not _acknowledges(response, self._under_way[0].header):
                    raise ProtocolError(f"server {self.server.name} acknowledged a contribution that was not sent")
                contribution = self._under_way.popleft()
                header, num_bytes = contribution.header, contribution.header.payload_bytes
                self._under_way_bytes -= num_bytes
                self._timeline.add(
                    SpanKind.SEND, self._begun_ns.popleft(), clock_ns(), header.slot, header.bundle, num_bytes
                )
                self._changed.set()
                self._faults.acknowledged(response.step, response.slot)
        finally:
            call.cancel()
            # gRPC leaves the iterator of a call that broke suspended; it must not take what the next stream shall send.
            self._num_streams += 1
            self._changed.set()

    def _may_send(self) -> bool:
        """Whether there is something to send that fits the window; what is larger than the window goes alone."""
        if not self._waiting:
            return False
        return not self._under_way or (
            self._under_way_bytes + self._waiting[0].header.payload_bytes <= self._window_bytes
        )

    async def _messages(self, number: int) -> AsyncIterator[bytes]:
        while True:
            while number == self._num_streams and not self._may_send():
                self._changed.clear()
                await self._changed.wait()
            if number != self._num_streams:
                return
            contribution = self._waiting.popleft()
            self._under_way.append(contribution)
            self._begun_ns.append(clock_ns())
            self._under_way_bytes += contribution.header.payload_bytes
            self.sent_bytes += contribution.header.payload_bytes
            for message in frames(contribution.header, contribution.payloads):
                yield message


def _acknowledges(response: pb.PushResponse, header: pb.ContributionHeader) -> bool:
    """Whether a response is about the contribution with this header."""
    keys = [(item.step, item.slot, item.bundle, item.part) for item in (response, header)]
    return keys[0] == keys[1]


class Pusher:
    """Gathers gradients into bundles, encodes these in a thread of its own and hands them to the servers' streams.

    They are the bundles of which worker number `worker` of a replica has the gradients.
    """

    def __init__(
        self, plan: Plan, stubs: list[ParameterServerStub], faults: Faults, timeline: Timeline, worker: int = 0
    ):
        self.streams = [
            PushStream(server, stub, faults, timeline) for server, stub in zip(plan.servers, stubs, strict=True)
        ]
        self._timeline = timeline
        self._plan = plan
        self._faults = faults
        self._book = CodecBook(plan.tensors, plan.recipe.codec.embedding)
        self._codec = first_push_codec(plan.recipe.codec)
        self.residuals = SlotResiduals(plan)
        self._bundles_of: dict[tuple[int, int], list[Bundle]] = {}
        self._needs: dict[tuple[int, int], set[int]] = {}
        """The tensors of a (bundle, part)."""
        uses = set(plan.uses_of_worker(worker))
        for bundle in plan.bundles:
            tensors = {fragment.tensor for fragment in bundle.fragments}
            for part in range(bundle.num_parts):
                if uses.issuperset((tensor, part) for tensor in tensors):
                    self._needs[bundle.index, part] = tensors
                    for tensor in tensors:
                        self._bundles_of.setdefault((tensor, part), []).append(bundle)
        self._loop = asyncio.get_running_loop()
        # One thread keeps the order of the backward pass, and leaves the cores to it.
        self.encode_thread = ThreadPoolExecutor(1, "encode")
        self._encoding: deque[list[Future[None]]] = deque()
        self._failed: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Keep all streams open. Raises ProtocolError when a server refuses a contribution for good, and whatever keeps
        one from being encoded: a step would wait for it for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_encoding())
            for stream in self.streams:
                group.create_task(stream.run())

    async def _watch_encoding(self) -> None:
        await self._failed

    def _encoded(self, future: Future[None]) -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    def use_codec(self, codec: str) -> None:
        """The codec of the contributions from the next slot on, as the servers have named it."""
        self._codec = codec

    def submit(self, step: int, slot: int) -> Emit:
        """What a slot's gradients are given to; called in the compute thread.

        Waits until at most one slot is being encoded: gradients of at most two are held.
        """
        while len(self._encoding) > 1:
            for future in self._encoding.popleft():
                future.result()
        encoding: list[Future[None]] = []
        self._encoding.append(encoding)
        missing = {key: set(tensors) for key, tensors in self._needs.items()}
        num_bundles = {use: len(bundles) for use, bundles in self._bundles_of.items()}
        gradients: dict[tuple[int, int], torch.Tensor] = {}
        codec = self._codec

        def emit(tensor: int, part: int, gradient: torch.Tensor, totals: SlotTotals) -> None:
            if self._faults.spoils(step, slot):
                gradient.fill_(float("nan"))
            gradients[tensor, part] = gradient
            for bundle in self._bundles_of[tensor, part]:
                missing[bundle.index, part].discard(tensor)
                if missing[bundle.index, part]:
                    continue
                needed = {index: gradients[index, part] for index in self._needs[bundle.index, part]}
                future = self.encode_thread.submit(self._encode, codec, step, slot, bundle, part, needed, totals)
                future.add_done_callback(self._encoded)
                encoding.append(future)
                for index in needed:  # a gradient lives until its last bundle is encoded
                    num_bundles[index, part] -= 1
                    if not num_bundles[index, part]:
                        del gradients[index, part]

        return emit

    def close(self) -> None:
        """Stop encoding."""
        self.encode_thread.shutdown(wait=True, cancel_futures=True)

    def _encode(
        self,
        codec_name: str,
        step: int,
        slot: int,
        bundle: Bundle,
        part: int,
        gradients: dict[int, torch.Tensor],
        totals: SlotTotals,
    ) -> None:
        begin_ns = clock_ns()
        codec = self._book.of(bundle, codec_name)
        slices = [
            gradients[fragment.tensor].reshape(-1)[fragment.begin : fragment.end].float()
            for fragment in bundle.fragments
        ]
        payloads = self.residuals.encode(codec, slices, step, slot)
        num_bytes = sum(map(len, payloads))
        header = pb.ContributionHeader(
            job_id=self._plan.job_id,
            epoch=self._plan.epoch,
            step=step,
            slot=slot,
            bundle=bundle.index,
            part=part,
            codec=codec.codec.wire,
            fragment_bytes=[len(payload) for payload in payloads],
            payload_bytes=num_bytes,
            crc32c=checksum(*payloads),
            slot_tokens=totals.num_tokens,
            slot_samples=totals.num_samples,
            slot_loss_sum=totals.loss_sum,
        )
        self._loop.call_soon_threadsafe(self.streams[bundle.server].put, Contribution(header, payloads))
        self._timeline.add(SpanKind.ENCODE, begin_ns, clock_ns(), slot, bundle.index, num_bytes)
