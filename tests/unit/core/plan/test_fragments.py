"""The cut into fragments: every element in exactly one, none too large, no slivers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.plan.fragments import Tensor, cut

BLOCK = 256
shapes = st.lists(st.lists(st.integers(0, 60), min_size=0, max_size=3).map(tuple), min_size=0, max_size=8)
sizes = st.one_of(st.integers(1, 3000), st.sampled_from([1, 255, 256, 257, 512, 1 << 20]))


def tensors_of(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    return [Tensor(f"t{number}", shape, len(shape) > 1, number) for number, shape in enumerate(shapes)]


@given(shapes=shapes, fragment_elements=sizes)
def test_every_element_is_in_exactly_one_fragment_in_order(
    shapes: list[tuple[int, ...]], fragment_elements: int
) -> None:
    tensors = tensors_of(shapes)
    fragments = cut(tensors, fragment_elements)
    assert [fragment.index for fragment in fragments] == list(range(len(fragments)))
    assert [fragment.tensor for fragment in fragments] == sorted(fragment.tensor for fragment in fragments)
    for number, tensor in enumerate(tensors):
        at = 0
        for fragment in (fragment for fragment in fragments if fragment.tensor == number):
            assert fragment.begin == at < fragment.end
            at = fragment.end
        assert at == tensor.num_elements


@given(shapes=shapes, fragment_elements=sizes)
def test_no_fragment_is_larger_than_asked_for_or_one_block(
    shapes: list[tuple[int, ...]], fragment_elements: int
) -> None:
    for fragment in cut(tensors_of(shapes), fragment_elements):
        assert fragment.num_elements <= max(BLOCK, fragment_elements)
        assert fragment.num_bytes == 4 * fragment.num_elements


@given(num_elements=st.integers(1, 100_000), fragment_elements=sizes)
def test_the_pieces_of_a_tensor_are_alike_and_start_on_blocks(num_elements: int, fragment_elements: int) -> None:
    fragments = cut(tensors_of([(num_elements,)]), fragment_elements)
    assert all(fragment.begin % BLOCK == 0 for fragment in fragments)
    lengths = [fragment.num_elements for fragment in fragments]
    assert max(lengths) - min(lengths) <= BLOCK


def test_the_cut_of_one_tensor_does_not_depend_on_the_others() -> None:
    alone = cut(tensors_of([(1000, 7)]), 2048)
    beside = cut(tensors_of([(33,), (1000, 7), (5000,)]), 2048)
    assert [(f.begin, f.end) for f in beside if f.tensor == 1] == [(f.begin, f.end) for f in alone]


@pytest.mark.parametrize(
    ("num_elements", "fragment_elements", "expected"),
    [(256, 256, [256]), (257, 256, [256, 1]), (1024, 512, [512, 512]), (1000, 500, [256, 256, 256, 232]), (1, 9, [1])],
)
def test_examples(num_elements: int, fragment_elements: int, expected: list[int]) -> None:
    assert [f.num_elements for f in cut(tensors_of([(num_elements,)]), fragment_elements)] == expected
