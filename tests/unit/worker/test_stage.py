"""Every schedule gives, bit for bit, the gradients of the same microbatches run one after the other in one process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from support.tiny import GPT2, LLAMA, NO_DROPOUT, VOCAB_SIZE

from gradstream.core.model.model import UnitDraws, initial_weights
from gradstream.core.model.stage_module import StageModule, stage_tensors
from gradstream.core.model.weight_gradients import WeightPart
from gradstream.core.pipeline.schedule import SCHEDULES, SPLIT, Action, Schedule, make_schedule, unavailable
from gradstream.core.pipeline.validation import validate
from gradstream.worker.compute import last_backwards
from gradstream.worker.stage import StageRunner

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_LAYERS = 6
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "num_hidden_layers": NUM_LAYERS, "num_key_value_heads": 1},
    "gpt2-tied": {**GPT2, **NO_DROPOUT, "n_layer": NUM_LAYERS},
    "gpt2-dropout": {**GPT2, "n_layer": NUM_LAYERS},
}
NUM_MICROBATCHES = 4
EXISTING = [
    (name, num_workers, num_chunks)
    for name in SCHEDULES
    for num_workers in (1, 2, 3, 4)
    for num_chunks in (1, 2)
    if not unavailable(name, num_workers, NUM_MICROBATCHES, num_chunks)
]

Gradients = dict[tuple[str, int], torch.Tensor]


class Pipeline:
    """All workers of a pipeline in this process, with messages in a dictionary. `split`: see StageRunner."""

    def __init__(self, config: dict[str, Any], schedule: Schedule, split: bool = True):
        self.schedule = schedule
        self.weights = dict(initial_weights(config, seed=3))
        self.tokens = torch.randint(
            0, VOCAB_SIZE, (schedule.num_microbatches, 2, 13), generator=torch.Generator().manual_seed(1)
        )
        num_segments, num_stages = NUM_LAYERS + 2, schedule.num_stages
        bounds = [num_segments * stage // num_stages for stage in range(num_stages + 1)]
        self.stages = [StageModule(config, range(bounds[stage], bounds[stage + 1])) for stage in range(num_stages)]
        for stage in self.stages:
            stage.train()
            for (name, _), parameter in stage_tensors(stage, self.weights).items():
                parameter.data.copy_(self.weights[name])
        self.watching: Callable[[int], AbstractContextManager[object]] = lambda worker: nullcontext()
        self.given: Callable[[int], None] = lambda worker: None
        self.done_with: Callable[[int, Action], None] = lambda worker, action: None
        self.added: Counter[int] = Counter()
        self.draws = [UnitDraws(stage.model, seed=5) for stage in self.stages]
        self.runners = [
            StageRunner(
                {stage: self.stages[stage] for stage in range(worker, num_stages, schedule.num_workers)},
                num_stages,
                self.loss_sum,
                self.begin,
                split,
                lambda parameter: self.added.update([id(parameter)]),
            )
            for worker in range(schedule.num_workers)
        ]

    def begin(self, microbatch: int) -> None:
        for draws in self.draws:
            draws.key = (microbatch,)

    def loss_sum(self, logits_BTV: torch.Tensor, microbatch: int) -> torch.Tensor:
        targets_N = self.tokens[microbatch, :, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_N, reduction="sum")

    def run(self, max_actions: int = 10**9) -> None:
        """Go round the workers; each computes as far as it can, but not more than `max_actions` in all."""
        done: set[Action] = set()
        messages: dict[Action, torch.Tensor] = {}
        places = [0] * self.schedule.num_workers
        while sum(places) < min(max_actions, sum(map(len, self.schedule.rows))):
            for worker, row in enumerate(self.schedule.rows):
                if places[worker] == len(row):
                    continue
                action = row[places[worker]]
                needed = self.schedule.needs(action)
                if not done.issuperset(needed):
                    continue
                received = [messages.pop(item) for item in needed if item.stage != action.stage]
                first = action.stage == 0 and action.op == "F"
                given = self.tokens[action.microbatch, :, :-1].contiguous() if first else next(iter(received), None)

                def give(tensor: torch.Tensor, worker: int = worker, action: Action = action) -> None:
                    messages[action] = tensor
                    self.given(worker)

                with self.watching(worker):
                    self.runners[worker].run(action, given, give)
                self.done_with(worker, action)
                done.add(action)
                places[worker] += 1

    def gradients(self) -> Gradients:
        found: Gradients = {}
        for stage in self.stages:
            of_stage = gradients_of(stage, self.weights)
            assert not found.keys() & of_stage.keys()
            found |= of_stage
        return found


def gradients_of(stage: StageModule, names: Collection[str]) -> Gradients:
    found: Gradients = {}
    for key, parameter in stage_tensors(stage, names).items():
        assert parameter.grad is not None, key
        found[key] = parameter.grad
    return found


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Gradients, dict[int, float]]:
    """A model's config, and what one process makes of its microbatches in turn: gradients and losses."""
    config = MODELS[request.param]
    alone = Pipeline(config, make_schedule("1f1b", 1, NUM_MICROBATCHES))
    losses = {}
    for microbatch in range(NUM_MICROBATCHES):
        alone.begin(microbatch)
        logits_BTV = alone.stages[0](alone.tokens[microbatch, :, :-1])
        loss = alone.loss_sum(logits_BTV, microbatch)
        loss.backward()
        losses[microbatch] = float(loss.detach())
    return config, alone.gradients(), losses


