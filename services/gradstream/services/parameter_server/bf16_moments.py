"""AdamW with moments in bf16: 4 bytes a parameter less than torch's, rounded so that their mean is right.

Rounding to nearest would stop a moment that changes by less than half of its last bit, 1 part in 512, a step. Rounding
up with the probability of what is dropped keeps the mean. The draw is a function of (seed, step, tensor, element), so
bits depend neither on the placement of fragments nor on restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.adamw import adamw

from gradstream.core.checkpoint.shard import MOMENTS
from gradstream.core.kernels import moments
from gradstream.core.model.model import derive_seed
from gradstream.core.optimizer.optimizer import STEP_COUNT
from gradstream.core.plan.fragments import Fragment, Tensor
from gradstream.core.recipe.recipe import OptimizerConfig


class Bf16MomentsOptimizer:
    """torch's fused AdamW over a bundle's fragments, as Optimizer, with moments that are held in bf16.

    A fragment's moments are widened to fp32, updated, and rounded back, one fragment at a time.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        fragments: Sequence[Fragment],
        tensors: Sequence[Tensor],
        config: OptimizerConfig,
        seed: int,
    ):
        """`tensors` has the tensor of each fragment, and `seed` is the job's."""
        self._weights = weights
        self._gradients = gradients
        self._fragments = fragments
        self._tensors = tensors
        self._config = config
        self._seed = seed
        self._moments = [
            {name: torch.zeros(len(weights_N), dtype=torch.bfloat16) for name in MOMENTS} for weights_N in weights
        ]
        self._counts = [torch.zeros((), dtype=torch.float32) for _ in weights]

    @torch.no_grad()
    def step(self, rate: float, step: int) -> None:
        """Update the weights in place with learning rate `rate`. `step` is the number of the job's step."""
        config = self._config
        beta1, beta2 = config.betas
        scratch = {name: torch.empty(max(map(len, self._weights), default=0)) for name in MOMENTS}
        for number, weights_N in enumerate(self._weights):
            held, tensor = self._moments[number], self._tensors[number]
            wide = {name: scratch[name][: len(weights_N)].copy_(held[name]) for name in MOMENTS}
            adamw(
                [weights_N],
                [self._gradients[number]],
                [wide["exp_avg"]],
                [wide["exp_avg_sq"]],
                [],
                [self._counts[number]],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=rate,
                weight_decay=config.weight_decay if tensor.decay else 0.0,
                eps=config.eps,
                maximize=False,
            )
            moments.round_moments(
                wide["exp_avg"].numpy().view(np.uint32),
                wide["exp_avg_sq"].numpy().view(np.uint32),
                derive_seed(self._seed, "moments", step, tensor.name),
                self._fragments[number].begin,
                _bits(held["exp_avg"]),
                _bits(held["exp_avg_sq"]),
            )

    def state(self) -> list[dict[str, npt.NDArray[Any]]]:
        """For each fragment the moments as the bits of bf16, and the count in fp32, as views."""
        return [
            {**{name: _bits(held[name]) for name in MOMENTS}, STEP_COUNT: count.numpy().reshape(-1)}
            for held, count in zip(self._moments, self._counts, strict=True)
        ]

    def names(self, number: int) -> tuple[str, ...]:
        """The names of the arrays in `state` of fragment `number`."""
        return (*MOMENTS, STEP_COUNT)

    def load(self, states: Sequence[dict[str, npt.NDArray[np.float32]]]) -> None:
        """Replace the arrays by values in fp32, moments rounded to nearest: those that were bf16 stay the same."""
        for held, count, state in zip(self._moments, self._counts, states, strict=True):
            for name in MOMENTS:
                held[name].copy_(torch.from_numpy(state[name]))
            count.copy_(torch.from_numpy(state[STEP_COUNT]).reshape(()))

    @property
    def state_bytes(self) -> int:
        """Bytes of the moments."""
        return 4 * sum(len(weights_N) for weights_N in self._weights)


def _bits(values_N: torch.Tensor) -> npt.NDArray[np.uint16]:
    return values_N.view(torch.int16).numpy().view(np.uint16)
