"""An attempt (slots that a replica computes in one go, at one version), its schedule and its two interfaces.

`Exchange` carries the activations and gradients of a pipeline; `Emit` takes the finished gradients of a slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from gradstream.core.pipeline.schedule import Action, Op, Schedule, make_schedule
from gradstream.core.plan.bundles import WEIGHTS
from gradstream.core.plan.plan import Plan
from gradstream.core.wire.slot_totals import SlotTotals


class AbandonedError(Exception):
    """The attempt was abandoned: its step was committed, or its plan replaced, during the computation."""


@dataclass(frozen=True)
class Attempt:
    """Slots that are computed one after the other without a pause, at one version.

    `number` rises with each attempt of a replica. A validation pass has one slot and no backward passes. A round has
    one slot, whose inner steps are computed one after the other.
    """

    number: int
    version: int
    slots: tuple[int, ...]
    validate: bool = False


class Emit(Protocol):
    """Takes what one slot contributes, each (tensor, part, array) once. Called from the compute thread.

    With `array` WEIGHTS the values are a final gradient, or the difference of a round; else they are a moment.
    """

    def __call__(self, tensor: int, part: int, values: torch.Tensor, totals: SlotTotals, array: str = WEIGHTS) -> None:
        """Take the values. The caller must not use them afterwards."""


class Exchange(Protocol):
    """Exchanges an attempt's activations and gradients with the neighbours. Called from the compute thread."""

    def receive(self, action: Action) -> tuple[torch.Tensor, float]:
        """Wait for the tensor that `action` needs from a neighbour.

        Returns it with the microbatch's loss, which only backward passes use. Raises AbandonedError when the tensor
        will not come.
        """

    def send(self, action: Action, tensor: torch.Tensor, loss_sum: float) -> None:
        """Send the tensor that `action` has computed to the neighbour that needs it."""


class Alone:
    """The exchange of a worker that has no neighbours: its stages pass tensors to each other in memory."""

    def __init__(self) -> None:
        self._given: dict[tuple[int, int, bool], tuple[torch.Tensor, float]] = {}

    def receive(self, action: Action) -> tuple[torch.Tensor, float]:
        forward = action.op is Op.FORWARD
        return self._given.pop((action.stage + (-1 if forward else 1), action.microbatch, forward))

    def send(self, action: Action, tensor: torch.Tensor, loss_sum: float) -> None:
        self._given[action.stage, action.microbatch, action.op is Op.FORWARD] = (tensor, loss_sum)


def is_round(plan: Plan, attempt: Attempt) -> bool:
    """Whether an attempt computes a slot's round of inner steps."""
    return not attempt.validate and plan.rounds.is_round(attempt.version)


def num_inner_steps(plan: Plan, attempt: Attempt) -> int:
    """How often an attempt goes through its schedule: once, or once for each inner step of a round."""
    return len(plan.rounds.steps_from(attempt.version)) if is_round(plan, attempt) else 1


def num_samples(plan: Plan, attempt: Attempt) -> int:
    """Number of samples in each slot of an attempt.

    A validation pass takes all held-out samples of its slot where the recipe asks for more than there are.
    """
    if not attempt.validate:
        return plan.recipe.training.slot_batch
    return min(plan.recipe.validation.num_samples // plan.num_slots, plan.held_out_samples[attempt.slots[0]])


def num_microbatches(plan: Plan, attempt: Attempt) -> int:
    """Number of microbatches in each slot of an attempt. The last one of a validation pass may have fewer samples."""
    return -(-num_samples(plan, attempt) // plan.recipe.training.microbatch)


def schedule_for(plan: Plan, attempt: Attempt) -> Schedule:
    """The schedule by which all workers of a replica compute an attempt; in a round, each of its inner steps."""
    count = len(attempt.slots) * num_microbatches(plan, attempt)
    if attempt.validate:
        return forward_schedule(plan.replica_size, count, plan.num_chunks)
    return schedule_of(plan.pipeline_schedule, plan.replica_size, count, plan.num_chunks)


@lru_cache(maxsize=64)
def schedule_of(name: str, num_workers: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """The schedule of a training attempt. Without a pipeline each microbatch's backward pass follows its forward."""
    return make_schedule(name or "1f1b", num_workers, num_microbatches, num_chunks)


@lru_cache(maxsize=64)
def forward_schedule(num_workers: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """The schedule of a validation pass: all microbatches through a worker's first stage, then through its next."""
    rows = tuple(
        tuple(
            Action(chunk * num_workers + worker, Op.FORWARD, microbatch)
            for chunk in range(num_chunks)
            for microbatch in range(num_microbatches)
        )
        for worker in range(num_workers)
    )
    return Schedule("forward", num_microbatches, num_chunks, rows)
