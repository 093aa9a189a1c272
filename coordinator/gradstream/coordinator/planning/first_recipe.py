"""Write a first recipe for a person's text and machines, with a reason for each value. Pure functions.

Sizes and learning rates follow GPT-3 (Brown et al. 2020, table 2.1) from 124M on; smaller models take higher rates, as
`recipes/stdlib-gpt.yaml` does. The number of tokens follows Hoffmann et al. 2022 (20 per parameter), limited by the
number of passes over the text (Muennighoff et al. 2023: more than 4 to 16 passes gain little).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from gradstream.coordinator.data.pieces import MAX_DEFAULT_FRACTION
from gradstream.core.errors import ConfigError, nearest

BYTES_A_TOKEN = 3.5
"""Approximate value for English text or code in a byte-level BPE with a vocabulary of a few thousand words."""
TOKENS_A_PARAMETER = 20
MAX_PASSES = 10
MIN_STEPS = 200
MAX_STEPS = 1_000_000
MIN_SLOTS = 4
LARGEST_MICROBATCH = 8
MIN_LENGTH = 16
SAMPLES_A_SLOT = 8
"""Minimum number of samples per slot. With little text, samples become shorter, but not below MIN_LENGTH."""
SLOW_BITS_PER_SECOND = 300e6
"""Below it int4 is worth its coarser gradients: at 100 Mb/s int4 halves the time of a step (docs/benchmarks.md)."""
LARGEST_UNASKED = "10M"
"""The largest size that is chosen without --size: it trains in minutes to hours on a CPU."""


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama of about `num_parameters`. `batch_tokens` is the number of tokens of a step."""

    num_parameters: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    vocab_size: int
    sequence_length: int
    batch_tokens: int
    learning_rate: float

    def config(self, vocab_size: int) -> dict[str, Any]:
        """The contents of a config.json."""
        return {
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.sequence_length,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
        }


SIZES = {
    "1M": Size(934_000, 128, 4, 4, 352, 1024, 256, 8 << 10, 2e-3),
    "3M": Size(3_050_000, 192, 6, 6, 512, 2048, 256, 8 << 10, 3e-3),
    "10M": Size(10_200_000, 320, 7, 5, 896, 4096, 256, 8 << 10, 2e-3),
    "30M": Size(33_000_000, 512, 9, 8, 1408, 8192, 512, 32 << 10, 1e-3),
    "124M": Size(97_500_000, 768, 12, 12, 2048, 16384, 1024, 128 << 10, 6e-4),
    "350M": Size(342_000_000, 1024, 24, 16, 2816, 32768, 1024, 256 << 10, 3e-4),
    "1B": Size(1_095_000_000, 2048, 20, 16, 5632, 32768, 2048, 512 << 10, 2e-4),
}


@dataclass(frozen=True, slots=True)
class Text:
    """The text to train on. `path` is the directory of the data set; `sources` are the files to prepare it from.

    `num_tokens` is the size of the training split, an estimate if the data set is not prepared yet. `vocab_size` and
    `num_held_out` (tokens of the validation split) are those of the data set, 0 if it is not prepared yet.
    """

    path: str
    num_tokens: int
    sources: tuple[str, ...] = ()
    vocab_size: int = 0
    num_held_out: int = 0


@dataclass(frozen=True, slots=True)
class Machines:
    """The nodes that train.

    `link_bits_per_second` is the speed of each node's link, None if all run on one machine. `num_threads` is the number
    of threads of a worker.
    """

    num_servers: int = 2
    num_workers: int = 2
    link_bits_per_second: float | None = None
    num_threads: int = 1
    has_gpu: bool = False


@dataclass(frozen=True, slots=True)
class OwnModel:
    """A model of the person's own: the path of its config.json, and values from this file."""

    path: str
    num_parameters: int
    vocab_size: int
    positions: int | None


