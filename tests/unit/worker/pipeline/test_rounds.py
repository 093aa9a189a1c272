"""A slot's round by a replica of several workers: the bits of one worker, and no others' messages are used."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.chains import BOUND_SECONDS, Chain, answer, until
from support.micro import MICRO_LLAMA, micro_plan

from gradstream.core.errors import ProtocolError
from gradstream.core.model.model import build, initial_weights
from gradstream.core.model.stage_module import segments_of
from gradstream.core.pipeline.schedule import Action, Op
from gradstream.core.plan.bundles import WEIGHTS
from gradstream.core.plan.plan import Plan
from gradstream.core.wire.frames import checksum, frames
from gradstream.core.wire.slot_totals import SlotTotals
from gradstream.proto.v1 import worker_pb2 as pb
from gradstream.worker.attempt import AbandonedError, Attempt
from gradstream.worker.compute import SlotComputer
from gradstream.worker.held_version import Array, HeldVersion
from gradstream.worker.pipeline.inbound import BACKWARD, FORWARD, REDUCTION
from gradstream.worker.pipeline.layout import Layout
from gradstream.worker.pipeline.neighbours import Neighbours
from gradstream.worker.pipeline.reduction import clip_factor
from gradstream.worker.rounds import Progress, RoundComputer
from gradstream.worker.samples.data import Batch

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
LAYERS = 3
LLAMA = MICRO_LLAMA | {"num_hidden_layers": LAYERS}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": LAYERS,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    # The threads of one process share the generator that dropout draws from, workers do not.
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
MODELS = {"llama": LLAMA, "llama-tied": LLAMA | {"tie_word_embeddings": True}, "gpt2": GPT2}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "llama": {"clip_norm": 0.01},
    "llama-tied": {"kind": "sgd", "learning_rate": 0.5, "momentum": 0.9, "nesterov": True, "clip_norm": 0.01},
    "gpt2": {"kind": "muon", "clip_norm": 0.01},
}
CUTS: dict[str, tuple[int, int, str]] = {
    "two": (2, 1, "1f1b"),
    "zero-bubble": (2, 1, "zero-bubble"),
    "three": (3, 1, "gpipe"),
    "two-with-chunks": (4, 2, "interleaved-1f1b"),
}
"""Number of stages, chunks a worker, schedule."""
VERSION, SLOT = 1, 1


def plan_of(kind: str, num_stages: int = 1, chunks: int = 1, schedule: str = "1f1b", **optimizer: Any) -> Plan:
    """Version 0 begins an ordinary step, all others rounds of three inner steps."""
    model = MODELS[kind]
    sections: dict[str, Any] = {"local": {"steps": 3, "after": 1, "moments": "fp32"}}
    sections |= {"optimizer": OPTIMIZERS[kind] | optimizer, "schedule": {"warmup_steps": 4}}
    if num_stages:
        sections["pipeline"] = {"stages": num_stages if num_stages > 1 else "auto", "chunks": chunks}
    plan = micro_plan(model, sections=sections, num_steps=7)
    if not num_stages:
        return plan
    segments = segments_of(build(model, "meta"))
    cuts = [len(segments) * (stage + 1) // num_stages - 1 for stage in range(num_stages)]
    ends = tuple(segments[cut].units[-1] + 1 for cut in cuts)
    return replace(plan, stage_ends=ends, num_chunks=chunks, pipeline_schedule=schedule)


def batch_of(step: int) -> Batch:
    tokens = np.random.default_rng((step, SLOT)).integers(0, 64, size=(4, 9))
    return Batch(tokens[:, :-1], tokens[:, 1:])


class Contribution:
    """What a slot gave away, on all workers."""

    def __init__(self) -> None:
        self.values: dict[Array, torch.Tensor] = {}
        self.totals: set[SlotTotals] = set()

    def __call__(self, tensor: int, part: int, values: torch.Tensor, totals: SlotTotals, array: str = WEIGHTS) -> None:
        assert part == 0
        assert (tensor, array) not in self.values, "each array once"
        self.values[tensor, array] = values
        self.totals.add(totals)


class Member:
    """One worker of a replica, which holds a version with moments as after some rounds."""

    def __init__(self, plan: Plan, place: int):
        self.plan = plan
        self.computer = SlotComputer(plan, CPU, place)
        held = HeldVersion(plan, self.computer.parameters)
        weights = dict(initial_weights(dict(plan.model_config), 0))
        for (tensor, array), held_N in held.arrays.items():
            generator = torch.Generator().manual_seed(tensor)
            values_N = torch.rand(len(held_N), generator=generator) * 1e-3
            with torch.no_grad():
                held_N.copy_(weights[plan.tensors[tensor].name].reshape(-1) if array == WEIGHTS else values_N)
        self.rounds = RoundComputer(self.computer, held)

    def run(self, attempt: Attempt, emit: Contribution, neighbours: Neighbours | None, **hooks: Any) -> None:
        wanted = (lambda: True) if neighbours is None else (lambda: neighbours.is_valid(attempt))
        if neighbours is not None:
            neighbours.run(attempt, wanted)
        self.rounds.run(attempt, batch_of, emit, neighbours=neighbours, **({"wanted": wanted} | hooks))


def alone(plan: Plan, **hooks: Any) -> Contribution:
    """A slot's round on one worker."""
    found = Contribution()
    Member(plan, 0).run(Attempt(0, VERSION, (SLOT,)), found, None, **hooks)
    return found


