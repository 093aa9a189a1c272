"""A worker holds the encoded gradients of at most two slots: the third waits, and nothing is lost or sent twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from support.micro import micro_plan

from gradstream.core.model.model import initial_weights
from gradstream.core.node.faults import Faults
from gradstream.core.pipeline.schedule import SCHEDULES, make_schedule, unavailable
from gradstream.core.plan.sizes import MAX_ENCODED_SLOTS
from gradstream.core.rpc.channel import listen, new_server, open_channel
from gradstream.core.telemetry.timeline import SpanKind
from gradstream.core.wire.frames import checksum, parse
from gradstream.core.wire.stubs import ParameterServerStub, add_parameter_server
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.worker.attempt import AbandonedError, Alone, Attempt
from gradstream.worker.backlog import Backlog
from gradstream.worker.compute import SlotComputer, last_backwards
from gradstream.worker.push import Pusher
from gradstream.worker.samples.data import Batch
from gradstream.worker.timeline import Timeline

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_SLOTS = 4
PLAN = micro_plan(num_slots=NUM_SLOTS, global_batch=8)
TOKENS = np.random.default_rng(0).integers(0, 64, size=(NUM_SLOTS, 2, 9))


class Receiver:
    """A server's Push alone. It takes every contribution, and acknowledges while `open` is set."""

    def __init__(self) -> None:
        self.received: list[tuple[int, int]] = []  # (slot, bundle)
        self.taken: dict[tuple[int, int], int] = {}  # their checksums
        self.open = asyncio.Event()
        self.came = asyncio.Event()

    async def Push(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[pb.PushResponse]:
        yield pb.PushResponse(window_bytes=1 << 20)
        async for message in messages:
            found, payload = parse(message)
            header = pb.ContributionHeader.FromString(bytes(found or b""))
            key = (header.slot, header.bundle)
            self.received.append(key)
            assert self.taken.setdefault(key, checksum(bytes(payload))) == header.crc32c
            self.came.set()
            await self.open.wait()
            yield pb.PushResponse(
                window_bytes=1 << 20,
                result=pb.PUSH_RESULT_ACCEPTED,
                step=header.step,
                slot=header.slot,
                bundle=header.bundle,
            )

    async def Pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[bytes]:
        raise NotImplementedError
        yield b""

    async def CompleteStep(self, request: Any, context: Any) -> None: ...

    async def CompleteSlots(self, request: Any, context: Any) -> None: ...

    async def GetServerStatus(self, request: Any, context: Any) -> None: ...

    async def serve(self, address: str) -> tuple[grpc.aio.Server, int]:
        server = new_server()
        add_parameter_server(self, server)
        port = listen(server, address)
        await server.start()
        return server, port


class Work:
    """A worker's computation of all slots of step 0, in its compute thread."""

    def __init__(self, port: int):
        self.timeline = Timeline()
        self.channel = open_channel(f"127.0.0.1:{port}")
        self.pusher = Pusher(PLAN, [ParameterServerStub(self.channel)], Faults(""), self.timeline)
        self.computer = SlotComputer(PLAN, torch.device("cpu"))
        weights = dict(initial_weights(dict(PLAN.model_config), 0))
        with torch.no_grad():
            for name, parameter in self.computer.model.named_parameters():
                parameter.copy_(weights[name])
        self.superseded = False
        self.held: list[int] = []  # number of slots held after each slot
        self.sending = asyncio.create_task(self.pusher.run())
        self.computing = asyncio.create_task(asyncio.to_thread(self._compute))

    def _compute(self) -> None:
        for slot, tokens in enumerate(TOKENS):
            with self.timeline.computing(SpanKind.COMPUTE, slot):
                self.computer.run(
                    Attempt(0, 0, (slot,)),
                    {slot: Batch(tokens[:, :-1], tokens[:, 1:])},
                    lambda slot: self.pusher.submit(0, slot),
                    lambda: True,
                    Alone(),
                    lambda slot, stage: self.pusher.backlog.make_room(0, slot, stage, lambda: not self.superseded),
                )
            self.held.append(len({held.slot for held in self.pusher.backlog._slots[0] if held.held}))

    async def until_it_waits(self) -> str:
        async with asyncio.timeout(20):
            while self.pusher.backlog.waiting is None:  # noqa: ASYNC110 - set in the compute thread
                await asyncio.sleep(0.001)
        return self.pusher.backlog.waiting[0]

    async def close(self) -> None:
        self.superseded = True
        self.pusher.backlog.wake()
        self.sending.cancel()
        await asyncio.gather(self.sending, self.computing, return_exceptions=True)
        self.pusher.close()
        self.computer.close()
        await self.channel.close(None)


ALL = [(slot, bundle.index) for slot in range(NUM_SLOTS) for bundle in PLAN.bundles]


async def test_the_third_slot_waits_for_the_first_also_after_a_stream_broke() -> None:
    receiver = Receiver()
    server, port = await receiver.serve("127.0.0.1:0")
    work = Work(port)
    try:
        for turn in range(2):
            assert await work.until_it_waits() == "server-0 to acknowledge slot 0 of step 0"
            await receiver.came.wait()
            assert work.held == [1, 2]
            assert {slot for slot, _ in receiver.received} <= {0, 1}
            if turn == 0:  # cut the stream in mid-step: what was not acknowledged comes again
                await server.stop(None)
                receiver.came.clear()
                server, _ = await receiver.serve(f"127.0.0.1:{port}")
        receiver.open.set()
        await work.computing
        async with asyncio.timeout(20):
            # Encoding goes on after computing: the stream may be empty before the last slot's contributions are put.
            while len(receiver.taken) < len(ALL) or not work.pusher.streams[0].empty:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)
        assert max(work.held) == MAX_ENCODED_SLOTS
        assert sorted(receiver.taken) == sorted(ALL)
        assert not work.pusher.backlog._slots[0][-1].held
        waits = [span for span in work.timeline.take() if span[0] is SpanKind.WAIT]
        assert waits[0][3] == 2, "it counts as the third slot's wait"
        assert waits[0][4] is not None, "for a contribution"
    finally:
        await work.close()
        await server.stop(None)


