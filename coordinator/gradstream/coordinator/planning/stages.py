"""Cut a model into pipeline stages by the time of each segment, within each worker's memory and speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradstream.core.errors import ConfigError


@dataclass(frozen=True)
class SegmentCost:
    """The cost of one segment of a model (embedding, layer, head).

    `seconds` is the time of the forward and backward pass of one microbatch on a worker of speed 1. `held_bytes` is the
    memory that the worker always needs for the segment (weights, gradients, encoded data). `activation_bytes` is the
    memory of each microbatch between its two passes.
    """

    name: str
    seconds: float
    held_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class StageOffer:
    """The worker of one stage.

    `speed` is relative to the others, `memory_bytes` is 0 if not known, and `live_activations` is the number of
    microbatches that it holds at once in the schedule.
    """

    worker: str
    speed: float
    memory_bytes: int
    live_activations: int


@dataclass(frozen=True)
class StageCut:
    """A cut: `ends[s]` is the first segment after stage s; `seconds` and `num_bytes` are the figures of each stage."""

    ends: tuple[int, ...]
    seconds: tuple[float, ...]
    num_bytes: tuple[int, ...]

    @property
    def segments(self) -> tuple[range, ...]:
        """The segments of each stage."""
        return tuple(range(begin, end) for begin, end in zip((0, *self.ends), self.ends, strict=False))


def cut_stages(segments: Sequence[SegmentCost], offers: Sequence[StageOffer]) -> tuple[StageCut, str]:
    """Cut the segments into stages that minimize the time of the slowest stage; return the cut and its reason.

    Each stage gets at least one segment, in order. Raises ConfigError when there are fewer segments than stages, or
    when no cut fits the workers' memory. The error then names a worker and the bytes missing in the cut that lacks
    least.
    """
    if len(segments) < len(offers):
        raise ConfigError(
            f"the model has {len(segments)} segments ({', '.join(segment.name for segment in segments)}), too few for "
            f"{len(offers)} stages; use at most {len(segments)}"
        )
    # Cumulative sums: a stage's figure is the difference of two entries.
    seconds, held, activations = [0.0], [0], [0]
    for segment in segments:
        seconds.append(seconds[-1] + segment.seconds)
        held.append(held[-1] + segment.held_bytes)
        activations.append(activations[-1] + segment.activation_bytes)

    def stage_seconds(stage: int, begin: int, end: int) -> float:
        return (seconds[end] - seconds[begin]) / offers[stage].speed

    def stage_bytes(stage: int, begin: int, end: int) -> int:
        live = offers[stage].live_activations
        return held[end] - held[begin] + live * (activations[end] - activations[begin])

    def lacking(stage: int, begin: int, end: int) -> float:
        memory = offers[stage].memory_bytes
        return max(0, stage_bytes(stage, begin, end) - memory) if memory else 0

    def cost(stage: int, begin: int, end: int) -> float:
        return math.inf if lacking(stage, begin, end) else stage_seconds(stage, begin, end)

    def cut(ends: tuple[int, ...]) -> StageCut:
        bounds = [(stage, begin, end) for stage, (begin, end) in enumerate(zip((0, *ends), ends, strict=False))]
        return StageCut(ends, tuple(stage_seconds(*at) for at in bounds), tuple(stage_bytes(*at) for at in bounds))

    slowest, ends = _fastest_cut(cost, len(offers), len(segments))
    if math.isinf(slowest):
        _, ends = _fastest_cut(lacking, len(offers), len(segments))
        best = cut(ends)
        short = [
            (best.num_bytes[stage] - offer.memory_bytes, stage, offer)
            for stage, offer in enumerate(offers)
            if offer.memory_bytes
        ]
        missing, stage, offer = max(short, key=lambda item: item[0])
        names = [segments[number].name for number in best.segments[stage]]
        raise ConfigError(
            f"worker {offer.worker} needs {best.num_bytes[stage]:,} bytes for stage {stage} "
            f"({names[0]} to {names[-1]}, activations of {offer.live_activations} at once) but offers "
            f"{offer.memory_bytes:,} ({missing:,} missing)"
        )
    found = cut(ends)
    limit = max(range(len(offers)), key=lambda stage: found.seconds[stage])
    mean = sum(found.seconds) / len(found.seconds)
    reason = (
        f"stage {limit} on {offers[limit].worker} is the slowest with {found.seconds[limit]:.3g} s a microbatch, "
        f"{found.seconds[limit] / mean if mean else 1.0:.2f} times the mean"
    )
    return found, reason


def _fastest_cut(
    cost: Callable[[int, int, int], float], num_stages: int, num_segments: int
) -> tuple[float, tuple[int, ...]]:
    """Find the cut that minimizes the highest cost of a stage, by dynamic programming; return that cost and the ends.

    Takes stages times segments squared. Among equal cuts the earlier stages get fewer segments.
    """
    # worst[end]: the lowest maximum cost of the first stages over the first `end` segments.
    worst = [0.0] + [math.inf] * num_segments
    choices: list[list[int]] = []
    for stage in range(num_stages):
        following, begins = [math.inf] * (num_segments + 1), [stage] * (num_segments + 1)
        for end in range(stage + 1, num_segments - (num_stages - stage - 1) + 1):
            for begin in range(stage, end):
                value = max(worst[begin], cost(stage, begin, end))
                if value < following[end]:
                    following[end], begins[end] = value, begin
        worst = following
        choices.append(begins)
    ends, end = [], num_segments
    for begins in reversed(choices):
        ends.append(end)
        end = begins[end]
    return worst[num_segments], tuple(reversed(ends))
