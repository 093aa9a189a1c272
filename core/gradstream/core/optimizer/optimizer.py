"""The optimizer's update of a list of slices: a server's fragments, or a worker's whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from gradstream.core.optimizer.rule import STEP_COUNT, Rule, Slice
from gradstream.core.optimizer.rules import rule_of
from gradstream.core.recipe.recipe import OptimizerConfig

__all__ = ["STEP_COUNT", "Optimizer"]


class OptimizerState:
    """The state of some slices under an optimizer: a few flat arrays a slice, which a checkpoint can name."""

    def __init__(self, owners: Sequence[tuple[Rule, int]]):
        """`owners` has the rule of each slice, and the slice's number there."""
        self._owners = list(owners)

    def state(self) -> list[dict[str, npt.NDArray[np.float32]]]:
        """For each slice the optimizer's arrays by name, all fp32, as views of the optimizer's memory.

        The arrays are zeros before the first step.
        """
        return [{name: array.numpy().reshape(-1) for name, array in held.items()} for held in self._held()]

    def names(self, number: int) -> tuple[str, ...]:
        """The names of the arrays in `state` of slice `number`."""
        return self._owners[number][0].arrays

    def moment(self, name: str, number: int) -> torch.Tensor:
        """The array `name` of slice `number`, in the optimizer's own memory. Steps and `load` write to that memory."""
        rule, place = self._owners[number]
        return rule.state_of(place)[name]

    def count(self, num_steps: int) -> None:
        """Count steps of AdamW that were taken elsewhere: the moments are set apart."""
        for held in self._held():
            if STEP_COUNT in held:
                held[STEP_COUNT].add_(num_steps)

    def load(self, states: Sequence[dict[str, npt.NDArray[np.float32]]]) -> None:
        """Overwrite the optimizer's arrays by arrays in the form of `state`."""
        for held, state in zip(self._held(), states, strict=True):
            for name, array in held.items():
                array.copy_(torch.from_numpy(state[name]).reshape(array.shape))

    @property
    def state_bytes(self) -> int:
        """Bytes of the arrays, without the counts."""
        return sum(
            4 * len(set(rule.arrays) - {STEP_COUNT}) * rule.slices[place].weights.numel()
            for rule, place in self._owners
        )

    def _held(self) -> list[dict[str, torch.Tensor]]:
        return [rule.state_of(place) for rule, place in self._owners]


class Optimizer(OptimizerState):
    """Updates slices of tensors in place by their gradients, each by the rule that takes its tensor.

    On a server the bundles that must be updated together have an optimizer of their own, so any thread can update them
    as soon as their turn comes.
    """

    def __init__(self, slices: Sequence[Slice], config: OptimizerConfig):
        """A tensor that its rule updates only as a whole has all its slices here, in order."""
        taken: dict[type[Rule], list[Slice]] = {}
        places: list[tuple[type[Rule], int]] = []
        for each in slices:
            kind = rule_of(config, each.tensor)
            own = taken.setdefault(kind, [])
            places.append((kind, len(own)))
            own.append(each)
        rules = {kind: kind(own, config) for kind, own in taken.items()}
        super().__init__([(rules[kind], place) for kind, place in places])
        self._rules = list(rules.values())

    @torch.no_grad()
    def step(self, rate: float, step: int = 0) -> None:
        """Update the weights in place with learning rate `rate`, whatever the number of the step."""
        for rule in self._rules:
            rule.step(rate)

    def part(self, begin: int, end: int) -> OptimizerState:
        """The state of slices [begin, end)."""
        return OptimizerState(self._owners[begin:end])
