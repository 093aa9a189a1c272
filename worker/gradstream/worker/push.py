"""Encodes contributions off the compute thread and streams them to each bundle's server; sends again after a break.

Everything here except `Pusher.submit` and the encoding runs on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from gradstream.core.codecs import Payload
from gradstream.core.codecs.payloads import CodecBook
from gradstream.core.errors import ProtocolError
from gradstream.core.node.faults import Faults
from gradstream.core.plan.bundles import WEIGHTS, Bundle, first_push_codec
from gradstream.core.plan.plan import Plan, Server
from gradstream.core.telemetry.timeline import SpanKind
from gradstream.core.wire.frames import checksum, frames
from gradstream.core.wire.slot_totals import SlotTotals
from gradstream.core.wire.stubs import ParameterServerStub
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.worker.attempt import Emit
from gradstream.worker.backlog import Backlog
from gradstream.worker.outbound import Call, Outbound
from gradstream.worker.residuals import SlotResiduals
from gradstream.worker.timeline import Timeline, clock_ns

DEFAULT_WINDOW_BYTES = 4 << 20
"""Bytes that may be under way before the server has told its window."""


@dataclass(frozen=True)
class Contribution:
    """What one slot contributes to one bundle, encoded: its gradient, or its difference or moment of a round.

    `let_go` is called once the contribution is held no longer: it was acknowledged, or its step is over.
    """

    header: pb.ContributionHeader
    payloads: list[Payload]
    let_go: Callable[[], None] = lambda: None


class PushStream(Outbound[Contribution]):
    """Sends contributions to one server; it holds those of at most two slots (gradstream.worker.backlog)."""

    kind = "a parameter server"

    def __init__(self, server: Server, stub: ParameterServerStub, faults: Faults, timeline: Timeline):
        super().__init__(server.title)
        self._server = server
        self._stub = stub
        self._faults = faults
        self._timeline = timeline
        self._begun_ns: deque[int] = deque()  # when each contribution under way was begun
        self._under_way_bytes = 0
        self._window_bytes = DEFAULT_WINDOW_BYTES

    def forget_before(self, step: int) -> None:
        """Drop contributions to committed steps that were not sent yet."""
        waiting, self._waiting = self._waiting, deque()
        for contribution in waiting:
            if contribution.header.step >= step:
                self._waiting.append(contribution)
            else:
                contribution.let_go()

    # -- Outbound --------------------------------------------------------------------------------------------------

    async def _until_wanted(self) -> None:
        while not self._waiting:
            self._changed.clear()
            await self._changed.wait()

    def _begin(self) -> Iterable[bytes]:
        self._begun_ns.clear()
        self._under_way_bytes = 0
        return ()

    def _open(self, messages: AsyncIterator[bytes]) -> Call:
        return self._stub.Push(messages)

    def _heard(self, response: pb.PushResponse) -> None:
        self._window_bytes = response.window_bytes
        if response.result == pb.PUSH_RESULT_UNSPECIFIED:
            return
        if not self._under_way or not _acknowledges(response, self._under_way[0].header):
            raise ProtocolError(f"server {self._server.name} acknowledged a contribution that was not sent")
        contribution = self._under_way.popleft()
        contribution.let_go()
        header, num_bytes = contribution.header, contribution.header.payload_bytes
        self._under_way_bytes -= num_bytes
        self._timeline.add(SpanKind.SEND, self._begun_ns.popleft(), clock_ns(), header.slot, header.bundle, num_bytes)
        self._faults.acknowledged(response.step, response.slot)

    def _may_send(self, message: Contribution) -> bool:
        # A contribution larger than the window is sent alone.
        return not self._under_way or (self._under_way_bytes + message.header.payload_bytes <= self._window_bytes)

    def _sending(self, message: Contribution) -> Iterable[bytes]:
        self._begun_ns.append(clock_ns())
        self._under_way_bytes += message.header.payload_bytes
        self.sent_bytes += message.header.payload_bytes
        return frames(message.header, message.payloads)


def _acknowledges(response: pb.PushResponse, header: pb.ContributionHeader) -> bool:
    """Return whether a response acknowledges the contribution with this header."""
    keys = [(item.step, item.slot, item.bundle, item.part) for item in (response, header)]
    return keys[0] == keys[1]


@dataclass(frozen=True)
class _SlotOfStep:
    """A slot of a step that is being encoded, with the codec that the servers named before the slot began."""

    step: int
    slot: int
    codec: str
    futures: list[Future[None]] = field(default_factory=list)
    """One for each contribution of the slot."""


Source = tuple[int, int, str]
"""(tensor, part, array): what `Emit` takes at once."""


class SlotEmit:
    """The `Emit` of a slot: collects its values, and encodes a bundle as soon as all its values are there.

    `bundles_of` are by source, `sources_of` by (bundle, part). `encode(bundle, part, values, totals)` is called once
    for each (bundle, part), with the values by tensor. `spoils()` returns whether a fault is injected into the slot.
    """

    def __init__(
        self,
        bundles_of: Mapping[Source, list[Bundle]],
        sources_of: Mapping[tuple[int, int], set[Source]],
        encode: Callable[[Bundle, int, dict[int, torch.Tensor], SlotTotals], None],
        spoils: Callable[[], bool],
    ):
        self._bundles_of = bundles_of
        self._sources_of = sources_of
        self._encode = encode
        self._spoils = spoils
        self._missing = {key: set(sources) for key, sources in sources_of.items()}
        self._num_bundles = {source: len(bundles) for source, bundles in bundles_of.items()}  # not encoded yet
        self._values: dict[Source, torch.Tensor] = {}

    def __call__(self, tensor: int, part: int, values: torch.Tensor, totals: SlotTotals, array: str = WEIGHTS) -> None:
        source = (tensor, part, array)
        if self._spoils():
            values.fill_(float("nan"))
        self._values[source] = values
        for bundle in self._bundles_of[source]:
            missing = self._missing[bundle.index, part]
            missing.discard(source)
            if missing:
                continue
            needed = self._sources_of[bundle.index, part]
            self._encode(bundle, part, {needs[0]: self._values[needs] for needs in needed}, totals)
            for needs in needed:  # values are kept until their last bundle is given to be encoded
                self._num_bundles[needs] -= 1
                if not self._num_bundles[needs]:
                    del self._values[needs]


class Pusher:
    """Gathers a slot's values into bundles, encodes these in a separate thread and queues them on the servers' streams.

    Handles the bundles whose gradients worker number `worker` of a replica has.
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
        self.backlog = Backlog(plan, timeline)
        self._bundles_of: dict[Source, list[Bundle]] = {}
        self._sources_of: dict[tuple[int, int], set[Source]] = {}  # by (bundle, part)
        self._stage_of: dict[tuple[int, int], int] = {}  # by (bundle, part)
        uses = set(plan.uses_of_worker(worker))
        for bundle in (*plan.bundles, *plan.moment_bundles):
            tensors = {fragment.tensor for fragment in bundle.fragments}
            for part in range(bundle.num_parts):
                if uses.issuperset((tensor, part) for tensor in tensors):
                    sources = {(tensor, part, bundle.array) for tensor in tensors}
                    self._sources_of[bundle.index, part] = sources
                    first = plan.tensors[bundle.fragments[0].tensor]  # all tensors of a bundle have the same use
                    self._stage_of[bundle.index, part] = plan.stage_of((first.unit, first.last_unit)[part])
                    for source in sources:
                        self._bundles_of.setdefault(source, []).append(bundle)
        self._loop = asyncio.get_running_loop()
        # A single thread keeps the order of the backward pass and leaves the other cores to that pass.
        self.encode_thread = ThreadPoolExecutor(1, "encode")
        self._encoding: deque[_SlotOfStep] = deque()
        self._failed: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Keep all streams open.

        Raises ProtocolError when a server refuses a contribution for a reason that does not pass. Raises any error of
        the encoding, because the step would wait for that contribution without end.
        """
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
        """Use the codec that the servers have named for all contributions from the next slot on."""
        self._codec = codec

    def submit(self, step: int, slot: int) -> Emit:
        """Return the `Emit` that takes what a slot contributes. Called in the compute thread.

        Waits until at most one slot is being encoded, so the values of at most two slots are held.
        """
        while len(self._encoding) > 1:
            for future in self._encoding.popleft().futures:
                future.result()
        key = _SlotOfStep(step, slot, self._codec)
        self._encoding.append(key)
        encode = partial(self._encode_later, key)
        # In a round a fault strikes at an inner step, before its gradients are used.
        spoils = partial(self._faults.spoils, step, slot) if not self._plan.rounds.is_round(step) else lambda: False
        return SlotEmit(self._bundles_of, self._sources_of, encode, spoils)

    def close(self) -> None:
        """Stop encoding."""
        self.encode_thread.shutdown(wait=True, cancel_futures=True)

    def _encode_later(
        self, key: _SlotOfStep, bundle: Bundle, part: int, values: dict[int, torch.Tensor], totals: SlotTotals
    ) -> None:
        at = (bundle.index, part)
        let_go = self.backlog.add(key.step, key.slot, self._stage_of[at], at)
        future = self.encode_thread.submit(self._encode, key, bundle, part, values, totals, let_go)
        future.add_done_callback(self._encoded)
        key.futures.append(future)

    def _encode(
        self,
        key: _SlotOfStep,
        bundle: Bundle,
        part: int,
        values: dict[int, torch.Tensor],
        totals: SlotTotals,
        let_go: Callable[[], None],
    ) -> None:
        begin_ns = clock_ns()
        codec = self._book.of(bundle, self._plan.codec_of(bundle, key.codec))
        slices = [
            values[fragment.tensor].reshape(-1)[fragment.begin : fragment.end].float() for fragment in bundle.fragments
        ]
        payloads = self.residuals.encode(codec, slices, key.step, key.slot)
        num_bytes = sum(map(len, payloads))
        header = pb.ContributionHeader(
            job_id=self._plan.job_id,
            epoch=self._plan.epoch,
            step=key.step,
            slot=key.slot,
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
        self._loop.call_soon_threadsafe(self.streams[bundle.server].put, Contribution(header, payloads, let_go))
        self._timeline.add(SpanKind.ENCODE, begin_ns, clock_ns(), key.slot, bundle.index, num_bytes)
