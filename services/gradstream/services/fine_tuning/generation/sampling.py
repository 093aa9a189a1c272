"""Chooses the next token from a model's logits.

Shape suffixes: V tokens of the vocabulary.
"""

from __future__ import annotations

import torch

from gradstream.core.errors import CheckpointError

# Numbers of the likeliest tokens to find the nucleus in, before the whole vocabulary is sorted.
NUM_LIKELIEST = (256, 4096)
# Far above the rounding of a sum of probabilities.
MARGIN = 1e-6


def nucleus(probabilities_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Find the nucleus (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020).

    The nucleus is the smallest set of the likeliest tokens that together have at least `top_p`, and at least one token;
    among equally likely tokens those of lower number come first. Returns bool, shape (V,).

    The whole vocabulary is sorted only where the likeliest tokens are not enough; both ways give the same nucleus.
    """
    for num_likeliest in NUM_LIKELIEST:
        if num_likeliest >= len(probabilities_V):
            break
        # All tokens that are at least as likely as one of them: in order they are the first ones of the vocabulary.
        least = torch.topk(probabilities_V, num_likeliest, sorted=False).values.min()
        likeliest_V = (probabilities_V >= least).nonzero().squeeze(1)
        if probabilities_V[likeliest_V].double().sum() > top_p + MARGIN:
            kept_V = torch.zeros_like(probabilities_V, dtype=torch.bool)
            kept_V[likeliest_V] = _nucleus_of_all(probabilities_V[likeliest_V], top_p)
            return kept_V
    return _nucleus_of_all(probabilities_V, top_p)


def _nucleus_of_all(probabilities_V: torch.Tensor, top_p: float) -> torch.Tensor:
    sorted_V, order_V = torch.sort(probabilities_V.double(), descending=True, stable=True)
    before_V = sorted_V.cumsum(0) - sorted_V
    # The first token always belongs to the nucleus: rounding may make the sum before it nonzero, and top_p may be 0.
    before_V[0] = -1.0
    kept_V = torch.zeros_like(probabilities_V, dtype=torch.bool)
    kept_V[order_V[before_V < top_p]] = True
    return kept_V


def choose(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Choose the next token: the likeliest at temperature 0, otherwise a draw from the nucleus of softmax(logits / T).

    A draw looks up one uniform number in the cumulative probabilities in the vocabulary's order. So each draw advances
    `generator` by the same amount for any logits, and two tokens of nearly equal probability do not swap places when
    other rows of the batch change the last bits of the logits. Raises CheckpointError when the logits are not numbers.
    """
    logits_V = logits_V.double()
    top = logits_V.max()
    if not torch.isfinite(top):
        raise CheckpointError("the model's logits are not finite; its weights are damaged: name another version")
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities_V = ((logits_V - top) / temperature).softmax(0)
    if top_p < 1:
        probabilities_V = probabilities_V * nucleus(probabilities_V, top_p)
    cumulated_V = probabilities_V.cumsum(0)
    at = torch.rand((), dtype=torch.float64, generator=generator) * cumulated_V[-1]
    token = int(torch.searchsorted(cumulated_V, at, right=True))
    # Rounding may make the draw equal the whole sum. Then it means the last token that can be drawn.
    return min(token, int(probabilities_V.nonzero()[-1]))
