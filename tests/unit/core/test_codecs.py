"""Codecs: input == decoded + residual, with a bound on the residual; sizes to the byte; nothing broken is hidden."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.codecs import INT8_BLOCK, Codec, codec_named, codec_on_wire
from gradstream.core.errors import ProtocolError
from gradstream.proto.v1 import plan_pb2

CODECS = [codec_named(name) for name in ("fp32", "bf16", "int8")]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
# Around the edges of blocks, and anywhere between.
lengths = st.one_of(st.sampled_from([1, 2, 255, 256, 257, 511, 512, 513, 600]), st.integers(1, 600))
# Below this, fp32 has no full mantissa left and relative bounds mean nothing.
SUBNORMAL = 2.0**-126


def random_values(length: int, seed: int, exponent: float = 0.0) -> torch.Tensor:
    """Values of both signs over several magnitudes, some of them exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    values_N = torch.randn(length, generator=generator) * torch.exp(3 * torch.randn(length, generator=generator))
    values_N[torch.rand(length, generator=generator) < 0.05] = 0.0
    return values_N * 10.0**exponent


def decoded(codec: Codec, payload: np.ndarray, length: int) -> torch.Tensor:
    out_N = torch.full((length,), 7.0)
    codec.decode(payload, out_N)
    return out_N


def residual_bound(codec: Codec, values_N: torch.Tensor) -> torch.Tensor:
    """The most that a decoded value may differ, in fp64."""
    wide_N = values_N.double()
    if codec.name == "fp32":
        return torch.zeros_like(wide_N)
    if codec.name == "bf16":
        return wide_N.abs() * 2.0**-8 + 2.0**-134
    blocks = [block.abs().max().expand(len(block)) / 127 / 2 for block in wide_N.split(INT8_BLOCK)]
    # The scale, the quotient and the product are each rounded to fp32.
    return torch.cat(blocks) * (1 + 127 * 2 * 2.0**-22) + 127 * 2.0**-149


@every_codec
@given(length=lengths, seed=st.integers(0, 2**32), exponent=st.floats(-40, 30))
def test_input_is_decoded_plus_residual(codec: Codec, length: int, seed: int, exponent: float) -> None:
    values_N = random_values(length, seed, exponent)
    decoded_N = decoded(codec, codec.encode(values_N), length)
    residual_N = values_N.double() - decoded_N.double()
    assert (residual_N.abs() <= residual_bound(codec, values_N)).all()


