"""Exchanges activations and gradients with a worker's neighbours in a pipeline, over one stream a neighbour and
direction, and the messages of reductions (gradstream.worker.pipeline.reduction).

The first worker of a replica begins attempts, and each worker passes them on to the next. Attempts are computed in
turn. Tensors of an abandoned attempt are dropped and never used. The schedule of an attempt determines which tensors
come and in which order; any other tensor is refused before a byte is allocated for it.

The sender keeps a tensor until the neighbour has it. After a break the sender sends the missing tensors again, and the
receiver drops duplicates.

`Neighbours.receive` and `send`, those of reductions and `begin_inner_step` run in the compute thread; everything else
runs on the event loop.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from gradstream.core.codecs import Payload, codec_named
from gradstream.core.errors import ProtocolError, StaleEpochError
from gradstream.core.log import get_logger
from gradstream.core.node.faults import Faults
from gradstream.core.pipeline.schedule import Action, Op
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.transport import PLAIN, Transport
from gradstream.core.wire.frames import checksum, verify
from gradstream.proto.v1 import worker_pb2 as pb
from gradstream.worker.attempt import (
    AbandonedError,
    Attempt,
    is_round,
    num_inner_steps,
    num_microbatches,
    schedule_for,
)
from gradstream.worker.pipeline.checks import HeaderChecks
from gradstream.worker.pipeline.inbound import (
    BACKWARD,
    FORWARD,
    REDUCTION,
    WORDS,
    Expectation,
    Inbound,
    Key,
    sequence,
    window_of,
)
from gradstream.worker.pipeline.layout import Layout
from gradstream.worker.pipeline.links import Link, Outgoing
from gradstream.worker.pipeline.place import Place, Shapes
from gradstream.worker.timeline import Timeline

log = get_logger()

MAX_REASON_CHARACTERS = 300
MAX_ELEMENTS_AT_ONCE = 1 << 18
"""The compute thread itself encodes tensors up to this size: on a busy machine waking another thread takes longer."""


class Neighbours:
    """The neighbours of one worker in one place, and the attempt that is under way: the `Exchange` of a SlotComputer.

    `on_error` is called with an error after which this worker cannot go on. On the first worker, `on_void` is called
    when another worker has abandoned an attempt. `on_wake` is called when an attempt may have become void.
    """

    def __init__(
        self,
        plan: Plan,
        place: Place,
        hidden_size: int,
        faults: Faults,
        timeline: Timeline,
        on_error: Callable[[Exception], None],
        on_void: Callable[[], None],
        transport: Transport = PLAIN,
        on_wake: Callable[[], None] = lambda: None,
    ):
        self.plan, self.place = plan, place
        self.latest: Attempt | None = None
        self.inbounds: dict[pb.Direction.ValueType, Inbound] = {}
        self.links: dict[pb.Direction.ValueType, Link] = {}
        self.waiting: tuple[str, float] | None = None
        """The message that the compute thread waits for, in words, and since when in Unix seconds."""
        self.received_bytes = 0
        self._shapes = Shapes(plan, hidden_size)
        self._faults = faults
        self._on_error = on_error
        self._on_void = on_void
        self._on_wake = on_wake
        self._timeline = timeline
        self._codec = codec_named(plan.recipe.pipeline.activations)
        self._layout = Layout(plan)
        self._checks = HeaderChecks(plan, place, self._shapes, self._codec, self._layout)
        self._is_raw = self._codec.name == "fp32"  # tensors are sent and used without a copy
        self._loop = asyncio.get_running_loop()
        self._condition = threading.Condition()
        self._running: Attempt | None = None
        self._inner_step = 0
        self._first_microbatch = 0  # of the inner step, counted over the round
        self._wanted: Callable[[], bool] = lambda: True
        self._void_before = 0
        self._ended = False
        self._abandoned = 0  # the highest attempt whose abandonment was passed on
        self._upcoming: deque[Attempt] = deque()
        self._changed = asyncio.Event()
        # Encodes large tensors and decodes all arriving ones, off the compute thread and off the event loop.
        self._thread = ThreadPoolExecutor(1, "neighbours")
        self._encodes_apart = False  # whether that thread was ever given a tensor to encode
        self._open_streams(transport)
        self._tasks = [asyncio.create_task(self._keep(link)) for link in self.links.values()]

    def _open_streams(self, transport: Transport) -> None:
        plan, place = self.plan, self.place
        size, index, chunks = plan.replica_size, place.index, plan.num_chunks > 1
        # Activations go up the ring, gradients go down. The last and the first worker are linked only with several
        # chunks.
        for direction, step in ((FORWARD, 1), (BACKWARD, -1)):
            after, before = (index + step) % size, (index - step) % size
            wraps_out, wraps_in = index + step != after, index - step != before
            if chunks or not wraps_out:
                hello = pb.StageHello(
                    job_id=plan.job_id,
                    epoch=plan.epoch,
                    table=place.replica.number,
                    worker=index,
                    direction=direction,
                )
                self.links[direction] = Link(place.title(after), place.replica.workers[after].address, hello, transport)
            if chunks or not wraps_in:
                self.inbounds[direction] = Inbound(place.title(before), direction)

    async def close(self) -> None:
        """End all streams. A thread that waits in `receive` gets AbandonedError."""
        self.end()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for inbound in self.inbounds.values():
            inbound.tell()
        for link in self.links.values():
            await link.close()
        await asyncio.to_thread(self._thread.shutdown, True, cancel_futures=True)

    async def _keep(self, link: Link) -> None:
        try:
            await link.run()
        except Exception as error:
            self._on_error(error)

    # -- attempts -----------------------------------------------------------------------------------------------------

    async def begin(self, version: int, slots: tuple[int, ...], validate: bool) -> Attempt:
        """Begin an attempt, on the first worker, and tell the other workers.

        Waits until all earlier messages of this worker are under way, so the neighbours' credit bounds how far it runs
        ahead of them.
        """
        if self._encodes_apart:
            await self._loop.run_in_executor(self._thread, lambda: None)  # wait for tensors that are being encoded
        await self.links[FORWARD].flush()
        number = self.latest.number + 1 if self.latest is not None else 1
        attempt = Attempt(number, version, slots, validate)
        self._take_up(attempt, self._void_before)
        return attempt

    async def next_attempt(self) -> Attempt:
        """Wait for the next attempt. Called on all workers but the first."""
        while not self._upcoming:
            self._changed.clear()
            await self._changed.wait()
        return self._upcoming[0]

    def took(self, attempt: Attempt) -> None:
        """Remove an attempt that `next_attempt` returned from the queue."""
        if self._upcoming and self._upcoming[0] is attempt:
            self._upcoming.popleft()

    def is_valid(self, attempt: Attempt) -> bool:
        """Return whether an attempt is still valid: not abandoned, and with neighbours that have not ended."""
        return not self._ended and attempt.number >= self._void_before

    def abandon(self, attempt: Attempt, reason: str) -> None:
        """Give up an attempt that this worker cannot go on with.

        On the first worker all attempts become void; any other worker asks the first one to begin another.
        """
        log.info("an attempt is abandoned", number=attempt.number, step=attempt.version, reason=reason)
        if self.place.is_first:
            self.void()
        else:
            header = pb.StageHeader(abandon=pb.StageAbandon(number=attempt.number, reason=reason))
            self.links[BACKWARD].put(Outgoing(header, []))

    def void(self) -> None:
        """Make all attempts that have begun void: drop their tensors."""
        if self.latest is not None:
            self._forget_before(self.latest.number + 1)
        self.wake()

    def end(self) -> None:
        """End the exchange with these neighbours: from now on no attempt is valid."""
        self._ended = True
        self.void()

    def wake(self) -> None:
        """Wake the compute thread to check whether its attempt is still wanted."""
        with self._condition:
            self._condition.notify_all()
        self._on_wake()

    def _forget_before(self, number: int) -> None:
        with self._condition:
            self._void_before = max(self._void_before, number)
            for inbound in self.inbounds.values():
                inbound.forget_before(number)
        self.wake()
        for link in self.links.values():
            link.forget_before(number)
        self._upcoming = deque(attempt for attempt in self._upcoming if attempt.number >= number)

    def _take_up(self, attempt: Attempt, void_before: int) -> None:
        schedule = schedule_for(self.plan, attempt)
        size, index = self.plan.replica_size, self.place.index
        expectations = {}
        for direction in self.inbounds:
            sender = index + (-1 if direction == FORWARD else 1)
            expectations[direction] = Expectation(
                sequence(schedule, sender % size, index, direction),
                schedule.num_microbatches,
                num_inner_steps(self.plan, attempt),
                is_round(self.plan, attempt) and 0 <= sender < size,
            )
        window = window_of(schedule, index)
        shape = self._shapes.of(attempt, 0)
        count = 0 if self._is_raw else window
        posted = [
            [torch.empty(shape) for _ in range(min(count, len(expectation.order)))]
            for expectation in expectations.values()
        ]
        self._forget_before(void_before)
        with self._condition:
            self.latest = attempt
            for inbound, buffers in zip(self.inbounds.values(), posted, strict=True):
                inbound.begin(attempt, expectations[inbound.direction], window, buffers)
        if index + 1 < size:
            begin = pb.StageAttempt(
                number=attempt.number,
                version=attempt.version,
                slots=attempt.slots,
                validate=attempt.validate,
                void_before=void_before,
            )
            self.links[FORWARD].put(Outgoing(pb.StageHeader(begin=begin), []))
        if not self.place.is_first:
            self._upcoming.append(attempt)
        self._changed.set()

    # -- the compute thread's side ---------------------------------------------------------------------------------

    def run(self, attempt: Attempt, wanted: Callable[[], bool]) -> None:
        """Let `receive` and `send` work for this attempt from now on; earlier attempts are over on this worker."""
        with self._condition:
            self._running, self._wanted = attempt, wanted
            self._inner_step = self._first_microbatch = 0
            for inbound in self.inbounds.values():
                inbound.forget_before(attempt.number)
        for inbound in self.inbounds.values():
            inbound.tell()

    def begin_inner_step(self, number: int) -> None:
        """Let `receive` and `send` work for an inner step of the running attempt, a round, from now on."""
        assert self._running is not None
        self._inner_step = number
        self._first_microbatch = number * num_microbatches(self.plan, self._running)

    def receive(self, action: Action) -> tuple[torch.Tensor, float]:
        """See `Exchange`."""
        forward = action.op is Op.FORWARD
        inbound = self.inbounds[FORWARD if forward else BACKWARD]
        key = (action.stage + (-1 if forward else 1), self._first_microbatch + action.microbatch)
        return self._next(inbound, key, WORDS[inbound.direction])

    def receive_reduction(self, direction: pb.Direction.ValueType) -> Payload:
        """Wait for the neighbour's message of the inner step's reduction. Raises AbandonedError if it will not come."""
        payload: Payload = self._next(self.inbounds[direction], (REDUCTION, self._inner_step), "reduction")[0].numpy()
        return payload

    def _next(self, inbound: Inbound, of_attempt: Key, word: str) -> tuple[torch.Tensor, float]:
        """Wait for a message of the running attempt. Raises AbandonedError."""
        assert self._running is not None
        key = (self._running.number, of_attempt)
        with self._condition:
            if not self._is_here(inbound, key):
                self.waiting = (f"the next {word} from {inbound.title}", time.time())
                try:
                    with self._timeline.waiting():
                        while not self._is_here(inbound, key):
                            self._condition.wait()
                finally:
                    self.waiting = None
            tensor, loss_sum = inbound.arrived.pop(key)
        self._loop.call_soon_threadsafe(inbound.tell)
        return tensor, loss_sum

    def _is_here(self, inbound: Inbound, key: tuple[int, Key]) -> bool:
        """Return whether a message has arrived. The caller must hold the condition. Raises AbandonedError."""
        if self._ended or key[0] < self._void_before or not self._wanted():
            raise AbandonedError
        return key in inbound.arrived

    def send(self, action: Action, tensor: torch.Tensor, loss_sum: float) -> None:
        """See `Exchange`."""
        attempt = self._running
        assert attempt is not None
        schedule = schedule_for(self.plan, attempt)
        slot = attempt.slots[action.microbatch // (schedule.num_microbatches // len(attempt.slots))]
        self._faults.sent(self.plan.rounds.steps_at(attempt.version) + self._inner_step, slot)
        microbatch = self._first_microbatch + action.microbatch
        # The size of the largest microbatch decides for all: one thread encodes a worker's tensors, in order.
        if tensor.device.type == "cpu" and math.prod(self._shapes.largest) <= MAX_ELEMENTS_AT_ONCE:
            self._encode(attempt, action, microbatch, tensor, loss_sum)
            return
        self._encodes_apart = True
        encoding = self._thread.submit(self._encode, attempt, action, microbatch, tensor, loss_sum)
        encoding.add_done_callback(self._told)

    def send_reduction(self, direction: pb.Direction.ValueType, payload: Payload) -> None:
        """Send this worker's message of the inner step's reduction, behind all tensors of that step."""
        attempt = self._running
        assert attempt is not None
        reduction = pb.StageReduction(attempt_number=attempt.number, inner_step=self._inner_step)
        if self._encodes_apart:
            self._thread.submit(self._give, attempt, direction, reduction, payload).add_done_callback(self._told)
        else:
            self._give(attempt, direction, reduction, payload)

    def _give(
        self, attempt: Attempt, direction: pb.Direction.ValueType, reduction: pb.StageReduction, payload: Payload
    ) -> None:
        header = pb.StageHeader(reduction=reduction, payload_bytes=len(payload), crc32c=checksum(payload))
        self._loop.call_soon_threadsafe(self._put, self.links[direction], attempt, Outgoing(header, [payload]))

    def _told(self, encoding: Future[None]) -> None:
        """Report an error of the encoding thread, because the neighbour would wait for the tensor without end."""
        error = None if encoding.cancelled() else encoding.exception()
        if isinstance(error, Exception):
            self._loop.call_soon_threadsafe(self._on_error, error)

    def _encode(self, attempt: Attempt, action: Action, microbatch: int, tensor: torch.Tensor, loss_sum: float) -> None:
        flat = tensor.detach().float().contiguous().reshape(-1)
        in_place = self._is_raw and flat.device.type == "cpu"
        payload: Payload = flat.numpy().view(np.uint8) if in_place else self._codec.encode(flat)
        header = pb.StageHeader(
            tensor=pb.StageTensor(
                attempt_number=attempt.number,
                stage=action.stage,
                microbatch=microbatch,
                shape=tensor.shape,
                codec=self._codec.wire,
                loss_sum=loss_sum,
            ),
            payload_bytes=len(payload),
            crc32c=checksum(payload),
        )
        link = self.links[FORWARD if action.op is Op.FORWARD else BACKWARD]
        self._loop.call_soon_threadsafe(self._put, link, attempt, Outgoing(header, [payload]))

    def _put(self, link: Link, attempt: Attempt, message: Outgoing) -> None:
        if self.is_valid(attempt):
            link.put(message)

    # -- messages from neighbours ----------------------------------------------------------------------------------

    def check(self, inbound: Inbound, header: pb.StageHeader) -> bool:
        """Check a message's header before anything is allocated for it; return whether its payload is to be used.

        Raises ProtocolError that names the neighbour.
        """
        return self._checks.check(inbound, header, self.latest, len(self._upcoming))

    async def take(self, inbound: Inbound, header: pb.StageHeader, payload: Payload) -> None:
        """Act on a complete message whose header was checked. Raises ProtocolError."""
        kind = header.WhichOneof("content")
        if kind == "begin":
            begin = header.begin
            if self.latest is None or begin.number > self.latest.number:
                attempt = Attempt(begin.number, begin.version, tuple(begin.slots), begin.validate)
                self._take_up(attempt, begin.void_before)
        elif kind == "abandon":
            self._heard_abandon(inbound, header.abandon)
        elif kind == "tensor":
            await self._take_tensor(inbound, header, payload)
        elif kind == "reduction":
            self._take_reduction(inbound, header, payload)

    def _heard_abandon(self, inbound: Inbound, abandon: pb.StageAbandon) -> None:
        if self.latest is None or not self._void_before <= abandon.number <= self.latest.number:
            return
        reason = " ".join(abandon.reason[:MAX_REASON_CHARACTERS].split())
        log.info("an attempt was abandoned", number=abandon.number, by=inbound.title, reason=reason)
        if self.place.is_first:
            self.void()
            self._on_void()
        elif abandon.number > self._abandoned:
            self._abandoned = abandon.number
            told = pb.StageAbandon(number=abandon.number, reason=abandon.reason[:MAX_REASON_CHARACTERS])
            self.links[BACKWARD].put(Outgoing(pb.StageHeader(abandon=told), []))

    async def _take_tensor(self, inbound: Inbound, header: pb.StageHeader, payload: Payload) -> None:
        tensor = header.tensor
        what = f"{WORDS[inbound.direction]} of microbatch {tensor.microbatch} from stage {tensor.stage}"
        verify(header, payload, f"{inbound.title}, {what}")
        shape = tuple(tensor.shape)
        if self._is_raw:
            values = torch.from_numpy(payload.view(np.float32)).view(shape)
        else:
            values = inbound.buffer(shape)
            await self._loop.run_in_executor(self._thread, self._codec.decode, payload, values.view(-1))
        with self._condition:
            if inbound.take(tensor.attempt_number, (tensor.stage, tensor.microbatch), values, tensor.loss_sum):
                self.received_bytes += len(payload)
                self._condition.notify_all()

    def _take_reduction(self, inbound: Inbound, header: pb.StageHeader, payload: Payload) -> None:
        reduction = header.reduction
        what = f"{inbound.title}, reduction of inner step {reduction.inner_step}"
        verify(header, payload, what)
        try:
            self._layout.check_numbers(payload, self.place.index, inbound.direction)
        except ProtocolError as error:
            raise ProtocolError(f"{what}: {error}") from None
        with self._condition:
            key = (REDUCTION, reduction.inner_step)
            if inbound.take(reduction.attempt_number, key, torch.from_numpy(payload), 0.0):
                self.received_bytes += len(payload)
                self._condition.notify_all()


def check_hello(neighbours: Neighbours, hello: pb.StageHello) -> Inbound:
    """Find the inbound side that a stream's hello belongs to.

    Raises ProtocolError when the sender is no neighbour, and StaleEpochError when it is not in this worker's replica
    under this plan.
    """
    plan, place = neighbours.plan, neighbours.place
    if (hello.job_id, hello.epoch, hello.table) != (plan.job_id, plan.epoch, place.replica.number):
        raise StaleEpochError(
            f"replica {hello.table} of {hello.job_id} epoch {hello.epoch} is not in force here: this worker is in "
            f"replica {place.replica.number} of {plan.job_id} epoch {plan.epoch}"
        )
    inbound = neighbours.inbounds.get(hello.direction)
    step = 1 if hello.direction == FORWARD else -1
    if inbound is None or (hello.worker + step) % plan.replica_size != place.index:
        raise ProtocolError(
            f"a stream from place {hello.worker} of the replica is not for place {place.index}; only neighbours stream"
        )
    return inbound
