"""bench-codecs: every codec's encode and decode-and-add, one thread, against torch `copy_` of the same fp32 tensor.

The tensor is larger than the caches, like a layer's gradient, and cut into fragments of 4 MiB as in a plan. The rival
is timed in the same loop, in turns, and the median of the pairs' ratios is reported. The values are normal numbers,
scaled by a magnitude that differs from row to row. `ratio` is fp32's bytes over the payload's; `error` is the norm that
one call loses, as a share. Codecs with a residual carry it from call to call. bf16, int8 and int4 have targets.

`add_alone` and `add_together` add four contributions to sums in fixed point, as servers do: one after the other, each
to all fragments, and all four to a fragment in one pass. Their rival is decode-and-add in fp32, one after the other.

`sum_error_CODEC_DECAY` is what a residual of this decay brings over rounds: the error of the sum of all that four slots
sent in 80 rounds, as a share of the norm of the sum of their differences. Half of a slot's difference is common to all
slots and turns slowly, by a tenth a round; the other half is noise. `cos` is the cosine between the two sums, which a
common factor such as the learning rate cannot change. The error of a round is that of its own mean difference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from report import Result, arguments_parser, at_most, chosen, report, result

from gradstream.core.codecs import CODEC_NAMES, Codec, Payload, ResidualCodec, State, codec_named
from gradstream.core.codecs.fixed_point import FixedPointSum
from gradstream.core.codecs.payloads import BundleCodec
from gradstream.core.kernels import preload as kernels_preload
from gradstream.core.plan.bundles import Bundle
from gradstream.core.plan.fragments import Fragment, Tensor

TARGETS = {"encode": 0.5, "decode_add": 1.0}
WITH_TARGET = ("bf16", "int8", "int4")
NUM_CONTRIBUTIONS = 4
DECAYS = {"int4": (0, 0.9), "int2": (0, 0.8, 0.9, 0.95, 1), "sparse": (0, 0.8, 0.9, 0.95, 1)}
"""Decays of which the error of the sum is measured, by codec."""
TARGET_ADD = 0.8


@dataclass(frozen=True)
class Size:
    """The size of the measurement. `shape` is the shape of a fragment: 4 MiB of fp32."""

    shape: tuple[int, int] = (1024, 1024)
    num_fragments: int = 16
    num_rounds: int = 15
    num_differences: int = 80


SMOKE = Size((64, 64), 1, 1, 2)


def main() -> None:
    arguments = arguments_parser(__doc__).parse_args()
    size = SMOKE if arguments.smoke else Size()
    names = chosen("codecs", {name: name for name in CODEC_NAMES}, arguments.only)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    kernels_preload.preload()
    magnitudes = torch.randn(size.num_fragments, size.shape[0], 1).exp()
    sources = list((torch.randn(size.num_fragments, *size.shape) * magnitudes).unbind())
    targets = list(torch.zeros(size.num_fragments, *size.shape).unbind())
    results: list[Result] = []
    for name in names:
        codec = codec_named(name)
        payloads = [codec.encode(source) for source in sources]
        payload_bytes = sum(payload.nbytes for payload in payloads)
        ratio = 4 * sum(source.numel() for source in sources) / payload_bytes
        for operation, function in (
            ("encode", partial(encode, codec, sources, states(codec, size))),
            ("decode_add", partial(decode_add, codec, payloads, targets)),
        ):
            ours, rival = paired(function, partial(copy, sources, targets), size.num_rounds)
            value = statistics.median(b / a for a, b in zip(ours, rival, strict=True))
            speed = 4 * sum(source.numel() for source in sources) / statistics.median(ours) / 1e9
            detail = f"{speed:.2f} GB/s of fp32, ratio {ratio:.2f}, error {relative_error(codec, sources[0]):.4f}"
            target = TARGETS[operation] if name in WITH_TARGET else 0.0
            results.append(result(f"{operation}_{name}", value, target, detail))
        results.extend(add_results(name, sources, size))
        results.extend(sum_error(name, decay, size.num_differences) for decay in DECAYS.get(name, ()))
    report("codecs", results)


def add_results(name: str, sources: list[torch.Tensor], size: Size) -> list[Result]:
    """Compare sums in fixed point with decode-and-add in fp32."""
    fragments = [Fragment(0, number, 0, size.shape[0] * size.shape[1], size.shape[1]) for number in range(len(sources))]
    tensors = [Tensor(f"t{number}", size.shape, True, 0) for number in range(len(sources))]
    codecs = [BundleCodec(Bundle(0, 0, (fragment,)), tensors, name, name) for fragment in fragments]
    encoded = [
        [codec.encode([source.view(-1)], number) for number in range(NUM_CONTRIBUTIONS)]
        for codec, source in zip(codecs, sources, strict=True)
    ]
    sums = [FixedPointSum([fragment.num_elements], NUM_CONTRIBUTIONS) for fragment in fragments]
    targets = [torch.zeros(fragment.num_elements) for fragment in fragments]

    def in_fp32() -> None:
        for number in range(NUM_CONTRIBUTIONS):
            for codec, contributions, target_N in zip(codecs, encoded, targets, strict=True):
                codec.decode_add(contributions[number], [target_N], 0)

    def alone() -> None:
        for number in range(NUM_CONTRIBUTIONS):
            for codec, contributions, total in zip(codecs, encoded, sums, strict=True):
                codec.add(contributions[number : number + 1], total, 0)
        clear()

    def together() -> None:
        for codec, contributions, total in zip(codecs, encoded, sums, strict=True):
            codec.add(contributions, total, 0)
        clear()

    def clear() -> None:
        for total in sums:
            total.clear()

    results = []
    for operation, function, target in (("add_alone", alone, 0.0), ("add_together", together, TARGET_ADD)):
        ours, rival = paired(function, in_fp32, size.num_rounds)
        value = statistics.median(b / a for a, b in zip(ours, rival, strict=True))
        num_bytes = 4 * NUM_CONTRIBUTIONS * sum(fragment.num_elements for fragment in fragments)
        detail = f"{num_bytes / statistics.median(ours) / 1e9:.2f} GB/s of fp32 into fixed point"
        results.append(result(f"{operation}_{name}", value, target if name in WITH_TARGET else 0.0, detail))
    return results


def sum_error(name: str, decay: float, num_rounds: int) -> Result:
    """Compare the sum of what slots sent with the sum of their differences."""
    codec, generator = codec_named(name), torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    magnitudes, common, out = draw(256, 1).exp(), draw(256, 256), torch.empty(256, 256)
    carried = [codec.new_state((256, 256)) for _ in range(NUM_CONTRIBUTIONS)]
    due, sent = torch.zeros(2, 256, 256).unbind()
    errors = []
    for number in range(num_rounds):
        common = 0.9 * common + 0.19**0.5 * draw(256, 256)
        round_due, round_sent = torch.zeros(2, 256, 256).unbind()
        for state in carried:
            difference = (common + draw(256, 256)) * magnitudes
            round_due += difference
            codec.decode(codec.encode_with(difference, state, number, decay), out, number)
            round_sent += out
        errors.append(float((round_sent - round_due).norm() / round_due.norm()))
        due += round_due
        sent += round_sent
    cosine = float(torch.nn.functional.cosine_similarity(sent.view(-1), due.view(-1), dim=0))
    error = float((sent - due).norm() / due.norm())
    detail = f"cos {cosine:.3f}, error of a round {statistics.mean(errors):.3f}"
    return at_most(f"sum_error_{name}_{decay:g}", error, 0.0, detail)


def states(codec: Codec, size: Size) -> list[State]:
    """Make a residual for each fragment, if the codec has residuals."""
    return [codec.new_state(size.shape) for _ in range(size.num_fragments)] if isinstance(codec, ResidualCodec) else []


def encode(codec: Codec, sources: list[torch.Tensor], carried: list[State]) -> None:
    if isinstance(codec, ResidualCodec):
        for source, state in zip(sources, carried, strict=True):
            codec.encode_with(source, state)
    else:
        for source in sources:
            codec.encode(source)


def decode_add(codec: Codec, payloads: list[Payload], targets: list[torch.Tensor]) -> None:
    for payload, target in zip(payloads, targets, strict=True):
        codec.decode_add(payload, target)


def copy(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def relative_error(codec: Codec, values: torch.Tensor) -> float:
    """Compute the error of one call, as a share of the norm."""
    out = torch.empty_like(values)
    codec.decode(codec.encode(values), out)
    return float((out - values).norm() / values.norm())


def paired(first: Callable[[], None], second: Callable[[], None], num_rounds: int) -> tuple[list[float], list[float]]:
    """Time `num_rounds` calls of both functions, in turns, after one warm-up call of each; return all seconds."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(num_rounds + 1):
        for function, into in zip((first, second), seconds, strict=True):
            began = time.perf_counter()
            function()
            if number:
                into.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
