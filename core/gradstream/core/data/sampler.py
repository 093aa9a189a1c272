"""Which samples a slot takes at a step: a pure function of the seed, the slot and the step."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from hashlib import blake2b

from gradstream.core.data.manifest import DataShard, Manifest
from gradstream.core.errors import DataError


def slot_group(manifest: Manifest, split: str, slot: int, num_slots: int) -> list[DataShard]:
    """The data shards that slot `slot` draws from: every num_slots-th one of the split. The groups do not overlap."""
    return manifest.split(split)[slot::num_slots]


def samples_by_slot(manifest: Manifest, split: str, num_slots: int, sequence_length: int) -> list[int]:
    """Samples that each slot has of a split."""
    return [
        sum(manifest.num_samples(shard, sequence_length) for shard in slot_group(manifest, split, slot, num_slots))
        for slot in range(num_slots)
    ]


@dataclass(frozen=True, slots=True)
class SampleAddress:
    """Where a sample lies: window `window` of data shard `file`."""

    file: str
    window: int


class SlotSampler:
    """Which samples slot `slot` takes at each step: a pure function of (seed, step, slot).

    Over an epoch every window of the slot's group is taken exactly once, in an order that depends on seed, slot and
    epoch: a Feistel permutation with cycle walking (Black and Rogaway, "Ciphers with arbitrary finite domains",
    2002), which needs no memory and does not change with the version of a library.

    Raises DataError when the group has no sample.
    """

    def __init__(self, manifest: Manifest, split: str, slot: int, num_slots: int, sequence_length: int, seed: int):
        self._slot = slot
        self._seed = seed
        self._files: list[str] = []
        self._starts: list[int] = [0]
        for shard in slot_group(manifest, split, slot, num_slots):
            samples = manifest.num_samples(shard, sequence_length)
            if samples:
                self._files.append(shard.file)
                self._starts.append(self._starts[-1] + samples)
        if not self._files:
            raise DataError(
                f"slot {slot} of {num_slots} has no {split} sample of {sequence_length} tokens; "
                f"prepare at least {num_slots} larger {split} data shards or lower training.sequence_length"
            )

    @property
    def num_samples(self) -> int:
        """Samples of the slot's group: the length of its epoch."""
        return self._starts[-1]

    @property
    def files(self) -> tuple[str, ...]:
        """The token files the samples come from."""
        return tuple(self._files)

    def samples(self, step: int, count: int) -> list[SampleAddress]:
        """The `count` samples of step `step`, in order."""
        return [self._address(step * count + offset) for offset in range(count)]

    def first(self, count: int) -> list[SampleAddress]:
        """The first `count` samples in stored order (all of them if there are fewer): what a validation pass
        evaluates."""
        return [self._locate(position) for position in range(min(count, self.num_samples))]

    def _address(self, number: int) -> SampleAddress:
        epoch, position = divmod(number, self.num_samples)
        return self._locate(permute(position, self.num_samples, f"{self._seed}/{self._slot}/{epoch}"))

    def _locate(self, position: int) -> SampleAddress:
        shard = bisect_right(self._starts, position) - 1
        return SampleAddress(self._files[shard], position - self._starts[shard])


def permute(value: int, size: int, key: str) -> int:
    """Map `value` in [0, size) to another value in [0, size); for each key a permutation."""
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
