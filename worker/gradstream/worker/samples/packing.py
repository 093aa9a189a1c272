"""The forward pass's input for rows of several packed examples, by which no example attends to another."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch


def layout_of(examples_BT: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
    """Make position_ids, (B, T), which start at 0 in each example, from each token's number of its example.

    The model family makes its attention masks from the position_ids, one for each kind of layer: no token attends to
    another example, and sliding windows and chunks stay in force. A complete mask given here would replace all of them.
    A family that does otherwise is refused when its job is planned (`model_trial`). Padding, number 0, is an example
    of its own.
    """
    num_tokens = examples_BT.shape[1]
    places_T = np.arange(num_tokens)
    begins_BT = np.ones(examples_BT.shape, dtype=bool)
    begins_BT[:, 1:] = examples_BT[:, 1:] != examples_BT[:, :-1]
    first_BT = np.maximum.accumulate(np.where(begins_BT, places_T, 0), axis=1)
    return {"position_ids": torch.from_numpy(places_T - first_BT)}
