"""What nodes offer, and what a plan needs of them: bytes of memory, as pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradstream.core.plan.bundles import codec_for, first_push_codec
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.fragments import BYTES_PER_ELEMENT, Fragment, Tensor
from gradstream.core.plan.plan import Plan
from gradstream.core.plan.sizes import encoded_bytes
from gradstream.core.recipe.recipe import RESIDUAL_CODECS, Recipe

# fp32 arrays that an optimizer keeps beside the weights.
NUM_MOMENTS = {"adamw": 2, "sgd": 1}


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """A node as the planner sees it. `memory_bytes` 0 means that it did not say, `flops_per_second` 0 that it did not
    measure."""

    node_id: str
    name: str
    address: str
    memory_bytes: int
    flops_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class ServerBytes:
    """Memory that a server needs for its fragments, in bytes."""

    # Held all the time: master weights, moments, accumulator, reference, and the published bundles, encoded.
    state: int
    # On top while a checkpoint is written: a copy of what is saved.
    checkpoint: int
    # On top for a version that a newcomer pulls, where the others pull differences: the whole bundles for it.
    newcomer: int
    # Most that contributions can take which wait for their turn.
    early: int

    @property
    def most(self) -> int:
        """All of it at once."""
        return self.state + self.checkpoint + self.newcomer + self.early


def server_bytes(recipe: Recipe, fragments: Sequence[Fragment], tensors: Sequence[Tensor]) -> ServerBytes:
    """What a server with these fragments needs."""

    def encoded(codec: str, embedding: str) -> int:
        return sum(
            encoded_bytes(codec_for(tensors[fragment.tensor].kind, codec, embedding), fragment.shape)
            for fragment in fragments
        )

    array = BYTES_PER_ELEMENT * sum(fragment.num_elements for fragment in fragments)
    form, embedding = downlink(recipe.codec.pull), recipe.codec.embedding
    whole = encoded(form.full, embedding)
    saved = (1 + NUM_MOMENTS[recipe.optimizer.kind] + form.keeps_reference) * array
    if form.delta is None:
        published, newcomer = whole, 0
    else:
        published, newcomer = (array if form.keeps_reference else whole), whole
        published += encoded(form.delta, form.delta)
    state = (2 + NUM_MOMENTS[recipe.optimizer.kind]) * array + published
    push = first_push_codec(recipe.codec)
    early = recipe.training.num_slots * encoded(push, embedding)
    if recipe.pipeline.stages != 1:  # of a tied tensor both parts
        tied = [fragment for fragment in fragments if tensors[fragment.tensor].is_tied]
        early += recipe.training.num_slots * sum(
            encoded_bytes(codec_for(tensors[fragment.tensor].kind, push, embedding), fragment.shape)
            for fragment in tied
        )
    return ServerBytes(state, saved, newcomer, early)


HELD_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
"""Of an element of a frozen base, by how it is held."""


def worker_bytes(recipe: Recipe, num_parameters: int, num_frozen_parameters: int = 0) -> int:
    """Bytes that a worker needs beside its activations, should it hold every slot.

    A frozen base it holds in few bytes. Of what is trained, `num_parameters`:

    Weights, the gradients of the slot under way and of the one being encoded, the slots' encoded gradients until they
    are acknowledged, the next version's weights as they arrive, and each slot's residual where the codec keeps one.
    """
    push, pull = first_push_codec(recipe.codec), downlink(recipe.codec.pull).full
    slot = encoded_bytes(push, (num_parameters,))
    if push in RESIDUAL_CODECS:
        # Its residual at the version, and the one that the step leaves behind.
        slot += 2 * BYTES_PER_ELEMENT * num_parameters
    arriving = encoded_bytes(pull, (num_parameters,))
    frozen = 0
    if recipe.fine_tuning is not None:
        frozen = num_frozen_parameters * HELD_BYTES[recipe.fine_tuning.held]
    return frozen + 3 * BYTES_PER_ELEMENT * num_parameters + recipe.training.num_slots * slot + arriving


def stage_need(plan: Plan, place: int = 0) -> int:
    """Bytes that the worker in a place of a replica needs; without a pipeline, every worker.

    Follows from the plan alone, so also for one that was stored before the coordinator was restarted.
    """
    return plan.worker_bytes[place] if plan.worker_bytes else worker_bytes(plan.recipe, plan.num_parameters)


def human_bytes(count: float) -> str:
    """A size for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 1024 else f"{count / 1024:.1f} TiB"


def fits(memory_bytes: int, need: int) -> bool:
    """Whether a node's memory is enough; one that did not say how much it has is believed to have enough."""
    return not memory_bytes or memory_bytes >= need
