"""The outer rule of local steps: how servers apply a round's mean difference to their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.sgd import sgd

from gradstream.core.recipe.local import OuterConfig


class OuterOptimizer:
    """torch's fused SGD over a bundle's fragments, in which the mean difference takes the place of a gradient.

    `momenta` has the momentum of each fragment, in the form of the weights. Without momentum it is empty.
    """

    def __init__(self, weights: Sequence[torch.Tensor], differences: Sequence[torch.Tensor], config: OuterConfig):
        self._weights = list(weights)
        self._differences = list(differences)
        self._config = config
        self.momenta = [torch.zeros_like(weights_N) for weights_N in weights] if config.momentum else []

    def step(self) -> None:
        """Update the weights in place."""
        self._update(self._weights, self._differences, self.momenta)

    def preview(self, weights: Sequence[torch.Tensor], differences: Sequence[torch.Tensor]) -> None:
        """Update copies of the weights by copies of the differences, in place, as `step` will. Nothing else changes."""
        self._update(weights, differences, [momentum_N.clone() for momentum_N in self.momenta])

    @torch.no_grad()
    def _update(
        self, weights: Sequence[torch.Tensor], differences: Sequence[torch.Tensor], momenta: Sequence[torch.Tensor]
    ) -> None:
        config = self._config
        sgd(
            list(weights),
            list(differences),
            [*momenta] or [None] * len(weights),
            fused=True,
            weight_decay=0.0,
            momentum=config.momentum,
            lr=config.learning_rate,
            dampening=0.0,
            nesterov=config.nesterov and config.momentum > 0,
            maximize=False,
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of the momentum."""
        return 4 * sum(momentum_N.numel() for momentum_N in self.momenta)
