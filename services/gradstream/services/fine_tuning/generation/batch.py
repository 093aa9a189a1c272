"""Generates rows of one base together: a token of each, or the same number of a prompt's tokens of each.

Rows are aligned at their last token: shorter ones have padding at the left, which the mask hides, and each row's
positions count from its own first token. So rows can join and leave between any two tokens. A row's result does not
depend on the other rows, nor on the chunks in which its prompt is computed, except for the rounding of larger matrix
products.

Shape suffixes: B rows, H heads, T tokens (columns), D elements of a head, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gradstream.services.fine_tuning.generation.resident import ResidentBase

# Columns that a cache grows by at once. Growing copies all of its keys and values.
GROWTH_COLUMNS = 128


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer: a view of buffers that have columns to spare, so that a token copies only itself."""

    def __init__(self, cache: _Cache) -> None:
        super().__init__()
        self._cache = cache
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new columns. Returns all keys and all values."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[2]
        if not self._buffers or end > self._buffers[0].shape[2]:
            before = (key_states[:, :, :0], value_states[:, :, :0]) if begin == 0 else (self.keys, self.values)
            self.hold([before[0]], [before[1]], end)
        self._buffers[0][:, :, begin:end] = key_states
        self._buffers[1][:, :, begin:end] = value_states
        self._show(end)
        return self.keys, self.values

    def hold(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], num_columns: int) -> None:
        """Hold the rows of these tensors, each of shape (some rows, H, T, D), aligned at their last column.

        Makes room for at least `num_columns`. Padding is 0.
        """
        num_columns = max(num_columns, self._cache.columns)
        self._buffers = [_aligned(states, num_columns) for states in (keys, values)]
        self._show(max(states_BHTD.shape[2] for states_BHTD in keys))

    def _show(self, width: int) -> None:
        self.is_initialized = True
        self.keys, self.values = (buffer_BHTD[:, :, :width] for buffer_BHTD in self._buffers)


class _Cache(DynamicCache):  # type: ignore[misc]
    """Keys and values of all layers.

    Every layer keeps every column, also layers with a sliding window: the mask applies the window, and rows can join
    only if all layers have the same width.
    """

    def __init__(self) -> None:
        super().__init__()
        self.columns = 0  # that new buffers have
        self.layer_class_to_replicate = partial(_Layer, self)


class Batch:
    """Keys, values and further state of the rows. A row is known by its index."""

    def __init__(self, resident: ResidentBase):
        self._resident = resident
        self._cache: Any = None
        self._adapters: list[str] = []
        # For each row the number of tokens whose keys and values are in the cache. The longest row fills all columns.
        self.lengths: list[int] = []

    def join(self, prompts: Sequence[Sequence[int]], adapters: Sequence[str], num_columns: int = 0) -> torch.Tensor:
        """Add rows at the end. Returns the logits after each new row's prompt, shape (B of the new rows, V).

        A prompt may be the first tokens of a longer one, which `extend` goes on with. `num_columns` is the number of
        columns to make room for at once.
        """
        width = max(map(len, prompts))
        lengths = [len(prompt) for prompt in prompts]
        ids_BT = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask_BT = _mask(lengths, width)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        new = Batch(self._resident)
        new._cache = _Cache()
        new._cache.columns = max(width + GROWTH_COLUMNS, num_columns)
        logits_BV = self._resident.logits(ids_BT, mask_BT, positions_BT, new._cache, adapters)
        new.lengths, new._adapters = lengths, list(adapters)
        self.absorb(new)
        return logits_BV

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to each row. Returns the logits after it, shape (B, V)."""
        return self.extend([[token] for token in tokens])

    def extend(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append the same number of tokens to each row. Returns the logits after the last ones, shape (B, V)."""
        ids_BT = torch.tensor(ids)
        num_tokens = ids_BT.shape[1]
        positions_BT = torch.tensor(self.lengths).unsqueeze(1) + torch.arange(num_tokens)
        self.lengths = [length + num_tokens for length in self.lengths]
        width = max(self.lengths)
        if width > self._cache.columns:
            self._cache.columns = width + GROWTH_COLUMNS
        mask_BT = _mask(self.lengths, width)
        return self._resident.logits(ids_BT, mask_BT, positions_BT, self._cache, self._adapters)

    def absorb(self, other: Batch) -> None:
        """Add another batch's rows at the end. The other batch must not be used again."""
        self._cache = other._cache if self._cache is None else _joined(self._cache, other._cache)
        self.lengths += other.lengths
        self._adapters += other._adapters

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only these rows, in this order; free the memory of the others."""
        self.lengths = [self.lengths[index] for index in indices]
        self._adapters = [self._adapters[index] for index in indices]
        if not indices:
            self._cache = None
            return
        width = max(self.lengths)
        self._cache.columns = width + GROWTH_COLUMNS
        for layer in self._cache.layers:
            rows_B = torch.tensor(indices, device=layer.keys.device)
            kept = [states[:, :, -width:].index_select(0, rows_B) for states in (layer.keys, layer.values)]
            layer.hold(kept[:1], kept[1:], width)


def _mask(lengths: Sequence[int], width: int) -> torch.Tensor:
    """Make the mask: 1 for a row's own columns, 0 for the padding at their left."""
    return (torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)).long()


def _joined(left: Any, right: Any) -> Any:
    """Join the rows of two caches in one."""
    left.columns = max(left.get_seq_length(), right.get_seq_length()) + GROWTH_COLUMNS
    for mine, new in zip(left.layers, right.layers, strict=True):
        mine.hold([mine.keys, new.keys], [mine.values, new.values], left.columns)
    return left


def _aligned(parts: Sequence[torch.Tensor], num_columns: int) -> torch.Tensor:
    """Copy the rows of all parts, aligned at their last column, into one tensor with this number of columns."""
    width = max(part_BHTD.shape[2] for part_BHTD in parts)
    first_BHTD = parts[0]
    num_rows = sum(part_BHTD.shape[0] for part_BHTD in parts)
    whole_BHTD = first_BHTD.new_empty((num_rows, first_BHTD.shape[1], num_columns, first_BHTD.shape[3]))
    begin = 0
    for part_BHTD in parts:
        end, padding = begin + part_BHTD.shape[0], width - part_BHTD.shape[2]
        whole_BHTD[begin:end, :, :padding] = 0
        whole_BHTD[begin:end, :, padding:width] = part_BHTD
        begin = end
    return whole_BHTD
