"""torch's fused AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradstream.core.optimizer.rule import STEP_COUNT, Rule, Slice
from gradstream.core.recipe.recipe import OptimizerConfig

if TYPE_CHECKING:
    import torch


class AdamW(Rule):
    """AdamW (Loshchilov and Hutter 2019). Each slice has its own count of steps. The moments begin with zeros."""

    arrays = ("exp_avg", "exp_avg_sq", STEP_COUNT)

    def __init__(self, slices: Sequence[Slice], config: OptimizerConfig):
        import torch

        super().__init__(slices, config)
        self._state = [
            {
                "exp_avg": torch.zeros_like(each.weights),
                "exp_avg_sq": torch.zeros_like(each.weights),
                STEP_COUNT: torch.zeros((), device=each.weights.device),  # where the fused kernel wants it
            }
            for each in slices
        ]
        self._groups = [
            (
                weight_decay,
                [slices[number].weights for number in numbers],
                [slices[number].gradient for number in numbers],
                [[self._state[number][name] for number in numbers] for name in self.arrays],
            )
            for weight_decay, numbers in self.by_decay()
        ]

    @classmethod
    def moments(cls, config: OptimizerConfig) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def step(self, rate: float) -> None:
        from torch.optim.adamw import adamw

        beta1, beta2 = self.config.betas
        for weight_decay, weights, gradients, (averages, squares, counts) in self._groups:
            adamw(
                weights,
                gradients,
                averages,
                squares,
                [],
                counts,
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=rate,
                weight_decay=weight_decay,
                eps=self.config.eps,
                maximize=False,
            )

    def state_of(self, number: int) -> dict[str, torch.Tensor]:
        return self._state[number]
