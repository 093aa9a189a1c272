"""The arrays of the version that a worker holds: the weights and, in a job that shares them, the moments.

Ordinary steps and validation passes compute on the weights themselves. A round computes on copies, because the next
version may come as differences to the held weights, and because each slot begins its round from them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from gradstream.core.plan.bundles import WEIGHTS, Bundle
from gradstream.core.plan.plan import Plan

Array = tuple[int, str]
"""(tensor of the plan, array of a bundle): a tensor's weights, or one of its moments."""


class HeldVersion:
    """The held arrays of the tensors in `parameters`, which are by (tensor, part) of the plan. All are flat and fp32.

    The weights are the memory that the parameters have now. Two parts of one tensor share their memory.
    """

    def __init__(self, plan: Plan, parameters: Mapping[tuple[int, int], nn.Parameter]):
        self.arrays: dict[Array, torch.Tensor] = {}
        self.num_fragments: dict[Array, int] = {}
        """The fragments of each array, which arrive in bundles."""
        self._parameters = parameters
        for (tensor, _), parameter in sorted(parameters.items(), reverse=True):
            self.arrays[tensor, WEIGHTS] = parameter.data.view(-1)
        for bundle in (*plan.bundles, *plan.moment_bundles):
            for fragment in bundle.fragments:
                array = (fragment.tensor, bundle.array)
                weights_N = self.arrays.get((fragment.tensor, WEIGHTS))
                if weights_N is None:
                    continue
                if array not in self.arrays:
                    self.arrays[array] = torch.zeros_like(weights_N)
                self.num_fragments[array] = self.num_fragments.get(array, 0) + 1

    def slices(self, bundle: Bundle) -> list[torch.Tensor]:
        """The fragments of a bundle as views of the held arrays."""
        return [self.arrays[f.tensor, bundle.array][f.begin : f.end] for f in bundle.fragments]

    def moments(self, tensor: int) -> dict[str, torch.Tensor]:
        """A tensor's shared moments by name."""
        return {
            name: array_N for (number, name), array_N in self.arrays.items() if number == tensor and name != WEIGHTS
        }

    def compute_on(self, weights: Mapping[int, torch.Tensor]) -> None:
        """Let the model compute on these weights, flat tensors by number, instead of the held ones."""
        for (tensor, _), parameter in self._parameters.items():
            parameter.data = weights[tensor].view(parameter.shape)

    def compute_on_held(self) -> None:
        """Let the model compute on the held weights."""
        self.compute_on({tensor: array_N for (tensor, name), array_N in self.arrays.items() if name == WEIGHTS})
