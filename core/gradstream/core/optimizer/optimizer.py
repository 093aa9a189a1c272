"""The optimizer's update of a list of tensors: a server's fragments, or a worker's whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from gradstream.core.recipe.recipe import OptimizerConfig

STEP_COUNT = "step"


@dataclass(frozen=True)
class _Group:
    """The tensors with the same weight decay, and their optimizer arrays: one a name and tensor.

    torch's functions take lists of arrays; the lists are made once.
    """

    weight_decay: float
    members: list[int]
    weights: list[torch.Tensor]
    gradients: list[torch.Tensor]
    arrays: dict[str, list[Any]]


class Optimizer:
    """torch's fused AdamW or SGD over a list of flat tensors: updates `weights` in place by `gradients`.

    On a server each bundle has an optimizer of its own, so any thread can update a bundle as soon as its turn comes.
    The state is a few flat arrays a tensor, which a checkpoint can name. This class calls torch's optimizer functions
    and not its optimizer objects, because the objects search all of their state at every step.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        decays: Sequence[bool],
        config: OptimizerConfig,
    ):
        self._weights = weights
        self._config = config
        self._groups = [
            _Group(
                weight_decay,
                members,
                [weights[number] for number in members],
                [gradients[number] for number in members],
                self._initial([weights[number] for number in members]),
            )
            for has, weight_decay in ((True, config.weight_decay), (False, 0.0))
            if (members := [number for number, decay in enumerate(decays) if decay is has])
        ]

    def _initial(self, weights: list[torch.Tensor]) -> dict[str, list[Any]]:
        """Make the initial arrays: zeros, which are None for SGD without momentum, because torch leaves them zeros."""
        if self._config.kind == "sgd":
            has = self._config.momentum > 0
            return {"momentum_buffer": [torch.zeros_like(weights_N) if has else None for weights_N in weights]}
        zeros = {name: [torch.zeros_like(weights_N) for weights_N in weights] for name in ("exp_avg", "exp_avg_sq")}
        return {**zeros, STEP_COUNT: [torch.zeros((), dtype=torch.float32) for _ in weights]}

    @torch.no_grad()
    def step(self, rate: float, step: int = 0) -> None:
        """Update the weights in place with learning rate `rate`, whatever the number of the step."""
        config = self._config
        for group in self._groups:
            if config.kind == "adamw":
                beta1, beta2 = config.betas
                adamw(
                    group.weights,
                    group.gradients,
                    group.arrays["exp_avg"],
                    group.arrays["exp_avg_sq"],
                    [],
                    group.arrays[STEP_COUNT],
                    fused=True,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=rate,
                    weight_decay=group.weight_decay,
                    eps=config.eps,
                    maximize=False,
                )
                continue
            sgd(
                group.weights,
                group.gradients,
                group.arrays["momentum_buffer"],
                fused=True,
                weight_decay=group.weight_decay,
                momentum=config.momentum,
                lr=rate,
                dampening=0.0,
                nesterov=config.nesterov and config.momentum > 0,
                maximize=False,
            )

    def moment(self, name: str, number: int) -> torch.Tensor:
        """The array `name` of tensor `number`, in the optimizer's own memory. Steps and `load` write to that memory."""
        for group in self._groups:
            if number in group.members:
                return group.arrays[name][group.members.index(number)]  # type: ignore[no-any-return]
        raise IndexError(number)

    def count(self, num_steps: int) -> None:
        """Count steps of AdamW that were taken elsewhere: the moments are set apart."""
        for group in self._groups:
            for count in group.arrays.get(STEP_COUNT, ()):
                count += num_steps

    def state(self) -> list[dict[str, npt.NDArray[np.float32]]]:
        """For each tensor the optimizer's arrays by name, all fp32, as views of the optimizer's memory.

        The arrays are zeros before the first step.
        """
        states: list[dict[str, npt.NDArray[np.float32]]] = [{} for _ in self._weights]
        for group in self._groups:
            for name, tensors in group.arrays.items():
                for number, tensor in zip(group.members, tensors, strict=True):
                    held = torch.zeros_like(self._weights[number]) if tensor is None else tensor
                    states[number][name] = held.numpy().reshape(-1)
        return states

    def names(self) -> list[str]:
        """The names of the arrays in `state`."""
        return ["exp_avg", "exp_avg_sq", STEP_COUNT] if self._config.kind == "adamw" else ["momentum_buffer"]

    def load(self, states: Sequence[dict[str, npt.NDArray[np.float32]]]) -> None:
        """Overwrite the optimizer's arrays by arrays in the form of `state`."""
        for group in self._groups:
            for name, tensors in group.arrays.items():
                for held, number in zip(tensors, group.members, strict=True):
                    if held is not None:
                        held.copy_(torch.from_numpy(states[number][name]).reshape(held.shape))

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's arrays."""
        return (8 if self._config.kind == "adamw" else 4) * sum(weights_N.numel() for weights_N in self._weights)
