"""bench-overlap: what a round costs in loss if it begins before the exchange of the one before is over.

gradstream's rounds wait for the whole version: the exchange takes time, and no loss. The others here do not wait. They
are written in plain PyTorch, with all slots in one computation; nothing is encoded.

- `streaming`: the layers in three fragments, each exchanged at its own place in the round. Some steps later the mean is
  mixed half and half into the slot's own weights. Moments stay with the slot (Streaming DiLoCo, Douillard et al. 2025).
- `moved`: the same fragments, but a slot keeps its progress and moves by the difference of the mean to what it sent.
  Moments become the mean.
- `turns`: twice as many slots of half the samples, in two groups that take turns. A group's round begins from the
  version before the newest one, so the other group's round hides the exchange.
- `delayed`: all slots begin from the version before the newest one; the outer rate is one half.

A figure is the final validation loss minus that of the rounds that wait, in nats, for the same number of tokens.

    make bench-overlap
    python benchmarks/overlap.py --only streaming --width 128 --rate 4e-3
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from report import Result, arguments_parser, at_most, chosen, report
from torch.nn import functional

from gradstream.coordinator.data.prepare import prepare
from gradstream.core.recipe.recipe import PrepareConfig

VOCAB, LAYERS, HEADS, LENGTH = 1024, 4, 4, 64
BATCH = 8
"""Samples of a step, over all slots."""
NUM_SLOTS = 2
BETAS = (0.9, 0.95)
DECAY = 0.1
FRAGMENTS = 3
MIXING = 0.5

Arrays = dict[str, torch.Tensor]
"""Arrays by parameter. Those of slots have the slots as their first dimension."""


@dataclass
class State:
    """Weights and AdamW's moments, of one version or of several slots."""

    weights: Arrays
    first: Arrays
    second: Arrays

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> State:
        """A state of new arrays."""
        return State(*({name: function(a) for name, a in part.items()} for part in self.parts))

    def lerp(self, other: State, weight: float) -> State:
        """This state, moved by a share of the way to another one."""
        pairs = zip(self.parts, other.parts, strict=True)
        return State(*({name: torch.lerp(a, theirs[name], weight) for name, a in own.items()} for own, theirs in pairs))

    @property
    def parts(self) -> tuple[Arrays, Arrays, Arrays]:
        return self.weights, self.first, self.second


