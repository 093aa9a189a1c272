"""One slot's gradient: equal to plain autograd's in every bit, each tensor once, last layers first."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.micro import MICRO_LLAMA, micro_plan
from torch import nn

from gradstream.core.errors import ConfigError
from gradstream.core.model.model import build, derive_seed, forward_units, initial_weights, inventory
from gradstream.core.model.stage_module import segments_of
from gradstream.core.pipeline.schedule import Action, Op
from gradstream.core.wire.slot_totals import SlotTotals
from gradstream.worker.attempt import AbandonedError, Alone, Attempt
from gradstream.worker.compute import SlotComputer, _LastPass
from gradstream.worker.samples.data import Batch
from gradstream.worker.stage_build import pick_device

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = MICRO_LLAMA


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
MODELS = {"llama": MODEL, "llama-tied": MODEL | {"tie_word_embeddings": True}, "gpt2-with-dropout": GPT2}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
CPU = torch.device("cpu")
TOKENS = np.random.default_rng(0).integers(0, 64, size=(4, 9))


def load(model: nn.Module, config: dict[str, Any]) -> None:
    weights = dict(initial_weights(config, 0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


class Emitted:
    """What a slot gave away, in order."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.gradients: dict[int, torch.Tensor] = {}
        self.totals: set[SlotTotals] = set()

    def __call__(self, tensor: int, part: int, gradient: torch.Tensor, totals: SlotTotals) -> None:
        assert part == 0
        assert tensor not in self.gradients, "each tensor once"
        self.order.append(tensor)
        self.gradients[tensor] = gradient
        self.totals.add(totals)


def run_slot(
    computer: SlotComputer,
    step: int,
    slot: int,
    tokens: np.ndarray[Any, np.dtype[np.int64]],
    emitted: Emitted,
    wanted: Callable[[], bool],
) -> SlotTotals:
    computer.run(
        Attempt(0, step, (slot,)), {slot: Batch(tokens[:, :-1], tokens[:, 1:])}, lambda _: emitted, wanted, Alone()
    )
    (totals,) = emitted.totals
    return totals


def evaluate(computer: SlotComputer, wanted: Callable[[], bool] = lambda: True) -> tuple[float, int]:
    found = computer.evaluate(Attempt(0, 0, (0,), True), Batch(TOKENS[:, :-1], TOKENS[:, 1:]), wanted, Alone())
    assert found is not None
    return found


def run(model: dict[str, Any], slot: int = 1, **training: Any) -> tuple[Emitted, SlotTotals, SlotComputer]:
    computer = SlotComputer(micro_plan(model, **training), CPU)
    load(computer.model, model)
    emitted = Emitted()
    totals = run_slot(computer, 2, slot, TOKENS, emitted, lambda: True)
    return emitted, totals, computer


def plain_autograd(model_config: dict[str, Any], slot: int, microbatch: int) -> tuple[dict[str, torch.Tensor], float]:
    """The same in a few lines of torch: sum the loss of each microbatch, let .grad add up."""
    model = build(model_config)
    load(model, model_config)
    model.train()
    under_way = [0]

    def begin(name: str) -> None:  # what a unit draws depends on its name and the microbatch alone
        torch.manual_seed(derive_seed(0, "step", 2, slot, under_way[0], name))

    for name, unit in forward_units(model):
        unit.register_forward_pre_hook(lambda *_, name=name: begin(name))
    loss_sum = 0.0
    for under_way[0], piece in enumerate(torch.from_numpy(TOKENS).split(microbatch)):
        logits_BTV = model(input_ids=piece[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), piece[:, 1:].flatten(), reduction="sum")
        loss.backward()
        loss_sum += float(loss.detach())
    return {name: parameter.grad for name, parameter in model.named_parameters()}, loss_sum


@every_model
@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_gradients_are_plain_autograds_bit_for_bit(model: dict[str, Any], microbatch: int) -> None:
    emitted, totals, computer = run(model, microbatch=microbatch)
    expected, loss_sum = plain_autograd(model, 1, microbatch)
    names = [tensor.name for tensor in inventory(model)]
    assert sorted(emitted.gradients) == list(range(len(names)))
    for number, name in enumerate(names):
        assert torch.equal(emitted.gradients[number], expected[name]), name
    assert (totals.num_tokens, totals.num_samples) == (32, 4)
    assert totals.loss_sum == pytest.approx(loss_sum, rel=1e-12)
    assert emitted.totals == {totals}, "every contribution says the same of its slot"
    assert all(parameter.grad is None for parameter in computer.model.parameters())


