"""Generates rows of one base together, one token of each at a time.

Rows are aligned at their last token: shorter ones have padding at the left, which the mask hides, and each row's
positions count from its own first token. So rows can join and leave between any two tokens. A row's result does not
depend on the other rows, except for the rounding of larger matrix products.

Shape suffixes: B rows, H heads, T tokens (columns), D elements of a head, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache

from gradstream.services.fine_tuning.generation.resident import ResidentBase


class Batch:
    """Keys, values and further state of the rows. A row is known by its index."""

    def __init__(self, resident: ResidentBase):
        self._resident = resident
        self._cache: Any = None
        self._adapters: list[str] = []
        # For each row the number of tokens whose keys and values are in the cache. The longest row fills all columns.
        self.lengths: list[int] = []

    def join(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str]) -> torch.Tensor:
        """Add rows at the end. Returns the logits after each new row's prompt, shape (B of the new rows, V)."""
        width = max(map(len, prompts))
        lengths = [len(prompt) for prompt in prompts]
        ids_BT = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask_BT = _mask(lengths, width)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        # Every layer keeps every column, also layers with a sliding window: the mask applies the window, and rows can
        # join only if all layers have the same width.
        cache: Any = DynamicCache()
        logits_BV = self._resident.logits(ids_BT, mask_BT, positions_BT, cache, adapters)
        self._cache = cache if self._cache is None else _joined(self._cache, cache)
        self.lengths += lengths
        self._adapters += adapters
        return logits_BV

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to each row. Returns the logits after it, shape (B, V)."""
        positions_BT = torch.tensor(self.lengths).unsqueeze(1)
        self.lengths = [length + 1 for length in self.lengths]
        mask_BT = _mask(self.lengths, max(self.lengths))
        ids_BT = torch.tensor(tokens).unsqueeze(1)
        return self._resident.logits(ids_BT, mask_BT, positions_BT, self._cache, self._adapters)

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only these rows, in this order; free the memory of the others."""
        self.lengths = [self.lengths[index] for index in indices]
        self._adapters = [self._adapters[index] for index in indices]
        if not indices:
            self._cache = None
            return
        width = max(self.lengths)
        for layer in self._cache.layers:
            rows_B = torch.tensor(indices, device=layer.keys.device)
            layer.keys = layer.keys.index_select(0, rows_B)[:, :, -width:].contiguous()
            layer.values = layer.values.index_select(0, rows_B)[:, :, -width:].contiguous()


def _mask(lengths: Sequence[int], width: int) -> torch.Tensor:
    """Make the mask: 1 for a row's own columns, 0 for the padding at their left."""
    return (torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)).long()


def _joined(left: Any, right: Any) -> Any:
    """Join the rows of two caches in one."""
    width = max(left.get_seq_length(), right.get_seq_length())

    def widened(states_BHTD: torch.Tensor) -> torch.Tensor:
        return functional.pad(states_BHTD, (0, 0, width - states_BHTD.shape[2], 0))

    for mine, new in zip(left.layers, right.layers, strict=True):
        mine.keys = torch.cat([widened(mine.keys), widened(new.keys)])
        mine.values = torch.cat([widened(mine.values), widened(new.values)])
    return left


def peak_positions(rows: Sequence[tuple[int, int]]) -> int:
    """The peak of columns times rows in a batch of rows, each given as (tokens so far, tokens to come)."""
    if not rows:
        return 0
    return len(rows) * (max(length for length, _ in rows) + max(to_come for _, to_come in rows))
