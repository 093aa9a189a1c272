"""Two bits a value: the levels, the layouts, and any codec with a residual that a recipe asks for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.codecs import TopK, codec_named
from gradstream.core.errors import ProtocolError
from gradstream.core.kernels.blocks import BLOCK

INT2, SPARSE = codec_named("int2"), codec_named("sparse")
FED_BACK = ["int8", "int4", "int4-hadamard", "int2", "topk", "sign", "sparse"]
lengths = st.sampled_from([1, 2, 255, 257, 600, 4096, 4097, 9000])


def values_of(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, generator=generator) * torch.exp(torch.randn(length, generator=generator))


def decoded(name: str, payload: np.ndarray, length: int, seed: int = 0) -> torch.Tensor:
    out_N = torch.full((length,), 7.0)
    codec_named(name).decode(payload, out_N, seed)
    return out_N


@given(length=lengths, seed=st.integers(0, 2**32))
def test_a_level_is_the_mean_of_the_magnitudes_that_have_it(length: int, seed: int) -> None:
    values_N = values_of(length, seed)
    got_N = decoded("int2", INT2.encode(values_N), length)
    assert torch.equal(got_N.signbit(), values_N.signbit())
    for block_E, got_E in zip(values_N.double().split(BLOCK), got_N.double().split(BLOCK), strict=True):
        levels = got_E.abs().unique().tolist()
        assert len(levels) <= 2
        for level in levels:
            has_it = got_E.abs() == level
            assert level == pytest.approx(float(block_E[has_it].abs().mean()), rel=2.0**-8)
        if len(levels) == 2:  # the large ones are larger than all small ones
            small = got_E.abs() == levels[0]
            assert block_E[small].abs().max() < block_E[~small].abs().min()
        # A mean loses the least: what is decoded has no more energy than what was encoded, but for bf16's rounding.
        assert got_E.norm() <= block_E.norm() * (1 + 2.0**-8)


def test_two_free_levels_lose_less_than_evenly_spaced_ones() -> None:
    """Beside the best of a fine grid of spacings for each block, with levels of ±1 and ±3 half-spacings."""
    generator = torch.Generator().manual_seed(0)
    normal_BE = torch.randn(64, BLOCK, generator=generator)
    cases = {
        "normal": normal_BE,
        "heavy tails": normal_BE * torch.exp(torch.randn(64, BLOCK, generator=generator)),
        "half zeros": normal_BE * (torch.rand(64, BLOCK, generator=generator) < 0.5),
    }
    for name, values_BE in cases.items():
        error = float((decoded("int2", INT2.encode(values_BE.view(-1)), 64 * BLOCK) - values_BE.view(-1)).norm())
        best_B = torch.full((64,), math.inf)
        for spacing in torch.linspace(0.1, 4, 100):
            half_B1 = spacing / 2 * values_BE.square().mean(1, keepdim=True).sqrt()
            magnitudes_BE = torch.where(values_BE.abs() > 2 * half_B1, 3 * half_B1, half_B1)
            best_B = torch.minimum(best_B, (magnitudes_BE - values_BE.abs()).square().sum(1))
        assert error < 1.01 * float(best_B.sum().sqrt()), name
        if name != "normal":
            assert error < 0.97 * float(best_B.sum().sqrt()), name


def test_layout_of_int2() -> None:
    """What other languages rely on: all levels, small before large, then four codes a byte, the first one lowest."""
    values_N = torch.tensor([1.0, -1.0, 4.0, -4.0] * 64 + [2.0, -2.0])
    payload = INT2.encode(values_N).tobytes()
    assert payload[:8] == bytes.fromhex("803f8040 00400040")
    assert payload[8:] == bytes([0b11_10_01_00] * 64 + [0b01_00])


def test_layout_of_sparse() -> None:
    """All levels, then 12 bits an index, then two bits a value; a short last chunk of 65 elements has two."""
    values_N = torch.zeros(4096 + 65)
    values_N[:64] = torch.tensor([1.0, -1.0, 4.0, -4.0] * 16)
    values_N[4096 + 0x21], values_N[4096 + 0x40] = 3.0, -3.0
    payload = SPARSE.encode(values_N).tobytes()
    assert payload[:8] == bytes.fromhex("803f8040 40404040")
    indices = sum(index << 12 * place for place, index in enumerate([*range(64), 0x21, 0x40]))
    assert payload[8 : 8 + 99] == indices.to_bytes(99, "little")
    assert payload[8 + 99 :] == bytes([0b11_10_01_00] * 16 + [0b01_00])


@given(length=lengths, seed=st.integers(0, 2**32))
def test_sparse_sends_what_topk_sends(length: int, seed: int) -> None:
    values_N = values_of(length, seed)
    topk_N = decoded("topk", codec_named("topk").encode(values_N), length)
    sparse_N = decoded("sparse", SPARSE.encode(values_N), length)
    assert torch.equal(sparse_N != 0, topk_N != 0)
    assert torch.equal(sparse_N.sign(), topk_N.sign())
    assert (sparse_N - topk_N).norm() <= 0.5 * topk_N.norm()


@pytest.mark.parametrize("length", [4096, 4097, 8191])
def test_sparse_refuses_indices_that_do_not_rise_within_the_chunk(length: int) -> None:
    payload = SPARSE.encode(values_of(length, 0))
    begin = 4 * -(-length // 4096)
    payload[begin : begin + 3] = [0x05, 0x50, 0x00]  # 5 and 5
    out_N = torch.full((length,), 7.0)
    for method in (SPARSE.decode, SPARSE.decode_add):
        with pytest.raises(ProtocolError, match="sparse payload whose indices do not rise"):
            method(payload, out_N)
    assert (out_N == 7.0).all()


def test_sparse_refuses_an_index_beyond_a_short_last_chunk() -> None:
    assert isinstance(SPARSE, TopK)
    payload = SPARSE.encode(values_of(10, 0))
    payload[4:6] = [10, 0]
    with pytest.raises(ProtocolError, match="within a chunk of 10 elements"):
        SPARSE.checked_elements(payload, 10)


@pytest.mark.parametrize("name", FED_BACK)
@given(length=lengths, seed=st.integers(0, 2**32))
def test_any_codec_may_keep_a_residual(name: str, length: int, seed: int) -> None:
    codec, state = codec_named(name), codec_named(name).new_state((length,))
    for step in range(3):
        values_N = values_of(length, seed + step)
        due_N = values_N + state["residual"]
        payload = codec.encode_with(values_N, state, step)
        assert np.array_equal(payload, codec.encode(due_N, step))
        got_N = decoded(name, payload, length, step)
        torch.testing.assert_close(got_N + state["residual"], due_N, rtol=0, atol=1e-6 * float(due_N.abs().max()))


@pytest.mark.parametrize("name", [*FED_BACK, "powersgd"])
def test_the_decay_multiplies_what_is_left(name: str) -> None:
    codec = codec_named(name)
    states = [codec.new_state((70, 100)) for _ in range(2)]
    payloads = [
        codec.encode_with(values_of(7000, 1).view(70, 100), state, 5, decay)
        for state, decay in zip(states, (1.0, 0.75), strict=True)
    ]
    assert np.array_equal(*payloads)
    assert states[0]["residual"].any()
    assert torch.equal(states[0]["residual"] * 0.75, states[1]["residual"])
    before = states[1]["residual"].clone()
    broken = torch.full((70, 100), math.nan)
    payload = codec.encode_with(broken, states[1], 6, 0.75)
    out = torch.zeros(70, 100)
    codec.decode(payload, out, 6)
    assert not out.isfinite().all()
    assert torch.equal(states[1]["residual"], before), "the step will be skipped"


@pytest.mark.parametrize("name", ["int4", "int2", "sparse"])
def test_error_feedback_brings_a_constant_difference(name: str) -> None:
    """With a residual the mean of what arrives approaches the difference; without one the error stays as it is."""
    difference_N = values_of(8192, 0)
    codec, state = codec_named(name), codec_named(name).new_state((8192,))
    total_N = torch.zeros(8192)
    for _ in range(256):
        total_N += decoded(name, codec.encode_with(difference_N, state), 8192)
    alone_N = decoded(name, codec.encode(difference_N), 8192)
    norm = difference_N.norm()
    assert (total_N / 256 - difference_N).norm() < 0.1 * (alone_N - difference_N).norm()
    assert (alone_N - difference_N).norm() > 0.05 * norm
