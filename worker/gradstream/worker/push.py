"""Gradients leaving: encoded off the compute thread, streamed to the server of each fragment, sent again after a break.

Everything here but `Pusher.submit` runs on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import grpc.aio
import torch

from gradstream.core.codecs import Payload, codec_named
from gradstream.core.errors import ProtocolError, one_line
from gradstream.core.log import get_logger
from gradstream.core.plan import Plan, Server
from gradstream.core.rpc import Backoff, error_from_rpc, refused_for_good
from gradstream.core.wire import ParameterServerStub, checksum, frames
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.worker.compute import SlotTotals
from gradstream.worker.faults import Faults

log = get_logger()

DEFAULT_WINDOW_BYTES = 4 << 20
"""Bytes that may be under way before the server has named its window."""


@dataclass(frozen=True)
class Contribution:
    """One encoded gradient of one fragment."""

    header: pb.ContributionHeader
    payload: Payload


class PushStream:
    """Delivers contributions to one server, in order, until each is acknowledged."""

    def __init__(self, server: Server, stub: ParameterServerStub, faults: Faults):
        self.server = server
        self.unreachable_since: float | None = None
        self.sent_bytes = 0
        self._stub = stub
        self._faults = faults
        self._waiting: deque[Contribution] = deque()
        self._under_way: deque[Contribution] = deque()
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
                self._under_way_bytes -= contribution.payload.nbytes
                self._changed.set()
                self._faults.acknowledged(response.step, response.slot)
        finally:
            call.cancel()
            # gRPC leaves the iterator of a call that broke suspended; it must not take what the next stream shall send.
            self._num_streams += 1
            self._changed.set()

    async def _messages(self, number: int) -> AsyncIterator[bytes]:
        while True:
            while number == self._num_streams and (
                not self._waiting
                or (self._under_way and self._under_way_bytes + self._waiting[0].payload.nbytes > self._window_bytes)
            ):
                self._changed.clear()
                await self._changed.wait()
            if number != self._num_streams:
                return
            contribution = self._waiting.popleft()
            self._under_way.append(contribution)
            self._under_way_bytes += contribution.payload.nbytes
            self.sent_bytes += contribution.payload.nbytes
            for message in frames(contribution.header, contribution.payload):
                yield message


def _acknowledges(response: pb.PushResponse, header: pb.ContributionHeader) -> bool:
    """Whether a response is about the contribution with this header."""
    keys = [(item.step, item.slot, item.fragment, item.part) for item in (response, header)]
    return keys[0] == keys[1]


class Pusher:
    """Cuts gradients into fragments, encodes them in a thread of its own and hands them to the servers' streams."""

    def __init__(self, plan: Plan, stubs: list[ParameterServerStub], faults: Faults):
        self.streams = [PushStream(server, stub, faults) for server, stub in zip(plan.servers, stubs, strict=True)]
        self._plan = plan
        self._faults = faults
        self._codec = codec_named(plan.recipe.codec.push)
        self._by_tensor: dict[int, list[int]] = {}
        for fragment in plan.fragments:
            self._by_tensor.setdefault(fragment.tensor, []).append(fragment.index)
        self._loop = asyncio.get_running_loop()
        # One thread keeps the order of the backward pass, and leaves the cores to it.
        self._executor = ThreadPoolExecutor(1, "encode")
        self._encoding: deque[list[Future[None]]] = deque()

    async def run(self) -> None:
        """Keep all streams open. Raises ProtocolError when a server refuses a contribution for good."""
        async with asyncio.TaskGroup() as group:
            for stream in self.streams:
                group.create_task(stream.run())

    def begin_slot(self) -> None:
        """Wait, in the compute thread, until at most one slot is being encoded: gradients of at most two are held."""
        while len(self._encoding) > 1:
            for future in self._encoding.popleft():
                future.result()
        self._encoding.append([])

    def submit(self, step: int, slot: int) -> Callable[[int, torch.Tensor, SlotTotals], None]:
        """The `emit` of SlotComputer.run_slot for one slot; called in the compute thread."""

        def emit(tensor: int, gradient: torch.Tensor, totals: SlotTotals) -> None:
            if self._faults.spoils(step, slot):
                gradient.fill_(float("nan"))
            self._encoding[-1].append(self._executor.submit(self._encode, step, slot, tensor, gradient, totals))

        return emit

    def close(self) -> None:
        """Stop encoding."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _encode(self, step: int, slot: int, tensor: int, gradient: torch.Tensor, totals: SlotTotals) -> None:
        flat_N = gradient.reshape(-1).float()
        for index in self._by_tensor[tensor]:
            fragment = self._plan.fragments[index]
            payload = self._codec.encode(flat_N[fragment.begin : fragment.end])
            header = pb.ContributionHeader(
                job_id=self._plan.job_id,
                epoch=self._plan.epoch,
                step=step,
                slot=slot,
                fragment=index,
                codec=self._codec.wire,
                num_elements=fragment.num_elements,
                payload_bytes=payload.nbytes,
                crc32c=checksum(payload),
                slot_tokens=totals.num_tokens,
                slot_samples=totals.num_samples,
                slot_loss_sum=totals.loss_sum,
            )
            stream = self.streams[self._plan.placement[index]]
            self._loop.call_soon_threadsafe(stream.put, Contribution(header, payload))
