"""Packing: every example once and whole, and a row's bytes in the manifest's layout."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.data.manifest import NO_TARGET
from gradstream.services.fine_tuning.examples.rendering import Example
from gradstream.services.fine_tuning.examples.rows import pack, row_bytes

ROW_LENGTH = 24
PADDING = 9
LENGTHS = st.lists(st.integers(1, ROW_LENGTH), max_size=60)


def example(length: int, first: int, marks: list[bool]) -> Example:
    """Ids from `first` on, of `length` places."""
    is_target = np.array([False, *(marks * length)[:length]], np.bool_)
    is_target[-1] = True
    return Example("x", bytes([first % 256]), np.arange(first, first + length + 1, dtype=np.uint32), is_target)


@given(LENGTHS, st.integers(1, 12))
def test_every_example_is_in_one_row_that_holds_it(lengths: list[int], min_rows: int) -> None:
    rows = pack(lengths, ROW_LENGTH, min_rows)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[number] for number in row) <= ROW_LENGTH for row in rows)
    assert len(rows) >= min(min_rows, len(lengths))
    assert rows == pack(lengths, ROW_LENGTH, min_rows)


@given(LENGTHS)
def test_packing_is_tight(lengths: list[int]) -> None:
    """Never could two rows be one, so there are fewer than twice as many as the tokens need."""
    rows = pack(lengths, ROW_LENGTH)
    fewest = -(-sum(lengths) // ROW_LENGTH)
    assert len(rows) <= 2 * fewest
    filled = sorted(sum(lengths[number] for number in row) for row in rows)
    assert all(left + right > ROW_LENGTH for left, right in pairwise(filled))


def test_the_packing_itself() -> None:
    assert pack([4, 8, 1, 4, 2, 1], 10) == [[1, 2, 5], [0, 3, 4]]
    assert pack([10, 10], 10) == [[0], [1]]
    assert pack([1, 1, 1, 1], 10, min_rows=3) == [[0], [3, 2], [1]]
    assert pack([], 10, min_rows=3) == []


@pytest.mark.parametrize("length", [0, 11])
def test_what_has_no_place_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="no place in a row of 10"):
        pack([3, length], 10)


@given(st.lists(st.integers(1, ROW_LENGTH), min_size=1, max_size=6), st.lists(st.booleans(), min_size=1, max_size=5))
def test_a_row_gives_its_examples_back(lengths: list[int], marks: list[bool]) -> None:
    while sum(lengths) > ROW_LENGTH:
        lengths = lengths[:-1]
    examples = [example(length, 100 * number + 10, marks) for number, length in enumerate(lengths)]
    data, begins = row_bytes(examples, ROW_LENGTH, PADDING)
    inputs, targets, numbers = np.frombuffer(data, "<u4").reshape(3, ROW_LENGTH)
    used = sum(lengths)
    assert begins == [sum(lengths[:number]) for number in range(len(lengths))]
    assert numbers.tolist() == [n for n, length in enumerate(lengths, 1) for _ in range(length)] + [0] * (
        ROW_LENGTH - used
    )
    assert (inputs[used:] == PADDING).all()
    assert (targets[used:] == NO_TARGET).all()
    for number, one in enumerate(examples, 1):
        mine = numbers == number
        assert inputs[mine].tolist() == one.ids[:-1].tolist()
        expected = [int(i) if mark else NO_TARGET for i, mark in zip(one.ids[1:], one.is_target[1:], strict=True)]
        assert targets[mine].tolist() == expected
        assert (targets[mine] != NO_TARGET).any()