@pytest.fixture
async def form() -> AsyncIterator[Callable[[Plan], Awaitable[Chain]]]:
    made: list[Chain] = []

    async def make(plan: Plan) -> Chain:
        chain = Chain(plan)
        made.append(chain)
        for node in chain.nodes:
            await node.server.start()
        await chain.form()
        return chain

    yield make
    for chain in made:
        await chain.close()


Form = Callable[[Plan], Awaitable[Chain]]


async def begin(chain: Chain) -> list[Attempt]:
    """Begin a round; return it as each worker knows it."""
    first = await chain.nodes[0].neighbours.begin(VERSION, (SLOT,), False)
    found = [first]
    for node in chain.nodes[1:]:
        attempt = await asyncio.wait_for(node.neighbours.next_attempt(), BOUND_SECONDS)
        while attempt.number < first.number:  # void
            node.neighbours.took(attempt)
            attempt = await asyncio.wait_for(node.neighbours.next_attempt(), BOUND_SECONDS)
        node.neighbours.took(attempt)
        found.append(attempt)
    return found


async def together(chain: Chain, members: list[Member], hooks: dict[int, Any] | None = None) -> Contribution:
    """A slot's round on all workers of a replica; `hooks` are by place."""
    found = Contribution()
    attempts = await begin(chain)
    parts = [
        chain.compute(
            lambda i=i: members[i].run(attempts[i], found, chain.nodes[i].neighbours, **(hooks or {}).get(i, {}))
        )
        for i in range(len(members))
    ]
    await asyncio.gather(*parts)
    return found


def equal(first: Contribution, second: Contribution) -> bool:
    return (
        first.values.keys() == second.values.keys()
        and first.totals == second.totals
        and all(torch.equal(first.values[array], second.values[array]) for array in first.values)
    )


@pytest.mark.parametrize("kind", MODELS)
async def test_no_bit_depends_on_the_number_of_stages(kind: str, form: Form) -> None:
    expected = alone(plan_of(kind))
    assert len(expected.totals) == 1
    assert not equal(alone(plan_of(kind, clip_norm=1e6)), expected), "clipping bites"
    if kind == "llama":
        assert equal(alone(plan_of(kind, num_stages=0)), expected), "nor on the pipeline section"
    for cut in [CUTS["two-with-chunks"]] if kind == "gpt2" else CUTS.values():
        plan = plan_of(kind, *cut)
        chain = await form(plan)
        members = [Member(plan, place) for place in range(plan.replica_size)]
        for _ in range(2):  # the second time as the next attempt of the same replica
            assert equal(await together(chain, members), expected), cut
        assert not any(node.errors for node in chain.nodes)


