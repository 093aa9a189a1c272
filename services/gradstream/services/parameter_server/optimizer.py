"""The update rule, one fragment at a time, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradstream.core.config import OptimizerConfig, ScheduleConfig

STEP_COUNT = "step"


def learning_rate(step: int, num_steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """The learning rate of step `step` of `num_steps`, both counted from 0.

    Linear warm-up over `warmup_steps`, then: cosine to `min_ratio` (Loshchilov and Hutter, 2016); WSD, constant and a
    linear decay to `min_ratio` over the last `decay_steps` (Hu et al., "MiniCPM", 2024); or constant.
    """
    peak = optimizer.learning_rate
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "cosine":
        span = max(1, num_steps - 1 - schedule.warmup_steps)
        share = min(1.0, (step - schedule.warmup_steps) / span)
        return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * (1 + math.cos(math.pi * share)) / 2)
    if schedule.kind == "wsd" and schedule.decay_steps:
        share = max(0.0, (step - (num_steps - 1 - schedule.decay_steps)) / schedule.decay_steps)
        return peak * (1 - (1 - schedule.min_ratio) * min(1.0, share))
    return peak


def preload() -> None:
    """Make one optimizer and throw it away: torch's first one imports its compiler, which takes seconds."""
    BundleOptimizer([torch.zeros(1)], [torch.zeros(1)], [False], OptimizerConfig()).step(0.0)


class BundleOptimizer:
    """torch's own AdamW or SGD, fused, over a bundle's fragments: `weights` are updated by `gradients`, in place.

    An optimizer a bundle, not one for all: each bundle can then be updated, in any thread, as soon as its turn comes.
    Its state is a handful of flat arrays a fragment, which a checkpoint can name.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        decays: Sequence[bool],
        config: OptimizerConfig,
    ):
        self._weights = weights
        self._kind = config.kind
        for weights_N, gradient_N in zip(weights, gradients, strict=True):
            weights_N.grad = gradient_N
        groups: list[dict[str, Any]] = []
        for decay, weight_decay in ((True, config.weight_decay), (False, 0.0)):
            members = [weights_N for weights_N, has in zip(weights, decays, strict=True) if has is decay]
            if members:
                groups.append({"params": members, "weight_decay": weight_decay})
        self._optimizer: torch.optim.Optimizer
        if config.kind == "adamw":
            self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
        else:
            self._optimizer = torch.optim.SGD(
                groups,
                lr=0.0,
                momentum=config.momentum,
                nesterov=config.nesterov and config.momentum > 0,
                fused=True,
            )

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the weights in place with learning rate `rate`."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()

    def state(self) -> list[dict[str, npt.NDArray[np.float32]]]:
        """For each fragment the optimizer's arrays by name, aliasing its memory; all fp32. Zeros before the first
        step."""
        return [
            {name: tensor.numpy().reshape(-1) for name, tensor in self._tensors(weights_N).items()}
            for weights_N in self._weights
        ]

    def names(self) -> list[str]:
        """The names of the arrays in `state`."""
        return ["exp_avg", "exp_avg_sq", STEP_COUNT] if self._kind == "adamw" else ["momentum_buffer"]

    def load(self, states: Sequence[dict[str, npt.NDArray[np.float32]]]) -> None:
        """Put arrays as given by `state` in place of the optimizer's."""
        for weights_N, arrays in zip(self._weights, states, strict=True):
            state = {name: torch.from_numpy(arrays[name].copy()) for name in self.names()}
            if STEP_COUNT in state:
                state[STEP_COUNT] = state[STEP_COUNT].reshape(())
            self._optimizer.state[weights_N] = state

    def _tensors(self, weights_N: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self._optimizer.state[weights_N]
        tensors: dict[str, torch.Tensor] = {}
        for name in self.names():
            value = state.get(name)
            if value is None:  # torch makes the state at the first step; before it, it stands for zeros
                value = torch.zeros(()) if name == STEP_COUNT else torch.zeros_like(weights_N)
            tensors[name] = value
        return tensors

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's arrays."""
        return (8 if self._kind == "adamw" else 4) * sum(weights_N.numel() for weights_N in self._weights)
