"""Placement: every fragment has a server, and no server has more than its share in any window or overall."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.coordinator.planning.placement import pieces_of, place
from gradstream.core.plan.fragments import Fragment, Tensor, cut

# A forward unit's tensors, by number of elements.
units = st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=7), min_size=1, max_size=8)
servers = st.integers(1, 6)


def model_of(units: list[list[int]], fragment_elements: int = 1024) -> tuple[list[Fragment], list[Tensor]]:
    tensors = [
        Tensor(f"{unit}.{number}", (size,), False, unit)
        for unit, sizes in enumerate(units)
        for number, size in enumerate(sizes)
    ]
    return cut(tensors, fragment_elements), tensors


def loads(fragments: list[Fragment], placement: list[int], num_servers: int) -> list[int]:
    total = [0] * num_servers
    for fragment in fragments:
        total[placement[fragment.index]] += fragment.num_bytes
    return total


@given(units=units, num_servers=servers)
def test_every_fragment_is_placed_and_the_same_way_each_time(units: list[list[int]], num_servers: int) -> None:
    fragments, tensors = model_of(units)
    placement, reason = place(fragments, tensors, num_servers)
    assert len(placement) == len(fragments)
    assert set(placement) <= set(range(num_servers))
    assert place(fragments, tensors, num_servers) == (placement, reason)
    assert f"{len(fragments)} fragments on {num_servers} server" in reason


@given(units=units, num_servers=servers)
def test_each_window_is_balanced_to_its_largest_fragment(units: list[list[int]], num_servers: int) -> None:
    fragments, tensors = model_of(units)
    placement, _ = place(fragments, tensors, num_servers)
    for unit in range(len(units)):
        window = [fragment for fragment in fragments if tensors[fragment.tensor].unit == unit]
        load = loads(window, placement, num_servers)
        assert max(load) - min(load) <= max(fragment.num_bytes for fragment in window)


@given(units=units, num_servers=servers)
def test_the_whole_is_balanced_to_the_largest_fragment(units: list[list[int]], num_servers: int) -> None:
    fragments, tensors = model_of(units)
    placement, _ = place(fragments, tensors, num_servers)
    load = loads(fragments, placement, num_servers)
    assert max(load) - min(load) <= max(fragment.num_bytes for fragment in fragments)


def test_many_equal_layers_do_not_add_up_to_an_imbalance() -> None:
    """5 and 4 + 4 in each layer: whoever got the 5 must get the 8 next time."""
    fragments, tensors = model_of([[500, 400, 400]] * 100)
    placement, _ = place(fragments, tensors, 2)
    low, high = sorted(loads(fragments, placement, 2))
    assert high - low <= 4 * 500


@given(units=units, num_servers=servers)
def test_every_server_gets_a_fragment_when_there_are_enough(units: list[list[int]], num_servers: int) -> None:
    fragments, tensors = model_of(units)
    placement, _ = place(fragments, tensors, num_servers)
    assert len(set(placement)) == min(num_servers, len(fragments))


@given(units=units, num_servers=servers, data=st.data())
def test_a_tensor_that_is_updated_whole_has_one_server(
    units: list[list[int]], num_servers: int, data: st.DataObject
) -> None:
    fragments, tensors = model_of(units)
    whole = data.draw(st.sets(st.integers(0, len(tensors) - 1)))
    placement, reason = place(fragments, tensors, num_servers, whole)
    for number in whole:
        assert len({placement[each.index] for each in fragments if each.tensor == number}) == 1
    pieces = pieces_of(fragments, whole)
    assert sorted(each.index for piece in pieces for each in piece) == list(range(len(fragments)))
    assert len(set(placement)) == min(num_servers, len(pieces))
    load = loads(fragments, placement, num_servers)
    assert max(load) - min(load) <= max(sum(each.num_bytes for each in piece) for piece in pieces)
    assert (f"each of {len(whole)} matrices on one server" in reason) == bool(whole)
    if not whole:
        assert (placement, reason) == place(fragments, tensors, num_servers)


def test_no_server_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_servers"):
        place([], [], 0)
