"""Codecs: input == decoded + residual, a bound on the residual, exact sizes, and non-finite values stay visible."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.codecs import CODEC_NAMES, Codec, ResidualCodec, codec_named, codec_on_wire
from gradstream.core.codecs._device import rotate, rotation_key
from gradstream.core.errors import ProtocolError
from gradstream.core.kernels.blocks import BLOCK
from gradstream.core.plan.sizes import encoded_bytes
from gradstream.proto.v1 import plan_pb2

CODECS = [codec_named(name) for name in CODEC_NAMES]
EXACT = [codec for codec in CODECS if codec.exact_class]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
exact_codec = pytest.mark.parametrize("codec", EXACT, ids=lambda codec: codec.name)
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
    if codec.name.startswith("fp32"):
        return torch.zeros_like(wide_N)
    if codec.name.startswith("bf16") or codec.name == "factored":  # of slices that are no matrices
        return wide_N.abs() * 2.0**-8 + 2.0**-134
    if codec.name == "int2":
        # Every value lies between its block's smallest and largest magnitude, as does its level, but for rounding.
        return torch.cat(
            [(block.abs().max() * (1 + 2.0**-7) + 2.0**-132).expand(len(block)) for block in wide_N.split(BLOCK)]
        )
    largest = 127 if codec.name == "int8" else 7
    # The scale, the quotient and the product are each rounded to fp32.
    slack, smallest = 1 + largest * 2 * 2.0**-22, largest * 2.0**-149
    bounds = []
    for block in wide_N.split(BLOCK):
        if codec.name == "int4-hadamard" and len(block) == BLOCK:
            # A rotation keeps the norm of the block and of its error: 16 times half a step is the most of each element.
            # The rounding of 16 sums and, of subnormal numbers, of what is divided by 16 comes on top.
            norm = block.norm()
            bounds.append((norm / 7 / 2 * 16 * slack + norm * 2.0**-18 + 2.0**-138).expand(BLOCK))
        else:
            bounds.append((block.abs().max() / largest / 2 * slack + smallest).expand(len(block)))
    return torch.cat(bounds)


@exact_codec
@given(length=lengths, seed=st.integers(0, 2**32), exponent=st.floats(-40, 30))
def test_input_is_decoded_plus_residual(codec: Codec, length: int, seed: int, exponent: float) -> None:
    values_N = random_values(length, seed, exponent)
    decoded_N = decoded(codec, codec.encode(values_N), length)
    residual_N = values_N.double() - decoded_N.double()
    assert (residual_N.abs() <= residual_bound(codec, values_N)).all()


@exact_codec
@pytest.mark.parametrize("length", [1, 255, 256, 257, 4096])
@pytest.mark.parametrize("broken", [False, True])
def test_a_delta_is_the_difference_encoded_and_added(codec: Codec, length: int, broken: bool) -> None:
    generator = torch.Generator().manual_seed(length)
    values_N = torch.randn(length, generator=generator)
    held_N = values_N + 1e-3 * torch.randn(length, generator=generator)
    if broken:
        values_N[length // 2] = float("nan")
    expected_N = held_N.clone()
    payload = codec.encode(values_N - held_N, 3)
    codec.decode_add(payload, expected_N, 3)
    assert np.array_equal(codec.encode_delta(values_N, held_N, 3), payload)
    assert torch.equal(held_N.view(torch.int32), expected_N.view(torch.int32))


@every_codec
@given(length=lengths)
def test_payload_has_exactly_the_announced_size(codec: Codec, length: int) -> None:
    payload = codec.encode(random_values(length, 0))
    assert payload.dtype == np.uint8
    codec.check_size(payload.nbytes, (length,))
    if codec.fixed_size:
        assert payload.nbytes == codec.encoded_bytes((length,)) == encoded_bytes(codec.name, (length,))
    else:
        assert payload.nbytes <= codec.encoded_bytes((length,)) == encoded_bytes(codec.name, (length,))


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


@exact_codec
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
    values_N = torch.cat([torch.zeros(BLOCK), torch.full((BLOCK,), 1e30), torch.full((3,), 1e-30)])
    decoded_N = decoded(codec_named("int8"), codec_named("int8").encode(values_N), len(values_N))
    assert not decoded_N[:BLOCK].any()
    torch.testing.assert_close(decoded_N, values_N, rtol=1e-6, atol=0)


@every_codec
@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
@pytest.mark.parametrize("error", [-1, 1, 4])
def test_a_payload_of_another_length_is_refused_and_nothing_written(codec: Codec, length: int, error: int) -> None:
    payload = np.zeros(codec.encoded_bytes((length,)) + error, dtype=np.uint8)
    out_N = torch.full((length,), 7.0)
    for method in (codec.decode, codec.decode_add):
        with pytest.raises(ProtocolError, match=f"{codec.name} payload of {payload.nbytes} bytes"):
            method(payload, out_N)
    assert (out_N == 7.0).all()


@every_codec
@given(data=st.data(), length=lengths)
def test_any_bytes_of_the_right_length_decode_or_are_refused(codec: Codec, data: st.DataObject, length: int) -> None:
    """A peer's payload may be anything: it gives some numbers or a ProtocolError that leaves the output alone."""
    size = codec.encoded_bytes((length,))
    payload = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), dtype=np.uint8).copy()
    try:
        once_N = decoded(codec, payload, length)
    except ProtocolError:
        assert codec.name in ("topk", "sparse") or not codec.fixed_size
        out_N = torch.full((length,), 7.0)
        with pytest.raises(ProtocolError):
            codec.decode_add(payload, out_N)
        assert (out_N == 7.0).all()
    else:
        assert torch.equal(once_N.view(torch.int32), decoded(codec, payload, length).view(torch.int32))


