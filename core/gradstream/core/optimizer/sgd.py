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
    """SGD. The momentum begins with zeros. Without momentum no memory is taken, and `state_of` has zeros."""

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

    def state_of(self, number: int) -> dict[str, torch.Tensor]:
        import torch

        buffer = self._buffers[number]
        return {BUFFER: torch.zeros_like(self.slices[number].weights) if buffer is None else buffer}
