"""Where a model is cut into pipeline stages: by the time of each segment, within each worker's memory and speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradstream.core.errors import ConfigError


@dataclass(frozen=True)
class SegmentCost:
    """What one segment of a model (embedding, layer, head) costs.

    `seconds` of its forward and backward pass of one microbatch on a worker of speed 1; `held_bytes` while the worker
    has it (weights, gradients, what is encoded); `activation_bytes` of each microbatch between the two passes.
    """

    name: str
    seconds: float
    held_bytes: int
    activation_bytes: int


@dataclass(frozen=True)
class StageOffer:
    """The worker of one stage: its speed beside others', its memory (0: not known), and how many microbatches it holds
    at once by the schedule."""

    worker: str
    speed: float
    memory_bytes: int
    live_activations: int


@dataclass(frozen=True)
class StageCut:
    """`ends[s]` is the first segment after stage s; `seconds` and `num_bytes` are each stage's."""

    ends: tuple[int, ...]
    seconds: tuple[float, ...]
    num_bytes: tuple[int, ...]

    @property
    def segments(self) -> tuple[range, ...]:
        """The segments of each stage."""
        return tuple(range(begin, end) for begin, end in zip((0, *self.ends), self.ends, strict=False))


def cut_stages(segments: Sequence[SegmentCost], offers: Sequence[StageOffer]) -> tuple[StageCut, str]:
    """Give each stage at least one segment, in order, so that the slowest stage is as fast as it can be; and why so.

    Raises ConfigError when there are fewer segments than stages, or when no cut fits the workers' memory: it then names
    a worker and what it lacks under the cut that lacks least.
    """
    if len(segments) < len(offers):
        raise ConfigError(
            f"the model has {len(segments)} segments ({', '.join(segment.name for segment in segments)}), too few for "
            f"{len(offers)} stages; use at most {len(segments)}"
        )
    # Sums up to each segment make a stage's figures two subtractions.
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
            f"{offer.memory_bytes:,} ({missing:,} missing); use more stages, smaller microbatches or recomputation"
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
    """The ends of the cut whose worst stage costs least, by dynamic programming: stages times segments squared. Between
    equals the earlier stages get less."""
    # worst[end]: the least worst cost of the first stages over the first `end` segments.
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
