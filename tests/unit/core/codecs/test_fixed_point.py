"""Sums in fixed point: the same bits in any order, within the stated bound of the exact sum, at 8 bytes an element."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstream.core.codecs import CODEC_NAMES
from gradstream.core.codecs.fixed_point import FixedPointSum
from gradstream.core.codecs.payloads import BundleCodec
from gradstream.core.errors import ProtocolError
from gradstream.core.kernels.blocks import BLOCK
from gradstream.core.kernels.grid import grid
from gradstream.core.plan.bundles import Bundle
from gradstream.core.plan.fragments import Fragment, Tensor
from gradstream.core.plan.sizes import sum_bytes

DENSE = ["fp32", "bf16", "int8", "int4", "int4-hadamard", "int2"]
LENGTHS = (3, BLOCK, 5 * BLOCK + 17, 2 * BLOCK)
"""Lengths of the fragments: short, one block, more than a tile with a short last block, whole blocks."""
FRAGMENTS = tuple(Fragment(index, index, 0, length) for index, length in enumerate(LENGTHS))
BUNDLE = Bundle(0, 0, FRAGMENTS, 1)
TENSORS = [Tensor(f"t{index}", (length,), True, 0) for index, length in enumerate(LENGTHS)]


def gradients(seed: int, count: int) -> list[list[torch.Tensor]]:
    """Contributions of very different magnitudes: each fragment and contribution has a scale of its own."""
    draws = torch.Generator().manual_seed(seed)
    scales = random.Random(seed)
    return [
        [torch.randn(length, generator=draws) * 2.0 ** scales.randint(-60, 60) for length in LENGTHS]
        for _ in range(count)
    ]


def codec_of(name: str) -> BundleCodec:
    return BundleCodec(BUNDLE, TENSORS, name, name)


def sum_of(contributions: list, codec: BundleCodec, batches: list[int], count: int | None = None) -> torch.Tensor:
    """Add encoded contributions in this order, as many together as `batches` says, again and again."""
    total = FixedPointSum(LENGTHS, count or len(contributions))
    rest, number = list(contributions), 0
    while rest:
        size = batches[number % len(batches)]
        codec.add(rest[:size], total, 1)
        rest, number = rest[size:], number + 1
    total.finish()
    return total.result_N.clone()


@pytest.mark.parametrize("name", CODEC_NAMES)
@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 64),
    st.randoms(use_true_random=False),
    st.lists(st.integers(1, 4), min_size=1),
)
def test_the_same_bits_in_every_order(
    name: str, seed: int, count: int, order: random.Random, batches: list[int]
) -> None:
    codec = codec_of(name)
    encoded = [codec.encode(values, 1) for values in gradients(seed, count)]
    expected = sum_of(encoded, codec, [1])
    assert torch.isfinite(expected).all()
    order.shuffle(encoded)
    assert torch.equal(sum_of(encoded, codec, batches), expected)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("count", [1, 2, 6, 64, 512])
def test_the_error_is_within_the_bound(name: str, count: int) -> None:
    """The bound of each block: half a lower unit for each contribution, and one rounding to fp32."""
    codec = codec_of(name)
    encoded = [codec.encode(values, 1) for values in gradients(count, count)]
    found = sum_of(encoded, codec, [3]).double()
    decoded_CN = torch.empty(count, BUNDLE.num_elements)
    for row_N, payloads in zip(decoded_CN, encoded, strict=True):
        codec.decode(payloads, [row_N[begin:end] for begin, end in BUNDLE.bounds], 1)
    width = grid(count).width
    for number, (begin, end) in enumerate(BUNDLE.bounds):
        for block, first in enumerate(range(begin, end, BLOCK)):
            block_CE = decoded_CN[:, first : min(first + BLOCK, end)].double()
            magnitude = float(block_CE.abs().max())
            if "int" in name and name != "int2" and first + BLOCK <= end:  # a short last block is decoded first
                scales = [payloads[number][4 * block : 4 * block + 4].view(np.float32)[0] for payloads in encoded]
                magnitude = 256 * float(max(scales))
            # The magnitude is at least half of the power of two that decides on the top.
            bound = count * 2.0 ** (1 - width) * magnitude
            for place, values_C in enumerate(block_CE.T.tolist()):
                exact = math.fsum(values_C)
                assert abs(float(found[first + place]) - exact) <= bound + abs(exact) * 2.0**-24


@pytest.mark.parametrize("name", ["topk", "sparse"])
@pytest.mark.parametrize("wrong", [0.0, math.nan])
def test_elements_are_added_as_the_decoded_fragment_would_be(name: str, wrong: float) -> None:
    """Bit for bit, although only the blocks of the elements that are sent are touched."""
    codec, whole = codec_of(name), codec_of("fp32")
    encoded = [codec.encode(values, 1) for values in gradients(5, 7)]
    if wrong:
        encoded[3] = codec.encode([torch.full((length,), wrong) for length in LENGTHS], 1)
    expected = []
    for payloads in encoded:
        out = [torch.empty(length) for length in LENGTHS]
        codec.decode(payloads, out, 1)
        expected.append(whole.encode(out, 1))
    found_N, expected_N = sum_of(encoded, codec, [2]), sum_of(expected, whole, [3])
    assert torch.equal(found_N.nan_to_num(123.0), expected_N.nan_to_num(123.0))
    assert bool(found_N.isnan().any()) == bool(wrong)


@pytest.mark.parametrize("count", [6, 64])
def test_gradients_of_one_scale_are_added_more_exactly_than_in_fp32(count: int) -> None:
    codec, draws = codec_of("fp32"), torch.Generator().manual_seed(count)
    contributions = [[torch.randn(length, generator=draws) for length in LENGTHS] for _ in range(count)]
    whole_CN = torch.stack([torch.cat(values) for values in contributions])
    exact_N = whole_CN.double().sum(0)
    in_order_N = torch.zeros(BUNDLE.num_elements)
    for values_N in whole_CN:
        in_order_N += values_N
    found_N = sum_of([codec.encode(values, 1) for values in contributions], codec, [1])
    errors = [float((sum_N.double() - exact_N).square().mean().sqrt()) for sum_N in (found_N, in_order_N)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 4096])
def test_the_largest_digits_do_not_overflow(count: int, sign: int) -> None:
    """Of every exponent, so that some lie at the very top of their bin."""
    codec = codec_of("fp32")
    for exponent in range(-30, 31, 3):
        largest = sign * float(np.nextafter(np.float32(2.0**exponent), np.float32(0)))
        encoded = codec.encode([torch.full((length,), largest) for length in LENGTHS], 1)
        total = FixedPointSum(LENGTHS, count)
        for _ in range(count // 64):
            codec.add([encoded] * 64, total, 1)
        if count % 64:
            codec.add([encoded] * (count % 64), total, 1)
        total.finish()
        torch.testing.assert_close(total.result_N, torch.full_like(total.result_N, largest * count), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_the_sum_of_its_block_nan(name: str, wrong: float) -> None:
    codec = codec_of(name)
    contributions = gradients(1, 3)
    contributions[1][2][BLOCK + 5] = wrong
    encoded = [codec.encode(values, 1) for values in contributions]
    begin = BUNDLE.bounds[2][0]
    hit = torch.zeros(BUNDLE.num_elements, dtype=torch.bool)
    hit[begin + BLOCK : begin + 2 * BLOCK] = True
    for order in (encoded, encoded[::-1]):
        assert torch.equal(sum_of(order, codec, [2]).isnan(), hit)


def test_the_end_of_fp32_is_not_passed_in_silence() -> None:
    """Two finite contributions of which the sum is not finite, and one that a scale of int8 makes infinite."""
    codec = codec_of("fp32")
    encoded = codec.encode([torch.full((length,), 3e38) for length in LENGTHS], 1)
    assert sum_of([encoded, encoded], codec, [1]).isinf().all()
    smallest = codec.encode([torch.full((length,), 1e-45) for length in LENGTHS], 1)
    assert torch.equal(sum_of([smallest, smallest], codec, [1]), torch.full((BUNDLE.num_elements,), 2e-45 + 1e-45))


def test_a_sum_is_used_again_and_takes_the_stated_memory() -> None:
    codec = codec_of("int8")
    total = FixedPointSum(LENGTHS, 2)
    assert total.num_bytes == sum(map(sum_bytes, LENGTHS)) == 8 * BUNDLE.num_elements + 1 + 1 + 6 + 2
    for seed in (1, 2):
        encoded = [codec.encode(values, 1) for values in gradients(seed, 2)]
        codec.add(encoded, total, 1)
        total.finish()
        assert torch.equal(total.result_N, sum_of(encoded, codec, [1]))
        total.result_N.mul_(math.pi)


def test_payloads_of_other_lengths_are_refused() -> None:
    codec = codec_of("int8")
    encoded = codec.encode(gradients(1, 1)[0], 1)
    encoded[2] = encoded[2][:-1]
    with pytest.raises(ProtocolError, match="int8 payload"):
        codec.add([encoded], FixedPointSum(LENGTHS, 1), 1)
