"""The memory that nodes offer and the memory that a plan needs of them, in bytes. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradstream.core.checkpoint.shard import MAX_COPY_BYTES
from gradstream.core.machine.facts import MAX_THREADS
from gradstream.core.optimizer.rules import (
    every_moment_codecs,
    max_moments,
    moment_codecs,
    server_moments,
    whole_tensors,
)
from gradstream.core.plan.bundles import codec_for, first_push_codec
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.fragments import BYTES_PER_ELEMENT, Fragment, Tensor
from gradstream.core.plan.plan import Plan
from gradstream.core.plan.sizes import MAX_ENCODED_SLOTS, encoded_bytes, sum_bytes
from gradstream.core.recipe.local import progress_interval
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.wire.stream_limits import MAX_WAITING_BYTES

MOMENT_BYTES = {"fp32": 4, "bf16": 2}
"""Bytes of an element of the optimizer's arrays, by their type."""
SCRATCH_ARRAYS = 5
"""Arrays as large as a matrix that a thread needs to update the matrix as a whole."""


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """A node as input of the planner. `memory_bytes` is 0 if not reported, `flops_per_second` 0 if not measured."""

    node_id: str
    name: str
    address: str
    memory_bytes: int
    flops_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class ServerBytes:
    """Memory that a server needs for its fragments, in bytes."""

    # Always: master weights, moments, outer momentum, accumulators, reference, and the encoded published bundles.
    state: int
    # In addition while a checkpoint is written: copies of bundles that are updated before they are written.
    checkpoint: int
    # In addition while a newcomer pulls whole bundles of a version of which the other workers pull differences.
    newcomer: int
    # Maximum of the contributions that wait to be added. With a quorum, until it is decided which slots count, all do.
    early: int
    # While matrices are updated as a whole: what the rule computes with. No contribution waits then.
    scratch: int = 0

    @property
    def most(self) -> int:
        """The sum of all parts that are held at the same time: the peak memory."""
        return self.state + self.checkpoint + self.newcomer + max(self.early, self.scratch)


def server_bytes(recipe: Recipe, fragments: Sequence[Fragment], tensors: Sequence[Tensor]) -> ServerBytes:
    """Compute the memory that a server with these fragments needs."""

    def encoded(codec: str, embedding: str) -> int:
        return sum(
            encoded_bytes(codec_for(tensors[fragment.tensor].kind, codec, embedding), fragment.shape)
            for fragment in fragments
        )

    array = BYTES_PER_ELEMENT * sum(fragment.num_elements for fragment in fragments)
    form, embedding = downlink(recipe.codec.pull), recipe.codec.embedding
    whole = encoded(form.full, embedding)
    optimizer = recipe.optimizer
    kept = [len(server_moments(recipe, tensors[fragment.tensor])) * fragment.num_elements for fragment in fragments]
    moments = MOMENT_BYTES[optimizer.moments] * sum(kept)
    local = recipe.local
    if local is not None and local.outer.momentum:
        moments += array
    saved = (1 + form.keeps_reference) * array + moments
    if form.delta is None:
        published, newcomer = whole, 0
    else:
        published, newcomer = (array if form.keeps_reference else whole), whole
        published += encoded(form.delta, form.delta)
    sums = sum(sum_bytes(fragment.num_elements) for fragment in fragments)
    state = array + moments + sums + published
    push = first_push_codec(recipe.codec)
    early = recipe.training.num_slots * encoded(push, embedding)
    if recipe.pipeline.stages != 1:  # both parts of a tied tensor
        tied = [fragment for fragment in fragments if tensors[fragment.tensor].is_tied]
        early += recipe.training.num_slots * sum(
            encoded_bytes(codec_for(tensors[fragment.tensor].kind, push, embedding), fragment.shape)
            for fragment in tied
        )
    if local is not None:
        # Moments that slots share are summed and published as bundles of their own, with the weights' fragments.
        shared = {fragment: moment_codecs(recipe, tensors[fragment.tensor]) for fragment in fragments}
        moment_bytes = sum(encoded_bytes(name, each.shape) for each, codecs in shared.items() for name in codecs)
        state += moment_bytes + sum(len(codecs) * sum_bytes(each.num_elements) for each, codecs in shared.items())
        early += recipe.training.num_slots * moment_bytes
    matrices = whole_tensors(optimizer, tensors) & {fragment.tensor for fragment in fragments}
    largest = sorted((tensors[number].num_elements for number in matrices), reverse=True)[:MAX_THREADS]
    scratch = SCRATCH_ARRAYS * BYTES_PER_ELEMENT * sum(largest)
    if local is None or local.quorum is None:
        early = min(early, MAX_WAITING_BYTES)
    return ServerBytes(state, min(saved, MAX_COPY_BYTES), newcomer, early, scratch)