async def test_one_worker_with_chunks_has_the_same_bits() -> None:
    expected = alone(plan_of("llama-tied"))
    plan = replace(plan_of("llama-tied", 2), num_chunks=2, pipeline_schedule="zero-bubble")
    assert plan.replica_size == 1
    assert equal(alone(plan), expected)


async def test_workers_that_use_a_tied_tensor_keep_it_equal(form: Form) -> None:
    plan = plan_of("llama-tied", 2)
    (tied,) = (number for number, tensor in enumerate(plan.tensors) if tensor.is_tied)
    chain = await form(plan)
    members = [Member(plan, place) for place in range(2)]
    seen: list[dict[int, torch.Tensor]] = [{}, {}]

    def look(place: int) -> Callable[[Progress], None]:
        def begin_step(progress: Progress) -> None:
            use = (tied, place)
            seen[place][progress.place] = members[place].computer.parameters[use].detach().clone()

        return begin_step

    await together(chain, members, {place: {"begin_step": look(place)} for place in range(2)})
    assert [sorted(found) for found in seen] == [[0, 1, 2]] * 2
    assert all(torch.equal(seen[0][number], seen[1][number]) for number in range(3))
    assert not torch.equal(seen[0][0], seen[0][2])


async def test_a_gradient_that_is_not_finite_spoils_the_round_on_all_workers(form: Form) -> None:
    plan = plan_of("llama-tied", 3, 1, "1f1b")
    chain = await form(plan)
    members = [Member(plan, place) for place in range(3)]
    found = await together(chain, members, {1: {"spoils": lambda step, slot: step == 2}})
    assert all(bool(values_N.isnan().all()) for values_N in found.values.values())
    assert equal(await together(chain, members), alone(plan_of("llama-tied")))


async def test_an_abandoned_round_begins_again_from_its_version(form: Form) -> None:
    plan = plan_of("llama-tied", 2)
    chain = await form(plan)
    first, second = (node.neighbours for node in chain.nodes)
    members = [Member(plan, place) for place in range(2)]
    begun: list[Progress] = []
    attempts = await begin(chain)
    lost = Contribution()
    waiting = asyncio.ensure_future(chain.compute(lambda: members[0].run(attempts[0], lost, first)))
    hooks = {"wanted": lambda: len(begun) < 2, "begin_step": begun.append}
    with pytest.raises(AbandonedError):
        await chain.compute(lambda: members[1].run(attempts[1], lost, second, **hooks))
    assert [progress.step for progress in begun] == [1, 2]
    second.abandon(attempts[1], "its weights broke off")
    with pytest.raises(AbandonedError):
        await waiting
    assert not lost.values
    assert equal(await together(chain, members), alone(plan_of("llama-tied")))


