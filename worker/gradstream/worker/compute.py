"""The stages that a worker has, on its device: the passes of one or several slots, and validation.

A worker of a job without a pipeline has one stage, the whole model. What is computed in which order is a row of a
schedule; what neighbours send and get goes through an `Exchange`.

Shape legend: B samples, T target tokens a sample, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import nn

from gradstream.core.errors import ConfigError
from gradstream.core.kernels.exp import IGNORED
from gradstream.core.model.fused_functions import cross_entropy_sum
from gradstream.core.model.model import UnitDraws, build, hidden_size, initialize_buffers, router_loss_factor
from gradstream.core.model.stage_module import StageModule, sections_of, stage_tensors
from gradstream.core.pipeline.schedule import SPLIT, Action, Op, Row, Schedule, make_schedule
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.recipe import TrainingConfig
from gradstream.core.telemetry.timeline import SpanKind
from gradstream.worker.frozen import STORE
from gradstream.worker.samples.data import Batch
from gradstream.worker.samples.packing import layout_of
from gradstream.worker.stage import StageRunner
from gradstream.worker.timeline import Timeline, clock_ns


class AbandonedError(Exception):
    """The slot is no longer wanted: its step was committed, or the plan replaced, while it was computed."""


@dataclass(frozen=True)
class SlotTotals:
    """What a slot adds to the step besides its gradient."""

    num_tokens: int
    num_samples: int
    loss_sum: float


@dataclass(frozen=True)
class Try:
    """Slots that are computed one after the other without a pause, at one version; `number` rises with each try of a
    replica. A validation pass has one slot and no backward."""

    number: int
    version: int
    slots: tuple[int, ...]
    validate: bool = False


Emit = Callable[[int, int, torch.Tensor, SlotTotals], None]
"""Called with (tensor, part, gradient, totals); the gradient is given away."""


class Exchange(Protocol):
    """How a try's activations and gradients reach the neighbours; called from the compute thread."""

    def receive(self, action: Action) -> tuple[torch.Tensor, float]:
        """What `action` needs of a neighbour, and for a backward pass the microbatch's loss. Waits; raises
        AbandonedError when it will not come."""

    def send(self, action: Action, tensor: torch.Tensor, loss_sum: float) -> None:
        """Give what `action` has computed to the neighbour that needs it."""


class Alone:
    """The exchange of a worker that is its own neighbour."""

    def __init__(self) -> None:
        self._given: dict[tuple[int, int, bool], tuple[torch.Tensor, float]] = {}

    def receive(self, action: Action) -> tuple[torch.Tensor, float]:
        forward = action.op is Op.FORWARD
        return self._given.pop((action.stage + (-1 if forward else 1), action.microbatch, forward))

    def send(self, action: Action, tensor: torch.Tensor, loss_sum: float) -> None:
        self._given[action.stage, action.microbatch, action.op is Op.FORWARD] = (tensor, loss_sum)


def pick_device(wanted: str) -> torch.device:
    """The device to compute on: "auto" takes CUDA when there is one. Raises ConfigError when it is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"--device {wanted}: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {wanted}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return device


@lru_cache(maxsize=64)
def schedule_of(name: str, num_workers: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """The table of a training run; without a pipeline each microbatch's two passes follow each other."""
    return make_schedule(name or "1f1b", num_workers, num_microbatches, num_chunks)


