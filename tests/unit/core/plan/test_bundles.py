"""Bundles: every fragment is in exactly one, and a peer's header of a bundle's payload is checked."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.codecs import CODEC_NAMES, ResidualCodec, State, codec_named
from gradstream.core.codecs.payloads import BundleCodec, CodecBook, seed_of, slices, split
from gradstream.core.errors import ProtocolError
from gradstream.core.plan.bundles import LOSSLESS_ENOUGH, Bundle, bundle, codec_for, first_push_codec
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.fragments import Tensor, cut
from gradstream.core.plan.sizes import encoded_bytes
from gradstream.core.recipe.recipe import RESIDUAL_CODECS, CodecConfig

PULLS = [
    *("fp32", "bf16", "int8", "fp32-zstd", "bf16-zstd", "auto"),
    *("delta-bf16", "delta-int8", "delta-int4", "delta-int4-hadamard", "delta-int2", "xor-fp32", "xor-bf16"),
]


@given(
    shapes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple), max_size=12),
    max_elements=st.sampled_from([256, 300, 512, 4096]),
    num_servers=st.integers(1, 4),
    data=st.data(),
)
def test_every_fragment_is_in_exactly_one_bundle(
    shapes: list[tuple[int, ...]], max_elements: int, num_servers: int, data: st.DataObject
) -> None:
    """Of one server, in forward order, and no larger than a fragment may be."""
    tensors = [Tensor(f"t{number}", shape, len(shape) > 1, number) for number, shape in enumerate(shapes)]
    fragments = cut(tensors, max_elements)
    placement = data.draw(
        st.lists(st.integers(0, num_servers - 1), min_size=len(fragments), max_size=len(fragments)), label="placement"
    )
    bundles = bundle(fragments, placement, max_elements)
    assert [one.index for one in bundles] == list(range(len(bundles)))
    members = [fragment.index for one in bundles for fragment in one.fragments]
    assert sorted(members) == [fragment.index for fragment in fragments]
    firsts = [one.fragments[0].index for one in bundles]
    assert firsts == sorted(firsts)
    for one in bundles:
        assert {placement[fragment.index] for fragment in one.fragments} == {one.server}
        assert one.num_elements <= max_elements or len(one.fragments) == 1
        assert one.num_elements == one.bounds[-1][1]
    for server in range(num_servers):
        mine = [one for one in bundles if one.server == server]
        indices = [fragment.index for one in mine for fragment in one.fragments]
        assert indices == sorted(indices), "a server sends in forward order"
        for before, after in pairwise(mine):
            assert before.num_elements + after.fragments[0].num_elements > max_elements, "one could have been both"
    assert bundle(fragments, placement, max_elements) == bundles


def test_bundles_of_a_case_worked_out_by_hand() -> None:
    tensors = [Tensor("a", (600,), False, 0), *(Tensor(name, (100,), False, 0) for name in "bcde")]
    fragments = cut(tensors, 512)  # a: 256 + 344; then b, c, d and e
    found = bundle(fragments, [0, 0, 1, 0, 1, 0], 512)
    assert [(one.server, [fragment.index for fragment in one.fragments]) for one in found] == [
        (0, [0]),
        (0, [1, 3]),
        (1, [2, 4]),
        (0, [5]),
    ]
    assert found[1].bounds == ((0, 344), (344, 444))
    flat_N = torch.arange(444.0)
    first_N, second_N = slices(flat_N, found[1])
    assert (len(first_N), float(second_N[0])) == (344, 344.0)
    second_N.zero_()
    assert not flat_N[344:].any(), "they are views"


@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("embedding", ["bf16", "int8", "int4", "int2"])
def test_which_codec_a_tensor_gets(codec: str, embedding: str) -> None:
    assert codec_for("matrix", codec, embedding) == codec_for("head", codec, embedding) == codec
    if codec in ("fp32", "bf16", "fp32-zstd", "bf16-zstd"):
        assert codec_for("vector", codec, embedding) == codec_for("embedding", codec, embedding) == codec
    else:
        assert codec_for("vector", codec, embedding) == "bf16"
        assert codec_for("embedding", codec, embedding) == embedding


def test_the_sets_of_codecs_name_codecs() -> None:
    assert set(CODEC_NAMES) >= LOSSLESS_ENOUGH
    assert {name for name in CODEC_NAMES if isinstance(codec_named(name), ResidualCodec)} == set(RESIDUAL_CODECS)
    assert first_push_codec(CodecConfig(push="auto")) == "bf16"
    assert first_push_codec(CodecConfig(push="int4")) == "int4"


@pytest.mark.parametrize("pull", PULLS)
def test_every_pull_of_a_recipe_leads_to_codecs(pull: Any) -> None:
    assert CodecConfig(pull=pull).pull == pull
    form = downlink(pull)
    codec_named(form.full)
    if form.delta is not None:
        codec_named(form.delta)
    # A difference is taken to what a newcomer gets too: that must be the copy as it is, not a rounded one.
    assert not form.keeps_reference or form.full == "fp32"
    assert form.keeps_reference == (pull.startswith("delta") or pull == "auto")


def mixed_bundle(odd: bool = True) -> tuple[Bundle, list[Tensor]]:
    """One fragment of each kind, of odd sizes, or so that every payload begins where the kernels can read it."""
    tensors = [
        Tensor("m", (20, 16), True, 0, "matrix"),
        Tensor("v", (21 if odd else 20,), False, 0, "vector"),
        Tensor("e", (9, 33 if odd else 32), True, 0, "embedding"),
        Tensor("n", (5, 7), True, 0, "matrix"),
    ]
    (found,) = bundle(cut(tensors, 1024), [0] * 4, 1024)
    return found, tensors


def right_sizes(codec: BundleCodec) -> list[int]:
    values = [torch.ones(fragment.num_elements) for fragment in codec.bundle.fragments]
    return [len(payload) for payload in codec.encode(values, 0)]


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8"])
def test_moments_have_one_codec_whatever_their_tensor(name: str) -> None:
    found, tensors = mixed_bundle()
    assert len({tensors[fragment.tensor].kind for fragment in found.fragments}) > 1
    codec = BundleCodec(replace(found, array="exp_avg"), tensors, name, "bf16")
    assert [one.name for one in codec.codecs] == [name] * len(found.fragments)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_announced_sizes_are_those_of_a_payload_or_refused(name: str) -> None:
    found, tensors = mixed_bundle()
    codec = BundleCodec(found, tensors, name, "int8")
    sizes = right_sizes(codec)
    codec.check_sizes(sizes, sum(sizes))
    assert sum(sizes) <= codec.max_bytes
    assert codec.max_bytes == sum(
        encoded_bytes(codec_for(tensors[fragment.tensor].kind, name, "int8"), fragment.shape)
        for fragment in found.fragments
    )
    most = [one.encoded_bytes(fragment.shape) for one, fragment in zip(codec.codecs, found.fragments, strict=True)]
    hostile: list[tuple[list[int], int]] = [
        ([], 0),
        ([], sum(sizes)),
        (sizes[:-1], sum(sizes[:-1])),
        ([*sizes, 0], sum(sizes)),
        ([*sizes, 2**63], sum(sizes) + 2**63),
        (sizes, sum(sizes) - 1),
        (sizes, sum(sizes) + 1),
        (sizes, 0),
        (sizes, 2**64 - 1),
        ([sum(sizes), 0, 0, 0], sum(sizes)),
        ([0] * 4, 0),
        ([2**64 - 1] * 4, 4 * (2**64 - 1)),
        ([2**64 - 1] * 4, 2**64 - 4),  # what wraps around in 64 bits
    ]
    for number in range(4):
        changed = [*most]
        changed[number] += 1
        hostile.append((changed, sum(changed)))
    for fragment_bytes, payload_bytes in hostile:
        with pytest.raises(ProtocolError) as caught:
            codec.check_sizes(fragment_bytes, payload_bytes)
        assert "\n" not in str(caught.value)


@given(data=st.data())
def test_sizes_that_pass_never_announce_more_than_the_most(data: st.DataObject) -> None:
    found, tensors = mixed_bundle()
    codec = BundleCodec(found, tensors, data.draw(st.sampled_from(CODEC_NAMES)), "bf16")
    near = [one.encoded_bytes(fragment.shape) for one, fragment in zip(codec.codecs, found.fragments, strict=True)]
    fragment_bytes = [data.draw(st.one_of(st.integers(size - 9, size + 1), st.integers(0, 2**64 - 1))) for size in near]
    payload_bytes = data.draw(st.one_of(st.just(sum(fragment_bytes)), st.integers(0, 2**64 - 1)))
    try:
        codec.check_sizes(fragment_bytes, payload_bytes)
    except ProtocolError:
        return
    assert payload_bytes == sum(fragment_bytes) <= codec.max_bytes


@pytest.mark.parametrize("odd", [True, False])
@pytest.mark.parametrize("name", [name for name in CODEC_NAMES if name not in RESIDUAL_CODECS])
def test_a_bundles_payload_comes_back_fragment_by_fragment(name: str, odd: bool) -> None:
    """As if each fragment were alone, with its own seed; from one payload of pieces that begin where they happen to."""
    found, tensors = mixed_bundle(odd)
    codec = BundleCodec(found, tensors, name, "int8")
    flat_N, held_N = torch.randn(2, found.num_elements, generator=torch.Generator().manual_seed(1))
    values, old = slices(flat_N, found), slices(held_N.clone(), found)
    payloads = codec.encode(values, 7)
    out_N, sum_N, new_N = torch.full_like(flat_N, 3.0), torch.ones_like(flat_N), held_N.clone()
    pieces = split(np.concatenate(payloads), [len(payload) for payload in payloads])
    codec.decode(pieces, slices(out_N, found), 7)
    codec.decode_add(pieces, slices(sum_N, found), 7)
    deltas = codec.encode_delta(values, slices(new_N, found), 7)
    for number, fragment in enumerate(found.fragments):
        alone = codec_named(codec_for(tensors[fragment.tensor].kind, name, "int8"))
        seed = seed_of(7, fragment.index)
        value = values[number].reshape(fragment.shape)
        payload = alone.encode(value, seed)
        assert payloads[number].tobytes() == payload.tobytes()
        expected = torch.empty(fragment.shape)
        alone.decode(payload, expected, seed)
        assert torch.equal(slices(out_N, found)[number], expected.view(-1))
        assert torch.equal(slices(sum_N, found)[number], expected.view(-1) + 1)
        assert deltas[number].tobytes() == alone.encode_delta(value, old[number].view(fragment.shape), seed).tobytes()
        assert torch.equal(slices(new_N, found)[number], old[number])


def test_a_piece_of_another_length_is_refused_before_anything_is_written() -> None:
    found, tensors = mixed_bundle(odd=False)
    codec = BundleCodec(found, tensors, "int8", "int8")
    payloads = codec.encode(slices(torch.ones(found.num_elements), found), 0)
    out_N = torch.full((found.num_elements,), 3.0)
    for number, piece in enumerate(payloads):
        with pytest.raises(ProtocolError, match="payload of"):
            codec.decode([*payloads[:number], piece[:-1], *payloads[number + 1 :]], slices(out_N, found), 0)
    assert torch.equal(out_N, torch.full_like(out_N, 3.0))


def test_seeds_of_all_versions_and_fragments_differ() -> None:
    seeds = {seed_of(version, fragment) for version in (0, 1, 2**20) for fragment in (0, 1, 2**31)}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("name", sorted(RESIDUAL_CODECS))
def test_each_fragment_of_a_residual_codec_keeps_what_it_did_not_send(name: str) -> None:
    """Fragments whose kind gives them a codec without residual keep nothing."""
    found, tensors = mixed_bundle()
    codec = BundleCodec(found, tensors, name, "bf16")
    values = slices(torch.randn(found.num_elements, generator=torch.Generator().manual_seed(1)), found)
    states: dict[int, State] = {}
    out_N = torch.zeros(found.num_elements)
    codec.decode(codec.encode_with(values, states, 3), slices(out_N, found), 3)
    kept = [fragment.index for fragment in found.fragments if tensors[fragment.tensor].kind == "matrix"]
    assert sorted(states) == kept
    for fragment, value_N, got_N in zip(found.fragments, values, slices(out_N, found), strict=True):
        if fragment.index in states:
            left_N = states[fragment.index]["residual"].reshape(-1)
            torch.testing.assert_close(got_N + left_N, value_N, rtol=1e-5, atol=1e-6)
    before = {index: state["residual"].clone() for index, state in states.items()}
    codec.encode_with(values, states, 4)
    assert any(not torch.equal(before[index], states[index]["residual"]) for index in before), "it is used again"


def test_split_gives_views_where_kernels_can_read_and_copies_elsewhere() -> None:
    payload = np.arange(64, dtype=np.uint8)
    pieces = split(payload, [8, 2, 6, 3, 1, 44])
    assert np.array_equal(np.concatenate(pieces), payload)
    begins = [0, 8, 10, 16, 19, 20]
    for piece, begin in zip(pieces, begins, strict=True):
        assert np.shares_memory(piece, payload) == (begin % 4 == 0)
        assert piece.__array_interface__["data"][0] % 4 == 0


def test_a_book_makes_each_codec_once_and_tells_its_uses_apart() -> None:
    found, tensors = mixed_bundle()
    book = CodecBook(tensors, "bf16")
    assert book.of(found, "int8") is book.of(found, "int8")
    assert book.of(found, "int8") is not book.of(found, "int4")
    names = [[one.name for one in make(found, "int8").codecs] for make in (book.of, book.delta)]
    # The difference of an embedding is as dense as a matrix's.
    assert names == [["int8", "bf16", "bf16", "int8"], ["int8", "bf16", "int8", "int8"]]
