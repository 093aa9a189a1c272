"""Initial weights that a child process draws are those that this process would draw, and errors come as one line."""

from __future__ import annotations

import numpy as np
import pytest
from support.micro import MICRO_LLAMA

from gradstream.core.errors import ConfigError
from gradstream.core.model import drawing
from gradstream.core.model.model import initial_weights


def test_a_child_draws_the_same_bits() -> None:
    """The slices of two tensors; the child is asked for no others."""
    weights = {name: tensor.reshape(-1).numpy().copy() for name, tensor in initial_weights(MICRO_LLAMA, 7)}
    first, *_, last = weights
    wanted = {first: [(0, 10), (10, weights[first].size)], last: [(3, 4)]}
    drawn = [
        (name, begin, slice_N.copy()) for name, begin, slice_N in drawing._draw_in_child(MICRO_LLAMA, 7, wanted, None)
    ]
    assert [(name, begin) for name, begin, _ in drawn] == [(first, 0), (first, 10), (last, 3)]
    for name, begin, slice_N in drawn:
        assert np.array_equal(slice_N.view(np.int32), weights[name][begin : begin + slice_N.size].view(np.int32))


def test_the_error_of_a_child_is_one_line() -> None:
    with pytest.raises(ConfigError, match="model_type 'lama' is not known to transformers"):
        list(drawing._draw_in_child(MICRO_LLAMA | {"model_type": "lama"}, 7, {"w": [(0, 1)]}, None))


def test_a_child_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "MODULE", "gradstream.core.no_such_module")
    with pytest.raises(ConfigError, match=r"cannot be drawn .*no_such_module"):
        list(drawing._draw_in_child(MICRO_LLAMA, 7, {"w": [(0, 1)]}, None))
