"""The update rule, one fragment at a time, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

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


class BundleOptimizer:
    """torch's own AdamW or SGD, fused, over a bundle's fragments: `weights` are updated by `gradients`, in place.

    One for each bundle, not one for all: each bundle can then be updated, in any thread, as soon as its turn comes. Its
    state is a handful of flat arrays a fragment, which a checkpoint can name. torch's functions, not its optimizer
    objects: these look through all of their state at every step.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        decays: Sequence[bool],
        config: OptimizerConfig,
    ):
        self._weights = weights
        self._gradients = gradients
        self._config = config
        # Zeros, or None before a first step that sets what it finds missing: torch's SGD does, its AdamW does not.
        self._states: list[dict[str, Any]] = [
            self._initial(weights_N) for weights_N, _, _ in zip(weights, gradients, decays, strict=True)
        ]
        self._groups = [
            (weight_decay, members)
            for has, weight_decay in ((True, config.weight_decay), (False, 0.0))
            if (members := [number for number, decay in enumerate(decays) if decay is has])
        ]

    def _initial(self, weights_N: torch.Tensor) -> dict[str, Any]:
        if self._config.kind == "sgd":
            return {"momentum_buffer": None}
        zeros = {name: torch.zeros_like(weights_N) for name in ("exp_avg", "exp_avg_sq")}
        return {**zeros, STEP_COUNT: torch.zeros((), dtype=torch.float32)}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update the weights in place with learning rate `rate`."""
        config = self._config
        for weight_decay, members in self._groups:
            weights = [self._weights[number] for number in members]
            gradients = [self._gradients[number] for number in members]
            states = [self._states[number] for number in members]
            if config.kind == "adamw":
                beta1, beta2 = config.betas
                averages, squares, counts = ([state[name] for state in states] for name in self.names())
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
                    eps=config.eps,
                    maximize=False,
                )
                continue
            buffers = [state["momentum_buffer"] for state in states]
            sgd(
                weights,
                gradients,
                buffers,
                fused=True,
                weight_decay=weight_decay,
                momentum=config.momentum,
                lr=rate,
                dampening=0.0,
                nesterov=config.nesterov and config.momentum > 0,
                maximize=False,
            )
            for state, buffer in zip(states, buffers, strict=True):
                state["momentum_buffer"] = buffer

    def state(self) -> list[dict[str, npt.NDArray[np.float32]]]:
        """For each fragment the optimizer's arrays by name, aliasing its memory; all fp32. Zeros before the first
        step."""
        return [
            {
                name: (torch.zeros_like(weights_N) if tensor is None else tensor).numpy().reshape(-1)
                for name, tensor in state.items()
            }
            for weights_N, state in zip(self._weights, self._states, strict=True)
        ]

    def names(self) -> list[str]:
        """The names of the arrays in `state`."""
        return ["exp_avg", "exp_avg_sq", STEP_COUNT] if self._config.kind == "adamw" else ["momentum_buffer"]

    def load(self, states: Sequence[dict[str, npt.NDArray[np.float32]]]) -> None:
        """Put arrays as given by `state` in place of the optimizer's."""
        for state, arrays in zip(self._states, states, strict=True):
            for name in self.names():
                tensor = torch.from_numpy(arrays[name].copy())
                state[name] = tensor.reshape(()) if name == STEP_COUNT else tensor

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's arrays."""
        return (8 if self._config.kind == "adamw" else 4) * sum(weights_N.numel() for weights_N in self._weights)