@every_codec
def test_a_matrix_on_which_autograd_watches_can_be_encoded(codec: Codec) -> None:
    values = torch.randn(3, 100, requires_grad=True)
    out = torch.empty(3, 100)
    codec.decode(codec.encode(values), out)
    expected = torch.empty(3, 100)
    codec.decode(codec.encode(values.detach().clone()), expected)
    assert torch.equal(out, expected)


@every_codec
def test_a_slice_without_elements_is_an_empty_payload(codec: Codec) -> None:
    payload = codec.encode(torch.empty(0))
    codec.check_size(payload.nbytes, (0,))
    out_N = torch.empty(0)
    codec.decode(payload, out_N)
    codec.decode_add(payload, out_N)


def test_bf16_rounds_to_nearest_even() -> None:
    ulp = 2.0**-7
    values_N = torch.tensor([1 + ulp / 2, 1 + 1.5 * ulp, 1 + 0.51 * ulp])
    codec = codec_named("bf16")
    assert decoded(codec, codec.encode(values_N), 3).tolist() == [1.0, 1 + 2 * ulp, 1 + ulp]


def test_layout_of_the_payloads() -> None:
    """What other languages rely on: little-endian, int8 with all scales first."""
    values_N = torch.cat([torch.full((BLOCK,), 127.0), torch.tensor([254.0, -254.0])])
    payload = codec_named("int8").encode(values_N).tobytes()
    assert payload[:8] == np.array([1.0, 2.0], dtype="<f4").tobytes()
    assert payload[8:] == bytes([127] * BLOCK + [127, 129])
    payload = (
        codec_named("int4").encode(torch.cat([torch.full((BLOCK,), 7.0), torch.tensor([14.0, -2.0, -14.0])])).tobytes()
    )
    assert payload[:8] == np.array([1.0, 2.0], dtype="<f4").tobytes()
    assert payload[8:] == bytes([0x77] * (BLOCK // 2) + [0xF7, 0x09])
    assert codec_named("fp32").encode(torch.tensor([1.0])).tobytes() == bytes.fromhex("0000803f")
    assert codec_named("bf16").encode(torch.tensor([1.0])).tobytes() == bytes.fromhex("803f")


def test_the_registry_covers_the_protos_enum() -> None:
    for name, number in plan_pb2.Codec.items():
        if number == plan_pb2.CODEC_UNSPECIFIED:
            continue
        codec = codec_on_wire(number)
        assert codec.wire == number
        assert codec is codec_named(name.removeprefix("CODEC_").lower().replace("_", "-"))


def test_only_codecs_with_a_residual_are_outside_the_exact_class() -> None:
    assert [codec.name for codec in CODECS if not codec.exact_class] == ["topk", "sign", "powersgd", "sparse"]
    assert all(codec.exact_class != isinstance(codec, ResidualCodec) for codec in CODECS)


@pytest.mark.parametrize("number", [0, 14, 99, -1])
def test_an_unknown_codec_on_the_wire_is_refused(number: int) -> None:
    with pytest.raises(ProtocolError, match=f"unknown codec {number}"):
        codec_on_wire(number)


@pytest.mark.parametrize(("name", "value"), [("int8", -3.0885e-42), ("int4", -1.4e-44)])
def test_integers_of_subnormal_numbers_stay_in_range(name: str, value: float) -> None:
    """Their scale is rounded so coarsely that a quotient can pass the largest; it must not wrap to another sign."""
    values_N = torch.full((600,), value)
    decoded_N = decoded(codec_named(name), codec_named(name).encode(values_N), 600)
    assert (decoded_N < 0).all()
    assert ((decoded_N - values_N).abs() <= values_N.abs() / 2).all()


def hadamard_matrix() -> torch.Tensor:
    """The orthonormal Walsh-Hadamard matrix of order 256 in natural order, fp64."""
    matrix, step = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(8):
        matrix = torch.kron(matrix, step)
    return matrix / 16


def test_the_rotation_is_the_transform_of_the_definition() -> None:
    """Each unit vector goes to its column of the matrix, times its sign; the signs depend on seed and block."""
    key = rotation_key(11)
    first, second = rotate(torch.eye(BLOCK), key).double(), hadamard_matrix()
    signs = first[:, :1] * 16
    assert set(signs.view(-1).tolist()) == {-1.0, 1.0}
    assert torch.equal(first, signs * second)
    ones_BE = torch.ones(64, BLOCK)
    signs_BE = (rotate(ones_BE, key) @ hadamard_matrix().float()).sign()
    assert len({tuple(row.tolist()) for row in signs_BE}) == 64
    assert abs(float(signs_BE.mean())) < 4 / (64 * BLOCK) ** 0.5
    assert not torch.equal(rotate(ones_BE, rotation_key(12)), rotate(ones_BE, key))
    for seed in (0, 1, 2**32, 2**40 + 1, 2**63, -5):
        assert 0 <= rotation_key(seed) < 2**32
    assert len({rotation_key(seed) for seed in (0, 1, 2**32, 2**40 + 1, 2**63)}) == 5


def test_the_rotation_lowers_the_error_of_heavy_tails_and_the_seed_must_match() -> None:
    generator = torch.Generator().manual_seed(0)
    values_N = torch.randn(64 * BLOCK, generator=generator)
    values_N[::BLOCK] *= 50  # one outlier a block
    plain, rotated = codec_named("int4"), codec_named("int4-hadamard")
    outs = {}
    for name, codec, seed in (("plain", plain, 3), ("rotated", rotated, 3), ("other", rotated, 4)):
        outs[name] = torch.empty_like(values_N)
        codec.decode(codec.encode(values_N, 3), outs[name], seed)
    errors = {name: float((out - values_N).norm() / values_N.norm()) for name, out in outs.items()}
    assert errors["rotated"] < 0.6 * errors["plain"]
    assert errors["other"] > 1


@pytest.mark.parametrize(
    ("name", "most"), [("bf16", 0.003), ("int8", 0.01), ("int4", 0.14), ("int4-hadamard", 0.14), ("int2", 0.342)]
)
def test_relative_error_of_normal_numbers_is_what_the_table_says(name: str, most: float) -> None:
    values_N = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    out_N = decoded(codec_named(name), codec_named(name).encode(values_N), 1 << 16)
    assert (out_N - values_N).norm() / values_N.norm() < most


@pytest.mark.parametrize(
    ("name", "ratio"),
    [
        ("fp32", 1),
        ("bf16", 2),
        ("int8", 3.94),
        ("int4", 7.76),
        ("int4-hadamard", 7.76),
        ("int2", 15.06),
        ("fp32-zstd", 1.0),
        ("bf16-zstd", 2.0),
        ("topk", 64),
        ("sign", 28.44),
        ("powersgd", 128),
        ("sparse", 141.24),
    ],
)
def test_ratios_are_what_the_table_says(name: str, ratio: float) -> None:
    """Of zstd the least ratio, which is what plans count with."""
    assert 4 * 2**20 / codec_named(name).encoded_bytes((1024, 1024)) == pytest.approx(ratio, abs=0.01)


def test_sizes_need_neither_torch_nor_numba() -> None:
    """The planner uses them."""
    code = (
        "import sys, gradstream.core.plan.sizes as e; assert e.encoded_bytes('int4', (3, 100)) == 158; "
        "assert not {'torch', 'numba', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_preload_compiles_all_that_the_codecs_call() -> None:
    """What it missed would stop a node for seconds in the middle of a step."""
    code = """
import torch
from gradstream.core.kernels import codec, dense, fixed_point, residual, two_bits
from gradstream.core.kernels.preload import preload
from gradstream.core.codecs import CODEC_NAMES, codec_named
modules = (dense, codec, fixed_point, residual, two_bits)
compiled = [(name, k) for module in modules for name, k in vars(module).items() if hasattr(k, "signatures")]
preload()
before = {name: len(k.signatures) for name, k in compiled}
assert all(count for name, count in before.items() if not name.startswith("_")), before
for name in CODEC_NAMES:
    for length in (1, 5000, 8192):
        made, out = codec_named(name), torch.zeros(length)
        payload = made.encode(torch.ones(length), seed=2**63)
        made.decode(payload, out, seed=2**63)
        made.decode_add(payload, out, seed=2**63)
assert before == {name: len(k.signatures) for name, k in compiled}, before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
