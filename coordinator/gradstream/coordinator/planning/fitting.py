"""Which pipelines fit the workers' memory: the part of the planner that needs no times. Pure functions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate

from gradstream.coordinator.planning.needs import worker_bytes
from gradstream.coordinator.planning.stages import SegmentCost
from gradstream.core.errors import ConfigError
from gradstream.core.model.profile import SegmentProfile
from gradstream.core.pipeline.schedule import SCHEDULES, SPLIT, Op, Schedule, make_schedule, num_live, unavailable
from gradstream.core.plan.fragments import BYTES_PER_ELEMENT, Tensor
from gradstream.core.recipe.recipe import Recipe

NO_LIMIT = 1 << 62
"""The memory of a worker that did not report it."""


def segment_costs(recipe: Recipe, tensors: Sequence[Tensor], profiles: Sequence[SegmentProfile]) -> list[SegmentCost]:
    """Compute the costs of the segments for the cut. A tied tensor counts in both of its segments."""
    # Between the two halves of a split backward pass a worker keeps the activations that it recomputed.
    keeps = recipe.training.recompute and recipe.pipeline.schedule in SPLIT
    costs = []
    for profile in profiles:
        trained = num_parameters(tensors, profile.units)
        costs.append(
            SegmentCost(
                profile.name,
                profile.forward_seconds + profile.backward_seconds,
                worker_bytes(recipe, trained, max(0, profile.num_parameters - trained)),
                profile.activation_bytes + keeps * profile.working_bytes,
            )
        )
    return costs


def num_parameters(tensors: Iterable[Tensor], units: Iterable[int]) -> int:
    """Count the elements of the tensors that forward units use. A tied tensor counts once per use."""
    wanted = set(units)
    return sum(tensor.num_elements for tensor in tensors for unit in {tensor.unit, tensor.last_unit} if unit in wanted)


# --- activations ------------------------------------------------------------------------------------------------------


def runs_of(recipe: Recipe) -> tuple[int, ...]:
    """The numbers of microbatches of all possible runs, for any number of replicas; slots are distributed evenly.

    An inner step of a round is a run of one slot.
    """
    training, local = recipe.training, recipe.local
    slots = training.num_slots
    shares = {share for replicas in range(1, slots + 1) for share in (slots // replicas, -(-slots // replicas))}
    if local is not None and not local.after:
        shares = {1}
    return tuple(share * (training.slot_batch // training.microbatch) for share in sorted(shares))


def reduced_bytes(recipe: Recipe, tensors: Sequence[Tensor]) -> int:
    """Memory that a worker needs once for the reductions of a round: the tied tensors that it gets and sends on."""
    if recipe.local is None:
        return 0
    return 2 * BYTES_PER_ELEMENT * sum(tensor.num_elements for tensor in tensors if tensor.is_tied)


def schedules_for(recipe: Recipe, size: int, runs: Sequence[int]) -> tuple[str, ...]:
    """The schedules that the recipe allows and that exist for every run of replicas of `size` workers.

    Raises ConfigError when there is none.
    """
    config, training = recipe.pipeline, recipe.training
    names: tuple[str, ...] = (config.schedule,)
    if config.schedule == "auto":
        names = tuple(name for name in SCHEDULES if not (training.recompute and name in SPLIT))
    lacks = {
        name: next(filter(None, (unavailable(name, size, run, config.chunks) for run in runs)), "") for name in names
    }
    names = tuple(name for name in names if not lacks[name])
    if not names:
        raise ConfigError(
            f"{list(lacks.values())[-1]}, of training.microbatch={training.microbatch} samples, however many slots a "
            f"replica holds"
        )
    return names


@lru_cache(maxsize=16)
def make_all(name: str, size: int, runs: tuple[int, ...], chunks: int) -> tuple[Schedule, ...]:
    """Make a schedule for runs of each of these lengths."""
    return tuple(make_schedule(name, size, run, chunks) for run in runs)


@lru_cache(maxsize=256)
def stage_live(name: str, size: int, runs: tuple[int, ...], chunks: int) -> tuple[int, ...]:
    """For each stage, the maximum number of microbatches whose activations it holds at once."""
    if chunks == 1:
        return tuple(num_live(name, size, max(runs), place) for place in range(size))
    most = [0] * (size * chunks)
    for schedule in make_all(name, size, runs, chunks):
        for row in schedule.rows:
            now = dict.fromkeys((action.stage for action in row), 0)
            for action in row:
                now[action.stage] += (action.op is Op.FORWARD) - (action.op is schedule.last_op)
                most[action.stage] = max(most[action.stage], now[action.stage])
    return tuple(most)


def lean_live(names: Sequence[str], size: int, runs: tuple[int, ...], chunks: int) -> tuple[int, ...]:
    """`stage_live` of the schedule that holds least."""
    return min((stage_live(name, size, runs, chunks) for name in names), key=sum)


# --- what fits --------------------------------------------------------------------------------------------------------


def working_bytes(profiles: Sequence[SegmentProfile]) -> int:
    """Memory that a worker needs once for all its stages: to recompute the largest layer."""
    return max(profile.working_bytes for profile in profiles)


def offered_bytes(memory: int, working: int, chunks: int) -> int:
    """The memory that a worker offers to each of its stages; 0 when there is no limit."""
    return 0 if memory == NO_LIMIT else max(1, (memory - working) // chunks)


class Fitter:
    """Tells whether workers can hold a recipe's model as a pipeline."""

    def __init__(self, recipe: Recipe, costs: Sequence[SegmentCost], profiles: Sequence[SegmentProfile]):
        self._recipe = recipe
        self._num_segments = len(costs)
        self._working = working_bytes(profiles)
        self._runs = runs_of(recipe)
        self._held = [0, *accumulate(cost.held_bytes for cost in costs)]
        self._activations = [0, *accumulate(cost.activation_bytes for cost in costs)]
        self._live: dict[int, tuple[int, ...]] = {}  # by number of workers

    @property
    def sizes(self) -> range:
        """The numbers of workers of a replica that the recipe allows."""
        config = self._recipe.pipeline
        if config.stages != "auto":
            return range(config.min_workers, config.min_workers + 1)
        return range(1, self._num_segments // config.chunks + 1)

    def fits(self, memories: Sequence[int]) -> bool:
        """Whether a cut fits workers with these memories, by place. Raises ConfigError when no schedule exists.

        Memory alone decides, so each stage takes as many segments as it can hold.
        """
        size, chunks = len(memories), self._recipe.pipeline.chunks
        if size not in self._live:
            names = schedules_for(self._recipe, size, self._runs)
            self._live[size] = lean_live(names, size, self._runs, chunks)
        live = self._live[size]
        begin, stages = 0, size * chunks
        if stages > self._num_segments:
            return False
        for stage in range(stages):
            last = self._num_segments - (stages - stage - 1)  # each later stage needs a segment
            offered = offered_bytes(memories[stage % size], self._working, chunks)
            end = last if not offered else min(last, self._most(begin, live[stage], offered))
            if end == begin:
                return False
            begin = end
        return begin == self._num_segments

    def fewest(self, memories: Sequence[int]) -> int | None:
        """The fewest of workers with these memories, largest first, that can form a replica; None when none can."""
        for size in self.sizes:
            if size > len(memories):
                return None
            largest = memories[:size]
            try:
                if self.fits(largest) or self.fits(largest[::-1]):
                    return size
            except ConfigError:
                continue
        return None

    def _most(self, begin: int, live: int, offered: int) -> int:
        """The end of the longest stage from segment `begin` on that `offered` bytes hold."""

        def num_bytes(end: int) -> int:
            held = self._held[end] - self._held[begin]
            return held + live * (self._activations[end] - self._activations[begin])

        return bisect_right(range(self._num_segments + 1), offered, lo=begin, key=num_bytes) - 1
