"""Neighbours over real gRPC: the tensors that a neighbour may send are known beforehand, and no others are used."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.chains import BOUND_SECONDS, HIDDEN_SIZE, Chain, answer, hello, message, until
from support.micro import MICRO_LLAMA, micro_plan

from gradstream.core.errors import GradstreamError, ProtocolError, StaleEpochError
from gradstream.core.pipeline.schedule import Action, Op
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.channel import listen, new_server
from gradstream.core.wire.frames import checksum, frame, frames
from gradstream.core.wire.stubs import add_worker
from gradstream.proto.v1 import plan_pb2
from gradstream.proto.v1 import worker_pb2 as pb
from gradstream.worker.attempt import AbandonedError
from gradstream.worker.pipeline import neighbours
from gradstream.worker.pipeline.inbound import BACKWARD, FORWARD

SHAPE = (2, 8, HIDDEN_SIZE)  # samples, tokens, hidden size of the micro model
SLOTS = (0, 1)  # of two microbatches each


def plan_of(activations: str = "fp32", num_stages: int = 2, num_samples: int = 8) -> Plan:
    """The micro model in stages: embedding and layers first, the last one with the head. `num_samples` are those of a
    validation pass."""
    plan = micro_plan(MICRO_LLAMA)
    pipeline = plan.recipe.pipeline.model_copy(update={"stages": num_stages, "activations": activations})
    validation = plan.recipe.validation.model_copy(update={"num_samples": num_samples})
    recipe = plan.recipe.model_copy(update={"pipeline": pipeline, "validation": validation})
    ends = {2: (2, 6), 3: (2, 3, 6)}[num_stages]
    return dataclasses.replace(plan, recipe=recipe, stage_ends=ends, pipeline_schedule="1f1b")


@pytest.fixture
async def make_chain() -> AsyncIterator[Callable[..., Awaitable[Chain]]]:
    made: list[Chain] = []

    async def make(**changes: Any) -> Chain:
        chain = Chain(plan_of(**changes))
        made.append(chain)
        for node in chain.nodes:
            await node.server.start()
        await chain.form()
        return chain

    yield make
    for chain in made:
        await chain.close()


MakeChain = Callable[..., Awaitable[Chain]]


def activation(microbatch: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(microbatch))


# --- what neighbours do for each other --------------------------------------------------------------------------------


@pytest.mark.parametrize("max_at_once", [neighbours.MAX_ELEMENTS_AT_ONCE, 0])
@pytest.mark.parametrize(("activations", "error"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 2**-6)])
async def test_tensors_and_losses_arrive(
    make_chain: MakeChain, activations: str, error: float, max_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "MAX_ELEMENTS_AT_ONCE", max_at_once)
    chain = await make_chain(activations=activations)
    first, second = (node.neighbours for node in chain.nodes)
    attempt = await first.begin(2, SLOTS, False)
    followed = await asyncio.wait_for(second.next_attempt(), BOUND_SECONDS)
    assert followed == attempt
    first.run(attempt, lambda: True)
    second.run(followed, lambda: True)
    for microbatch in range(2):
        first.send(Action(0, Op.FORWARD, microbatch), activation(microbatch), 0.0)
        received, _ = await chain.compute(second.receive, Action(1, Op.FORWARD, microbatch))
        assert received.shape == SHAPE
        sent = activation(microbatch)
        assert float((received - sent).abs().max()) <= error * float(sent.abs().max())
        second.send(Action(1, Op.BACKWARD, microbatch), -sent, 1.5 + microbatch)
        gradient, loss_sum = await chain.compute(first.receive, Action(0, Op.BACKWARD, microbatch))
        assert loss_sum == 1.5 + microbatch
        assert float((gradient + sent).abs().max()) <= error * float(sent.abs().max())
    assert not chain.nodes[0].errors
    assert not chain.nodes[1].errors


async def test_an_attempt_goes_down_the_whole_chain_and_an_abandon_up(make_chain: MakeChain) -> None:
    chain = await make_chain(num_stages=3)
    first, _, third = (node.neighbours for node in chain.nodes)
    attempt = await first.begin(0, SLOTS, False)
    followed = await asyncio.wait_for(third.next_attempt(), BOUND_SECONDS)
    assert followed.number == attempt.number
    third.abandon(followed, "its weights broke off")
    await until(lambda: chain.nodes[0].voids == 1, "the first worker to hear of it")
    assert not first.is_valid(attempt)
    again = await first.begin(0, SLOTS, False)
    assert again.number > attempt.number
    await until(lambda: not third.is_valid(attempt), "the last one to hear of the next attempt")
    third.took(followed)
    assert (await third.next_attempt()).number == again.number


async def test_nothing_of_an_abandoned_attempt_is_used(make_chain: MakeChain) -> None:
    chain = await make_chain()
    first, second = (node.neighbours for node in chain.nodes)
    attempt = await first.begin(0, SLOTS, False)
    first.run(attempt, lambda: True)
    first.send(Action(0, Op.FORWARD, 0), torch.full(SHAPE, 7.0), 0.0)
    inbound = second.inbounds[FORWARD]
    await until(lambda: bool(inbound.arrived), "the tensor to arrive")
    first.void()
    again = await first.begin(0, SLOTS, False)
    first.run(again, lambda: True)
    first.send(Action(0, Op.FORWARD, 0), torch.full(SHAPE, 9.0), 0.0)
    await until(lambda: again.number in {number for number, _ in inbound.arrived}, "the second one to arrive")
    assert {number for number, _ in inbound.arrived} == {again.number}
    followed = await second.next_attempt()
    assert followed.number == again.number
    second.run(followed, lambda: True)
    received, _ = await chain.compute(second.receive, Action(1, Op.FORWARD, 0))
    assert torch.equal(received, torch.full(SHAPE, 9.0))


async def test_a_waiting_worker_is_told_that_its_attempt_is_void(make_chain: MakeChain) -> None:
    chain = await make_chain()
    first = chain.nodes[0].neighbours
    attempt = await first.begin(0, SLOTS, False)
    first.run(attempt, lambda: True)
    waiting = asyncio.ensure_future(chain.compute(first.receive, Action(0, Op.BACKWARD, 0)))
    first.void()
    with pytest.raises(AbandonedError):
        await waiting
    first.run(await first.begin(0, SLOTS, False), lambda: False)
    with pytest.raises(AbandonedError):
        await chain.compute(first.receive, Action(0, Op.BACKWARD, 0))


async def test_after_a_break_what_is_missing_comes_again_and_nothing_twice(make_chain: MakeChain) -> None:
    chain = await make_chain()
    first, second = chain.nodes[0].neighbours, chain.nodes[1]
    attempt = await first.begin(0, SLOTS, False)
    first.run(attempt, lambda: True)
    first.send(Action(0, Op.FORWARD, 0), activation(0), 0.0)
    inbound = second.neighbours.inbounds[FORWARD]
    await until(lambda: bool(inbound.arrived), "the tensor to arrive")
    await second.server.stop(None)
    second.server = new_server()
    add_worker(second.servicer, second.server)
    await until(lambda: first.links[FORWARD].unreachable_since is not None, "the break to be seen")
    assert "worker w1 at" in first.links[FORWARD].title
    first.send(Action(0, Op.FORWARD, 1), activation(1), 0.0)
    assert listen(second.server, second.address)
    await second.server.start()
    second.neighbours.run(await second.neighbours.next_attempt(), lambda: True)
    for microbatch in range(2):
        received, _ = await chain.compute(second.neighbours.receive, Action(1, Op.FORWARD, microbatch))
        assert torch.equal(received, activation(microbatch))
    await until(lambda: first.links[FORWARD].unreachable_since is None, "the neighbour to answer again")
    assert not inbound.arrived


async def test_credit_bounds_what_waits(make_chain: MakeChain) -> None:
    chain = await make_chain()
    first, second = (node.neighbours for node in chain.nodes)
    attempt = await first.begin(0, SLOTS, False)
    first.run(attempt, lambda: True)
    inbound = second.inbounds[FORWARD]
    for microbatch in range(4):  # more than 1f1b ever sends ahead
        first.send(Action(0, Op.FORWARD, microbatch), activation(microbatch), 0.0)
    await until(lambda: len(inbound.arrived) == 2 and not inbound.window, "the window to be full")
    second.run(await second.next_attempt(), lambda: True)
    for microbatch in range(4):
        received, _ = await chain.compute(second.receive, Action(1, Op.FORWARD, microbatch))
        assert torch.equal(received, activation(microbatch))
        assert len(inbound.arrived) <= 2
    assert not chain.nodes[0].errors


# --- what a neighbour must not do -------------------------------------------------------------------------------------


def tensor_messages(
    values: torch.Tensor | None = None, crc32c: int | None = None, num_bytes: int | None = None, **changes: Any
) -> list[bytes]:
    payload = (activation(0) if values is None else values).numpy().view(np.uint8).reshape(-1)
    fields = {"attempt_number": 1, "stage": 0, "microbatch": 0, "shape": SHAPE, "codec": plan_pb2.CODEC_FP32, **changes}
    header = pb.StageHeader(
        tensor=pb.StageTensor(**fields),
        payload_bytes=len(payload) if num_bytes is None else num_bytes,
        crc32c=checksum(payload) if crc32c is None else crc32c,
    )
    return list(frames(header, [payload]))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        pytest.param(tensor_messages(shape=(2, 8, 17)), r"shape \[2, 8, 17\], but it is \[2, 8, 16\] here", id="shape"),
        pytest.param(tensor_messages(shape=()), r"shape \[\], but", id="no-shape"),
        pytest.param(tensor_messages(codec=plan_pb2.CODEC_BF16), "codec CODEC_BF16, but the recipe", id="dtype"),
        pytest.param(tensor_messages(codec=99), "codec 99, but the recipe", id="unknown-dtype"),
        pytest.param(tensor_messages(microbatch=1), "out of order, that of microbatch 0 from stage 0", id="order"),
        pytest.param(tensor_messages(microbatch=4), "gets no such activation", id="microbatch"),
        pytest.param(tensor_messages(stage=1), "gets no such activation", id="stage"),
        pytest.param(tensor_messages(attempt_number=2), "that attempt has not begun here", id="attempt"),
        pytest.param(tensor_messages(crc32c=1), "checksum .* is not the announced 00000001", id="checksum"),
        pytest.param(tensor_messages(num_bytes=5), "fp32 payload of 5 bytes where 256 elements take 1024", id="size"),
        pytest.param(tensor_messages(num_bytes=1 << 40), "fp32 payload of 1099511627776 bytes", id="huge"),
        pytest.param([message(abandon=pb.StageAbandon(number=1))], "must not abandon an attempt here", id="abandon"),
        pytest.param([message()], "a message without content", id="empty"),
        pytest.param([message(hello=hello())], "a message without content", id="second-hello"),
        pytest.param([b"\x22\x01x"], "unexpected field", id="garbage"),
        pytest.param([frame(b"\xff\xff\xff")], "not a valid message", id="no-protobuf"),
        pytest.param(
            [message(begin=pb.StageAttempt(number=9, version=99, slots=[0]))], "version 99, but the job", id="version"
        ),
        pytest.param([message(begin=pb.StageAttempt(number=9, slots=[0, 0]))], r"slots \[0, 0\]", id="slots"),
        pytest.param([message(begin=pb.StageAttempt(number=9, slots=[2]))], r"slots \[2\]", id="slot"),
        pytest.param([message(begin=pb.StageAttempt(number=9))], r"slots \[\]", id="no-slots"),
        pytest.param(
            [message(begin=pb.StageAttempt(number=9, slots=[0, 1], validate=True))],
            "validation pass of 2",
            id="validate",
        ),
        pytest.param(
            [message(begin=pb.StageAttempt(number=9, slots=[0], void_before=10))],
            "void_before 10 is above its own number",
            id="void",
        ),
    ],
)
async def test_what_breaks_the_protocol_is_refused_by_name_and_nothing_is_used(
    make_chain: MakeChain, messages: list[bytes], words: str
) -> None:
    chain = await make_chain()
    first, second = (node.neighbours for node in chain.nodes)
    await first.begin(0, SLOTS, False)
    attempt = await asyncio.wait_for(second.next_attempt(), BOUND_SECONDS)
    with pytest.raises(ProtocolError, match=words) as caught:
        raise await answer(chain.nodes[1], messages)
    assert "worker w0 at 127.0.0.1:" in str(caught.value)
    assert not second.inbounds[FORWARD].arrived
    assert second.is_valid(attempt)
    # The neighbour itself goes on as if nothing had been.
    first.run(first.latest, lambda: True)  # type: ignore[arg-type]
    first.send(Action(0, Op.FORWARD, 0), activation(0), 0.0)
    second.run(attempt, lambda: True)
    received, _ = await chain.compute(second.receive, Action(1, Op.FORWARD, 0))
    assert torch.equal(received, activation(0))


@pytest.mark.parametrize(
    ("opening", "error", "words"),
    [
        pytest.param(hello(worker=1), ProtocolError, "only neighbours stream", id="not-a-neighbour"),
        pytest.param(hello(direction=BACKWARD), ProtocolError, "only neighbours stream", id="direction"),
        pytest.param(hello(epoch=0), StaleEpochError, "not in force here", id="epoch"),
        pytest.param(hello(table=0), StaleEpochError, "replica 0 of job epoch 1 is not in force", id="table"),
    ],
)
async def test_a_stream_from_elsewhere_is_refused(
    make_chain: MakeChain, opening: pb.StageHello, error: type[GradstreamError], words: str
) -> None:
    chain = await make_chain()
    with pytest.raises(error, match=words):
        raise await answer(chain.nodes[1], [], opening)


async def test_streams_of_a_replica_that_was_formed_anew_end(make_chain: MakeChain) -> None:
    chain = await make_chain()
    second = chain.nodes[1]
    old = [node.neighbours for node in chain.nodes]
    await old[0].close()  # its own stream would take this one's place
    before = old[1].inbounds[FORWARD].stream
    refused = asyncio.ensure_future(answer(second, [], hello()))
    await until(lambda: old[1].inbounds[FORWARD].stream is not before, "the stream to be open")
    await chain.form(number=2)
    with pytest.raises(StaleEpochError, match="formed again"):
        raise await refused
    await old[1].close()
    # The new replica starts from nothing.
    first, now = (node.neighbours for node in chain.nodes)
    attempt = await first.begin(0, SLOTS, False)
    assert (await asyncio.wait_for(now.next_attempt(), BOUND_SECONDS)).number == attempt.number == 1
    assert not old[1].inbounds[FORWARD].arrived


async def test_tensors_under_way_when_the_next_attempt_begins_are_taken(make_chain: MakeChain) -> None:
    """A validation pass has more room than training; what was sent by that stays welcome."""
    chain = await make_chain(num_samples=16)  # eight, four microbatches, a slot
    first, second = (node.neighbours for node in chain.nodes)
    validation = await first.begin(0, (0,), True)
    first.run(validation, lambda: True)
    for microbatch in range(4):
        first.send(Action(0, Op.FORWARD, microbatch), activation(microbatch), 0.0)
    training = await first.begin(0, SLOTS, False)
    first.run(training, lambda: True)
    first.send(Action(0, Op.FORWARD, 0), activation(9), 0.0)
    followed = await asyncio.wait_for(second.next_attempt(), BOUND_SECONDS)
    second.took(followed)
    assert followed.validate
    second.run(followed, lambda: True)
    for microbatch in range(4):
        received, _ = await chain.compute(second.receive, Action(1, Op.FORWARD, microbatch))
        assert torch.equal(received, activation(microbatch))
    followed = await asyncio.wait_for(second.next_attempt(), BOUND_SECONDS)
    assert followed.number == training.number
    second.run(followed, lambda: True)
    received, _ = await chain.compute(second.receive, Action(1, Op.FORWARD, 0))
    assert torch.equal(received, activation(9))
    assert not chain.nodes[0].errors


async def test_an_attempt_begins_behind_what_is_still_being_encoded(
    make_chain: MakeChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "MAX_ELEMENTS_AT_ONCE", 0)
    first, second = (node.neighbours for node in (await make_chain()).nodes)
    first.run(await first.begin(0, SLOTS, False), lambda: True)
    await until(lambda: first.links[FORWARD].empty, "the attempt to be taken")
    go_on = threading.Event()
    first._thread.submit(go_on.wait, BOUND_SECONDS)  # the tensor is encoded after it
    first.send(Action(0, Op.FORWARD, 0), activation(0), 0.0)
    beginning = asyncio.create_task(first.begin(1, SLOTS, False))
    await asyncio.to_thread(int)  # time enough for a task that would not wait
    assert not beginning.done()
    go_on.set()
    attempt = await asyncio.wait_for(beginning, BOUND_SECONDS)
    # What the second one is told of the next attempt comes behind the tensor.
    await until(lambda: second.latest == attempt, "the next attempt to be known")
    assert (1, (0, 0)) in second.inbounds[FORWARD].arrived


async def test_a_late_tensor_of_a_void_attempt_may_be_larger_than_those_of_the_next(make_chain: MakeChain) -> None:
    chain = await make_chain(num_samples=2)  # one sample a slot: half of a training microbatch
    first, second = (node.neighbours for node in chain.nodes)
    attempt = await first.begin(0, SLOTS, False)
    followed = await asyncio.wait_for(second.next_attempt(), BOUND_SECONDS)
    second.run(followed, lambda: True)
    first.void()
    again = await first.begin(1, (0,), True)
    assert first.latest == again
    second.send(Action(1, Op.BACKWARD, 0), activation(0), 1.0)  # it has not heard yet, or just now
    await until(lambda: not second.is_valid(attempt), "the second one to hear of the next attempt")
    await until(lambda: second.links[BACKWARD].empty, "what it sent to be taken")
    assert not first.inbounds[BACKWARD].arrived
    assert not chain.nodes[1].errors


async def test_a_tensor_that_cannot_be_encoded_is_an_error_and_not_a_silence(make_chain: MakeChain) -> None:
    chain = await make_chain()
    first = chain.nodes[0].neighbours
    first.run(await first.begin(0, SLOTS, False), lambda: True)
    first.send(Action(0, Op.FORWARD, 0), torch.empty(SHAPE, device="meta"), 0.0)
    await until(lambda: bool(chain.nodes[0].errors), "the error to be told")


async def test_attempts_do_not_pile_up(make_chain: MakeChain) -> None:
    second = (await make_chain()).nodes[1].neighbours
    inbound = second.inbounds[FORWARD]
    for number in range(1, 66):
        header = pb.StageHeader(begin=pb.StageAttempt(number=number, slots=[0]))
        if number == 65:
            with pytest.raises(ProtocolError, match=r"worker w0 at .*: attempt 65: 64 attempts wait here already"):
                second.check(inbound, header)
            break
        assert not second.check(inbound, header)
        await second.take(inbound, header, np.empty(0, np.uint8))
