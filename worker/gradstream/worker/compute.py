"""Training and validation passes of an attempt's slots on the stages that a worker has.

A worker of a job without a pipeline has one stage, the whole model. The worker's row of the schedule gives the order
of the passes. Activations and gradients go to and come from neighbours through an `Exchange`; finished gradients go to
the slot's `Emit`.

Shape legend: B samples, T target tokens a sample, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from gradstream.core.model.model import UnitDraws, hidden_size
from gradstream.core.pipeline.schedule import SPLIT, Action, Op, Row
from gradstream.core.plan.plan import Plan
from gradstream.core.telemetry.timeline import SpanKind
from gradstream.core.wire.slot_totals import SlotTotals
from gradstream.worker.attempt import AbandonedError, Attempt, Emit, Exchange, schedule_for
from gradstream.worker.samples.data import IGNORED, Batch
from gradstream.worker.samples.packing import layout_of
from gradstream.worker.stage import StageRunner
from gradstream.worker.stage_build import Use, build_stages
from gradstream.worker.timeline import Timeline, clock_ns


class SlotComputer:
    """Holds the stages of worker number `worker` of a replica and computes attempts on them.

    All methods run in the worker's compute thread, one at a time. `parameters` are by (tensor, part) of the plan.
    """

    def __init__(self, plan: Plan, device: torch.device, worker: int = 0, timeline: Timeline | None = None):
        self.device = device
        self.plan = plan
        self.worker = worker
        self._timeline = timeline or Timeline()
        self._training = plan.recipe.training
        built = build_stages(plan, device, worker)
        self.models, self.parameters = built.models, built.parameters
        self._stages, self._uses_of_stage = built.stages, built.uses_of_stage
        self.hidden_size = hidden_size(self.models[0])
        self._draws = [UnitDraws(model, plan.recipe.seed) for model in self.models]
        # A split backward pass would have to keep the recomputed activations of its first part for the second.
        split = plan.pipeline_schedule in SPLIT or (plan.has_pipeline and not self._training.recompute)
        self._runner = StageRunner(self._stages, plan.num_stages, self._loss_sum, self._begin, split, self._on_added)
        self._use_of = {id(parameter): use for use, parameter in self.parameters.items()}
        self._microbatches = _Microbatches()
        self._key: Callable[[int], tuple[object, ...]] = lambda microbatch: ()
        self._last_pass: _LastPass | None = None
        """Set during the backward pass after which a stage's gradients of a slot are final."""

    @property
    def model(self) -> nn.Module:
        """The model of a worker with one stage."""
        return self.models[0]

    def close(self) -> None:
        """Release the model."""
        self._runner.close()

    def run(
        self,
        attempt: Attempt,
        batches: Mapping[int, Batch],
        begin_slot: Callable[[int], Emit],
        wanted: Callable[[], bool],
        exchange: Exchange,
        make_room: Callable[[int, int], None] = lambda slot, stage: None,
        step: int | None = None,
    ) -> None:
        """Compute this worker's part of an attempt's gradients at the weights in the model.

        `batches` are by slot; without packed rows only workers with the first or the last stage need them.
        `begin_slot(slot)` is called before the first backward pass of a slot and returns the slot's `Emit`. `Emit` is
        called during the slot's last backward passes, last layers first, as soon as a tensor's gradient, summed over
        the slot's target tokens, is final. `make_room(slot, stage)` is called before the pass after which a stage's
        gradients of a slot are final, and may wait. `step` is the inner step in a round, where a version stands for
        several; without it the step has the attempt's version as its number. Raises AbandonedError when `wanted()`
        turns false.
        """
        slots = attempt.slots
        schedule = schedule_for(self.plan, attempt)
        row = schedule.rows[self.worker]
        per_slot = schedule.num_microbatches // len(slots)
        self._microbatches = self._split(slots, batches)
        # A slot has the same key on every worker that computes it.
        step = attempt.version if step is None else step
        self._key = lambda number: ("step", step, slots[number // per_slot], number % per_slot)
        for stage in self._stages.values():
            stage.train()
        emits: dict[int, Emit] = {}
        finals = last_backwards(row, per_slot)
        losses = self._runner.losses
        try:
            for action in row:
                if action.op is Op.FORWARD and not wanted():
                    raise AbandonedError
                number = action.microbatch // per_slot
                slot = slots[number]
                if action.op is not Op.FORWARD and number not in emits:
                    emits[number] = begin_slot(slot)
                received = self._receive(action, exchange, losses)
                if action in finals:
                    make_room(slot, action.stage)
                    own = range(number * per_slot, (number + 1) * per_slot)
                    loss_sum = math.fsum(losses[microbatch] for microbatch in own)
                    totals = self._totals(batches.get(slot), loss_sum)
                    self._last_pass = _LastPass(emits[number], totals, wanted)
                self._pass(action, received, slot, per_slot, exchange, losses)
                if self._last_pass is not None:
                    self._emit_rest(action.stage, self._last_pass)
                    self._last_pass = None
        finally:
            self._last_pass = None
            self._runner.abandon()
            self._microbatches = _Microbatches()

    @torch.no_grad()
    def evaluate(
        self, attempt: Attempt, batch: Batch | None, wanted: Callable[[], bool], exchange: Exchange
    ) -> tuple[float, int] | None:
        """Compute this worker's part of a validation pass.

        Returns, on the worker with the last stage, the sum of the loss over the slot's target tokens in nats and the
        number of those tokens; elsewhere None. Raises AbandonedError.
        """
        schedule = schedule_for(self.plan, attempt)
        self._microbatches = self._split(attempt.slots, {} if batch is None else {attempt.slots[0]: batch})
        self._key = lambda number: ()
        for stage in self._stages.values():
            stage.eval()
        losses: dict[int, float] = {}
        try:
            for action in schedule.rows[self.worker]:
                if not wanted():
                    raise AbandonedError
                received = self._receive(action, exchange, losses)
                assert received is not None
                self._begin(action.microbatch)
                result = self._stages[action.stage](received)
                if action.stage == self.plan.num_stages - 1:
                    losses[action.microbatch] = float(self._loss_sum(result, action.microbatch))
                else:
                    exchange.send(action, result, 0.0)
        finally:
            self._microbatches = _Microbatches()
        if batch is None or not losses:
            return None
        return math.fsum(losses.values()), batch.num_targets

    # -- passes ----------------------------------------------------------------------------------------------------

    def _receive(self, action: Action, exchange: Exchange, losses: dict[int, float]) -> torch.Tensor | None:
        if action.op is Op.BACKWARD_WEIGHT:
            return None
        if action.op is Op.FORWARD:
            if not action.stage:
                return self._microbatches.inputs[action.microbatch]
            return exchange.receive(action)[0].to(self.device)
        if action.stage == self.plan.num_stages - 1:
            return None
        received, losses[action.microbatch] = exchange.receive(action)
        return received.to(self.device)

    def _pass(
        self,
        action: Action,
        received: torch.Tensor | None,
        slot: int,
        per_slot: int,
        exchange: Exchange,
        losses: Mapping[int, float],
    ) -> None:
        begin_ns = clock_ns()
        sending_ns = 0

        def give(tensor: torch.Tensor) -> None:
            nonlocal sending_ns
            sent_ns = clock_ns()
            exchange.send(action, tensor, 0.0 if action.op is Op.FORWARD else losses[action.microbatch])
            sending_ns = clock_ns() - sent_ns

        self._runner.run(action, received, give)
        end_ns = clock_ns() - sending_ns  # the span of a pass leaves out the time for sending
        if self.plan.has_pipeline:
            self._timeline.add(
                _SPANS[action.op],
                begin_ns,
                end_ns,
                slot,
                stage=action.stage,
                microbatch=action.microbatch % per_slot,
            )

    def _emit_rest(self, stage: int, last_pass: _LastPass) -> None:
        """Emit zeros for parameters without a path from the loss, because the step waits for their gradients."""
        for use in reversed(self._uses_of_stage[stage]):
            if use not in last_pass.emitted:
                parameter = self.parameters[use]
                gradient, parameter.grad = parameter.grad, None
                last_pass.emit(use, torch.zeros_like(parameter) if gradient is None else gradient)

    def _on_added(self, parameter: torch.Tensor) -> None:
        """Emit a parameter's summed gradient if this is the last backward pass of a slot: it is final then."""
        if self._last_pass is not None and parameter.grad is not None:
            gradient, parameter.grad = parameter.grad, None
            self._last_pass.emit(self._use_of[id(parameter)], gradient)

    def _begin(self, microbatch: int) -> None:
        key = self._key(microbatch)
        for draws in self._draws:
            draws.key = key
        for stage in self._stages.values():
            stage.layout = self._microbatches.layouts.get(microbatch, {})

    def _split(self, slots: Sequence[int], batches: Mapping[int, Batch]) -> _Microbatches:
        """Cut the slots' batches into microbatches, on the device."""
        found = _Microbatches()
        for slot in slots:
            if slot not in batches:
                continue
            for begin in range(0, len(batches[slot]), self._training.microbatch):
                piece = batches[slot].piece(begin, begin + self._training.microbatch)
                if piece.examples is not None:
                    layout = layout_of(piece.examples)
                    found.layouts[len(found.inputs)] = {key: layout[key].to(self.device) for key in layout}
                found.targets.append(torch.from_numpy(np.ascontiguousarray(piece.targets)).to(self.device))
                found.inputs.append(torch.from_numpy(np.ascontiguousarray(piece.inputs)).to(self.device))
        return found

    def _totals(self, batch: Batch | None, loss_sum: float) -> SlotTotals:
        """Compute a slot's share of the step's totals.

        Only slots of packed rows need their batch here: in other slots all tokens are targets.
        """
        training = self._training
        num_tokens = training.slot_batch * training.sequence_length if batch is None else batch.num_targets
        return SlotTotals(num_tokens, training.slot_batch, loss_sum)

    def _loss_sum(self, logits_BTV: torch.Tensor, microbatch: int) -> torch.Tensor:
        targets_N = self._microbatches.targets[microbatch].flatten()
        logits_NV = logits_BTV.float().flatten(0, 1)
        loss_sum = nn.functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORED, reduction="sum")
        router_loss = self._stages[self.plan.num_stages - 1].router_loss
        if router_loss is None:
            return loss_sum
        # transformers adds the router loss to the mean over a batch's targets. Here losses are sums, which the server
        # divides by the step's targets, so it is multiplied by the number of targets.
        return loss_sum + router_loss * int((targets_N != IGNORED).sum())


@dataclass(frozen=True)
class _Microbatches:
    """Inputs and targets by number of microbatch, in the order of the slots.

    Empty on a worker that has neither the first nor the last stage, unless rows are packed.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    layouts: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    """By microbatch, what `layout_of` returns for packed rows."""


class _LastPass:
    """The backward pass after which a stage's gradients of a slot are final. Passes them to the slot's `Emit`."""

    def __init__(self, emit: Emit, totals: SlotTotals, wanted: Callable[[], bool]):
        self.emitted: set[Use] = set()
        self._emit = emit
        self._totals = totals
        self._wanted = wanted

    def emit(self, use: Use, gradient: torch.Tensor) -> None:
        """Pass a gradient to the slot's `Emit`. Raises AbandonedError."""
        if not self._wanted():
            raise AbandonedError
        self.emitted.add(use)
        self._emit(*use, gradient, self._totals)


_SPANS = {
    Op.FORWARD: SpanKind.FORWARD,
    Op.BACKWARD: SpanKind.BACKWARD,
    Op.BACKWARD_INPUT: SpanKind.BACKWARD_INPUT,
    Op.BACKWARD_WEIGHT: SpanKind.BACKWARD_WEIGHT,
}


def last_backwards(row: Row, per_slot: int) -> set[Action]:
    """The actions after which the gradients of a stage and slot are final."""
    last: dict[tuple[int, int], Action] = {}
    for action in row:
        if action.op in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            last[action.stage, action.microbatch // per_slot] = action
    return set(last.values())
