"""A slot's round: equal to plain PyTorch, the same bits whatever was computed before, nothing left when abandoned."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from support.micro import MICRO_LLAMA, micro_plan
from torch import nn

from gradstream.core.codecs.payloads import CodecBook
from gradstream.core.model.model import build, initial_weights
from gradstream.core.plan.bundles import WEIGHTS
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.learning_rate import rate_of_step
from gradstream.core.rpc.channel import listen, new_server, open_channel
from gradstream.core.wire.frames import frame
from gradstream.core.wire.slot_totals import SlotTotals
from gradstream.core.wire.stubs import ParameterServerStub, add_parameter_server
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.worker.attempt import AbandonedError, Alone, Attempt
from gradstream.worker.compute import SlotComputer
from gradstream.worker.held_version import Array, HeldVersion
from gradstream.worker.progress import ProgressFiles
from gradstream.worker.pull import ServerPull
from gradstream.worker.rounds import Progress, RoundComputer
from gradstream.worker.samples.data import Batch
from gradstream.worker.timeline import Timeline
from gradstream.worker.weights import Arrival, Inbox, WeightInstaller

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SGD = {"kind": "sgd", "learning_rate": 0.05, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "clip_norm": 0.5}
NESTEROV = SGD | {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
Values = dict[Array, torch.Tensor]


def plan_of(
    model: dict[str, Any] = MICRO_LLAMA, optimizer: dict[str, Any] | None = None, num_rounds: int = 4, **local: Any
) -> Plan:
    local = {"steps": 3, "moments": "fp32", "outer": {"learning_rate": 0.8, "momentum": 0.9}} | local
    num_steps = local.get("after", 0) + num_rounds * local["steps"]
    sections = {"local": local, "optimizer": optimizer or {}, "schedule": {"warmup_steps": 4}}
    return micro_plan(model, sections=sections, num_steps=num_steps)


def batch_of(step: int, slot: int) -> Batch:
    tokens = np.random.default_rng((step, slot)).integers(0, 64, size=(4, 9))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def first_weights(plan: Plan) -> Values:
    weights = dict(initial_weights(dict(plan.model_config), 0))
    return {(number, WEIGHTS): weights[tensor.name].reshape(-1) for number, tensor in enumerate(plan.tensors)}


class Worker:
    """A model, the version that it holds, and its rounds."""

    def __init__(self, plan: Plan, version: Values, progress: ProgressFiles | None = None):
        self.plan = plan
        self.computer = SlotComputer(plan, CPU)
        self.held = HeldVersion(plan, self.computer.parameters)
        self.rounds = RoundComputer(self.computer, self.held, progress)
        self.hold(version)

    def hold(self, version: Values) -> None:
        with torch.no_grad():
            for array, held_N in self.held.arrays.items():
                held_N.copy_(version[array]) if array in version else held_N.zero_()

    def round(self, version: int, slot: int, **hooks: Any) -> Contribution:
        found = Contribution()
        hooks = {"wanted": lambda: True} | hooks
        self.rounds.run(Attempt(0, version, (slot,)), lambda step: batch_of(step, slot), found, **hooks)
        return found

    def gradient(self, step: int, slot: int) -> Values:
        """The mean gradient of an ordinary step."""
        found = Contribution()
        self.computer.run(
            Attempt(0, 0, (slot,)), {slot: batch_of(step, slot)}, lambda _: found, lambda: True, Alone(), step=step
        )
        return {array: values.reshape(-1) / found.totals.num_tokens for array, values in found.values.items()}


class Contribution:
    """What a slot gave away, in order."""

    def __init__(self) -> None:
        self.values: Values = {}
        self.totals = SlotTotals(0, 0, 0.0)

    def __call__(self, tensor: int, part: int, values: torch.Tensor, totals: SlotTotals, array: str = WEIGHTS) -> None:
        assert part == 0
        assert (tensor, array) not in self.values, "each array once"
        self.values[tensor, array] = values
        self.totals = totals


def commit(plan: Plan, held: Values, found: list[Contribution], buffers: Values) -> Values:
    """The next version: the outer rule on the mean difference, and the mean moments."""
    assert plan.recipe.local is not None
    outer = plan.recipe.local.outer
    num_tokens = sum(each.totals.num_tokens for each in found)
    version = {}
    for array in found[0].values:
        mean_N = sum(each.values[array] for each in found) / num_tokens
        if array[1] == WEIGHTS:
            buffer_N = buffers[array] = outer.momentum * buffers[array] + mean_N if array in buffers else mean_N
            update_N = mean_N + outer.momentum * buffer_N if outer.nesterov else buffer_N
            mean_N = held[array] - outer.learning_rate * update_N
        version[array] = mean_N
    return version


def plain_losses(plan: Plan) -> list[float]:
    """The mean loss of every round by torch's own optimizers, in the usual way."""
    recipe, local = plan.recipe, plan.recipe.local
    assert local is not None
    model = build(dict(plan.model_config))
    names = [tensor.name for tensor in plan.tensors]
    parameters = [model.get_parameter(name) for name in names]
    weights = dict(initial_weights(dict(plan.model_config), 0))
    held = [weights[name].clone() for name in names]
    outer = torch.optim.SGD(held, local.outer.learning_rate, local.outer.momentum, nesterov=local.outer.nesterov)
    shared: list[dict[str, torch.Tensor]] = []
    losses = []
    for first in range(0, recipe.training.num_steps, local.steps):
        differences, states, loss_sum, num_tokens = [], [], 0.0, 0
        for slot in range(plan.num_slots):
            with torch.no_grad():
                for parameter, weight in zip(parameters, held, strict=True):
                    parameter.copy_(weight)
            optimizer = inner_optimizer(plan, parameters)
            for parameter, state in zip(parameters, shared, strict=False):
                optimizer.state[parameter] = {name: value.clone() for name, value in state.items()}
                if "exp_avg" in state:
                    optimizer.state[parameter]["step"] = torch.tensor(float(first))
            for step in range(first, first + local.steps):
                batch = batch_of(step, slot)
                logits = model(input_ids=torch.from_numpy(np.ascontiguousarray(batch.inputs)), use_cache=False).logits
                targets = torch.from_numpy(np.ascontiguousarray(batch.targets)).flatten()
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, recipe.optimizer.clip_norm)
                for group in optimizer.param_groups:
                    group["lr"] = rate_of_step(recipe, step)
                optimizer.step()
                loss_sum += loss.item() * batch.num_targets
                num_tokens += batch.num_targets
            differences.append(
                [weight - parameter.detach() for weight, parameter in zip(held, parameters, strict=True)]
            )
            states.append([optimizer.state[parameter] for parameter in parameters])
        for number, weight in enumerate(held):
            weight.grad = torch.stack([each[number] for each in differences]).mean(0)
        outer.step()
        if local.inner_state == "shared":
            shared = [
                {
                    name: torch.stack([state[number][name] for state in states]).mean(0)
                    for name in states[0][number]
                    if name != "step"
                }
                for number in range(len(held))
            ]
        losses.append(loss_sum / num_tokens)
    return losses


