"""Computes the actions of a schedule on one worker's stages of a pipeline, one at a time.

The caller passes in the tensors from neighbours and a callback that takes the tensors for neighbours; this module does
not know about transport. Gradients add up in the parameters' `grad`, microbatch after microbatch, in the order of the
schedule's row. A single process would add them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gradstream.core.model.weight_gradients import WeightGradients, WeightPart
from gradstream.core.pipeline.schedule import Action, Op


@dataclass
class _Live:
    """State of one microbatch on one stage between its forward and its last backward pass."""

    received: torch.Tensor
    result: torch.Tensor  # activations, or the loss
    gradient: torch.Tensor | None = None
    weight_part: WeightPart | None = None


class StageRunner:
    """Runs the passes of `stages`, which are by their index among `num_stages`.

    A stage is a StageModule, or a whole model that gives logits. `loss_sum(logits, microbatch)` computes the last
    stage's loss. `begin(microbatch)` is called before each action and seeds the random draws of a microbatch's passes.
    With `split`, backward passes of all stages but the first run in two parts, also where the schedule has them in one:
    the neighbour gets its gradient before the gradients of the matrices are computed. `on_added(parameter)` is called
    whenever a backward pass has added all of a parameter's gradient to its `grad`.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        num_stages: int,
        loss_sum: Callable[[torch.Tensor, int], torch.Tensor],
        begin: Callable[[int], None],
        split: bool,
        on_added: Callable[[nn.Parameter], None] = lambda parameter: None,
    ):
        self._stages = stages
        self._gradients = {
            index: WeightGradients(stage, split and index > 0, on_added) for index, stage in stages.items()
        }
        self._last = num_stages - 1
        self._loss_sum = loss_sum
        self._begin = begin
        self._live: dict[tuple[int, int], _Live] = {}
        self.losses: dict[int, float] = {}
        self.max_live = 0

    def close(self) -> None:
        """Stop calling `on_added`."""
        for gradients in self._gradients.values():
            gradients.close()

    def run(self, action: Action, received: torch.Tensor | None, give: Callable[[torch.Tensor], None]) -> None:
        """Compute an action. `give(tensor)` is called with the result for the neighbour as soon as it is computed.

        The action may go on after that call. A forward pass receives token ids (first stage) or the activations of the
        stage before, and gives its own activations. A backward pass receives the gradient of the activations that this
        stage gave, and gives the gradient of those that it received. The last stage gives no activations and receives
        no gradient; the first stage gives no gradient.
        """
        self._begin(action.microbatch)
        if action.op is Op.FORWARD:
            self._forward(action, received, give)
            return
        key = (action.stage, action.microbatch)
        live = self._live[key] if action.op is Op.BACKWARD_INPUT else self._live.pop(key)
        if not action.stage:
            self._backward_of_first(action, live, received)
            return
        gradients = self._gradients[action.stage]
        if action.op is Op.BACKWARD_INPUT:
            gradient, live.weight_part = gradients.backward_input(live.result, received, live.received)
            give(gradient)
        elif action.op is Op.BACKWARD_WEIGHT:
            assert live.weight_part is not None
            live.weight_part.add()
        elif gradients.split:
            gradient, weight_part = gradients.backward_until_given(live.result, received, live.received)
            give(gradient)
            weight_part.add()
        else:
            live.result.backward(received)  # type: ignore[no-untyped-call]
            assert live.received.grad is not None
            give(live.received.grad)

    def abandon(self) -> None:
        """Drop all microbatches under way and the gradients that they have added."""
        self._live.clear()
        self.losses.clear()
        for stage in self._stages.values():
            stage.zero_grad(set_to_none=True)

    def _forward(self, action: Action, received: torch.Tensor | None, give: Callable[[torch.Tensor], None]) -> None:
        assert received is not None
        if action.stage:
            received = received.detach().requires_grad_()
        result = self._stages[action.stage](received)
        if action.stage == self._last:
            result = self._loss_sum(result, action.microbatch)
            self.losses[action.microbatch] = float(result.detach())
        self._live[action.stage, action.microbatch] = _Live(received, result)
        self.max_live = max(self.max_live, len(self._live))
        if action.stage != self._last:
            give(result.detach())

    def _backward_of_first(self, action: Action, live: _Live, received: torch.Tensor | None) -> None:
        """Run a backward pass of the first stage: token ids have no gradient, so only weights get one."""
        if action.op is Op.BACKWARD_INPUT:
            live.gradient = received
        elif live.result.requires_grad:  # otherwise the stage has no adapter and needs no gradient
            live.result.backward(received if action.op is Op.BACKWARD else live.gradient)  # type: ignore[no-untyped-call]