@every_model
def test_last_layers_come_first(model: dict[str, Any]) -> None:
    emitted, _, _ = run(model)
    units = [inventory(model)[number].unit for number in emitted.order]
    layers = sorted({tensor.unit for tensor in inventory(model) if ".0." in tensor.name or ".1." in tensor.name})
    assert len(layers) == 2
    within = [unit for unit in units if unit in layers]
    assert within == sorted(within, reverse=True)
    assert units[-1] == 0, "the embedding is final when all is done"


class Recording(Alone):
    """Notes in the same list as an Emitted what was sent."""

    def __init__(self, order: list[int | Action]):
        super().__init__()
        self._order = order

    def send(self, action: Action, tensor: torch.Tensor, loss_sum: float) -> None:
        self._order.append(action)
        super().send(action, tensor, loss_sum)


@every_model
def test_the_stage_before_gets_its_gradient_before_the_servers_get_those_of_the_matrices(
    model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the gradients of a pipeline's stages are emitted from inside its passes, each one once."""
    left: list[int] = []
    emit_rest = SlotComputer._emit_rest

    def counting(self: SlotComputer, stage: int, last_pass: _LastPass) -> None:
        left.append(len(set(self._uses_of_stage[stage]) - last_pass.emitted))
        emit_rest(self, stage, last_pass)

    monkeypatch.setattr(SlotComputer, "_emit_rest", counting)
    segments = segments_of(build(model, "meta"))
    stage_ends = (segments[2].units[0], segments[-1].units[-1] + 1)
    plan = replace(micro_plan(model), stage_ends=stage_ends, num_chunks=2, pipeline_schedule="interleaved-1f1b")
    computer = SlotComputer(plan, CPU)
    weights, tensors = dict(initial_weights(model, 0)), inventory(model)
    with torch.no_grad():
        for (number, _), parameter in computer.parameters.items():
            parameter.copy_(weights[tensors[number].name])
    order: list[int | Action] = []
    gradients: dict[tuple[int, int], torch.Tensor] = {}

    def emit(tensor: int, part: int, gradient: torch.Tensor, totals: SlotTotals) -> None:
        assert (tensor, part) not in gradients, "each tensor once"
        order.append(tensor)
        gradients[tensor, part] = gradient

    batch = Batch(TOKENS[:, :-1], TOKENS[:, 1:])
    computer.run(Attempt(0, 2, (1,)), {1: batch}, lambda slot: emit, lambda: True, Recording(order))
    assert left == [0, 0], "of each stage"
    assert set(gradients) == set(computer.parameters)
    last = [item for item in order if isinstance(item, Action) and item.op is Op.BACKWARD][-1]
    sent = order.index(last)
    matrices = {
        number
        for number, tensor in enumerate(tensors)
        if tensor.kind in ("matrix", "head") and tensor.unit >= stage_ends[0]
    }
    assert matrices
    assert all(order.index(number) > sent for number in matrices)
    expected, _ = plain_autograd(model, 1, 2)
    for number, tensor in enumerate(tensors):
        found = sum(gradients[use] for use in gradients if use[0] == number)
        assert isinstance(found, torch.Tensor)
        if len([use for use in gradients if use[0] == number]) == 1:
            assert torch.equal(found, expected[tensor.name]), tensor.name
        else:
            torch.testing.assert_close(found, expected[tensor.name])


@every_model
def test_recompute_gives_the_same_bits(model: dict[str, Any]) -> None:
    without, first, _ = run(model, recompute=False)
    with_it, second, _ = run(model, recompute=True)
    assert first == second
    assert without.gradients.keys() == with_it.gradients.keys()
    for number, gradient in without.gradients.items():
        assert torch.equal(gradient, with_it.gradients[number])


def test_a_slot_is_the_same_whatever_was_computed_before() -> None:
    first, _, computer = run(GPT2)
    run_slot(computer, 0, 0, TOKENS[::-1], Emitted(), lambda: True)
    evaluate(computer)
    again = Emitted()
    run_slot(computer, 2, 1, TOKENS, again, lambda: True)
    assert all(torch.equal(first.gradients[number], again.gradients[number]) for number in first.gradients)
    other, _, _ = run(GPT2, slot=0)
    assert not torch.equal(first.gradients[0], other.gradients[0]), "another slot draws another dropout"


def test_a_parameter_without_a_path_to_the_loss_gets_zeros() -> None:
    """The step waits for every fragment: one that never came would hold it for ever."""
    computer = SlotComputer(micro_plan(), CPU)
    load(computer.model, MODEL)
    layer = computer.model.get_submodule("model.layers.1.mlp")
    layer.register_forward_hook(lambda module, inputs, output: output.detach())
    emitted = Emitted()
    totals = run_slot(computer, 0, 0, TOKENS, emitted, lambda: True)
    names = [tensor.name for tensor in inventory(MODEL)]
    assert sorted(emitted.gradients) == list(range(len(names)))
    for number, name in enumerate(names):
        assert emitted.gradients[number].shape == computer.parameters[number, 0].shape
        cut_off = "layers.1.mlp" in name or "layers.1.post_attention_layernorm" in name
        assert bool(emitted.gradients[number].any()) != cut_off, name
    assert emitted.totals == {totals}


@pytest.mark.parametrize("answers", [0, 1, 2, 5])
def test_an_abandoned_slot_stops_and_leaves_no_gradient(answers: int) -> None:
    """Whether it is abandoned before, between the microbatches or inside the last backward pass."""
    computer = SlotComputer(micro_plan(), CPU)
    load(computer.model, MODEL)
    left = iter([True] * answers)
    emitted = Emitted()
    with pytest.raises(AbandonedError):
        run_slot(computer, 0, 0, TOKENS, emitted, lambda: next(left, False))
    assert len(emitted.order) == max(0, answers - 2), "two microbatches ask first"
    assert all(parameter.grad is None for parameter in computer.model.parameters())
    # The next slot is not disturbed by what was left behind.
    after = Emitted()
    run_slot(computer, 2, 1, TOKENS, after, lambda: True)
    expected, _, _ = run(MODEL)
    assert all(torch.equal(after.gradients[number], expected.gradients[number]) for number in after.gradients)


def test_evaluation_is_the_mean_loss_without_dropout_and_can_be_abandoned() -> None:
    computer = SlotComputer(micro_plan(GPT2, microbatch=2), CPU)
    load(computer.model, GPT2)
    loss_sum, num_tokens = evaluate(computer)
    model = build(GPT2).eval()
    load(model, GPT2)
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    whole = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    assert num_tokens == 32
    assert loss_sum == pytest.approx(float(whole), rel=1e-5)
    assert evaluate(computer) == (loss_sum, num_tokens)
    with pytest.raises(AbandonedError):
        evaluate(computer, lambda: False)


def test_bf16_is_near_fp32_and_its_gradients_are_fp32() -> None:
    exact, _, _ = run(MODEL)
    coarse, _, _ = run(MODEL, precision="bf16")
    for number, gradient in exact.gradients.items():
        assert coarse.gradients[number].dtype == torch.float32
        difference = (coarse.gradients[number] - gradient).norm() / gradient.norm()
        assert 0 < difference < 0.1


def test_a_plan_of_another_model_is_refused() -> None:
    plan = micro_plan()
    object.__setattr__(plan, "model_config", MODEL | {"hidden_size": 32})
    with pytest.raises(ConfigError, match="is not in this worker's model"):
        SlotComputer(plan, CPU)


@pytest.mark.parametrize("wanted", ["nonsense", f"cuda:{torch.cuda.device_count()}"])
def test_a_device_that_is_not_there_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {wanted}"):
        pick_device(wanted)
    assert pick_device("cpu") == CPU


MIXTRAL: dict[str, Any] = {
    **MODEL,
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}


def test_a_router_loss_is_added_as_transformers_adds_it() -> None:
    """Its training loss is the mean over a batch's targets and the router loss; ours are sums over targets."""
    emitted, totals, computer = run(MIXTRAL, microbatch=2)
    model: Any = build(MIXTRAL)
    load(model, MIXTRAL)
    model.train()
    loss_sum = 0.0
    for piece in torch.from_numpy(TOKENS).split(2):
        found = model(
            input_ids=piece[:, :-1], labels=piece[:, :-1], shift_labels=piece[:, 1:].contiguous(), use_cache=False
        )
        loss = found.loss * 16
        loss.backward()
        loss_sum += float(loss.detach())
    assert totals.loss_sum == pytest.approx(loss_sum, rel=1e-6)
    parameters = dict(model.named_parameters())
    for number, tensor in enumerate(inventory(MIXTRAL)):
        torch.testing.assert_close(
            emitted.gradients[number], parameters[tensor.name].grad, rtol=1e-4, atol=1e-5, msg=tensor.name
        )
    without, _, _ = run({**MIXTRAL, "output_router_logits": False}, microbatch=2)
    gate = next(number for number, tensor in enumerate(inventory(MIXTRAL)) if "gate." in tensor.name)
    assert not torch.allclose(without.gradients[gate], emitted.gradients[gate], rtol=1e-2)
    # Validation is the cross-entropy alone.
    assert evaluate(computer)[0] < totals.loss_sum
