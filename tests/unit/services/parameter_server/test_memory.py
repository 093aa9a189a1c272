"""The memory of a server that the planner predicts, beside what its bundles hold: all weights trained, and adapters."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from support.micro import MICRO_LLAMA, micro_plan

from gradstream.coordinator.planning.needs import ServerBytes, server_bytes
from gradstream.core.codecs.payloads import CodecBook
from gradstream.core.model.model import inventory
from gradstream.core.optimizer.optimizer import STEP_COUNT
from gradstream.core.optimizer.rules import whole_tensors
from gradstream.core.plan.bundles import bundle, first_push_codec
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.fragments import Tensor, cut
from gradstream.core.recipe.fine_tuning import LoraConfig
from gradstream.core.recipe.recipe import OptimizerConfig, Recipe
from gradstream.services.parameter_server.weight_bundle import WeightBundle

FRAGMENT_ELEMENTS = 256
TRAINED = ("full", "lora")
DEFAULT: dict[str, str] = {}
"""Push int8, pull delta-int8: the codecs of a recipe that names none."""


@cache
def trained_tensors(trained: str) -> list[Tensor]:
    """The micro model's tensors, or those of its adapters."""
    return inventory(MICRO_LLAMA, LoraConfig(rank=4, alpha=8) if trained == "lora" else None)


class Held:
    """The bundles of a server that holds all fragments, and what they hold."""

    def __init__(self, recipe: Recipe, tensors: list[Tensor]):
        self.fragments = cut(tensors, FRAGMENT_ELEMENTS)
        self.form = downlink(recipe.codec.pull)
        self._num_slots = recipe.training.num_slots
        self._push = first_push_codec(recipe.codec)
        self._book = CodecBook(tensors, recipe.codec.embedding)
        bundles = bundle(self.fragments, [0] * len(self.fragments), FRAGMENT_ELEMENTS)
        self.early = 0
        self.states = [WeightBundle(one, tensors, recipe, self.form, self._book) for one in bundles]

    def begin_version(self, version: int) -> None:
        """Add what was taken, and publish other weights as a version."""
        self.early = 0
        generator = torch.Generator().manual_seed(version)
        for state in self.states:
            more = state.start_adding()
            while more:
                state.add(self._book.of(state.bundle, self._push), 0)
                more, _ = state.finish_adding()
            for number, fragment in enumerate(state.bundle.fragments):
                state.initialize(number, torch.randn(fragment.num_elements, generator=generator))
            state.publish(version, self.form.delta or self.form.full)
            state.begin_step(version)

    def serve_newcomer(self) -> None:
        """Frame the whole bundles, as for a worker without the version before."""
        for state in self.states:
            state.full()

    def take_all(self) -> None:
        """Take every contribution of the step before one is added."""
        for state in self.states:
            codec = self._book.of(state.bundle, self._push)
            values = [torch.randn(fragment.num_elements) for fragment in state.bundle.fragments]
            for slot in range(self._num_slots):
                payloads = codec.encode(values, 0)
                state.take(slot, 0)
                state.put(payloads)
                self.early += sum(map(len, payloads))

    def bytes(self) -> ServerBytes:
        """What is held now, and what a checkpoint would take."""
        newcomer = sum(state.newcomer_bytes for state in self.states)
        saved = sum(
            array.nbytes
            for state in self.states
            for _, arrays in state.snapshot()
            for name, array in arrays.items()
            if name != STEP_COUNT  # one number a fragment
        )
        return ServerBytes(sum(state.state_bytes for state in self.states) - newcomer, saved, newcomer, self.early)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize(
    "codec",
    [
        DEFAULT,
        {"push": "bf16", "pull": "bf16"},
        {"push": "fp32", "pull": "fp32"},
        {"push": "int8", "pull": "int8"},
        {"push": "auto", "pull": "auto"},
    ],
    ids=lambda codec: codec.get("pull", "default"),
)
def test_a_server_holds_what_was_predicted(trained: str, codec: dict[str, str]) -> None:
    recipe, tensors = micro_plan(codec=codec).recipe, trained_tensors(trained)
    held = Held(recipe, tensors)
    predicted = server_bytes(recipe, held.fragments, tensors)
    # 1. A first version: no difference to publish yet, and every worker is new.
    held.begin_version(0)
    held.serve_newcomer()
    first = held.bytes()
    assert (first.newcomer, first.checkpoint) == (predicted.newcomer, predicted.checkpoint)
    assert first.state <= predicted.state
    # 2. The next one, which workers that hold the first pull, before and after a new worker.
    held.begin_version(1)
    assert held.bytes() == ServerBytes(predicted.state, predicted.checkpoint, 0, 0)
    held.serve_newcomer()
    assert held.bytes() == ServerBytes(predicted.state, predicted.checkpoint, predicted.newcomer, 0)
    # 3. All contributions arrive before the first is added.
    held.take_all()
    assert held.bytes() == predicted
    # 4. What was framed for the new worker goes with its version.
    held.begin_version(2)
    assert held.bytes() == ServerBytes(predicted.state, predicted.checkpoint, 0, 0)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("pull", ["xor-bf16", "xor-fp32", "bf16-zstd"])
