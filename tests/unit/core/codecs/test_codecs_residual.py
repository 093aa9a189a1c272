"""Codecs with a residual: the residual is sent later, and invalid values do not get into the state."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.codecs import ResidualCodec, State, codec_named
from gradstream.core.errors import ProtocolError
from gradstream.core.plan.sizes import powersgd_form, topk_kept


def residual_codec(name: str) -> ResidualCodec:
    codec = codec_named(name)
    assert isinstance(codec, ResidualCodec)
    return codec


CODECS = [residual_codec(name) for name in ("topk", "sign", "powersgd", "sparse")]
each = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
shapes = st.sampled_from([(1,), (2,), (255,), (257,), (600,), (4097,), (9000,), (1, 300), (300, 1), (7, 256), (64, 96)])


def values_of(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(torch.randn(shape, generator=generator))


def decoded(codec: ResidualCodec, payload: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    out = torch.full(shape, 7.0)
    codec.decode(payload, out)
    return out


def copied(state: State) -> State:
    return {key: tensor.clone() for key, tensor in state.items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[key].view(torch.int32), other[key].view(torch.int32)) for key in one
    )


@each
@given(shape=shapes, seed=st.integers(0, 2**32), exponent=st.floats(-30, 30))
def test_input_is_decoded_plus_residual(
    codec: ResidualCodec, shape: tuple[int, ...], seed: int, exponent: float
) -> None:
    state = codec.new_state(shape)
    assert state["residual"].shape == shape
    assert not state["residual"].any()
    for step in range(3):
        values = values_of(shape, seed + step) * 10.0**exponent
        due = values + state["residual"]
        payload = codec.encode_with(values, state, step)
        assert payload.nbytes == codec.encoded_bytes(shape)
        got = decoded(codec, payload, shape)
        if codec.name == "topk":
            # bf16 is the upper half of fp32, so what it leaves out is a number of fp32, too.
            assert torch.equal(got + state["residual"], due)
        else:
            # A difference is rounded to fp32, and powersgd's product may be added up in another order.
            torch.testing.assert_close(
                got.double() + state["residual"].double(), due.double(), rtol=0, atol=4e-6 * float(due.abs().max())
            )


@each
@given(shape=shapes, seed=st.integers(0, 2**32))
def test_encode_is_encode_with_a_fresh_state_and_repeats(
    codec: ResidualCodec, shape: tuple[int, ...], seed: int
) -> None:
    values = values_of(shape, seed)
    states = [codec.new_state(shape), codec.new_state(shape)]
    assert same(*states)
    for step in range(2):
        payloads = [codec.encode_with(values, state) for state in states]
        assert np.array_equal(*payloads)
        if not step:
            assert np.array_equal(payloads[0], codec.encode(values))
    assert same(*states)


@each
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(1,), (300,), (4096,), (9000,), (64, 96)])
def test_what_is_not_finite_is_sent_and_leaves_the_state_alone(
    codec: ResidualCodec, shape: tuple[int, ...], broken: float
) -> None:
    state = codec.new_state(shape)
    codec.encode_with(values_of(shape, 0), state)
    before = copied(state)
    for at in {0, math.prod(shape) // 2, math.prod(shape) - 1}:
        values = values_of(shape, 1)
        values.view(-1)[at] = broken
        payload = codec.encode_with(values, state)
        codec.check_size(payload.nbytes, shape)
        assert not decoded(codec, payload, shape).isfinite().all()
        assert same(state, before)
    assert decoded(codec, codec.encode_with(values_of(shape, 2), state), shape).isfinite().all()


@each
@pytest.mark.parametrize("shape", [(300,), (4096,), (64, 96)])
def test_the_largest_numbers_neither_overflow_nor_poison_the_state(
    codec: ResidualCodec, shape: tuple[int, ...]
) -> None:
    """Either they go through, or the payload is not finite and the state as it was."""
    largest = torch.finfo(torch.float32).max
    values = torch.where(values_of(shape, 0) > 0, largest, -largest)
    state = codec.new_state(shape)
    before = copied(state)
    got = decoded(codec, codec.encode_with(values, state), shape)
    assert all(tensor.isfinite().all() for tensor in state.values())
    if codec.name != "powersgd":
        assert got.isfinite().all()
    elif not got.isfinite().all():
        assert same(state, before)


@each
@pytest.mark.parametrize("shape", [(5000,), (64, 96)])
def test_a_constant_gradient_arrives(codec: ResidualCodec, shape: tuple[int, ...]) -> None:
    """The mean of what was decoded approaches the gradient: the residual does not grow for ever."""
    gradient = values_of(shape, 0)
    state = codec.new_state(shape)
    total = torch.zeros(shape, dtype=torch.float64)
    errors = {}
    for step in range(1, 1601):
        total += decoded(codec, codec.encode_with(gradient, state), shape)
        if step in (100, 400, 1600):
            errors[step] = float((total / step - gradient).norm() / gradient.norm())
    # The residual of what has settled stays as it is: its share falls like 1 / steps. Sign settles slowest.
    assert errors[400] < 0.6 * errors[100] or errors[400] < 1e-3
    assert errors[1600] < 0.6 * errors[400] or errors[1600] < 1e-3
    assert errors[1600] < (0.08 if codec.name == "sign" else 0.03)
    torch.testing.assert_close(total + state["residual"].double(), 1600 * gradient.double(), rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 4096, 4097, 9000])
def test_topk_sends_the_largest_of_each_chunk(length: int) -> None:
    values_N = values_of((length,), 0).round(decimals=1)  # with ties
    got_N = decoded(CODECS[0], CODECS[0].encode(values_N), (length,))
    for chunk_E, got_E in zip(values_N.split(4096), got_N.split(4096), strict=True):
        keep = topk_kept(len(chunk_E))
        assert keep == -(-len(chunk_E) // 64)
        order_E = sorted(range(len(chunk_E)), key=lambda i: (-abs(float(chunk_E[i])), i))
        expected_E = torch.zeros(len(chunk_E))
        expected_E[order_E[:keep]] = chunk_E[order_E[:keep]].bfloat16().float()
        assert torch.equal(got_E, expected_E)


def test_topk_sends_every_element_in_turn() -> None:
    """All equal: each call sends what has waited longest, so 64 calls reach all."""
    state = CODECS[0].new_state((4096,))
    reached_N = torch.zeros(4096)
    for _ in range(64):
        reached_N += decoded(CODECS[0], CODECS[0].encode_with(torch.ones(4096), state), (4096,))
    assert (reached_N > 0).all()


@pytest.mark.parametrize(
    "break_it",
    [lambda i: i.__setitem__(0, 4096), lambda i: i.__setitem__(63, 65535), lambda i: i.__setitem__(5, i[4])],
    ids=["beyond the chunk", "far beyond", "twice the same"],
)
@pytest.mark.parametrize("length", [4096, 4097, 8191])
def test_topk_refuses_indices_that_do_not_rise_within_the_chunk(break_it, length: int) -> None:  # type: ignore[no-untyped-def]
    payload = CODECS[0].encode(values_of((length,), 0))
    break_it(payload[:128].view(np.uint16))
    out_N = torch.full((length,), 7.0)
    for method in (CODECS[0].decode, CODECS[0].decode_add):
        with pytest.raises(ProtocolError, match="topk payload whose indices"):
            method(payload, out_N)
    assert (out_N == 7.0).all()


def test_topk_refuses_an_index_beyond_a_short_last_chunk() -> None:
    payload = CODECS[0].encode(values_of((4096 + 10,), 0))
    payload[128:130].view(np.uint16)[0] = 10
    with pytest.raises(ProtocolError, match="within a chunk of 10 elements"):
        CODECS[0].decode(payload, torch.empty(4106))


def test_layouts() -> None:
    """What other languages rely on."""
    values_N = torch.zeros(4100)
    values_N[[7, 9, 4098]] = torch.tensor([1.0, -2.0, 3.0])
    parts_2M = CODECS[0].encode(values_N).view(np.uint16).reshape(2, 65)
    chosen = dict(zip(parts_2M[0, :64].tolist(), parts_2M[1, :64].tolist(), strict=True))
    assert chosen[7] == 0x3F80
    assert chosen[9] == 0xC000
    assert parts_2M[:, 64].tolist() == [2, 0x4040]
    signs = CODECS[1].encode(torch.tensor([1.0, -2.0, 3.0] + [0.0] * 253 + [-4.0, 2.0])).tobytes()
    assert signs[:8] == np.array([6 / 256, 3.0], dtype="<f4").tobytes()
    assert signs[8:] == bytes([0b10] + [0] * 31 + [0b01])


def test_powersgd_gets_a_matrix_of_low_rank_right_and_follows_it() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(120, 4, generator=generator), torch.randn(4, 90, generator=generator)
    for values in (left @ right, (left @ right).reshape(-1)):
        shape = tuple(values.shape)
        state = CODECS[2].new_state(shape)
        errors = []
        for _ in range(4):
            state["residual"].zero_()
            got = decoded(CODECS[2], CODECS[2].encode_with(values, state), shape)
            errors.append(float((got - values).norm() / values.norm()))
        assert errors[-1] < errors[0] or errors[0] < 1e-5
        if len(shape) == 2:
            assert errors[0] < 1e-5


def test_powersgd_recovers_from_a_gradient_of_zeros() -> None:
    state = CODECS[2].new_state((40, 50))
    assert not decoded(CODECS[2], CODECS[2].encode_with(torch.zeros(40, 50), state), (40, 50)).any()
    assert state["basis"].any()
    got = decoded(CODECS[2], CODECS[2].encode_with(torch.ones(40, 50), state), (40, 50))
    torch.testing.assert_close(got, torch.ones(40, 50))


def test_powersgd_sends_what_is_too_small_as_it_is() -> None:
    values = values_of((6, 8), 0)
    assert powersgd_form((6, 8))[0] == 0
    state = CODECS[2].new_state((6, 8))
    assert torch.equal(decoded(CODECS[2], CODECS[2].encode_with(values, state), (6, 8)), values)
    assert not state["residual"].any()


@each
def test_a_state_of_another_slice_is_refused(codec: ResidualCodec) -> None:
    with pytest.raises(ValueError, match="a residual of 300 elements for a slice of 600"):
        codec.encode_with(torch.ones(600), codec.new_state((300,)))