@every_codec
@given(length=lengths)
def test_payload_has_exactly_the_announced_size(codec: Codec, length: int) -> None:
    per_element = {"fp32": 4 * length, "bf16": 2 * length, "int8": length + 4 * ((length + 255) // 256)}
    payload = codec.encode(random_values(length, 0))
    assert payload.dtype == np.uint8
    assert payload.nbytes == codec.encoded_bytes(length) == per_element[codec.name]


@every_codec
@given(length=lengths, seed=st.integers(0, 2**32))
def test_same_input_gives_same_bytes_and_is_left_alone(codec: Codec, length: int, seed: int) -> None:
    values_N = random_values(length, seed)
    before_N = values_N.clone()
    first = codec.encode(values_N)
    padded = torch.cat([torch.zeros(3), values_N, torch.zeros(5)])  # elsewhere in memory, otherwise aligned
    assert first.tobytes() == codec.encode(padded[3 : 3 + length]).tobytes()
    first[:] = 0xFF
    assert torch.equal(values_N, before_N), "the payload must not share memory with the input"


@every_codec
@given(length=lengths, seed=st.integers(0, 2**32))
def test_decode_add_is_decode_then_add_bit_for_bit(codec: Codec, length: int, seed: int) -> None:
    payload = codec.encode(random_values(length, seed))
    sum_N = random_values(length, seed + 1)
    expected_N = sum_N + decoded(codec, payload, length)
    codec.decode_add(payload, sum_N)
    assert torch.equal(sum_N.view(torch.int32), expected_N.view(torch.int32))


@every_codec
@given(length=lengths, data=st.data(), broken=st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_what_is_not_finite_stays_not_finite(codec: Codec, length: int, data: st.DataObject, broken: float) -> None:
    at = data.draw(st.integers(0, length - 1))
    values_N = random_values(length, 1)
    values_N[at] = broken
    assert not decoded(codec, codec.encode(values_N), length)[at].isfinite()


@every_codec
@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
def test_zeros_stay_zeros(codec: Codec, length: int) -> None:
    assert not decoded(codec, codec.encode(torch.zeros(length)), length).any()


def test_a_block_of_zeros_beside_others_is_untouched() -> None:
    values_N = torch.cat([torch.zeros(INT8_BLOCK), torch.full((INT8_BLOCK,), 1e30), torch.full((3,), 1e-30)])
    decoded_N = decoded(codec_named("int8"), codec_named("int8").encode(values_N), len(values_N))
    assert not decoded_N[:INT8_BLOCK].any()
    torch.testing.assert_close(decoded_N, values_N, rtol=1e-6, atol=0)


@every_codec
@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("error", [-1, 1, 4])
def test_a_payload_of_another_length_is_refused_and_nothing_written(codec: Codec, length: int, error: int) -> None:
    payload = np.zeros(codec.encoded_bytes(length) + error, dtype=np.uint8)
    out_N = torch.full((length,), 7.0)
    for method in (codec.decode, codec.decode_add):
        with pytest.raises(ProtocolError, match=f"{codec.name} payload of {payload.nbytes} bytes"):
            method(payload, out_N)
    assert (out_N == 7.0).all()


@every_codec
@given(data=st.data(), length=lengths)
def test_any_bytes_of_the_right_length_decode(codec: Codec, data: st.DataObject, length: int) -> None:
    """A peer's payload may be anything: it gives some numbers, never an exception."""
    size = codec.encoded_bytes(length)
    payload = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8).copy()
    once_N = decoded(codec, payload, length)
    assert torch.equal(once_N.view(torch.int32), decoded(codec, payload, length).view(torch.int32))


def test_a_matrix_on_which_autograd_watches_can_be_encoded() -> None:
    values_N = torch.randn(300, requires_grad=True)
    for codec in CODECS:
        assert codec.encode(values_N).nbytes == codec.encoded_bytes(300)


def test_bf16_rounds_to_nearest_even() -> None:
    ulp = 2.0**-7
    values_N = torch.tensor([1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.51 * ulp])
    codec = codec_named("bf16")
    assert decoded(codec, codec.encode(values_N), 3).tolist() == [1.0, 1 + 2 * ulp, 1 + ulp]


def test_layout_of_the_payloads() -> None:
    """What other languages rely on: little-endian, int8 with all scales first."""
    values_N = torch.cat([torch.full((INT8_BLOCK,), 127.0), torch.tensor([254.0, -254.0])])
    payload = codec_named("int8").encode(values_N).tobytes()
    assert payload[:8] == np.array([1.0, 2.0], dtype="<f4").tobytes()
    assert payload[8:] == bytes([127] * INT8_BLOCK + [127, 129])
    assert codec_named("fp32").encode(torch.tensor([1.0])).tobytes() == bytes.fromhex("0000803f")
    assert codec_named("bf16").encode(torch.tensor([1.0])).tobytes() == bytes.fromhex("803f")


def test_the_registry_covers_the_protos_enum() -> None:
    for name, number in plan_pb2.Codec.items():
        if number == plan_pb2.CODEC_UNSPECIFIED:
            continue
        codec = codec_on_wire(number)
        assert codec.wire == number
        assert codec is codec_named(name.removeprefix("CODEC_").lower())


@pytest.mark.parametrize("number", [0, 4, 99, -1])
def test_an_unknown_codec_on_the_wire_is_refused(number: int) -> None:
    with pytest.raises(ProtocolError, match=f"unknown codec {number}"):
        codec_on_wire(number)


def test_int8_of_subnormal_numbers_stays_in_range() -> None:
    """Their scale is rounded so coarsely that a quotient can pass 127; it must not wrap around to another sign."""
    values_N = torch.full((600,), -3.0885e-42)
    decoded_N = torch.empty(600)
    codec_named("int8").decode(codec_named("int8").encode(values_N), decoded_N)
    assert (decoded_N <= 0).all()
    assert ((decoded_N - values_N).abs() <= values_N.abs() / 2).all()