def test_of_compressed_weights_a_maximum_is_predicted(trained: str, pull: str) -> None:
    recipe, tensors = micro_plan(codec={"push": "bf16-zstd", "pull": pull}).recipe, trained_tensors(trained)
    held = Held(recipe, tensors)
    predicted = server_bytes(recipe, held.fragments, tensors)
    for version in range(2):
        held.begin_version(version)
        held.serve_newcomer()
        held.take_all()
        found = held.bytes()
        assert found.state <= predicted.state
        assert found.newcomer <= predicted.newcomer
        assert found.early <= predicted.early
        assert found.checkpoint == predicted.checkpoint


def test_bf16_moments_take_4_bytes_a_parameter_less() -> None:
    whole, tensors = micro_plan().recipe, trained_tensors("full")
    recipe = whole.model_copy(update={"optimizer": OptimizerConfig(moments="bf16")})
    held = Held(recipe, tensors)
    for version in range(2):
        held.begin_version(version)
    predicted = server_bytes(recipe, held.fragments, tensors)
    assert held.bytes() == ServerBytes(predicted.state, predicted.checkpoint, 0, 0)
    count = sum(tensor.num_elements for tensor in tensors)
    assert server_bytes(whole, held.fragments, tensors).state - predicted.state == 4 * count


def test_muon_keeps_one_moment_of_its_matrices() -> None:
    whole, tensors = micro_plan().recipe, trained_tensors("full")
    recipe = whole.model_copy(update={"optimizer": OptimizerConfig(kind="muon")})
    fragments = cut(tensors, FRAGMENT_ELEMENTS)
    predicted, adamw = (server_bytes(one, fragments, tensors) for one in (recipe, whole))
    matrices = [tensors[number].num_elements for number in whole_tensors(recipe.optimizer, tensors)]
    assert adamw.state - predicted.state == adamw.checkpoint - predicted.checkpoint == 4 * sum(matrices)
    assert predicted.scratch == 20 * sum(sorted(matrices)[-8:])
    assert (adamw.scratch, predicted.early) == (0, adamw.early)


def test_adapters_take_25_bytes_a_parameter_and_4_more_for_a_new_worker() -> None:
    """With the default codecs; a new worker pulls the reference in fp32."""
    recipe, tensors = micro_plan().recipe, trained_tensors("lora")
    held = Held(recipe, tensors)
    held.begin_version(0)
    held.begin_version(1)
    held.serve_newcomer()
    count = sum(tensor.num_elements for tensor in tensors)
    found = held.bytes()
    # A scale of 4 bytes for each 256 elements, or fewer at the end of a fragment.
    assert found.state / count == pytest.approx(25, abs=0.1)
    assert found.newcomer / count == 4
