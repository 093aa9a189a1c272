"""torch's fused SGD with momentum, also Nesterov's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradstream.core.optimizer.rule import Rule, Slice
from gradstream.core.recipe.recipe import OptimizerConfig

if TYPE_CHECKING:
    import torch

BUFFER = "momentum_buffer"


class SGD(Rule):
    """SGD. The momentum begins with zeros. Without momentum no memory is taken, and the arrays in `state` are zeros."""

    arrays = (BUFFER,)

    def __init__(self, slices: Sequence[Slice], config: OptimizerConfig):
        import torch

        super().__init__(slices, config)
        self._buffers = [torch.zeros_like(each.weights) if config.momentum else None for each in slices]
        self._groups = [
            (
                weight_decay,
                [slices[number].weights for number in numbers],
                [slices[number].gradient for number in numbers],
                [self._buffers[number] for number in numbers],
            )
            for weight_decay, numbers in self.by_decay()
        ]

    @classmethod
    def moments(cls, config: OptimizerConfig) -> tuple[str, ...]:
        return (BUFFER,) if config.momentum else ()

    def step(self, rate: float) -> None:
        from torch.optim.sgd import sgd

        for weight_decay, weights, gradients, buffers in self._groups:
            sgd(
                weights,
                gradients,
                buffers,
                fused=True,
                weight_decay=weight_decay,
                momentum=self.config.momentum,
                lr=rate,
                dampening=0.0,
                nesterov=self.config.nesterov and self.config.momentum > 0,
                maximize=False,
            )

    def state(self) -> list[dict[str, torch.Tensor]]:
        import torch

        return [
            {BUFFER: torch.zeros_like(each.weights) if buffer is None else buffer}
            for each, buffer in zip(self.slices, self._buffers, strict=True)
        ]
