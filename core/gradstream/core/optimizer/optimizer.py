"""The optimizer's update of a list of slices: a server's fragments, or a worker's whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from gradstream.core.optimizer.rule import STEP_COUNT, Rule, Slice, Updated
from gradstream.core.optimizer.rules import rule_of
from gradstream.core.recipe.recipe import OptimizerConfig

__all__ = ["STEP_COUNT", "Optimizer"]


class Optimizer:
    """Updates slices of tensors in place by their gradients, each by the rule that takes its tensor.

    Any thread can update a list of slices as soon as its turn comes, because each list has an optimizer of its own. The
    state is a few flat arrays a slice, which a checkpoint can name.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        tensors: Sequence[Updated],
        config: OptimizerConfig,
    ):
        """`tensors` has the tensor of each slice. A tensor that is updated whole has all its slices here, in order."""
        slices = [Slice(*each) for each in zip(weights, gradients, tensors, strict=True)]
        members: dict[type[Rule], list[int]] = {}
        for number, tensor in enumerate(tensors):
            members.setdefault(rule_of(config, tensor), []).append(number)
        self._rules = [(rule([slices[number] for number in found], config), found) for rule, found in members.items()]
        self._rule_of = {number: rule for rule, numbers in self._rules for number in numbers}

    @torch.no_grad()
    def step(self, rate: float, step: int = 0) -> None:
        """Update the weights in place with learning rate `rate`, whatever the number of the step."""
        for rule, _ in self._rules:
            rule.step(rate)

    def _arrays(self) -> list[dict[str, torch.Tensor]]:
        arrays: list[dict[str, torch.Tensor]] = [{} for _ in self._rule_of]
        for rule, numbers in self._rules:
            for number, state in zip(numbers, rule.state(), strict=True):
                arrays[number] = state
        return arrays

    def moment(self, name: str, number: int) -> torch.Tensor:
        """The array `name` of slice `number`, in the optimizer's own memory. Steps and `load` write to that memory."""
        return self._arrays()[number][name]

    def count(self, num_steps: int) -> None:
        """Count steps of AdamW that were taken elsewhere: the moments are set apart."""
        for arrays in self._arrays():
            if STEP_COUNT in arrays:
                arrays[STEP_COUNT] += num_steps

    def state(self) -> list[dict[str, npt.NDArray[np.float32]]]:
        """For each slice the optimizer's arrays by name, all fp32, as views of the optimizer's memory.

        The arrays are zeros before the first step.
        """
        return [{name: array.numpy().reshape(-1) for name, array in arrays.items()} for arrays in self._arrays()]

    def names(self, number: int) -> tuple[str, ...]:
        """The names of the arrays in `state` of slice `number`."""
        return self._rule_of[number].arrays

    def load(self, states: Sequence[dict[str, npt.NDArray[np.float32]]]) -> None:
        """Overwrite the optimizer's arrays by arrays in the form of `state`."""
        for held, state in zip(self._arrays(), states, strict=True):
            for name, array in held.items():
                array.copy_(torch.from_numpy(state[name]).reshape(array.shape))

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's arrays, without the counts."""
        sizes = ((set(rule.arrays) - {STEP_COUNT}, rule.slices) for rule, _ in self._rules)
        return sum(4 * len(arrays) * each.weights.numel() for arrays, slices in sizes for each in slices)