async def test_a_step_that_others_committed_ends_the_wait() -> None:
    receiver = Receiver()
    server, port = await receiver.serve("127.0.0.1:0")
    work = Work(port)
    try:
        await work.until_it_waits()
        # The step is over: what waits unsent is dropped, and what is under way still counts.
        work.pusher.streams[0].forget_before(1)
        assert not work.computing.done()
        work.superseded = True
        work.pusher.backlog.wake()
        with pytest.raises(AbandonedError):
            await work.computing
        assert work.pusher.backlog.waiting is None
    finally:
        await work.close()
        await server.stop(None)


async def test_what_is_dropped_unsent_makes_room() -> None:
    work = Work(1)  # nothing listens there, so all contributions wait
    try:
        await work.until_it_waits()
        while not work.computing.done():
            work.pusher.streams[0].forget_before(1)
            await asyncio.sleep(0.001)
        assert len(work.held) == NUM_SLOTS
    finally:
        await work.close()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_stage_finishes_its_slots_one_after_the_other(name: str) -> None:
    """So the wait of one slot never waits for a pass that comes after it."""
    tried = 0
    for size in (1, 2, 3, 4):
        for per_slot in (1, 2, 3):
            for chunks in (1, 2, 3):
                count = 6 * per_slot
                if unavailable(name, size, count, chunks):
                    continue
                for row in make_schedule(name, size, count, chunks).rows:
                    finals = last_backwards(row, per_slot)
                    finished: dict[int, list[int]] = {}
                    for action in row:
                        if action in finals:
                            finished.setdefault(action.stage, []).append(action.microbatch // per_slot)
                    assert len(finished) == chunks
                    assert all(slots == list(range(6)) for slots in finished.values())
                    tried += 1
    assert tried


def test_contributions_are_held_by_stage() -> None:
    backlog = Backlog(PLAN, Timeline())
    release = {}
    for slot in (0, 1):
        for stage in (0, 1):
            backlog.make_room(0, slot, stage, lambda: True)
            release[slot, stage] = backlog.add(0, slot, stage, (stage, 0))
    release[0, 1]()
    backlog.make_room(0, 2, 1, lambda: True)  # stage 1 has room, stage 0 has none
    waiting = threading.Thread(target=backlog.make_room, args=(0, 2, 0, lambda: True))
    waiting.start()
    release[1, 0]()  # any of the two makes room
    waiting.join(20)
    assert not waiting.is_alive()
    backlog.add(0, 2, 0, (0, 0))
    with pytest.raises(AbandonedError):
        backlog.make_room(0, 3, 0, lambda: False)
