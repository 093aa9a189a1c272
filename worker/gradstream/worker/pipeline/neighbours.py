"""A worker's neighbours in a pipeline: activations and gradients to them and from them, over one stream a neighbour and
direction.

The first worker of a replica begins attempts, and each passes them on to the next. They are computed in turn; what
belongs to an abandoned one is dropped, so nothing of it is ever used. Which tensors an attempt brings, and in which
order, follows from its schedule: whatever else comes is refused before a byte is allocated for it.

A tensor that was sent stays with the sender until the neighbour has it. After a break what is missing goes again, and
what came twice is dropped.

`Neighbours.receive` and `send` run in the compute thread; all else on the event loop.
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
from gradstream.core.wire.frames import checksum
from gradstream.proto.v1 import worker_pb2 as pb
from gradstream.worker.attempt import AbandonedError, Attempt, schedule_for
from gradstream.worker.pipeline.checks import HeaderChecks
from gradstream.worker.pipeline.inbound import BACKWARD, FORWARD, WORDS, Inbound, Key, sequence, window_of
from gradstream.worker.pipeline.links import Link, Outgoing
from gradstream.worker.pipeline.place import Place, Shapes
from gradstream.worker.timeline import Timeline

log = get_logger()

MAX_REASON_CHARACTERS = 300
MAX_ELEMENTS_AT_ONCE = 1 << 18
"""Tensors up to this size are encoded by the compute thread: on a busy machine waking another thread takes longer."""


class Neighbours:
    """The neighbours of one worker in one place, and the attempt that is under way: the `Exchange` of a SlotComputer.

    `on_error` is called with what makes going on impossible; on the first worker, `on_void` when another one has
    abandoned an attempt.
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
    ):
        self.plan, self.place = plan, place
        self.latest: Attempt | None = None
        self.inbounds: dict[pb.Direction.ValueType, Inbound] = {}
        self.links: dict[pb.Direction.ValueType, Link] = {}
        self.waiting: tuple[str, float] | None = None
        """What the compute thread waits for, and since when in Unix seconds."""
        self.received_bytes = 0
        self._shapes = Shapes(plan, hidden_size)
        self._faults = faults
        self._on_error = on_error
        self._on_void = on_void
        self._timeline = timeline
        self._codec = codec_named(plan.recipe.pipeline.activations)
        self._checks = HeaderChecks(plan, place, self._shapes, self._codec)
        self._is_raw = self._codec.name == "fp32"  # sent from where they lie, used where they arrive
        self._loop = asyncio.get_running_loop()
        self._condition = threading.Condition()
        self._running: Attempt | None = None
        self._wanted: Callable[[], bool] = lambda: True
        self._void_before = 0
        self._ended = False
        self._abandoned = 0  # the highest attempt that was told to be
        self._upcoming: deque[Attempt] = deque()
        self._changed = asyncio.Event()
        # What is large is encoded, and whatever comes decoded, off the compute thread and off the event loop.
        self._thread = ThreadPoolExecutor(1, "neighbours")
        self._encodes_apart = False  # whether it has had anything to encode
        self._open_streams(transport)
        self._tasks = [asyncio.create_task(self._keep(link)) for link in self.links.values()]

    def _open_streams(self, transport: Transport) -> None:
        plan, place = self.plan, self.place
        size, index, chunks = plan.replica_size, place.index, plan.num_chunks > 1
        # Activations go up the ring, gradients down; between the last worker and the first only with several chunks.
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
        """On the first worker: begin an attempt, and tell the others. Waits until what this one has sent before is
        under way: the neighbours' credit bounds how far it runs ahead of them."""
        if self._encodes_apart:
            await self._loop.run_in_executor(self._thread, lambda: None)  # what is being encoded comes first
        await self.links[FORWARD].flush()
        number = self.latest.number + 1 if self.latest is not None else 1
        attempt = Attempt(number, version, slots, validate)
        self._take_up(attempt, self._void_before)
        return attempt

    async def next_attempt(self) -> Attempt:
        """On the others: wait for the next attempt."""
        while not self._upcoming:
            self._changed.clear()
            await self._changed.wait()
        return self._upcoming[0]

    def took(self, attempt: Attempt) -> None:
        """An attempt that `next_attempt` gave is no longer to come."""
        if self._upcoming and self._upcoming[0] is attempt:
            self._upcoming.popleft()

    def is_valid(self, attempt: Attempt) -> bool:
        """Whether an attempt has not been abandoned."""
        return not self._ended and attempt.number >= self._void_before

    def abandon(self, attempt: Attempt, reason: str) -> None:
        """This worker cannot go on with an attempt: on the first one all are void, else it is asked to begin
        another."""
        log.info("an attempt is abandoned", number=attempt.number, step=attempt.version, reason=reason)
        if self.place.is_first:
            self.void()
        else:
            header = pb.StageHeader(abandon=pb.StageAbandon(number=attempt.number, reason=reason))
            self.links[BACKWARD].put(Outgoing(header, []))

    def void(self) -> None:
        """Nothing of the attempts that have begun is wanted any more."""
        if self.latest is not None:
            self._forget_before(self.latest.number + 1)
        self.wake()

    def end(self) -> None:
        """They are neighbours no more: no attempt is valid, nor will be."""
        self._ended = True
        self.void()

    def wake(self) -> None:
        """Make the compute thread look whether it is wanted."""
        with self._condition:
            self._condition.notify_all()

    def _forget_before(self, number: int) -> None:
        with self._condition:
            self._void_before = max(self._void_before, number)
            for inbound in self.inbounds.values():
                inbound.forget_before(number)
            self._condition.notify_all()
        for link in self.links.values():
            link.forget_before(number)
        self._upcoming = deque(attempt for attempt in self._upcoming if attempt.number >= number)

    def _take_up(self, attempt: Attempt, void_before: int) -> None:
        schedule = schedule_for(self.plan, attempt)
        size, index = self.plan.replica_size, self.place.index
        orders = {
            direction: sequence(schedule, (index + (-1 if direction == FORWARD else 1)) % size, index, direction)
            for direction in self.inbounds
        }
        window = window_of(schedule, index)
        shape = self._shapes.of(attempt, 0)
        count = 0 if self._is_raw else window
        posted = [[torch.empty(shape) for _ in range(min(count, len(order)))] for order in orders.values()]
        self._forget_before(void_before)
        with self._condition:
            self.latest = attempt
            for inbound, buffers in zip(self.inbounds.values(), posted, strict=True):
                inbound.begin(attempt, orders[inbound.direction], window, buffers)
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
        """From now on `receive` and `send` are those of this attempt; earlier ones are over here."""
        with self._condition:
            self._running, self._wanted = attempt, wanted
            for inbound in self.inbounds.values():
                inbound.forget_before(attempt.number)
        for inbound in self.inbounds.values():
            inbound.tell()

    def receive(self, action: Action) -> tuple[torch.Tensor, float]:
        """See `Exchange`."""
        attempt = self._running
        assert attempt is not None
        forward = action.op is Op.FORWARD
        inbound = self.inbounds[FORWARD if forward else BACKWARD]
        key = (attempt.number, (action.stage + (-1 if forward else 1), action.microbatch))
        with self._condition:
            if not self._is_here(inbound, key):
                self.waiting = (f"the next {WORDS[inbound.direction]} from {inbound.title}", time.time())
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
        """Whether a tensor has arrived; the condition must be held. Raises AbandonedError."""
        if self._ended or key[0] < self._void_before or not self._wanted():
            raise AbandonedError
        return key in inbound.arrived

    def send(self, action: Action, tensor: torch.Tensor, loss_sum: float) -> None:
        """See `Exchange`."""
        attempt = self._running
        assert attempt is not None
        schedule = schedule_for(self.plan, attempt)
        slot = attempt.slots[action.microbatch // (schedule.num_microbatches // len(attempt.slots))]
        self._faults.sent(attempt.version, slot)
        # By the largest of all, so that a worker's tensors take one way and stay in order.
        if tensor.device.type == "cpu" and math.prod(self._shapes.largest) <= MAX_ELEMENTS_AT_ONCE:
            self._encode(attempt, action, tensor, loss_sum)
            return
        self._encodes_apart = True
        self._thread.submit(self._encode, attempt, action, tensor, loss_sum).add_done_callback(self._told)

    def _told(self, encoding: Future[None]) -> None:
        """An error of the thread that encodes must not leave the neighbour waiting."""
        error = None if encoding.cancelled() else encoding.exception()
        if isinstance(error, Exception):
            self._loop.call_soon_threadsafe(self._on_error, error)

    def _encode(self, attempt: Attempt, action: Action, tensor: torch.Tensor, loss_sum: float) -> None:
        flat = tensor.detach().float().contiguous().reshape(-1)
        in_place = self._is_raw and flat.device.type == "cpu"
        payload: Payload = flat.numpy().view(np.uint8) if in_place else self._codec.encode(flat)
        header = pb.StageHeader(
            tensor=pb.StageTensor(
                attempt_number=attempt.number,
                stage=action.stage,
                microbatch=action.microbatch,
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

    # -- what neighbours say ---------------------------------------------------------------------------------------

    def check(self, inbound: Inbound, header: pb.StageHeader) -> bool:
        """Check a message's header before anything is allocated for it; whether its payload is to be used. Raises
        ProtocolError that names the neighbour."""
        return self._checks.check(inbound, header, self.latest, len(self._upcoming))

    async def take(self, inbound: Inbound, header: pb.StageHeader, payload: Payload) -> None:
        """Act on a checked message that is whole. Raises ProtocolError."""
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
        found = checksum(payload)
        if found != header.crc32c:
            raise ProtocolError(
                f"{inbound.title}, {WORDS[inbound.direction]} of microbatch {tensor.microbatch} from stage "
                f"{tensor.stage}: checksum {found:08x} is not the announced {header.crc32c:08x}; "
                f"the bytes changed on the way"
            )
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


def check_hello(neighbours: Neighbours, hello: pb.StageHello) -> Inbound:
    """Whose stream it is. Raises ProtocolError when its sender is no neighbour, StaleEpochError when it was one."""
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
