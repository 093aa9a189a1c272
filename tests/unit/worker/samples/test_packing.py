"""Rows of several examples: no token attends to another example, and positions begin at 0 in each example."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import GPT2, LLAMA, NO_DROPOUT

from gradstream.core.model.model import build
from gradstream.worker.samples.packing import layout_of


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 4))
def test_layout(lengths: list[int], padding: int) -> None:
    examples = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, padding])[None].astype(np.int64)
    layout = layout_of(examples)
    expected = np.concatenate([np.arange(length) for length in [*lengths, padding]])
    assert layout["position_ids"].tolist() == [expected.tolist()]
    assert set(layout) == {"position_ids"}  # each family makes its own masks of them


WINDOW = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": LLAMA,
    "gpt2": {**GPT2, **NO_DROPOUT},
    "mistral": {**LLAMA, **WINDOW, "model_type": "mistral"},
    "qwen2": {**LLAMA, **WINDOW, "model_type": "qwen2"},
    "qwen3": {**LLAMA, **WINDOW, "model_type": "qwen3", "head_dim": 8},
    "gemma3_text": {
        **LLAMA,
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama4_text": {**LLAMA, "model_type": "llama4_text", "head_dim": 8, "attention_chunk_size": 4},
}


@pytest.mark.parametrize("config", FAMILIES.values(), ids=list(FAMILIES))
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
