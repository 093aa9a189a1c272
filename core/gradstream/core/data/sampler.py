"""The sampler: the samples that a slot takes at a step, a pure function of the seed, the slot and the step."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

from gradstream.core.data.manifest import DataShard, Manifest
from gradstream.core.errors import DataError


@dataclass(frozen=True, slots=True)
class SampleRange:
    """The samples `first` to `first + count - 1` of a data shard; `count` is at least 1."""

    shard: DataShard
    first: int
    count: int


def check_samples(manifest: Manifest, split: str, num_slots: int, sequence_length: int) -> None:
    """Raise DataError when a slot would have no sample of the split."""
    counts = samples_by_slot(manifest, split, num_slots, sequence_length)
    if all(counts):
        return
    total = sum(counts)
    raise DataError(
        f"the data set has {total} {split} sample{'' if total == 1 else 's'} of {sequence_length} tokens, too few for "
        f"{num_slots} slots; add text or lower training.sequence_length or training.num_slots"
        f"{', or set validation.interval_steps=0' if split == 'validation' else ''}"
    )


@dataclass(frozen=True, slots=True)
class SampleAddress:
    """The place of a sample: window `window` of data shard `file`."""

    file: str
    window: int


def slot_groups(manifest: Manifest, split: str, num_slots: int, sequence_length: int) -> list[list[SampleRange]]:
    """The samples that each slot draws from: its group. Groups do not overlap, and cover every sample of the split.

    If the number of data shards is a multiple of `num_slots`, a group is every num_slots-th shard, whole. Otherwise, or
    if a slot would have no sample, the samples of the split, in the order of the shards, are cut into `num_slots`
    consecutive ranges, whose sizes differ by at most one sample. A group is empty only if the split has fewer samples
    than there are slots. Raises DataError for rows of another length.
    """
    shards = [SampleRange(shard, 0, manifest.num_samples(shard, sequence_length)) for shard in manifest.split(split)]
    if len(shards) % num_slots == 0:
        groups = [[part for part in shards[slot::num_slots] if part.count] for slot in range(num_slots)]
        if all(groups):
            return groups
    total = sum(part.count for part in shards)
    return [_cut(shards, total * slot // num_slots, total * (slot + 1) // num_slots) for slot in range(num_slots)]


def _cut(parts: list[SampleRange], begin: int, end: int) -> list[SampleRange]:
    """The samples [begin, end) of all samples of `parts`."""
    found, passed = [], 0
    for part in parts:
        first, last = max(begin - passed, 0), min(end - passed, part.count)
        if first < last:
            found.append(SampleRange(part.shard, part.first + first, last - first))
        passed += part.count
    return found


def samples_by_slot(manifest: Manifest, split: str, num_slots: int, sequence_length: int) -> list[int]:
    """Number of samples of a split in each slot's group."""
    groups = slot_groups(manifest, split, num_slots, sequence_length)
    return [sum(part.count for part in group) for group in groups]


class SlotSampler:
    """The samples that slot `slot` takes at each step: a pure function of (seed, step, slot).

    In a data epoch each window of the slot's group is taken exactly once. The order depends on seed, slot and epoch. It
    is a Feistel permutation with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002),
    which needs no memory and does not change with the version of a library.

    Raises DataError when the slot has no sample.
    """

    def __init__(self, manifest: Manifest, split: str, slot: int, num_slots: int, sequence_length: int, seed: int):
        self._slot = slot
        self._seed = seed
        self._parts = slot_groups(manifest, split, num_slots, sequence_length)[slot]
        self._starts = [0, *accumulate(part.count for part in self._parts)]
        if not self._parts:
            check_samples(manifest, split, num_slots, sequence_length)

    @property
    def num_samples(self) -> int:
        """Number of samples in the slot's group: the length of its data epoch."""
        return self._starts[-1]

    @property
    def shards(self) -> tuple[DataShard, ...]:
        """The data shards that have samples of the slot's group."""
        return tuple(part.shard for part in self._parts)

    def samples(self, step: int, count: int) -> list[SampleAddress]:
        """The `count` samples of step `step`, in order."""
        return [self._address(step * count + offset) for offset in range(count)]

    def first(self, count: int) -> list[SampleAddress]:
        """The first `count` samples in stored order, or all if there are fewer, for a validation pass."""
        return [self._locate(position) for position in range(min(count, self.num_samples))]

    def _address(self, number: int) -> SampleAddress:
        epoch, position = divmod(number, self.num_samples)
        return self._locate(permute(position, self.num_samples, f"{self._seed}/{self._slot}/{epoch}"))

    def _locate(self, position: int) -> SampleAddress:
        number = bisect_right(self._starts, position) - 1
        part = self._parts[number]
        return SampleAddress(part.shard.file, part.first + position - self._starts[number])


def permute(value: int, size: int, key: str) -> int:
    """Map `value` in [0, size) to a value in [0, size). The map is a permutation for each key."""
    if not 0 <= value < size:
        raise ValueError(f"{value} is not in [0, {size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = value >> half, value & mask
        for turn in range(4):
            digest = blake2b(f"{key}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        value = left << half | right
        if value < size:
            return value
