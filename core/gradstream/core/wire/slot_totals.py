"""What the contributions of a slot say about the slot: a worker sends it with each, the servers compare."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SlotTotals:
    """What a slot adds to the step besides its gradient. The loss is summed over the slot's target tokens."""

    num_tokens: int
    num_samples: int
    loss_sum: float

    def same_counts(self, other: SlotTotals) -> bool:
        """Whether both count the same tokens and samples."""
        return (self.num_tokens, self.num_samples) == (other.num_tokens, other.num_samples)

    def same_loss(self, other: SlotTotals) -> bool:
        """Whether both have the same loss; NaN is the same as NaN."""
        return self.loss_sum == other.loss_sum or (math.isnan(self.loss_sum) and math.isnan(other.loss_sum))
