"""The model on its device: one slot's forward and backward passes, and validation.

Shape legend: B samples, T target tokens a sample, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gradstream.core.config import TrainingConfig
from gradstream.core.errors import ConfigError
from gradstream.core.model import UnitDraws, build
from gradstream.core.plan import Plan

Tokens = npt.NDArray[np.int64]


class AbandonedError(Exception):
    """The slot is no longer wanted: its step was committed, or the plan replaced, while it was computed."""


@dataclass(frozen=True)
class SlotTotals:
    """What a slot adds to the step besides its gradient."""

    num_tokens: int
    num_samples: int
    loss_sum: float


Emit = Callable[[int, torch.Tensor, SlotTotals], None]


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


class SlotComputer:
    """Holds the model. Its methods run in the worker's compute thread, one at a time."""

    def __init__(self, plan: Plan, device: torch.device):
        self.device = device
        self.model = build(plan.model_config).to(device)
        self._training = plan.recipe.training
        self._draws = UnitDraws(self.model, plan.recipe.seed)
        self.parameters = _parameters_of(plan, self.model)
        self._emit: Callable[[int, torch.Tensor], None] | None = None
        if plan.recipe.training.recompute:
            self.model.activation_checkpointing_enable(  # type: ignore[operator]
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        self._hooks: list[RemovableHandle] = [
            parameter.register_post_accumulate_grad_hook(self._hook(number))  # type: ignore[no-untyped-call]
            for number, parameter in enumerate(self.parameters)
        ]

    def close(self) -> None:
        """Let go of the model: its hooks lead back to this object on a way that Python's garbage collector cannot
        see, so that neither would ever be freed."""
        for hook in self._hooks:
            hook.remove()

    def run_slot(self, step: int, slot: int, tokens: Tokens, emit: Emit, wanted: Callable[[], bool]) -> SlotTotals:
        """Compute one slot's gradient at the weights in place.

        `tokens` has shape (B, T + 1). `emit(tensor, gradient, totals)` is called from inside the last backward pass
        as soon as a tensor's gradient, summed over the slot's target tokens, is final: last layers first. The
        gradient is given away. Raises AbandonedError when `wanted()` turns false.
        """
        self.model.train()
        microbatch = self._training.microbatch
        pieces = [tokens[begin : begin + microbatch] for begin in range(0, len(tokens), microbatch)]
        num_tokens = len(tokens) * (tokens.shape[1] - 1)
        losses: list[float] = []
        emitted: set[int] = set()
        try:
            for number, piece in enumerate(pieces):
                if not wanted():
                    raise AbandonedError
                # The same for a slot whoever computes it.
                self._draws.key = ("step", step, slot, number)
                loss = self._loss_sum(piece)
                losses.append(float(loss.detach()))
                if number == len(pieces) - 1:
                    totals = SlotTotals(num_tokens, len(tokens), math.fsum(losses))

                    def on_final(tensor: int, gradient: torch.Tensor, totals: SlotTotals = totals) -> None:
                        if not wanted():
                            raise AbandonedError
                        emitted.add(tensor)
                        emit(tensor, gradient, totals)

                    self._emit = on_final
                loss.backward()  # type: ignore[no-untyped-call]
        finally:
            self._emit = None
            for parameter in self.parameters:
                parameter.grad = None
        for tensor, parameter in enumerate(self.parameters):
            if tensor not in emitted:  # no path from the loss to it: its gradient is zero, and the step waits for it
                emit(tensor, torch.zeros_like(parameter), totals)
        return totals

    @torch.no_grad()
    def evaluate(self, tokens: Tokens, wanted: Callable[[], bool]) -> tuple[float, int]:
        """Sum of the loss over the target tokens, in nats, and their number. Raises AbandonedError."""
        self.model.eval()
        losses: list[float] = []
        for begin in range(0, len(tokens), self._training.microbatch):
            if not wanted():
                raise AbandonedError
            losses.append(float(self._loss_sum(tokens[begin : begin + self._training.microbatch])))
        return math.fsum(losses), len(tokens) * (tokens.shape[1] - 1)

    def _loss_sum(self, tokens: Tokens) -> torch.Tensor:
        tokens_BT = torch.from_numpy(np.ascontiguousarray(tokens)).to(self.device)
        with autocast(self._training, self.device):
            logits_BTV = self.model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(
            logits_BTV.float().flatten(0, 1), tokens_BT[:, 1:].flatten(), reduction="sum"
        )

    def _hook(self, number: int) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if self._emit is not None and parameter.grad is not None:
                gradient, parameter.grad = parameter.grad, None
                self._emit(number, gradient)

        return hook


@contextmanager
def autocast(training: TrainingConfig, device: torch.device) -> Iterator[None]:
    """bf16 autocast when the recipe asks for it."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.precision == "bf16"):
        yield


def _parameters_of(plan: Plan, model: nn.Module) -> list[nn.Parameter]:
    """The model's parameters in the order of the plan's tensors. Raises ConfigError when they differ."""
    by_name = dict(model.named_parameters())
    for tensor in plan.tensors:
        if tensor.name not in by_name or tuple(by_name[tensor.name].shape) != tensor.shape:
            raise ConfigError(
                f"the plan's tensor '{tensor.name}' is not in this worker's model; "
                f"install the same transformers version on every machine"
            )
    return [by_name[tensor.name] for tensor in plan.tensors]