@dataclass(frozen=True, slots=True)
class FirstRecipe:
    """The values of a recipe as a nested mapping, and the reason for a value by its dotted key."""

    tree: dict[str, Any]
    reasons: dict[str, str] = field(default_factory=dict)
    validates: bool = True
    """Whether enough text is held out for validation passes."""

    @property
    def step_tokens(self) -> int:
        """Target tokens of a step."""
        training = self.tree["training"]
        return int(training["global_batch"] * training["sequence_length"])

    def with_steps(self, num_steps: int, reason: str) -> FirstRecipe:
        """Return the recipe with another number of steps, and with the intervals that depend on this number."""
        interval = _nice(num_steps / 10)
        tree = dict(self.tree)
        tree["training"] = {**tree["training"], "num_steps": num_steps}
        tree["schedule"] = {**tree["schedule"], "warmup_steps": _warmup(num_steps)}
        tree["validation"] = {"interval_steps": interval if self.validates else 0}
        tree["checkpoint"] = {**tree["checkpoint"], "interval_steps": interval}
        return replace(self, tree=tree, reasons={**self.reasons, "training.num_steps": reason})


def first_recipe(name: str, text: Text, machines: Machines, size: str | OwnModel | None = None) -> FirstRecipe:
    """Make a recipe for a text and machines. `size` is a name of SIZES, the person's own model, or None to choose.

    Raises ConfigError for an unknown size, and for a model with a smaller vocabulary than the data set.
    """
    reasons: dict[str, str] = {}
    preset, config, vocab_size = _model(text, size, reasons)
    num_parameters = size.num_parameters if isinstance(size, OwnModel) else preset.num_parameters
    slots = machines.num_workers * max(1, math.ceil(MIN_SLOTS / machines.num_workers))
    length = preset.sequence_length
    if isinstance(size, OwnModel) and size.positions is not None:
        length = min(length, size.positions)
    while length > MIN_LENGTH and text.num_tokens < SAMPLES_A_SLOT * slots * length:
        length //= 2  # with little text, shorter samples give each slot enough of them
    batch = max(slots, math.ceil(preset.batch_tokens / length / slots) * slots)
    micro = next(count for count in range(LARGEST_MICROBATCH, 0, -1) if batch // slots % count == 0)
    reasons["training.num_slots"] = (
        f"parts of a step, shared by {machines.num_workers} worker{'s' * (machines.num_workers > 1)}; at most {slots} "
        f"workers can share a step"
    )
    reasons["training.global_batch"] = f"{batch} samples of {length} tokens are {batch * length:,} tokens a step"
    push, pull, why = _codec(machines.link_bits_per_second)
    reasons["codec"] = why
    prepare = {"sources": list(text.sources), "vocab_size": vocab_size} if text.sources else None
    tree: dict[str, Any] = {
        "name": name,
        "seed": 1,
        "model": {"config": config},
        "training": {
            "num_steps": MIN_STEPS,
            "num_slots": slots,
            "global_batch": batch,
            "microbatch": micro,
            "sequence_length": length,
            "precision": "bf16" if machines.has_gpu else "fp32",
            "num_threads": machines.num_threads,
        },
        "optimizer": {
            "kind": "adamw",
            "learning_rate": preset.learning_rate,
            "betas": [0.9, 0.95],
            "weight_decay": 0.1,
            "clip_norm": 1.0,
        },
        "schedule": {"kind": "cosine", "warmup_steps": 1, "min_ratio": 0.1},
        "codec": {"push": push, "pull": pull},
        "data": {"path": text.path, **({"prepare": prepare} if prepare else {})},
        "validation": {"interval_steps": 1},
        "checkpoint": {"interval_steps": 1, "keep": 3},
        "cluster": {"min_servers": machines.num_servers, "min_workers": machines.num_workers},
    }
    held_out = MAX_DEFAULT_FRACTION * text.num_tokens if text.sources else text.num_held_out
    found = FirstRecipe(tree, reasons, validates=held_out >= 2 * slots * length)
    return found.with_steps(*_steps(num_parameters, text.num_tokens, found.step_tokens))


def steps_in(seconds: float, step_seconds: float) -> tuple[int, str]:
    """Return the number of steps that fit into a time, and the reason."""
    steps = max(1, min(MAX_STEPS, int(seconds / step_seconds)))
    return steps, f"as many as fit into {_minutes(seconds)} at about {step_seconds:.2g} s a step, as measured here"


def _model(text: Text, size: str | OwnModel | None, reasons: dict[str, str]) -> tuple[Size, dict[str, Any] | str, int]:
    if isinstance(size, OwnModel):
        if text.vocab_size > size.vocab_size:
            raise ConfigError(
                f"the data set {text.path} has {text.vocab_size} words, the model of {size.path} {size.vocab_size}; "
                f"prepare the text with the model's tokenizer, or take --size"
            )
        nearest_size = min(SIZES.values(), key=lambda each: abs(math.log(each.num_parameters / size.num_parameters)))
        reasons["model"] = f"{size.num_parameters:,} parameters, from {size.path}"
        return nearest_size, size.path, min(size.vocab_size, nearest_size.vocab_size)
    chosen, reason = choose_size(text.num_tokens) if size is None else (_named(size), "as asked")
    preset = SIZES[chosen]
    vocab_size = text.vocab_size or preset.vocab_size
    reasons["model"] = f"a Llama of about {chosen} parameters: {reason}"
    return preset, preset.config(vocab_size), vocab_size


def _named(size: str) -> str:
    wanted = size.strip().upper()
    if wanted not in SIZES:
        raise ConfigError(f"no size '{size}'{nearest(wanted, SIZES)}; choose one of {', '.join(SIZES)} or --config")
    return wanted


def choose_size(num_tokens: int) -> tuple[str, str]:
    """Return the largest size with at most half as many parameters as the text has tokens, and the reason."""
    names = list(SIZES)
    affordable = names[: names.index(LARGEST_UNASKED) + 1]
    fits = [name for name in affordable if SIZES[name].num_parameters * 2 <= num_tokens]
    chosen = fits[-1] if fits else names[0]
    return chosen, f"chosen for about {_count(num_tokens)} tokens of text" + (
        f"; at most {LARGEST_UNASKED} without --size" if chosen == LARGEST_UNASKED else ""
    )


def _codec(link_bits_per_second: float | None) -> tuple[str, str, str]:
    if link_bits_per_second is not None and link_bits_per_second < SLOW_BITS_PER_SECOND:
        return "int4", "delta-int4", "4 bits a number, since the link is slow"
    where = "on one machine" if link_bits_per_second is None else "for a link of this speed"
    return "int8", "delta-int8", f"8 bits a number {where}"


def _steps(num_parameters: int, num_tokens: int, step_tokens: int) -> tuple[int, str]:
    by_size, by_text = TOKENS_A_PARAMETER * num_parameters, MAX_PASSES * num_tokens
    wanted = _nice(min(by_size, by_text) / step_tokens)
    steps = max(MIN_STEPS, min(MAX_STEPS, wanted))
    tokens = steps * step_tokens
    least = f"; fewer than {MIN_STEPS} steps teach little" if wanted < MIN_STEPS else ""
    passes = f"{tokens / num_tokens:.2g} times through the text" if num_tokens else "the text"
    return steps, f"{_count(tokens)} tokens, {passes}, {tokens / num_parameters:.2g} a parameter{least}"


def _warmup(num_steps: int) -> int:
    """A twentieth of the steps, at most 2000. Of a short run more: 20 steps, but at most a fifth of them."""
    return max(1, min(2000, max(num_steps // 20, min(20, num_steps // 5))))


def _nice(value: float) -> int:
    """Round to a count with at most two digits that are not 0, at least 1."""
    if value <= 1:
        return 1
    unit: int = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return max(1, round(value / unit) * unit)


def _count(number: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f}"


def _minutes(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 3600:.3g} hours" if seconds >= 7200 else f"{seconds / 60:.3g} minutes"
