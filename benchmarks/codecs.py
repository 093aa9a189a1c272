"""bench-codecs: every codec, encode and decode-and-add, one thread, against torch `copy_` of the same fp32 tensor.

The tensor is larger than the caches, as a layer's gradient is. The rival is timed in the same loop, in turns, and the
median of the pairs' ratios is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from report import report, result

from gradstream.core.codecs import codec_named

NUM_ELEMENTS = 16 << 20  # 64 MiB of fp32, cut into fragments of 4 MiB as a plan would
FRAGMENT_ELEMENTS = 1 << 20
NUM_ROUNDS = 15
TARGETS = {"encode": 0.5, "decode_add": 1.0}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source_N = torch.randn(NUM_ELEMENTS)
    target_N = torch.zeros(NUM_ELEMENTS)
    pieces = list(range(0, NUM_ELEMENTS, FRAGMENT_ELEMENTS))
    results = []
    for name in ("fp32", "bf16", "int8"):
        codec = codec_named(name)
        payloads = [codec.encode(source_N[begin : begin + FRAGMENT_ELEMENTS]) for begin in pieces]

        def encode(codec=codec) -> None:  # type: ignore[no-untyped-def]
            for begin in pieces:
                codec.encode(source_N[begin : begin + FRAGMENT_ELEMENTS])

        def decode_add(codec=codec, payloads=payloads) -> None:  # type: ignore[no-untyped-def]
            for begin, payload in zip(pieces, payloads, strict=True):
                codec.decode_add(payload, target_N[begin : begin + FRAGMENT_ELEMENTS])

        def copy() -> None:
            for begin in pieces:
                target_N[begin : begin + FRAGMENT_ELEMENTS].copy_(source_N[begin : begin + FRAGMENT_ELEMENTS])

        for operation, function in (("encode", encode), ("decode_add", decode_add)):
            ours, rival = paired(function, copy)
            ratio = statistics.median(b / a for a, b in zip(ours, rival, strict=True))
            speed = NUM_ELEMENTS * 4 / statistics.median(ours) / 1e9
            results.append(result(f"{operation}_{name}", ratio, TARGETS[operation], f"{speed:.2f} GB/s of fp32"))
    report("codecs", results)


def paired(first: Callable[[], None], second: Callable[[], None]) -> tuple[list[float], list[float]]:
    """Seconds of each of NUM_ROUNDS calls of both, in turns, after one call of each to warm up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(NUM_ROUNDS + 1):
        for function, into in zip((first, second), seconds, strict=True):
            began = time.perf_counter()
            function()
            if number:
                into.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
