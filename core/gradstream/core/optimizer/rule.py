"""What an update rule is: the class that every rule extends. Without torch until a rule is used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from gradstream.core.recipe.recipe import OptimizerConfig

if TYPE_CHECKING:
    import torch

STEP_COUNT = "step"
"""The name of an array with one element: how often a slice was updated."""


class Updated(Protocol):
    """What a rule needs to know of a tensor of the inventory."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def kind(self) -> str: ...
    @property
    def decay(self) -> bool: ...


@dataclass(frozen=True)
class Slice:
    """A slice of a tensor: its weights, which a rule updates in place, its gradient, and the tensor.

    A server's slices are fragments, a worker's are whole tensors. Both arrays are flat fp32.
    """

    weights: torch.Tensor
    gradient: torch.Tensor
    tensor: Updated


class Rule(ABC):
    """An update rule for slices.

    Rules call torch's optimizer functions and not its optimizer objects, because the objects search all of their state
    at every step.
    """

    arrays: ClassVar[tuple[str, ...]]
    """The names of a slice's arrays."""
    whole: ClassVar[bool] = False
    """Whether the rule updates a tensor only as a whole: all slices of a tensor are given to one object, in order."""

    def __init__(self, slices: Sequence[Slice], config: OptimizerConfig):
        self.slices = slices
        self.config = config

    @classmethod
    def takes(cls, tensor: Updated) -> bool:
        """Whether the rule can update this tensor."""
        return True

    @classmethod
    @abstractmethod
    def moments(cls, config: OptimizerConfig) -> tuple[str, ...]:
        """The arrays, each as large as the weights, that the rule needs from one step to the next, by torch's names."""

    @abstractmethod
    def step(self, rate: float) -> None:
        """Update all weights in place with learning rate `rate`."""

    @abstractmethod
    def state_of(self, number: int) -> dict[str, torch.Tensor]:
        """The arrays of slice `number` by name, all fp32, as views of the rule's memory."""

    def by_decay(self) -> list[tuple[float, list[int]]]:
        """Each weight decay with the numbers of its slices: torch's functions take one decay for all arrays."""
        found: dict[float, list[int]] = {}
        for number, each in enumerate(self.slices):
            found.setdefault(self.config.weight_decay if each.tensor.decay else 0.0, []).append(number)
        return list(found.items())
