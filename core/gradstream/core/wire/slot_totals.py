"""Totals of a slot, which a worker sends with each contribution of the slot and the servers compare."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SlotTotals:
    """The tokens, samples and loss of a slot. The loss is summed over the slot's target tokens."""

    num_tokens: int
    num_samples: int
    loss_sum: float

    def same_counts(self, other: SlotTotals) -> bool:
        """Whether both have the same numbers of tokens and samples."""
        return (self.num_tokens, self.num_samples) == (other.num_tokens, other.num_samples)

    def same_loss(self, other: SlotTotals) -> bool:
        """Whether both have the same loss. NaN equals NaN."""
        return self.loss_sum == other.loss_sum or (math.isnan(self.loss_sum) and math.isnan(other.loss_sum))
