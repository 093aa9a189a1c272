"""Rows of several examples: no token sees one of another example, and positions begin anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import GPT2, LLAMA, NO_DROPOUT

from gradstream.core.model import build
from gradstream.worker.packing import layout_of


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 4))
def test_layout(lengths: list[int], padding: int) -> None:
    examples = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])[None].astype(np.int64)
    layout = layout_of(examples)
    expected = np.concatenate([np.arange(length) for length in [*lengths, padding]])
    assert layout["position_ids"].tolist() == [expected.tolist()]
    mask = layout["attention_mask"][0, 0].numpy()
    for token in range(examples.shape[1]):
        seen = [other for other in range(examples.shape[1]) if mask[token, other]]
        begin = token - expected[token]
        assert seen == list(range(begin, token + 1))


@pytest.mark.parametrize("config", [LLAMA, {**GPT2, **NO_DROPOUT}], ids=["llama", "gpt2"])
def test_a_packed_example_has_the_logits_that_it_has_alone(config: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = build(config).eval()
    ids = torch.randint(0, 320, (1, 20))
    examples = np.array([[1] * 7 + [2] * 9 + [0] * 4])
    with torch.no_grad():
        packed = model(input_ids=ids, use_cache=False, **layout_of(examples)).logits
        for begin, end in ((0, 7), (7, 16)):
            alone = model(input_ids=ids[:, begin:end], use_cache=False).logits
            torch.testing.assert_close(packed[:, begin:end], alone, rtol=1e-5, atol=1e-5)