@lru_cache(maxsize=64)
def forward_schedule(num_workers: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """The table of a validation pass: all microbatches through a worker's first stage, then through its next."""
    rows = tuple(
        tuple(
            Action(chunk * num_workers + worker, Op.FORWARD, microbatch)
            for chunk in range(num_chunks)
            for microbatch in range(num_microbatches)
        )
        for worker in range(num_workers)
    )
    return Schedule("forward", num_microbatches, num_chunks, rows)


def num_samples(plan: Plan, attempt: Try) -> int:
    """Samples of each of a try's slots: in a validation pass all that its slot has, where the recipe asks for more."""
    if not attempt.validate:
        return plan.recipe.training.slot_batch
    return min(plan.recipe.validation.num_samples // plan.num_slots, plan.held_out_samples[attempt.slots[0]])


def num_microbatches(plan: Plan, attempt: Try) -> int:
    """Microbatches of each of a try's slots; the last one of a validation pass may have fewer samples."""
    return -(-num_samples(plan, attempt) // plan.recipe.training.microbatch)


def schedule_for(plan: Plan, attempt: Try) -> Schedule:
    """The table by which all workers of a replica compute a try."""
    count = len(attempt.slots) * num_microbatches(plan, attempt)
    if attempt.validate:
        return forward_schedule(plan.replica_size, count, plan.num_chunks)
    return schedule_of(plan.schedule, plan.replica_size, count, plan.num_chunks)


class SlotComputer:
    """Holds the stages of worker number `worker` of a replica. Its methods run in the worker's compute thread, one at a
    time. `parameters` are by (tensor, part) of the plan."""

    def __init__(self, plan: Plan, device: torch.device, worker: int = 0, timeline: Timeline | None = None):
        self.device = device
        self.plan = plan
        self.worker = worker
        self.models: list[nn.Module] = []
        self.parameters: dict[tuple[int, int], nn.Parameter] = {}
        self._timeline = timeline or Timeline()
        self._training = plan.recipe.training
        self._stages: dict[int, _Stage] = {}
        self._uses_of_stage: dict[int, list[tuple[int, int]]] = {}
        self._held: set[str] = set()  # tensors of the frozen base
        for stage in plan.stages_of_worker(worker):
            module = self._build(stage)
            model = module.model if isinstance(module, StageModule) else module
            if self._training.recompute:
                model.activation_checkpointing_enable(  # type: ignore[operator]
                    activation_checkpointing_kwargs={"use_reentrant": False}
                )
            self.models.append(model)
            self._stages[stage] = _Stage(module, self._training, device)
        STORE.keep(self._held)
        self.hidden_size = hidden_size(self.models[0])
        self._draws = [UnitDraws(model, plan.recipe.seed) for model in self.models]
        self._targets: dict[int, torch.Tensor] = {}
        self._layouts: dict[int, dict[str, torch.Tensor]] = {}
        # What is computed again for the first part of a backward pass would have to be kept for the second.
        split = plan.schedule in SPLIT or (plan.has_pipeline and not self._training.recompute)
        self._runner = StageRunner(self._stages, plan.num_stages, self._loss_sum, self._begin, split, self._on_added)
        self._use_of = {id(parameter): use for use, parameter in self.parameters.items()}
        self._emit: Callable[[tuple[int, int], torch.Tensor], None] | None = None
        self._key: Callable[[int], tuple[object, ...]] = lambda microbatch: ()

    @property
    def model(self) -> nn.Module:
        """The model of a worker with one stage."""
        return self.models[0]

    def close(self) -> None:
        """Let go of the model."""
        self._runner.close()

    def run(
        self,
        attempt: Try,
        batches: Mapping[int, Batch],
        begin_slot: Callable[[int], Emit],
        wanted: Callable[[], bool],
        exchange: Exchange,
    ) -> None:
        """Compute this worker's part of a try's gradients at the weights in place.

        Without packed rows only workers with the first or the last stage need `batches`, which are by slot.
        `begin_slot(slot)`, called before the first backward pass of a slot, gives the function that is called from
        inside its last ones as soon as a tensor's gradient, summed over the slot's target tokens, is final: last layers
        first. Raises AbandonedError when `wanted()` turns false.
        """
        training, slots = self._training, attempt.slots
        schedule = schedule_for(self.plan, attempt)
        row = schedule.rows[self.worker]
        per_slot = schedule.num_microbatches // len(slots)
        inputs = self._split(slots, batches)
        # The same for a slot whoever computes it.
        self._key = lambda number: ("step", attempt.version, slots[number // per_slot], number % per_slot)
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
                slot, emitted = slots[number], set[tuple[int, int]]()
                if action.op is not Op.FORWARD and number not in emits:
                    emits[number] = begin_slot(slot)
                received = self._receive(action, inputs, exchange, losses)
                if action in finals:
                    own = range(number * per_slot, (number + 1) * per_slot)
                    totals = SlotTotals(
                        batches[slot].num_targets
                        if slot in batches
                        else training.slot_batch * training.sequence_length,
                        training.slot_batch,
                        math.fsum(losses[microbatch] for microbatch in own),
                    )

                    def on_final(
                        use: tuple[int, int],
                        gradient: torch.Tensor,
                        emitted: set[tuple[int, int]] = emitted,
                        emit: Emit = emits[number],
                        totals: SlotTotals = totals,
                    ) -> None:
                        if not wanted():
                            raise AbandonedError
                        emitted.add(use)
                        emit(*use, gradient, totals)

                    self._emit = on_final
                self._pass(action, received, slot, per_slot, exchange, losses)
                if self._emit is not None:
                    self._emit_rest(action.stage, emitted)
                    self._emit = None
        finally:
            self._emit = None
            self._runner.abandon()
            self._forget()

    @torch.no_grad()
    def evaluate(
        self, attempt: Try, batch: Batch | None, wanted: Callable[[], bool], exchange: Exchange
    ) -> tuple[float, int] | None:
        """On the worker with the last stage, the sum of the loss over the slot's target tokens, in nats, and their
        number. Raises AbandonedError."""
        schedule = schedule_for(self.plan, attempt)
        inputs = self._split(attempt.slots, {} if batch is None else {attempt.slots[0]: batch})
        self._key = lambda number: ()
        for stage in self._stages.values():
            stage.eval()
        losses: dict[int, float] = {}
        try:
            for action in schedule.rows[self.worker]:
                if not wanted():
                    raise AbandonedError
                received = self._receive(action, inputs, exchange, losses)
                assert received is not None
                self._begin(action.microbatch)
                result = self._stages[action.stage](received)
                if action.stage == self.plan.num_stages - 1:
                    losses[action.microbatch] = float(self._loss_sum(result, action.microbatch))
                else:
                    exchange.send(action, result, 0.0)
        finally:
            self._forget()
        if batch is None or not losses:
            return None
        return math.fsum(losses.values()), batch.num_targets

    # -- passes ----------------------------------------------------------------------------------------------------

    def _receive(
        self, action: Action, inputs: Sequence[torch.Tensor], exchange: Exchange, losses: dict[int, float]
    ) -> torch.Tensor | None:
        if action.op is Op.BACKWARD_WEIGHT:
            return None
        if action.op is Op.FORWARD:
            if not action.stage:
                return inputs[action.microbatch]
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
        end_ns = clock_ns() - sending_ns  # a pass is what is computed
        if self.plan.has_pipeline:
            self._timeline.add(
                _SPANS[action.op],
                begin_ns,
                end_ns,
                slot,
                stage=action.stage,
                microbatch=action.microbatch % per_slot,
            )

    def _emit_rest(self, stage: int, emitted: set[tuple[int, int]]) -> None:
        """Give away zeros for what has no path from the loss to it, as the step waits for it."""
        assert self._emit is not None
        for use in reversed(self._uses_of_stage[stage]):
            if use not in emitted:
                parameter = self.parameters[use]
                gradient, parameter.grad = parameter.grad, None
                self._emit(use, torch.zeros_like(parameter) if gradient is None else gradient)

    def _on_added(self, parameter: torch.Tensor) -> None:
        """A gradient was added up; in the last backward pass of a slot it is final."""
        if self._emit is not None and parameter.grad is not None:
            gradient, parameter.grad = parameter.grad, None
            self._emit(self._use_of[id(parameter)], gradient)

    def _begin(self, microbatch: int) -> None:
        key = self._key(microbatch)
        for draws in self._draws:
            draws.key = key
        for stage in self._stages.values():
            stage.layout = self._layouts.get(microbatch, {})

    def _forget(self) -> None:
        self._targets.clear()
        self._layouts.clear()

    def _split(self, slots: Sequence[int], batches: Mapping[int, Batch]) -> list[torch.Tensor]:
        """The microbatches' inputs, in the order of the slots; their targets and layouts are kept for the passes."""
        inputs: list[torch.Tensor] = []
        for slot in slots:
            if slot not in batches:
                continue
            for begin in range(0, len(batches[slot]), self._training.microbatch):
                piece = batches[slot].piece(begin, begin + self._training.microbatch)
                number = len(inputs)
                self._targets[number] = torch.from_numpy(np.ascontiguousarray(piece.targets)).to(self.device)
                if piece.examples is not None:
                    layout = layout_of(piece.examples)
                    self._layouts[number] = {key: tensor.to(self.device) for key, tensor in layout.items()}
                inputs.append(torch.from_numpy(np.ascontiguousarray(piece.inputs)).to(self.device))
        return inputs

    def _loss_sum(self, logits_BTV: torch.Tensor, microbatch: int) -> torch.Tensor:
        targets_N = self._targets[microbatch].flatten()
        loss_sum = cross_entropy_sum(logits_BTV.float().flatten(0, 1), targets_N)
        router_loss = self._stages[self.plan.num_stages - 1].router_loss
        if router_loss is None:
            return loss_sum
        # transformers adds it to the mean over a batch's targets; here sums are divided by the step's targets.
        return loss_sum + router_loss * int((targets_N != IGNORED).sum())

    # -- model -----------------------------------------------------------------------------------------------------

    def _build(self, stage: int) -> nn.Module:
        """The module of a stage; its parameters are entered under their tensors. Raises ConfigError when they are not
        the plan's."""
        plan = self.plan
        uses = [use for use in plan.uses_of_worker(self.worker) if plan.stage_of(_unit(plan, use)) == stage]
        self._uses_of_stage[stage] = uses
        module: nn.Module
        if plan.has_pipeline:
            module = StageModule(plan.model_config, _sections(plan, stage), self.device, plan.lora)
            names = {tensor.name for tensor in plan.tensors}
            found = stage_tensors(module, names)  # type: ignore[arg-type]
        else:
            module = build(plan.model_config, "meta", plan.lora)
            initialize_buffers(module, self.device)
            if plan.lora is None:
                module.tie_weights()  # type: ignore[operator]  # tied tensors lie apart after the move
            found = {(name, 0): parameter for name, parameter in module.named_parameters()}
        tuning = plan.recipe.finetuning
        if tuning is not None and plan.lora is not None:
            model = module.model if isinstance(module, StageModule) else module
            self._held |= STORE.fill(model, tuning.base, tuning.held, self.device)
        for use in uses:
            tensor = plan.tensors[use[0]]
            parameter = found.get((tensor.name, use[1]))
            if parameter is None or tuple(parameter.shape) != tensor.shape:
                raise ConfigError(
                    f"the plan's tensor '{tensor.name}' is not in this worker's model; "
                    f"install the same transformers version on every machine"
                )
            self.parameters[use] = parameter
            if use[1] and (use[0], 0) in self.parameters:
                parameter.data = self.parameters[use[0], 0].data  # both parts here: one copy of the weights
        own = {id(self.parameters[use]) for use in uses}
        for (name, _), parameter in found.items():
            if parameter.requires_grad and id(parameter) not in own:
                raise ConfigError(
                    f"the plan has no tensor for '{name}' of this worker's model; "
                    f"install the same transformers version on every machine"
                )
        return module


class _Stage(nn.Module):
    """A stage's module, or the whole model, under the recipe's precision: activations or token ids in, activations or
    logits out."""

    def __init__(self, module: nn.Module, training: TrainingConfig, device: torch.device):
        super().__init__()
        self.module = module
        self._training = training
        self._device = device
        self._router_factor = 0.0 if isinstance(module, StageModule) else router_loss_factor(module)
        self.router_loss: torch.Tensor | None = None
        """What the last forward pass in training adds to the mean loss of its targets."""
        self.layout: Mapping[str, torch.Tensor] = {}
        """What the passes of the microbatch at hand are told of it besides its tokens."""

    def forward(self, received: torch.Tensor) -> torch.Tensor:
        with autocast(self._training, self._device):
            if isinstance(self.module, StageModule):
                result: torch.Tensor = self.module(received, **self.layout)
            else:
                output = self.module(input_ids=received, use_cache=False, **self.layout)
                result = output.logits
                if self._router_factor and self.training:
                    self.router_loss = self._router_factor * output.aux_loss
                else:
                    self.router_loss = None
        return result


@contextmanager
def autocast(training: TrainingConfig, device: torch.device) -> Iterator[None]:
    """bf16 autocast when the recipe asks for it."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.precision == "bf16"):
        yield


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


def _unit(plan: Plan, use: tuple[int, int]) -> int:
    tensor = plan.tensors[use[0]]
    return tensor.last_unit if use[1] else tensor.unit


def _sections(plan: Plan, stage: int) -> range:
    """The sections of a stage. Raises ConfigError where the plan's cut is not between sections."""
    begin, end = (0, *plan.stage_ends)[stage], plan.stage_ends[stage]
    sections = sections_of(build(plan.model_config, "meta", plan.lora))
    own = [number for number, section in enumerate(sections) if section.units and begin <= section.units[0] < end]
    if not own or sections[own[0]].units[0] != begin or sections[own[-1]].units[-1] != end - 1:
        raise ConfigError(
            f"the plan's stage {stage} has units {begin} to {end - 1}, which are not whole sections of this worker's "
            f"model; install the same transformers version on every machine"
        )
    return range(own[0], own[-1] + 1)
