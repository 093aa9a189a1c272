"""One worker's stages of a pipeline: computes the actions of a schedule, one at a time.

What neighbours are to get is returned, what they sent is given in: how it travels is not known here. Gradients add up
in the parameters' `grad`, microbatch after microbatch in the order of the schedule's row, which is that of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gradstream.core.fused_layers import fuse
from gradstream.core.schedules import Action, Op
from gradstream.core.weight_gradients import WeightGradients, WeightPart


@dataclass
class _Live:
    """One microbatch on one stage between its forward and its last backward pass."""

    received: torch.Tensor
    result: torch.Tensor  # activations, or the loss
    gradient: torch.Tensor | None = None
    weight_part: WeightPart | None = None


class StageRunner:
    """`stages` (StageModule, or a whole model that gives logits) by their index among `num_stages`;
    `loss_sum(logits, microbatch)` is the last stage's loss.

    `begin(microbatch)` is called before each action: it seeds what the passes of a microbatch draw. `split`: backward
    passes of all stages but the first come in two parts, also where the schedule has them in one: the neighbour gets
    its gradient before those of the weights are made. Then `on_added(parameter)` is called whenever one of these has
    been added to its `grad`; for passes in one part autograd has hooks.
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
        for stage in stages.values():
            fuse(stage)
        self._gradients = {index: WeightGradients(stage, split and index > 0) for index, stage in stages.items()}
        self._split = split
        self._on_added = on_added
        self._rest: WeightPart | None = None
        self._last = num_stages - 1
        self._loss_sum = loss_sum
        self._begin = begin
        self._live: dict[tuple[int, int], _Live] = {}
        self.losses: dict[int, float] = {}
        self.most_live = 0

    def run(self, action: Action, received: torch.Tensor | None) -> torch.Tensor | None:
        """Compute an action; return what the neighbour needs of it, if any.

        A forward pass is given token ids (first stage) or the activations of the stage before, and gives its own; a
        backward pass is given the gradient of what this stage gave, and gives that of what it received. The last stage
        gives no activations, the first no gradient, and they are given none.

        A full backward pass that has given its gradient may not be over yet: `finish` follows every action.
        """
        self._begin(action.microbatch)
        if action.op is Op.FORWARD:
            return self._forward(action, received)
        key = (action.stage, action.microbatch)
        if action.op is Op.BACKWARD_INPUT:
            return self._backward_input(action, self._live[key], received)
        live = self._live.pop(key)
        if action.op is Op.BACKWARD_WEIGHT and action.stage:
            self._rest = live.weight_part
            return None
        if action.op is Op.BACKWARD and action.stage and self._split:
            gradient = self._backward_input(action, live, received)
            self._rest = live.weight_part
            return gradient
        if not live.result.requires_grad:
            return None  # a first stage without an adapter: nobody wants its gradient
        live.result.backward(received if action.op is Op.BACKWARD else live.gradient)  # type: ignore[no-untyped-call]
        return live.received.grad

    def finish(self) -> bool:
        """Compute what is left of the last action, now that the neighbour has what it waits for; whether there was
        anything."""
        rest, self._rest = self._rest, None
        if rest is None:
            return False
        rest.add(self._on_added)
        return True

    def abandon(self) -> None:
        """Forget every microbatch under way, and what it has added."""
        self._rest = None
        self._live.clear()
        self.losses.clear()
        for stage in self._stages.values():
            stage.zero_grad(set_to_none=True)

    def _forward(self, action: Action, received: torch.Tensor | None) -> torch.Tensor | None:
        assert received is not None
        if action.stage:
            received = received.detach().requires_grad_()
        result = self._stages[action.stage](received)
        if action.stage == self._last:
            result = self._loss_sum(result, action.microbatch)
            self.losses[action.microbatch] = float(result.detach())
        if result._is_view():
            result = result.clone()  # a view cannot be cut off its graph in place, which frees what is done with
        self._live[action.stage, action.microbatch] = _Live(received, result)
        self.most_live = max(self.most_live, len(self._live))
        return None if action.stage == self._last else result.detach()

    def _backward_input(self, action: Action, live: _Live, received: torch.Tensor | None) -> torch.Tensor | None:
        if not action.stage:  # token ids have no gradient: all of the pass is that of the weights
            live.gradient = received
            return None
        gradients = self._gradients[action.stage]
        gradient, live.weight_part = gradients.backward_input(live.result, received, live.received)
        return gradient