def inner_optimizer(plan: Plan, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    config = plan.recipe.optimizer
    groups = [
        {
            "params": [p for p, tensor in zip(parameters, plan.tensors, strict=True) if tensor.decay is decay],
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for decay in (True, False)
    ]
    if config.kind == "muon":
        matrices = [p for p, tensor in zip(parameters, plan.tensors, strict=True) if tensor.kind == "matrix"]
        return PlainMuon(matrices, config.weight_decay, groups, betas=config.betas, eps=config.eps)
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
    return torch.optim.SGD(groups, 0.1, config.momentum, nesterov=config.nesterov)


class PlainMuon(torch.optim.AdamW):
    """Muon for some matrices, as published but in fp32 (torch.optim.Muon rounds to bf16), and AdamW for the rest."""

    def __init__(self, matrices: list[nn.Parameter], weight_decay: float, groups: Any, **settings: Any):
        super().__init__(groups, **settings)
        self._matrices = matrices
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        rate = self.param_groups[0]["lr"]
        for matrix in self._matrices:
            assert matrix.grad is not None
            buffer = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
            buffer.lerp_(matrix.grad, 0.05)
            x = matrix.grad.lerp(buffer, 0.95)
            tall = x.shape[0] > x.shape[1]
            x = (x.T if tall else x) / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            matrix.mul_(1 - rate * self._weight_decay)
            matrix.add_(x.T if tall else x, alpha=-rate * 0.2 * math.sqrt(max(matrix.shape)))
            matrix.grad = None  # so that AdamW leaves the matrix alone
        super().step()


@pytest.mark.parametrize("inner_state", ["shared", "reset"])
@pytest.mark.parametrize(
    "optimizer", [{"clip_norm": 0.5}, NESTEROV, {"kind": "muon", "clip_norm": 0.5}], ids=["adamw", "sgd", "muon"]
)
def test_losses_are_those_of_plain_pytorch(optimizer: dict[str, Any], inner_state: str) -> None:
    plan = plan_of(optimizer=optimizer, inner_state=inner_state)
    version, buffers, losses = first_weights(plan), {}, []
    worker = Worker(plan, version)
    for number in range(plan.last_version):
        worker.hold(version)
        found = [worker.round(number, slot) for slot in range(plan.num_slots)]
        losses.append(sum(each.totals.loss_sum for each in found) / sum(each.totals.num_tokens for each in found))
        assert all((each.totals.num_tokens, each.totals.num_samples) == (3 * 32, 3 * 4) for each in found)
        version = commit(plan, version, found, buffers)
    expected = plain_losses(plan)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert len({round(loss, 3) for loss in expected}) > 1, "not a flat line"


@pytest.mark.parametrize("steps", [1, 2])
def test_sgd_without_momentum_contributes_its_clipped_gradients(steps: int) -> None:
    """Also the algebra of H = 1: the servers subtract the difference, as an ordinary SGD step does. Dropout is drawn by
    the number of the inner step."""
    plan = plan_of(GPT2, SGD, steps=steps, inner_state="reset")
    worker = Worker(plan, first_weights(plan))
    at = {array: values_N.clone() for array, values_N in worker.held.arrays.items()}
    for step in plan.rounds.steps_from(1):
        worker.hold(at)
        gradient = worker.gradient(step, 1)
        norm = math.sqrt(sum(float(gradient_N.double().square().sum()) for gradient_N in gradient.values()))
        assert norm > 0.5
        at = {a: at[a] - rate_of_step(plan.recipe, step) * 0.5 / (norm + 1e-6) * gradient[a] for a in at}
    first = first_weights(plan)
    worker.hold(first)
    found = worker.round(1, 1)
    for array, values_N in found.values.items():  # to within what a weight's last bit is worth
        torch.testing.assert_close(values_N / found.totals.num_tokens, first[array] - at[array], rtol=1e-4, atol=1e-8)


def shared_version(plan: Plan) -> Values:
    """Weights and moments as after some rounds."""
    version = first_weights(plan)
    generator = torch.Generator().manual_seed(1)
    for bundle in plan.moment_bundles:
        for fragment in bundle.fragments:
            count = plan.tensors[fragment.tensor].num_elements
            version.setdefault((fragment.tensor, bundle.array), torch.rand(count, generator=generator) * 1e-3)
    return version


def equal(first: Contribution, second: Contribution) -> bool:
    return (
        list(first.values) == list(second.values)
        and first.totals == second.totals
        and all(torch.equal(first.values[array], second.values[array]) for array in first.values)
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_bits_do_not_depend_on_what_a_worker_computed_before(kind: str) -> None:
    plan = plan_of(GPT2, {"kind": kind})
    version = shared_version(plan)
    busy, fresh = Worker(plan, version), Worker(plan, version)
    before = [busy.round(2, slot) for slot in (0, 1)]
    assert equal(fresh.round(2, 1), before[1])
    assert equal(busy.round(2, 0), before[0])
    assert not equal(before[0], before[1])
    names = {array[1] for array in before[0].values}
    assert names == {WEIGHTS, "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if kind == "muon" else set())
    units = [plan.tensors[tensor].unit for tensor, _ in before[0].values]
    assert units == sorted(units, reverse=True), "last layers first"


def test_shared_moments_and_their_count_of_steps_take_part() -> None:
    plan = plan_of()
    version = shared_version(plan)
    worker = Worker(plan, version)
    from_two = worker.round(2, 0)
    worker.hold(first_weights(plan))
    assert not equal(worker.round(2, 0), from_two)


def test_an_abandoned_round_leaves_the_held_version_and_the_next_slots_bits() -> None:
    plan = plan_of()
    version = shared_version(plan)
    worker = Worker(plan, version)
    expected = Worker(plan, version).round(1, 0)
    gradient = worker.gradient(3, 0)
    begun: list[Progress] = []
    with pytest.raises(AbandonedError):
        worker.round(1, 0, wanted=lambda: len(begun) < 2, begin_step=begun.append)
    assert begun == [Progress(3, 0, 3, 0), Progress(4, 1, 3, 0)]
    for array, held_N in worker.held.arrays.items():
        assert torch.equal(held_N, version[array])
    for (tensor, _), parameter in worker.computer.parameters.items():
        assert parameter.data_ptr() == worker.held.arrays[tensor, WEIGHTS].data_ptr()
        assert parameter.grad is None
    again = worker.gradient(3, 0)
    assert all(torch.equal(again[array], gradient[array]) for array in gradient)
    assert equal(worker.round(1, 0), expected)


def test_a_round_is_abandoned_while_it_is_emitted() -> None:
    plan = plan_of()
    worker = Worker(plan, shared_version(plan))
    made: list[bool] = []
    with pytest.raises(AbandonedError):
        worker.round(1, 0, wanted=lambda: not made, make_room=lambda: made.append(True))


def test_one_gradient_that_is_not_finite_spoils_the_whole_contribution() -> None:
    """A clipped infinity would be zeros almost everywhere, and the servers would take the round."""
    plan = plan_of()
    worker = Worker(plan, shared_version(plan))
    spoiled = worker.round(1, 0, spoils=lambda step, slot: (step, slot) == (4, 0))
    assert all(bool(values_N.isnan().all()) for values_N in spoiled.values.values())
    assert (spoiled.totals.num_tokens, spoiled.totals.num_samples) == (3 * 32, 3 * 4)


# -- progress on the disk ----------------------------------------------------------------------------------------------


def keep_progress(plan: Plan, version: Values, directory: Path, num_done: int, slot: int = 0) -> None:
    """Compute a round, keep its progress, and end as a killed worker does: before the inner step after `num_done`."""
    files = ProgressFiles(plan, directory)
    begun: list[Progress] = []
    with pytest.raises(AbandonedError):
        Worker(plan, version, files).round(1, slot, wanted=lambda: len(begun) <= num_done, begin_step=begun.append)
    files.close()


def go_on(plan: Plan, version: Values, directory: Path, slot: int = 0) -> tuple[Contribution, list[int]]:
    """Compute a slot's round on a new worker; return its contribution and the places of its inner steps."""
    files = ProgressFiles(plan, directory)
    begun: list[Progress] = []
    found = Worker(plan, version, files).round(1, slot, begin_step=begun.append)
    files.close()
    return found, [progress.place for progress in begun]


@pytest.mark.parametrize("optimizer", [{}, NESTEROV, SGD], ids=["adamw", "nesterov", "sgd"])
def test_a_worker_that_starts_again_goes_on_within_the_round(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    plan = plan_of(optimizer=optimizer, steps=6, progress_steps=4)
    version = shared_version(plan)
    expected = Worker(plan, version).round(1, 0)
    keep_progress(plan, version, tmp_path, 5)
    files = ProgressFiles(plan, tmp_path)
    files.close()
    assert [(kept.version, kept.slot, kept.num_done) for kept in files.kept] == [(1, 0, 4)], "what it says of itself"
    found, places = go_on(plan, version, tmp_path)
    assert places == [4, 5]
    assert equal(found, expected)


def test_progress_of_another_version_or_recipe_is_left_aside(tmp_path: Path) -> None:
    plan = plan_of(steps=6, progress_steps=4)
    version = shared_version(plan)
    keep_progress(plan, version, tmp_path, 5)
    other = {array: values_N * 1.5 for array, values_N in version.items()}
    assert go_on(plan, other, tmp_path)[1] == [0, 1, 2, 3, 4, 5]
    keep_progress(plan, version, tmp_path, 5)
    slower = plan_of(optimizer={"learning_rate": 1e-4}, steps=6, progress_steps=4)
    assert go_on(slower, version, tmp_path)[1] == [0, 1, 2, 3, 4, 5]


def test_a_slot_of_fewer_steps_follows_its_own_samples_and_the_rounds_rates(tmp_path: Path) -> None:
    plan = plan_of(optimizer=SGD, steps=6, progress_steps=2, slot_steps=[6, 3])
    version = shared_version(plan)
    worker = Worker(plan, version)
    begun: list[Progress] = []
    found = worker.round(1, 1, begin_step=begun.append)
    assert [(each.step, each.place, each.num_steps) for each in begun] == [(6, 0, 3), (8, 1, 3), (10, 2, 3)]
    assert (found.totals.num_samples, found.totals.num_tokens) == (12, 96)
    # By hand: the second round of a slot of 3 inner steps has the samples of its steps 3, 4 and 5.
    weights = {array: values_N.clone() for array, values_N in version.items() if array[1] == WEIGHTS}
    by_hand = Worker(plan, version)
    for number, step in ((3, 6), (4, 8), (5, 10)):
        by_hand.hold(weights)
        gradient = by_hand.gradient(number, 1)
        norm = math.sqrt(sum(float(each.double().square().sum()) for each in gradient.values()))
        scale = min(1.0, SGD["clip_norm"] / (norm + 1e-6)) * rate_of_step(plan.recipe, step)
        weights = {array: values_N - scale * gradient[array] for array, values_N in weights.items()}
    for array, values_N in weights.items():
        torch.testing.assert_close(found.values[array] / 96, version[array] - values_N, rtol=1e-4, atol=1e-7)
    # Progress on the disk counts the slot's own steps.
    keep_progress(plan, version, tmp_path, 2, slot=1)
    again, places = go_on(plan, version, tmp_path, slot=1)
    assert places == [2]
    assert equal(again, found)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:-9] + b"x" + data[-8:], lambda data: b""]
)
def test_damaged_progress_is_left_aside(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    plan = plan_of(steps=6, progress_steps=4)
    version = shared_version(plan)
    expected = Worker(plan, version).round(1, 0)
    keep_progress(plan, version, tmp_path, 5)
    (path,) = tmp_path.glob("rounds/*/*")
    path.write_bytes(damage(path.read_bytes()))
    found, places = go_on(plan, version, tmp_path)
    assert places == [0, 1, 2, 3, 4, 5]
    assert equal(found, expected)


def test_progress_is_removed_when_its_round_is_over(tmp_path: Path) -> None:
    plan = plan_of(steps=6, progress_steps=4)
    version = shared_version(plan)
    keep_progress(plan, version, tmp_path, 5)
    begun = next(tmp_path.glob("rounds/*/*")).with_suffix(".1.part")
    begun.touch()
    files = ProgressFiles(plan, tmp_path, now=lambda: 0.0)
    files.forget_before(1)
    files.close()
    assert len(list(tmp_path.glob("rounds/*/*"))) == 2
    later = ProgressFiles(plan, tmp_path)
    later.forget_before(plan.last_version)
    later.close()
    assert list(tmp_path.glob("rounds/*")) == []


def test_a_disk_without_room_costs_only_the_progress(tmp_path: Path) -> None:
    plan = plan_of(steps=6, progress_steps=4)
    version = shared_version(plan)
    (tmp_path / "rounds").write_text("in the way")
    found, places = go_on(plan, version, tmp_path)
    assert places == [0, 1, 2, 3, 4, 5]
    assert equal(found, Worker(plan, version).round(1, 0))


# -- the version's arrival ---------------------------------------------------------------------------------------------


def arrival(plan: Plan, version: Values, index: int, number: int) -> Arrival:
    bundle = plan.bundle(index)
    codec = CodecBook(plan.tensors, plan.recipe.codec.embedding).of(bundle, "fp32")
    payloads = codec.encode([version[f.tensor, bundle.array][f.begin : f.end] for f in bundle.fragments], number)
    header = pb.WeightsHeader(
        version=number,
        bundle=index,
        codec=codec.codec.wire,
        payload_bytes=sum(map(len, payloads)),
        fragment_bytes=[len(payload) for payload in payloads],
    )
    return Arrival(header, np.concatenate(payloads))


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as found:
        yield found


def test_a_round_waits_for_the_moments_and_a_forward_pass_does_not(thread: ThreadPoolExecutor) -> None:
    plan = plan_of()
    version = shared_version(plan)
    computer = SlotComputer(plan, CPU)
    installer = WeightInstaller(plan, computer.models, computer.parameters, Timeline())
    try:
        inbox = Inbox(1, "fp32")
        installer.install(inbox)
        for bundle in plan.bundles:
            inbox.put(arrival(plan, version, bundle.index, 1))
        computer.model(input_ids=torch.arange(8)[None], use_cache=False)
        waiting = thread.submit(installer.wait_all)
        *before, last = plan.moment_bundles
        for bundle in before:
            inbox.put(arrival(plan, version, bundle.index, 1))
        assert not waiting.done()
        inbox.put(arrival(plan, version, last.index, 1))
        waiting.result(20)
        assert installer.held.arrays.keys() == version.keys()
        for array, held_N in installer.held.arrays.items():
            assert torch.equal(held_N, version[array])
    finally:
        installer.close()
        computer.close()


class Publisher:
    """A server's Pull alone: answers with one version, and notes the bundles of each request."""

    def __init__(self, version: int):
        self.version = version
        self.requests: list[tuple[int, list[int]]] = []

    async def Pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[bytes]:
        self.requests.append((request.min_version, list(request.bundles)))
        yield frame(pb.WeightsHeader(version=self.version, push_codec=1).SerializeToString())
        await asyncio.Event().wait()

    async def Push(self, messages: AsyncIterator[bytes], context: Any) -> AsyncIterator[pb.PushResponse]:
        raise NotImplementedError
        yield pb.PushResponse()

    async def CompleteStep(self, request: Any, context: Any) -> None: ...

    async def CompleteSlots(self, request: Any, context: Any) -> None: ...

    async def GetServerStatus(self, request: Any, context: Any) -> None: ...


@pytest.mark.parametrize(
    ("asked", "answered", "shares"), [(0, 1, [False]), (0, 3, [False, True]), (2, 2, [True]), (1, 2, [False, True])]
)
async def test_moments_are_pulled_where_the_version_shares_them(asked: int, answered: int, shares: list[bool]) -> None:
    """Weights come first. A worker that comes late requests again when the version is a round's and not a step's."""
    plan = plan_of(after=2)
    publisher = Publisher(answered)
    server: grpc.aio.Server = new_server()
    add_parameter_server(publisher, server)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    channel = open_channel(f"127.0.0.1:{port}")
    weights, moments = ({bundle.index: bundle for bundle in found} for found in (plan.bundles, plan.moment_bundles))
    book = CodecBook(plan.tensors, plan.recipe.codec.embedding)
    pull = ServerPull(plan, plan.servers[0], weights, ParameterServerStub(channel), book, moments, Timeline())
    try:
        assert await asyncio.wait_for(pull.version(asked, None, None), 20) == answered
        expected = [[*weights, *moments] if with_moments else list(weights) for with_moments in shares]
        assert [bundles for _, bundles in publisher.requests] == expected
        assert publisher.requests[-1][0] in (asked, answered)
    finally:
        pull.cancel()
        await channel.close(None)
        await server.stop(None)
