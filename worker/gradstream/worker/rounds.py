"""Computes a slot's round: inner steps on a copy of a version's weights, and what the slot contributes in the end.

    version t ── copy ── inner step ── … ── inner step ── difference to version t, and moments ── push

In a pipeline each worker of a replica does this for the tensors of its stages. The workers reduce their gradients after
each inner step (gradstream.worker.pipeline.reduction), so the bits do not depend on the number of stages either.

A slot's round is a function of version t, seed and data alone. Nothing is kept from one slot to the next, so the bits
do not depend on who computes a slot, or on what that worker computed before. Only with `local.inner_state: keep` a slot
goes on from its own moments, as in DiLoCo (Douillard et al. 2023; gradstream.worker.kept_moments). A worker that starts
again goes on from what it has kept on its disk (gradstream.worker.progress).

Shape legend: N elements of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from gradstream.core.log import get_logger
from gradstream.core.optimizer.optimizer import Optimizer
from gradstream.core.optimizer.rule import Slice
from gradstream.core.optimizer.rules import kept_arrays
from gradstream.core.plan.bundles import WEIGHTS
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.learning_rate import rate_of_step
from gradstream.core.wire.slot_totals import SlotTotals
from gradstream.worker.attempt import AbandonedError, Alone, Attempt, Emit, Exchange
from gradstream.worker.compute import SlotComputer
from gradstream.worker.held_version import HeldVersion
from gradstream.worker.kept_moments import KeptMoments, Moments
from gradstream.worker.pipeline.neighbours import Neighbours
from gradstream.worker.pipeline.reduction import Reducer
from gradstream.worker.progress import ProgressFiles
from gradstream.worker.samples.data import Batch
from gradstream.worker.stage_build import Use

log = get_logger()


@dataclass(frozen=True)
class Progress:
    """An inner step that begins: its step of the job, its place among the slot's own of the round from 0, and its slot.

    `num_steps` is how many inner steps the slot takes in the round.
    """

    step: int
    place: int
    num_steps: int
    slot: int


class RoundComputer:
    """Computes rounds on the stages of `computer`, from the version in `held`. Runs in the compute thread."""

    def __init__(
        self,
        computer: SlotComputer,
        held: HeldVersion,
        progress: ProgressFiles | None = None,
        kept: KeptMoments | None = None,
    ):
        """`progress` keeps progress on disk; None: it is kept nowhere. `kept` has the moments that slots keep."""
        self._plan = computer.plan
        self._computer = computer
        self._held = held
        self._progress = progress
        self._kept = kept if kept is not None else KeptMoments(computer.plan)
        self._reducer = Reducer(computer.plan, computer.worker)

    def run(
        self,
        attempt: Attempt,
        batch_of: Callable[[int], Batch | None],
        emit: Emit,
        wanted: Callable[[], bool],
        begin_step: Callable[[Progress], None] = lambda progress: None,
        make_room: Callable[[], None] = lambda: None,
        spoils: Callable[[int, int], bool] = lambda step, slot: False,
        neighbours: Neighbours | None = None,
    ) -> None:
        """Compute the attempt's slot from the held version, which must be wholly in place, and emit its contribution.

        `batch_of(number)` reads the samples of the slot's step with this number, which counts the slot's own steps. It
        returns None on a worker whose stages need no tokens.
        `wanted()` is called before each microbatch, and before each tensor that is emitted. `begin_step` is called
        before each inner step; `make_room` before the slot's contribution is emitted, and it may wait. `spoils(step,
        slot)` returns whether a fault makes an inner step's gradients NaN. `neighbours` must run the attempt; None: the
        worker is alone in its replica. Raises AbandonedError when `wanted()` turns false. The model computes on the
        held weights again afterwards.
        """
        plan = self._plan
        (slot,) = attempt.slots
        state = _SlotState(plan, self._held, attempt.version, self._computer.parameters.keys())
        state.take(self._kept.at(attempt.version, slot))
        exchange: Exchange = Alone() if neighbours is None else neighbours
        steps = plan.rounds.slot_steps(attempt.version, slot)
        keep = self._resume(state, attempt.version, slot, len(steps))
        self._held.compute_on(state.weights)
        try:
            for place in range(state.num_done, len(steps)):
                step = steps[place].step
                begin_step(Progress(step, place, len(steps), slot))
                if neighbours is not None:
                    neighbours.begin_inner_step(place)
                batch = batch_of(steps[place].number)
                batches = {} if batch is None else {slot: batch}
                self._computer.run(attempt, batches, lambda _: state.collect, wanted, exchange, step=step)
                gradients = state.finish_gradients(spoils(step, slot))
                state.step(rate_of_step(plan.recipe, step), self._reducer.reduce(gradients, neighbours))
                keep()
        finally:
            self._held.compute_on_held()
        make_room()
        if self._kept.active:
            self._kept.keep(attempt.version, slot, state.own_arrays())
        state.emit(emit, wanted)

    def _resume(self, state: _SlotState, version: int, slot: int, num_steps: int) -> Callable[[], None]:
        """Bring a slot to its progress on the disk; return a function that keeps its progress where that is due."""
        files = self._progress
        if files is None or not files.interval_steps:
            return lambda: None
        kept = self._kept.at(version, slot)
        own = [array for tensor in sorted(kept) for _, array in sorted(kept[tensor].items())]
        key = files.key(version, slot, [*self._held.arrays.values(), *own])
        state.go_on(files.load(version, slot, key, state.arrays))
        if state.num_done:
            log.info(
                "goes on within a round, from its disk", version=version, slot=slot, done=state.num_done, of=num_steps
            )

        def keep() -> None:
            if files.due(state.num_done, num_steps):
                files.save(version, slot, key, state.arrays, state.totals)

        return keep


class _SlotState:
    """A slot's weights, gradients and moments within its round, by number of the plan's tensor.

    They are those of the tensors in `uses`: (tensor, part) of what this worker computes.
    """

    def __init__(self, plan: Plan, held: HeldVersion, version: int, uses: Collection[Use]):
        self._plan = plan
        self._held = held
        self._uses = set(uses)
        self.tensors = sorted(tensor for tensor, array in held.arrays if array == WEIGHTS)
        self.weights = {tensor: held.arrays[tensor, WEIGHTS].clone() for tensor in self.tensors}
        self.gradients = {tensor: torch.empty_like(weights_N) for tensor, weights_N in self.weights.items()}
        # A worker that has both parts of a tied tensor adds them as two workers do: after all microbatches.
        self._second = {
            tensor: torch.empty_like(weights_N)
            for tensor, weights_N in self.weights.items()
            if self._uses.issuperset({(tensor, 0), (tensor, 1)})
        }
        self._optimizer = Optimizer(
            [Slice(self.weights[tensor], self.gradients[tensor], plan.tensors[tensor]) for tensor in self.tensors],
            plan.recipe.optimizer,
        )
        self.totals: list[SlotTotals] = []
        """Of each inner step that is done."""
        self._totals_of_step = SlotTotals(0, 0, 0.0)
        self._moments: dict[int, dict[str, torch.Tensor]] = {}
        if plan.shares_moments(version):
            for number, tensor in enumerate(self.tensors):
                names = held.moments(tensor)
                self._moments[tensor] = {name: self._optimizer.moment(name, number) for name in names}
                for name, moment_N in self._moments[tensor].items():
                    moment_N.copy_(names[name])
            # AdamW's count of steps must be a function of the version. Therefore it also counts skipped rounds, and the
            # steps of this job alone where the moments come from another job, and it is the same for slots that took
            # fewer inner steps: their moments became one mean.
            self._optimizer.count(plan.rounds.steps_at(version))

    def take(self, moments: Moments) -> None:
        """Begin with the moments that the slot has kept; with none: with zeros."""
        for number, tensor in enumerate(self.tensors):
            for name, array in moments.get(tensor, {}).items():
                self._optimizer.moment(name, number).copy_(array)

    def own_arrays(self) -> Moments:
        """The arrays of the slot's optimizer that it keeps, in the optimizer's own memory."""
        return {
            tensor: {
                name: self._optimizer.moment(name, number)
                for name in kept_arrays(self._plan.recipe, self._plan.tensors[tensor])
            }
            for number, tensor in enumerate(self.tensors)
        }

    @property
    def num_done(self) -> int:
        """Number of inner steps that are done."""
        return len(self.totals)

    @property
    def arrays(self) -> list[torch.Tensor]:
        """All arrays that an inner step changes, in a fixed order, in the memory that the slot computes in."""
        numbers = range(len(self.tensors))
        own = [self._optimizer.moment(name, number) for number in numbers for name in self._optimizer.names(number)]
        return [*self.weights.values(), *(array for array in own if array is not None)]

    def go_on(self, totals: Sequence[SlotTotals]) -> None:
        """Go on after inner steps with these totals, whose result `arrays` has."""
        self.totals = list(totals)

    def collect(self, tensor: int, part: int, values: torch.Tensor, totals: SlotTotals, array: str = WEIGHTS) -> None:
        """Take an inner step's gradient of a tensor's part, as its mean over the slot's target tokens."""
        gradients = self._second if part and tensor in self._second else self.gradients
        torch.div(values.reshape(-1), totals.num_tokens, out=gradients[tensor])
        self._totals_of_step = totals

    def finish_gradients(self, spoiled: bool) -> dict[int, torch.Tensor]:
        """The collected gradients, with all parts that this worker has; NaN if a fault spoils them."""
        for tensor, second_N in self._second.items():
            self.gradients[tensor].add_(second_N)
        if spoiled:
            for gradient_N in self.gradients.values():
                gradient_N.fill_(math.nan)
        return self.gradients

    def step(self, rate: float, clip_factor: float) -> None:
        """Clip the gradients and update the weights, in place."""
        if clip_factor != 1.0:
            for gradient_N in self.gradients.values():
                gradient_N.mul_(clip_factor)
        self._optimizer.step(rate)
        self.totals.append(self._totals_of_step)

    def emit(self, emit: Emit, wanted: Callable[[], bool]) -> None:
        """Emit the differences and the moments, last layers first, times the round's tokens.

        The servers divide by the tokens of all slots. Differences and moments are made in the memory of the slot's
        weights and moments, tensor by tensor. Of a tied tensor the worker with the first part emits all: both workers
        have the same. Raises AbandonedError.
        """
        totals = sum_of(self.totals)
        self.gradients.clear()
        self._second.clear()
        del self._optimizer
        for tensor in reversed(self.tensors):
            if not wanted():
                raise AbandonedError
            weights_N = self.weights.pop(tensor)
            if (tensor, 0) not in self._uses:
                self._moments.pop(tensor, None)
                continue
            torch.sub(self._held.arrays[tensor, WEIGHTS], weights_N, out=weights_N)
            emit(tensor, 0, weights_N.mul_(totals.num_tokens), totals)
            for name, moment_N in self._moments.pop(tensor, {}).items():
                emit(tensor, 0, moment_N.mul_(totals.num_tokens), totals, name)


def sum_of(steps: Sequence[SlotTotals]) -> SlotTotals:
    """A slot's totals over the inner steps of a round."""
    return SlotTotals(
        sum(totals.num_tokens for totals in steps),
        sum(totals.num_samples for totals in steps),
        math.fsum(totals.loss_sum for totals in steps),
    )
