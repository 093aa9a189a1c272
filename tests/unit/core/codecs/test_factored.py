"""The factored codec: a matrix of numbers that are not negative, by the means of its rows and columns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradstream.core.codecs import codec_named
from gradstream.core.plan.sizes import encoded_bytes

FACTORED = codec_named("factored")


def second_moments(rows: int, columns: int, rank_one: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    product_RC = torch.rand(rows, 1, generator=generator) * torch.rand(columns, generator=generator) * 1e-6
    return product_RC if rank_one else product_RC * torch.rand(rows, columns, generator=generator)


def decoded(values: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(values, 7.0)
    FACTORED.decode(FACTORED.encode(values), out)
    return out


@pytest.mark.parametrize("shape", [(2, 2), (3, 500), (300, 257)])
def test_the_means_of_rows_and_columns_stay(shape: tuple[int, int]) -> None:
    values_RC = second_moments(*shape)
    found_RC = decoded(values_RC)
    assert len(FACTORED.encode(values_RC)) == encoded_bytes("factored", shape) == 4 * sum(shape)
    for axis in (0, 1):
        torch.testing.assert_close(found_RC.double().mean(axis), values_RC.double().mean(axis), rtol=1e-5, atol=0)
    assert (found_RC >= 0).all()


def test_a_product_of_rows_and_columns_loses_nothing_but_rounding() -> None:
    values_RC = second_moments(64, 96, rank_one=True)
    torch.testing.assert_close(decoded(values_RC), values_RC, rtol=1e-5, atol=0)


def test_rows_and_matrices_of_zeros_stay_zeros() -> None:
    values_RC = second_moments(40, 30)
    values_RC[7] = 0
    assert not decoded(values_RC)[7].any()
    assert not decoded(torch.zeros(40, 30)).any()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_stays_seen(wrong: float) -> None:
    values_RC = second_moments(40, 30)
    values_RC[3, 5] = wrong
    assert not decoded(values_RC)[3, 5].isfinite()


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    values_RC = second_moments(1024, 512)
    expected = FACTORED.encode(values_RC)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if before == 1 else 1)
        assert np.array_equal(FACTORED.encode(values_RC), expected)
    finally:
        torch.set_num_threads(before)