HELD_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
"""Bytes per element of a frozen base, by the type in which it is held."""


def worker_bytes(recipe: Recipe, num_parameters: int, num_frozen_parameters: int = 0) -> int:
    """Bytes that a worker needs besides its activations if it holds every slot.

    A frozen base takes `HELD_BYTES` per element. The `num_parameters` trained parameters take: weights, the gradients
    of the slot under way and of the slot being encoded, the encoded gradients of two slots (no more are held until
    they are acknowledged, gradstream.worker.backlog), the next version's weights as they arrive, and each slot's
    residual and moments where slots keep them. With local steps they take what `_round_arrays` counts instead of the
    weights and gradients, and shared moments are encoded and arrive like the weights.
    """
    push, pull = first_push_codec(recipe.codec), downlink(recipe.codec.pull).full
    num_slots, local = recipe.training.num_slots, recipe.local
    arrays = 3 if local is None else _round_arrays(recipe)
    contribution, arriving = encoded_bytes(push, (num_parameters,)), encoded_bytes(pull, (num_parameters,))
    shared = every_moment_codecs(recipe)
    moments = max(sum(encoded_bytes(name, (num_parameters,)) for name in codecs) for codecs in shared)
    contribution, arriving = contribution + moments, arriving + moments
    slots = min(MAX_ENCODED_SLOTS, num_slots) * contribution
    # What the slot keeps at the version, and what the step leaves behind.
    kept = int(recipe.codec.decay > 0)
    if local is not None and local.inner_state == "keep":
        kept += max_moments(recipe.optimizer)
    slots += num_slots * 2 * kept * BYTES_PER_ELEMENT * num_parameters
    frozen = 0
    if recipe.fine_tuning is not None:
        frozen = num_frozen_parameters * HELD_BYTES[recipe.fine_tuning.held]
    return frozen + arrays * BYTES_PER_ELEMENT * num_parameters + slots + arriving


def _round_arrays(recipe: Recipe) -> int:
    """The fp32 arrays of the weights' size that a worker holds in a round (gradstream.worker.rounds).

    They are: the version's weights and, if shared, its moments; the weights and moments of the slot under way, its
    gradient under way and its mean gradient; the difference and, if shared, the moments of the slot being encoded; and
    without a pipeline the copy of the slot's weights and moments that is written to the disk.
    """
    assert recipe.local is not None
    num_moments = max_moments(recipe.optimizer)
    shared = max(map(len, every_moment_codecs(recipe)))
    encoded = 1 + shared if recipe.training.num_slots > 1 else 0
    keeps = progress_interval(recipe.local, recipe.pipeline) > 0
    kept = 1 + num_moments if keeps else 0
    return (1 + shared) + (1 + num_moments + 2) + encoded + kept


def stage_need(plan: Plan, place: int = 0) -> int:
    """Bytes that the worker in a place of a replica needs; without a pipeline, every worker.

    Depends only on the plan, so it is also known for a plan that was stored before a restart of the coordinator.
    """
    return plan.worker_bytes[place] if plan.worker_bytes else worker_bytes(plan.recipe, plan.num_parameters)


def human_bytes(count: float) -> str:
    """A size for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 1024 else f"{count / 1024:.1f} TiB"


MAX_NAMED = 8
"""Of more names a reason has the first four, of more figures the range."""


def named(names: Sequence[str]) -> str:
    """Names for a reason: all, or the first ones and how many there are more."""
    if len(names) <= MAX_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:4])} and {len(names) - 4} more"


def fits(memory_bytes: int, need: int) -> bool:
    """Whether a node's memory is enough. Memory that was not reported (0) counts as enough."""
    return not memory_bytes or memory_bytes >= need