class Training:
    """The model, the data and the inner step. `rate` is the highest learning rate."""

    def __init__(self, data: Path, num_steps: int, width: int, rate: float, seed: int):
        self.num_steps = num_steps
        self._width, self._rate, self._seed = width, rate, seed
        self._train, validation = (_tokens(data, split) for split in ("train", "validation"))
        windows = [
            validation[begin : begin + LENGTH + 1]
            for begin in range(0, min(256 * LENGTH, len(validation) - LENGTH), LENGTH)
        ]
        self._validation = torch.from_numpy(np.stack(windows).astype(np.int64))
        size = width // HEADS
        angles = torch.outer(torch.arange(LENGTH).float(), 1e-4 ** (torch.arange(0, size, 2).float() / size))
        self._cos, self._sin = (torch.cat([part] * 2, -1) for part in (angles.cos(), angles.sin()))

    def initial(self) -> State:
        """The initial version: a Llama with tied embeddings."""
        generator = torch.Generator().manual_seed(self._seed)
        width, inner = self._width, 11 * self._width // 4
        weights = {"embedding": torch.randn(VOCAB, width, generator=generator) * 0.02}
        for layer in range(LAYERS):
            shapes = dict.fromkeys("qkvo", (width, width))
            shapes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
            for name, shape in shapes.items():
                weights[f"{layer}.{name}"] = torch.randn(*shape, generator=generator) * 0.02
            weights[f"{layer}.norm1"] = weights[f"{layer}.norm2"] = torch.ones(width)
        weights["norm"] = torch.ones(width)
        zeros = {name: torch.zeros_like(array) for name, array in weights.items()}
        return State(weights, zeros, dict(zeros))

    def loss(self, version: State) -> float:
        """The validation loss, in nats a token."""
        weights = {name: array[None] for name, array in version.weights.items()}
        with torch.no_grad():
            found = [self._losses(weights, part[None]).item() for part in self._validation.split(32)]
        return sum(found) / len(found)

    def step(self, slots: State, step: int, numbers: Sequence[int], samples: int) -> None:
        """Take an inner step of several slots in place. Their samples follow from their numbers."""
        tokens = torch.stack([self._batch(step, number, samples) for number in numbers])
        for array in slots.weights.values():
            array.requires_grad_(True)
        gradients = torch.autograd.grad(self._losses(slots.weights, tokens).sum(), list(slots.weights.values()))
        norms_S = torch.sqrt(sum((g.flatten(1).square().sum(1) for g in gradients), torch.zeros(len(numbers))))
        scales_S = (1 / (norms_S + 1e-6)).clamp(max=1)
        rate = self._rate_of(step)
        corrections = [1 - beta ** (step + 1) for beta in BETAS]
        for (name, array), gradient in zip(slots.weights.items(), gradients, strict=True):
            array.requires_grad_(False)
            clipped = gradient * scales_S.view(-1, *[1] * (gradient.dim() - 1))
            first = slots.first[name].lerp_(clipped, 1 - BETAS[0])
            second = slots.second[name].mul_(BETAS[1]).addcmul_(clipped, clipped, value=1 - BETAS[1])
            if array.dim() > 2:
                array.mul_(1 - rate * DECAY)
            array.addcdiv_(first / corrections[0], (second / corrections[1]).sqrt() + 1e-8, value=-rate)

    def _rate_of(self, step: int) -> float:
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / self.num_steps))
        return self._rate * min(1.0, (step + 1) / 100) * cosine

    def _batch(self, step: int, number: int, samples: int) -> torch.Tensor:
        generator = np.random.default_rng((self._seed, step, number))
        begins = generator.integers(0, len(self._train) - LENGTH - 1, samples)
        rows = np.stack([self._train[begin : begin + LENGTH + 1] for begin in begins])
        return torch.from_numpy(rows.astype(np.int64))

    def _losses(self, weights: Arrays, tokens: torch.Tensor) -> torch.Tensor:
        """The mean loss of each slot on its own samples."""
        num_slots, samples, _ = tokens.shape
        tables = weights["embedding"]
        x = torch.stack([functional.embedding(tokens[s, :, :-1], tables[s]) for s in range(num_slots)])
        for layer in range(LAYERS):
            part = {name: weights[f"{layer}.{name}"] for name in ("q", "k", "v", "o", "gate", "up", "down")}
            h = _norm(x, weights[f"{layer}.norm1"])
            q, k, v = (
                _product(h, part[name]).view(num_slots * samples, LENGTH, HEADS, -1).transpose(1, 2) for name in "qkv"
            )
            mixed = functional.scaled_dot_product_attention(self._turn(q), self._turn(k), v, is_causal=True)
            x = x + _product(mixed.transpose(1, 2).reshape(num_slots, samples, LENGTH, -1), part["o"])
            h = _norm(x, weights[f"{layer}.norm2"])
            x = x + _product(functional.silu(_product(h, part["gate"])) * _product(h, part["up"]), part["down"])
        logits = _product(_norm(x, weights["norm"]), tables.transpose(1, 2))
        targets = tokens[:, :, 1:].reshape(-1)
        each = functional.cross_entropy(logits.reshape(-1, VOCAB), targets, reduction="none")
        return each.view(num_slots, -1).mean(1)

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return x * self._cos + torch.cat([-x[..., half:], x[..., :half]], -1) * self._sin


def _tokens(data: Path, split: str) -> np.ndarray:
    return np.concatenate([np.fromfile(file, np.uint16) for file in sorted(data.glob(f"{split}-*.tokens"))])


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight[:, None, None]


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.flatten(1, 2), weight).view(*x.shape[:3], -1)


# -- the ways to exchange ----------------------------------------------------------------------------------------------


def _slots(version: State, count: int) -> State:
    return version.map(lambda array: array[None].repeat(count, *[1] * array.dim()))


def _mean(slots: State) -> State:
    return slots.map(lambda array: array.mean(0))


def _round(training: Training, version: State, first: int, length: int, numbers: Sequence[int], samples: int) -> State:
    """The mean of slots that take `length` inner steps from a version."""
    slots = _slots(version, len(numbers))
    for step in range(first, first + length):
        training.step(slots, step, numbers, samples)
    return _mean(slots)


def every_step(training: Training, length: int) -> State:
    """Data parallel: one slot has all samples of a step."""
    slots = _slots(training.initial(), 1)
    for step in range(training.num_steps):
        training.step(slots, step, [0], BATCH)
    return _mean(slots)


