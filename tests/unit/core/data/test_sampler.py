"""The sampler: a slot's samples are a permutation of its own group, and depend on nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstream.core.data.manifest import DataShard, Manifest, parse_manifest
from gradstream.core.data.sampler import SlotSampler, permute, samples_by_slot, slot_groups
from gradstream.core.errors import DataError

LENGTH = 16


def make_manifest(token_counts: list[int]) -> Manifest:
    """A manifest of training data shards with these numbers of tokens."""
    shards = tuple(
        DataShard(
            file=f"train-{number:05d}.tokens",
            index_file=f"train-{number:05d}.index",
            split="train",
            num_tokens=count,
            num_documents=1,
            num_bytes=2 * count,
            sha256="0" * 64,
            index_sha256="0" * 64,
        )
        for number, count in enumerate(token_counts)
    )
    return Manifest(token_dtype="uint16", vocab_size=300, end_of_text_id=0, tokenizer_sha256="0" * 64, shards=shards)


@given(st.integers(1, 400), st.text(max_size=8))
@settings(max_examples=40, deadline=None)
def test_permute_is_a_permutation(size: int, key: str) -> None:
    assert sorted(permute(value, size, key) for value in range(size)) == list(range(size))


def test_permute_depends_on_the_key_and_scrambles() -> None:
    orders = {tuple(permute(value, 100, key) for value in range(100)) for key in "abcdef"}
    assert len(orders) == 6
    assert tuple(range(100)) not in orders
    with pytest.raises(ValueError, match="not in"):
        permute(100, 100, "a")


def test_permute_is_pinned() -> None:
    """Values as first released. A change here changes every trajectory: a recipe would no longer give the same bits."""
    assert [permute(value, 10, "1/0/0") for value in range(10)] == [8, 6, 2, 0, 1, 3, 7, 9, 4, 5]


@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=9),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(1, 7),
)
@settings(max_examples=60, deadline=None)
def test_every_data_epoch_takes_every_window_once(counts: list[int], num_slots: int, seed: int, count: int) -> None:
    manifest = make_manifest(counts)
    everything = {(shard.file, window) for shard in manifest.shards for window in range(shard.num_samples(LENGTH))}
    groups = slot_groups(manifest, "train", num_slots, LENGTH)
    if len(everything) < num_slots:
        assert not all(groups)
        return
    for slot in range(num_slots):
        sampler = SlotSampler(manifest, "train", slot, num_slots, LENGTH, seed)
        windows = {
            (part.shard.file, window) for part in groups[slot] for window in range(part.first, part.first + part.count)
        }
        assert sampler.num_samples == len(windows) == samples_by_slot(manifest, "train", num_slots, LENGTH)[slot] > 0
        assert windows <= everything
        everything -= windows  # no other slot has one of them
        taken = [
            (address.file, address.window)
            for step in range(-(-2 * len(windows) // count))
            for address in sampler.samples(step, count)
        ]
        assert set(taken[: len(windows)]) == windows
        assert set(taken[len(windows) : 2 * len(windows)]) == windows
    assert not everything


def test_slots_share_whole_shards_where_these_can_be_shared() -> None:
    """As first released: a change here changes trajectories."""
    manifest = make_manifest([100, LENGTH, 300, 100, 100, 100, LENGTH, 100])
    groups = [[shard.file[8:11] for shard in SlotSampler(manifest, "train", s, 4, LENGTH, 0).shards] for s in range(4)]
    assert groups == [["000", "004"], ["005"], ["002"], ["003", "007"]]


@pytest.mark.parametrize(
    ("counts", "num_slots"),
    [([1000], 8), ([100, 500, 60], 2), ([100, LENGTH, 100, 100], 4)],
    ids=["one shard", "no multiple", "a shard without a window"],
)
def test_slots_share_the_windows_evenly_where_they_cannot_share_shards(counts: list[int], num_slots: int) -> None:
    samples = samples_by_slot(make_manifest(counts), "train", num_slots, LENGTH)
    assert min(samples) >= 1
    assert max(samples) - min(samples) <= 1


def test_samples_are_pure_and_depend_on_seed_and_slot() -> None:
    manifest = make_manifest([2000, 2000])
    make = lambda slot, seed: SlotSampler(manifest, "train", slot, 2, LENGTH, seed)  # noqa: E731
    late = make(0, 1).samples(70, 5)
    walked = make(0, 1)
    for step in range(70):
        walked.samples(step, 5)
    assert walked.samples(70, 5) == late
    windows = lambda sampler: [address.window for address in sampler.samples(0, 20)]  # noqa: E731
    assert windows(make(0, 1)) != windows(make(0, 2))
    assert windows(make(0, 1)) != windows(make(1, 1))


def test_first_is_in_stored_order_and_ends_with_the_group() -> None:
    sampler = SlotSampler(make_manifest([2 * LENGTH + 1, 3 * LENGTH + 1]), "train", 0, 1, LENGTH, 0)
    assert [(address.file[6:11], address.window) for address in sampler.first(99)] == [
        ("00000", 0),
        ("00000", 1),
        ("00001", 0),
        ("00001", 1),
        ("00001", 2),
    ]


def test_a_window_needs_its_last_target() -> None:
    shard = make_manifest([2 * LENGTH]).shards[0]
    assert shard.num_samples(LENGTH) == 1
    assert make_manifest([2 * LENGTH + 1]).shards[0].num_samples(LENGTH) == 2


def test_fewer_samples_than_slots_are_an_error() -> None:
    with pytest.raises(DataError, match=r"has 6 train samples of 16 tokens, too few for 7 slots; add text or lower"):
        SlotSampler(make_manifest([100, LENGTH]), "train", 0, 7, LENGTH, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not a valid data manifest"),
        ("[]", "not a valid data manifest"),
        ('{"format_version": 2}', "format_version"),
        (b"\xff\xfe", "not a valid data manifest"),
    ],
)
def test_a_bad_manifest_is_one_line(text: str | bytes, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        parse_manifest(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", ".hidden", ""])
def test_a_manifest_cannot_name_files_elsewhere(name: str) -> None:
    tree = make_manifest([100]).model_dump(mode="json")
    tree["shards"][0]["file"] = name
    with pytest.raises(DataError, match=r"shards\.0\.file"):
        parse_manifest(tree)
