"""The update rule, one fragment at a time, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

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
    FragmentOptimizer(torch.zeros(1), False, OptimizerConfig()).step(torch.zeros(1), 0.0)


class FragmentOptimizer:
    """torch's own AdamW (fused) or SGD over one fragment.

    An optimizer a fragment, not one for all: each fragment can then be updated, in any thread, as soon as its turn
    comes, and its state is a handful of flat arrays that a checkpoint can name.
    """

    def __init__(self, weights_N: torch.Tensor, decay: bool, config: OptimizerConfig):
        self._weights_N = weights_N
        self._kind = config.kind
        weight_decay = config.weight_decay if decay else 0.0
        self._optimizer: torch.optim.Optimizer
        if config.kind == "adamw":
            self._optimizer = torch.optim.AdamW(
                [weights_N], lr=0.0, betas=config.betas, eps=config.eps, weight_decay=weight_decay, fused=True
            )
        else:
            self._optimizer = torch.optim.SGD(
                [weights_N],
                lr=0.0,
                momentum=config.momentum,
                weight_decay=weight_decay,
                nesterov=config.nesterov and config.momentum > 0,
                fused=True,
            )

    @torch.no_grad()
    def step(self, gradient_N: torch.Tensor, rate: float) -> None:
        """Update the weights in place with learning rate `rate`."""
        self._weights_N.grad = gradient_N
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._weights_N.grad = None

    def state(self) -> dict[str, npt.NDArray[np.float32]]:
        """The optimizer's arrays by name, aliasing its memory; all fp32. Zeros before the first step."""
        return {name: tensor.numpy().reshape(-1) for name, tensor in self._tensors().items()}

    def names(self) -> list[str]:
        """The names of the arrays in `state`."""
        return ["exp_avg", "exp_avg_sq", STEP_COUNT] if self._kind == "adamw" else ["momentum_buffer"]

    def load(self, arrays: dict[str, npt.NDArray[np.float32]]) -> None:
        """Put arrays as given by `state` in place of the optimizer's."""
        state = {name: torch.from_numpy(arrays[name].copy()) for name in self.names()}
        if STEP_COUNT in state:
            state[STEP_COUNT] = state[STEP_COUNT].reshape(())
        self._optimizer.state[self._weights_N] = state

    def _tensors(self) -> dict[str, torch.Tensor]:
        state = self._optimizer.state[self._weights_N]
        tensors: dict[str, torch.Tensor] = {}
        for name in self.names():
            value = state.get(name)
            if value is None:  # torch makes the state at the first step; before it, it stands for zeros
                value = torch.zeros(()) if name == STEP_COUNT else torch.zeros_like(self._weights_N)
            tensors[name] = value
        return tensors

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's arrays."""
        return (8 if self._kind == "adamw" else 4) * self._weights_N.numel()