def assert_same(found: Gradients, expected: Gradients) -> None:
    assert set(found) == set(expected)
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient), key


@pytest.mark.parametrize(
    ("name", "num_workers", "num_chunks", "split"),
    [(*case, True) for case in EXISTING]
    + [(*case, False) for case in EXISTING if case[1] == 2 and case[0] not in SPLIT],
)
def test_gradients_are_those_of_one_process(
    name: str, num_workers: int, num_chunks: int, split: bool, model: tuple[dict[str, Any], Gradients, dict[int, float]]
) -> None:
    config, expected, losses = model
    schedule = make_schedule(name, num_workers, NUM_MICROBATCHES, num_chunks)
    pipeline = Pipeline(config, schedule, split)
    pipeline.run()
    assert_same(pipeline.gradients(), expected)
    assert pipeline.runners[-1].losses == losses
    # What the validator says of activations is what is held.
    assert tuple(runner.max_live for runner in pipeline.runners) == validate(schedule).live_activations


@pytest.mark.parametrize("name", ["1f1b", "zero-bubble"])
@pytest.mark.parametrize("num_workers", [2, 4])
def test_gradients_of_one_slot_have_nothing_of_the_next(
    name: str, num_workers: int, model: tuple[dict[str, Any], Gradients, dict[int, float]]
) -> None:
    """Two slots of two microbatches in one row: a slot's gradients are taken when it is through, by which time passes
    of the next one may have begun."""
    config = model[0]
    alone = Pipeline(config, make_schedule("1f1b", 1, NUM_MICROBATCHES))
    expected = []
    for slot in range(2):
        for microbatch in (2 * slot, 2 * slot + 1):
            alone.begin(microbatch)
            alone.loss_sum(alone.stages[0](alone.tokens[microbatch, :, :-1]), microbatch).backward()
        expected.append(alone.gradients())
        alone.stages[0].zero_grad()
    pipeline = Pipeline(config, make_schedule(name, num_workers, NUM_MICROBATCHES))
    taken: list[Gradients] = [{}, {}]
    lasts = [last_backwards(row, 2) for row in pipeline.schedule.rows]

    def take(worker: int, action: Action) -> None:
        if action in lasts[worker]:
            stage = pipeline.stages[action.stage]
            taken[action.microbatch // 2] |= gradients_of(stage, pipeline.weights)
            stage.zero_grad()

    pipeline.done_with = take
    pipeline.run()
    for slot in range(2):
        assert_same(taken[slot], expected[slot])


@pytest.mark.parametrize("name", ["1f1b", "zero-bubble"])
def test_an_abandoned_attempt_leaves_nothing(
    name: str, model: tuple[dict[str, Any], Gradients, dict[int, float]]
) -> None:
    config, expected, losses = model
    pipeline = Pipeline(config, make_schedule(name, 2, NUM_MICROBATCHES))
    for max_actions in (1, 7, 12):
        pipeline.run(max_actions)
        for runner in pipeline.runners:
            runner.abandon()
    pipeline.run()
    assert_same(pipeline.gradients(), expected)
    assert pipeline.runners[-1].losses == losses


EXPERTS = {**MODELS["llama"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
"""A layer's experts are one parameter of three dimensions, which no layer of ours has."""


@pytest.mark.parametrize("config", [*MODELS.values(), EXPERTS], ids=[*MODELS, "mixtral"])
def test_the_neighbours_gradient_is_there_before_those_of_the_matrices(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is kept until these are made is no more than what the forward pass kept."""
    pipeline = Pipeline(config, make_schedule("1f1b", 3, 1))
    saved = SavedBytes(pipeline)
    pipeline.watching = saved.watching
    gave: list[int] = []
    kept: dict[int, int] = {}
    add = WeightPart.add

    def adding(rest: WeightPart) -> None:
        worker = gave[-1]
        matrices = [gradient.weight for gradient in rest.put_off]
        assert matrices
        assert all(matrix.grad is None for matrix in matrices)
        tensors = [made for _, made in rest.others] + [tensor for one in rest.put_off for tensor in one.tensors]
        sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        kept[worker] = sum(sizes.values())
        add(rest)

    pipeline.given = gave.append
    monkeypatch.setattr(WeightPart, "add", adding)
    pipeline.run()
    assert set(kept) == {1, 2}, "the first stage has nobody to give a gradient to"
    for worker, size in kept.items():
        assert 0 < size <= saved.most[worker], worker
    for stage in pipeline.stages:
        assert all(parameter.grad is not None for parameter in stage.parameters())


@pytest.mark.parametrize("name", ["1f1b", "zero-bubble"])
def test_on_added_is_called_once_for_each_parameter_and_pass(name: str) -> None:
    pipeline = Pipeline(MODELS["llama"], make_schedule(name, 2, 2))
    pipeline.run()
    parameters = [id(parameter) for stage in pipeline.stages for parameter in stage.parameters()]
    assert pipeline.added == Counter(parameters * 2)


class SavedBytes:
    """Bytes that autograd keeps between forward and backward passes, by worker: now and at most.

    A storage counts once however many views of it are kept; parameters, which are there anyway, do not.
    """

    def __init__(self, pipeline: Pipeline):
        self.most = [0] * len(pipeline.runners)
        self._parameters = {
            parameter.untyped_storage().data_ptr() for stage in pipeline.stages for parameter in stage.parameters()
        }
        self._kept: list[Counter[int]] = [Counter() for _ in pipeline.runners]
        self._sizes: dict[int, int] = {}

    def watching(self, worker: int) -> AbstractContextManager[object]:
        kept = self._kept[worker]

        def pack(tensor: torch.Tensor) -> Held:
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in self._parameters:
                kept[key] += 1
                self._sizes[key] = storage.nbytes()
                self.most[worker] = max(self.most[worker], sum(self._sizes[found] for found in kept))
            return Held(tensor, kept)

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor)


class Held:
    """A tensor that autograd keeps; when the graph lets go of it, so does the count."""

    def __init__(self, tensor: torch.Tensor, kept: Counter[int]):
        self.tensor = tensor
        self._kept = kept

    def __del__(self) -> None:
        key = self.tensor.untyped_storage().data_ptr()
        self._kept[key] -= 1
        if self._kept[key] <= 0:
            del self._kept[key]


@pytest.mark.parametrize("name", ["1f1b", "eager-1f1b", "gpipe"])
def test_memory_of_activations_stays_within_the_bound(name: str) -> None:
    """Measured, as bytes: what a worker keeps is at most the bound's microbatches times what one of them takes."""
    num_workers, num_microbatches = 4, 12
    alone = Pipeline(MODELS["llama"], make_schedule(name, num_workers, 1))
    one = SavedBytes(alone)
    alone.watching = one.watching
    alone.run()
    schedule = make_schedule(name, num_workers, num_microbatches)
    pipeline = Pipeline(MODELS["llama"], schedule)
    measured = SavedBytes(pipeline)
    pipeline.watching = measured.watching
    pipeline.run()
    bounds = validate(schedule).live_activations
    for worker, (bound, most, each) in enumerate(zip(bounds, measured.most, one.most, strict=True)):
        assert each > 0
        # What does not belong to a microbatch, such as a mask, counts in each of `each` and once here.
        assert (bound - 1) * each < most <= bound * each, (worker, bound, most / each)
    if name == "1f1b":
        assert bounds == (4, 3, 2, 1)
