"""How the next token is chosen from a model's logits.

Shape suffixes: V tokens of the vocabulary.
"""

from __future__ import annotations

import torch

from gradstream.core.errors import CheckpointError


def nucleus(probabilities_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which tokens are the nucleus (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020): the fewest
    likeliest ones that together have at least `top_p`, at least one; among equals those of lower number. Returns bool,
    shape (V,)."""
    sorted_V, order_V = torch.sort(probabilities_V.double(), descending=True, stable=True)
    before_V = sorted_V.cumsum(0) - sorted_V
    # The first token always belongs: rounding may leave it something before it, and top_p may be 0.
    before_V[0] = -1.0
    kept_V = torch.zeros_like(probabilities_V, dtype=torch.bool)
    kept_V[order_V[before_V < top_p]] = True
    return kept_V


def choose(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """The next token: the likeliest at temperature 0, otherwise one draw from the nucleus of softmax(logits / T).

    The draw is one uniform number looked up in the cumulated probabilities in the vocabulary's order, so it moves
    `generator` on by the same amount whatever the logits, and two tokens that are nearly as likely as each other do not
    swap places when a batch mate changes the last bits of the logits.
    Raises CheckpointError when the logits are not numbers.
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
    # Rounded up, the draw may be the whole; the last token that can be drawn is meant then.
    return min(token, int(probabilities_V.nonzero()[-1]))
