"""Defaults that fit each other: keys that a recipe leaves out follow from the keys that it gives.

Pure functions over the tree that a person wrote, before it is validated. A value that is given is never changed; where
two given values disagree, validation refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradstream.core.data.manifest import Manifest

SEQUENCE_LENGTH = 256
NUM_SHARDS = 8
NUM_VALIDATION_SAMPLES = 64
VOCABULARY_SIZE = 4096
SMALLEST_VOCABULARY = 257
"""Size of the smallest byte-level tokenizer: 256 bytes and the end of text."""
MAX_DIGITS = 19
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions", "context_length")
"""Keys of a model's config for its longest sequence; model families use different ones."""


_KEYS = ("global_batch", "num_slots", "microbatch")


@dataclass(frozen=True, slots=True)
class BatchDefaults:
    """A default global batch, its number of slots and its microbatch, which divide each other."""

    global_batch: int
    num_slots: int
    microbatch: int


PRETRAINING = BatchDefaults(global_batch=32, num_slots=4, microbatch=8)
FINE_TUNING = BatchDefaults(global_batch=16, num_slots=2, microbatch=4)


def fit_batch(given: Mapping[str, Any], defaults: BatchDefaults, multiple: int = 0) -> dict[str, int]:
    """Compute the keys of a batch that are not given: global_batch, num_slots, microbatch.

    The number of slots is the largest divisor of the default that fits the given keys, and that divides `multiple`. The
    global batch is the default if the slots and the microbatch divide it, else the nearest batch that they divide. The
    microbatch is the largest divisor of a slot's samples up to the default.
    """
    batch, slots, micro = (_count(given.get(key)) for key in _KEYS)
    if any(given.get(key) is not None and _count(given.get(key)) is None for key in _KEYS):
        return {}  # a value is not a count: validation reports it
    choices = [count for count in range(defaults.num_slots, 0, -1) if defaults.num_slots % count == 0]
    choices = [count for count in choices if multiple % count == 0]
    if slots is None:
        whole = batch if batch is not None else defaults.global_batch
        fits = [count for count in choices if whole % (count * (micro or 1)) == 0]
        if not fits and batch is None:
            fits = [count for count in choices if count * (micro or 1) <= defaults.global_batch]
        slots = fits[0] if fits else 1
    if batch is None:
        unit = slots * (micro or 1)
        batch = max(1, round(defaults.global_batch / unit)) * unit
    if micro is None:
        share = batch // slots
        micro = next((size for size in range(defaults.microbatch, 0, -1) if share % size == 0), 1)
    found = dict(zip(_KEYS, (batch, slots, micro), strict=True))
    return {key: value for key, value in found.items() if given.get(key) is None}


def check_batch(global_batch: int, num_slots: int, microbatch: int) -> None:
    """Raise ValueError for a batch that cannot be divided."""
    if global_batch % num_slots:
        raise ValueError(
            f"global_batch {global_batch} is not divisible by num_slots {num_slots}; use "
            f"{global_batch // num_slots * num_slots or num_slots} or another number of slots"
        )
    share = global_batch // num_slots
    if share % microbatch:
        raise ValueError(
            f"a slot's {share} samples (global_batch / num_slots) are not divisible by microbatch {microbatch}; use a "
            f"microbatch that divides {share}"
        )


def fit_recipe(tree: Mapping[str, Any], manifest: Manifest | None = None) -> dict[str, Any]:
    """Fill in the keys of a pretraining recipe that it leaves out: batch, sequence length, data and validation.

    `manifest` is the manifest of its data set, if the data set exists already.
    """
    filled = dict(tree)
    training, validation = _section(tree, "training"), _section(tree, "validation")
    prepare, config = _section(_section(tree, "data"), "prepare"), _section(_section(tree, "model"), "config")
    # 1. The batch. Every slot has an equal part of the validation samples, which limits the number of slots.
    training |= fit_batch(training, PRETRAINING, _count(validation.get("num_samples")) or 0)
    longest = longest_sequence(config)
    if longest is not None:
        _default(training, "sequence_length", min(SEQUENCE_LENGTH, longest[1]))
    slots = _count(training.get("num_slots")) or PRETRAINING.num_slots
    # 2. The data: the tokenizer's vocabulary has the size of the model's.
    num_words = _count(text_section(config).get("vocab_size"))
    _default(prepare, "num_shards", -(-NUM_SHARDS // slots) * slots)
    if prepare.get("tokenizer") is None and num_words is not None and num_words >= SMALLEST_VOCABULARY:
        _default(prepare, "vocab_size", min(VOCABULARY_SIZE, num_words))
    # 3. Validation: as many samples as the data set holds out; no validation if a slot would have no sample.
    wanted, held_out = -(-NUM_VALIDATION_SAMPLES // slots) * slots, None
    if manifest is not None and manifest.layout == "windows":
        length = _count(training.get("sequence_length")) or SEQUENCE_LENGTH
        held_out = sum(shard.num_samples(length) for shard in manifest.split("validation"))
        wanted = max(slots, min(wanted, held_out // slots * slots))
    _default(validation, "num_samples", wanted)
    if prepare.get("validation_fraction") == 0 if held_out is None else held_out < slots:
        _default(validation, "interval_steps", 0)
    # Validation reports a section that is missing or is not a mapping.
    if isinstance(tree.get("training"), Mapping):
        filled["training"] = training
    if _section(_section(tree, "data"), "prepare"):
        filled["data"] = {**tree["data"], "prepare": prepare}
    if tree.get("validation") is None or isinstance(tree["validation"], Mapping):
        filled["validation"] = validation
    return filled


def longest_sequence(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The longest sequence that a config.json allows, as (its key in a recipe, length); None when no key limits it."""
    inner = text_section(config)
    prefix = "" if inner is config else "text_config."
    found = ((prefix + key, _count(inner.get(key))) for key in POSITIONS)
    return next(((key, value) for key, value in found if value is not None), None)


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model: the whole, or its `text_config`."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _section(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = tree.get(key)
    return dict(section) if isinstance(section, Mapping) else {}


def _default(section: dict[str, Any], key: str, value: object) -> None:
    if section.get(key) is None:
        section[key] = value


def _count(value: object) -> int | None:
    """Convert a positive whole number as validation does, also from a text or a float; None for anything else."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < MAX_DIGITS:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