def rounds(training: Training, length: int) -> State:
    """Rounds that wait for the whole version, with shared moments."""
    version = training.initial()
    for first in range(0, training.num_steps, length):
        version = _round(training, version, first, length, range(NUM_SLOTS), BATCH // NUM_SLOTS)
    return version


def delayed(training: Training, length: int) -> State:
    """All slots begin from the version before the newest one."""
    return _behind(training, length, [range(NUM_SLOTS)], BATCH // NUM_SLOTS)


def turns(training: Training, length: int) -> State:
    """Two groups of slots take turns."""
    numbers = range(2 * NUM_SLOTS)
    return _behind(training, length, [numbers[::2], numbers[1::2]], BATCH // (2 * NUM_SLOTS))


def _behind(training: Training, length: int, groups: Iterable[Sequence[int]], samples: int) -> State:
    before = newest = training.initial()
    for first in range(0, training.num_steps, length):
        for numbers in groups:
            end = _round(training, before, first, length, numbers, samples)
            moved = {
                name: array + 0.5 * (end.weights[name] - before.weights[name]) for name, array in newest.weights.items()
            }
            mixed = newest.lerp(end, 0.5)
            before, newest = newest, State(moved, mixed.first, mixed.second)
    return newest


def streaming(training: Training, length: int, delay: int, moves: bool) -> State:
    """Fragments in turn; a slot takes each mean `delay` steps after it was sent."""
    version = training.initial()
    slots = _slots(version, NUM_SLOTS)
    under_way: dict[int, tuple[int, State, State]] = {}  # by fragment: the step, what slots sent, its mean

    def take(fragment: int) -> None:
        _, sent, mean = under_way.pop(fragment)
        for name in sent.weights:
            version.weights[name] = mean.weights[name]
            if moves:
                slots.weights[name].add_(mean.weights[name] - sent.weights[name])
                slots.first[name].copy_(mean.first[name].expand_as(slots.first[name]))
                slots.second[name].copy_(mean.second[name].expand_as(slots.second[name]))
            else:
                slots.weights[name].lerp_(mean.weights[name].expand_as(slots.weights[name]), MIXING)

    for done in range(1, training.num_steps + 1):
        training.step(slots, done - 1, range(NUM_SLOTS), BATCH // NUM_SLOTS)
        for fragment in range(FRAGMENTS):
            if done % length == (fragment + 1) * length // FRAGMENTS % length:
                parts = ({n: a.clone() for n, a in part.items() if _fragment(n) == fragment} for part in slots.parts)
                sent = State(*parts)
                under_way[fragment] = (done, sent, _mean(sent))
            if fragment in under_way and under_way[fragment][0] + delay == done:
                take(fragment)
    for fragment in sorted(under_way):
        take(fragment)
    return version


def _fragment(name: str) -> int:
    """The fragment of a parameter: the embedding goes with the first layers, the last norm with the last ones."""
    layer = {"embedding": "0", "norm": str(LAYERS - 1)}.get(name, name.split(".")[0])
    return int(layer) * FRAGMENTS // LAYERS


Case = Callable[[Training, int], State]
"""Takes a training and the inner steps of a round; returns the last version."""

CASES: dict[str, Case] = {
    "every_step": every_step,
    **{f"streaming_{n}": (lambda t, length, n=n: streaming(t, length, n, False)) for n in (1, 5, 10, 20)},
    **{f"moved_{n}": (lambda t, length, n=n: streaming(t, length, n, True)) for n in (1, 5, 10, 20)},
    "turns": turns,
    "delayed": delayed,
}


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--width", type=int, default=64, help="of the model: 64 is 0.3 M parameters, 128 is 1 M")
    parser.add_argument("--rate", type=float, default=8e-3, help="the highest learning rate")
    parser.add_argument("--length", type=int, default=30, help="inner steps of a round")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    cases = {"every_step": every_step, "turns": turns} if options.smoke else CASES
    cases = chosen("overlap", cases, options.only)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="gradstream-bench-") as directory:
        data = Path(directory) / "data"
        size = 1_000_000 if options.smoke else 9_000_000
        sources = PrepareConfig(
            sources=["stdlib:"], vocab_size=VOCAB, num_shards=8, max_bytes=size, validation_fraction=0.05
        )
        prepare(sources, str(data))
        report("overlap", measured(data, cases, options))


def measured(data: Path, cases: Mapping[str, Case], options: Namespace) -> list[Result]:
    """Train the cases; return the differences to the rounds that wait."""
    length, num_steps = (2, 8) if options.smoke else (options.length, 2400)
    training = Training(data, num_steps, options.width, options.rate, options.seed)

    def loss(name: str, case: Case) -> float:
        began = time.monotonic()
        found = training.loss(case(training, length))
        print(f"{name}: {found:.4f}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return found

    base = loss("rounds", rounds)
    found = {name: loss(name, case) for name, case in cases.items()}
    return [at_most(f"loss_{name}", each - base, 0.0, f"{each:.4f}, rounds {base:.4f}") for name, each in found.items()]


if __name__ == "__main__":
    main()
