"""Rows that several examples were packed into: what a forward pass must know so that no example sees another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def layout_of(examples_BT: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
    """From the numbers of the examples that tokens belong to: position_ids, (B, T), which begin anew in each example,
    and attention_mask, (B, 1, T, T), true where a token may look.

    The mask is given whole because transformers hands it on as it is, whatever a family makes of position_ids.
    Padding, number 0, is an example of its own: every token may look at itself, so no row of the mask is empty.
    """
    num_tokens = examples_BT.shape[1]
    places_T = np.arange(num_tokens)
    begins_BT = np.ones(examples_BT.shape, dtype=bool)
    begins_BT[:, 1:] = examples_BT[:, 1:] != examples_BT[:, :-1]
    first_BT = np.maximum.accumulate(np.where(begins_BT, places_T, 0), axis=1)
    same_BTT = examples_BT[:, :, None] == examples_BT[:, None, :]
    mask_BTT = same_BTT & (places_T[:, None] >= places_T[None, :])
    return {
        "position_ids": torch.from_numpy(places_T - first_BT),
        "attention_mask": torch.from_numpy(mask_BTT[:, None]),
    }