def test_the_clip_factor_is_that_of_torch_and_says_what_is_not_finite() -> None:
    gradients = [torch.randn(5, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    squares = [float(one.double().square().sum()) for one in gradients]
    norm = torch.nn.utils.get_total_norm(gradients)
    assert clip_factor(squares, 0.5) == pytest.approx(0.5 / (float(norm) + 1e-6), rel=1e-6)
    assert clip_factor([1e-6], 0.5) == 1.0
    for wrong in ([np.nan], [np.inf, 1.0], [1e308] * 2):
        assert np.isnan(clip_factor(wrong, 0.5))


# --- what a neighbour must not do -------------------------------------------------------------------------------------


def reduction_messages(
    numbers: list[float] | None = None, num_bytes: int | None = None, crc32c: int | None = None, **changes: Any
) -> list[bytes]:
    layout = Layout(PLAN)
    if numbers is None:
        numbers = [1.0] * layout.num_numbers(0, FORWARD)
    payload = layout.pack(numbers, [torch.zeros(PLAN.tensors[tensor].num_elements) for tensor in layout.tensors(0)])
    header = pb.StageHeader(
        reduction=pb.StageReduction(**({"attempt_number": 1, "inner_step": 0} | changes)),
        payload_bytes=len(payload) if num_bytes is None else num_bytes,
        crc32c=checksum(payload) if crc32c is None else crc32c,
    )
    return list(frames(header, [payload]))


PLAN = plan_of("llama-tied", 2)
NUM_NORMS = Layout(PLAN).num_numbers(0, FORWARD)
NUM_BYTES = Layout(PLAN).num_bytes(0, FORWARD)


def test_the_sizes_of_reductions_follow_from_the_plan() -> None:
    layout = Layout(PLAN)
    own = [number for number, part in PLAN.uses_of_worker(0) if not PLAN.tensors[number].is_tied]
    assert len(own) == NUM_NORMS, "the sum of a tied tensor is known on the second worker only"
    assert NUM_BYTES == 8 * NUM_NORMS + 4 * 64 * 16
    assert layout.num_bytes(0, BACKWARD) == 8 + 4 * 64 * 16
    assert [layout.num_bytes_to(place, FORWARD) for place in range(2)] == [0, NUM_BYTES]


def test_numbers_of_a_reduction_that_cannot_be_are_refused() -> None:
    layout = Layout(PLAN)
    for factor in (0.0, 0.5, 1.0, np.nan):
        layout.check_numbers(layout.pack([factor], []), 0, BACKWARD)
    for factor in (-0.5, 1.5, np.inf):
        with pytest.raises(ProtocolError, match=f"a clip factor of {factor:g}"):
            layout.check_numbers(layout.pack([factor], []), 0, BACKWARD)
    layout.check_numbers(layout.pack([0.0, np.inf, np.nan] + [1.0] * (NUM_NORMS - 3), []), 1, FORWARD)
    with pytest.raises(ProtocolError, match="a squared norm of -inf"):
        layout.check_numbers(layout.pack([-np.inf] * NUM_NORMS, []), 1, FORWARD)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        pytest.param(reduction_messages(), "out of order, that of microbatch 0 from stage 0 comes first", id="order"),
        pytest.param(reduction_messages(inner_step=3), "gets no such reduction", id="inner-step"),
        pytest.param(reduction_messages(inner_step=2**32 - 1), "gets no such reduction", id="huge-inner-step"),
        pytest.param(reduction_messages(attempt_number=2), "that attempt has not begun here", id="attempt"),
        pytest.param(reduction_messages(num_bytes=5), f"5 bytes, but it has {NUM_BYTES} here", id="size"),
        pytest.param(reduction_messages(num_bytes=1 << 40), "1099511627776 bytes, but it has", id="huge"),
    ],
)
async def test_a_reduction_that_is_not_due_is_refused_by_name(messages: list[bytes], words: str, form: Form) -> None:
    chain = await form(PLAN)
    await begin(chain)
    with pytest.raises(ProtocolError, match=f"worker w0 at 127.0.0.1:.*{words}"):
        raise await answer(chain.nodes[1], messages)
    assert not chain.nodes[1].neighbours.inbounds[FORWARD].arrived


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        pytest.param(reduction_messages(crc32c=1), "checksum .* is not the announced 00000001", id="checksum"),
        pytest.param(reduction_messages([-1.0] * NUM_NORMS), "a squared norm of -1", id="norm"),
    ],
)
async def test_what_a_reduction_says_is_checked(messages: list[bytes], words: str, form: Form) -> None:
    chain = await form(PLAN)
    (attempt, _), first = await begin(chain), chain.nodes[0].neighbours
    first.run(attempt, lambda: True)
    for microbatch in range(2):
        first.send(Action(0, Op.FORWARD, microbatch), torch.zeros(2, 8, 16), 0.0)
    inbound = chain.nodes[1].neighbours.inbounds[FORWARD]
    await until(lambda: len(inbound.arrived) == 2, "both activations to arrive, after which the reduction is due")
    with pytest.raises(ProtocolError, match=f"worker w0 at 127.0.0.1:.*{words}"):
        raise await answer(chain.nodes[1], messages)
    assert not [key for _, key in inbound.arrived if key[0] == REDUCTION]
