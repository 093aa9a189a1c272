"""Plan the pipeline: number of stages, cuts, workers and schedule. Pure functions that return (decision, reason).

Memory is planned for a replica that holds every slot, because it holds all slots once the other replicas are gone. Time
is planned for the current number of replicas. A run computes all slots of a replica one after the other, so the number
of its microbatches depends on the number of replicas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from gradstream.coordinator.planning.fitting import (
    NO_LIMIT,
    Fitter,
    lean_live,
    make_all,
    offered_bytes,
    reduced_bytes,
    runs_of,
    schedules_for,
    segment_costs,
    stage_live,
    working_bytes,
)
from gradstream.coordinator.planning.needs import MAX_NAMED, NodeOffer, human_bytes, named
from gradstream.coordinator.planning.smallest_change import smallest_change
from gradstream.coordinator.planning.stages import SegmentCost, StageCut, StageOffer, cut_stages
from gradstream.core.errors import ConfigError, PlanError
from gradstream.core.model.profile import SegmentProfile
from gradstream.core.pipeline.schedule import SPLIT, Op, make_schedule
from gradstream.core.pipeline.simulation import Costs, choose_schedule, simulate
from gradstream.core.plan.fragments import Tensor
from gradstream.core.recipe.recipe import PipelineConfig, Recipe, TrainingConfig

LATENCY_SECONDS = 0.0005
NO_DIFFERENCE = 1 / 3
"""The speeds measured on two threads of one core can differ by as much, depending on the load of the other thread."""

Groups = Sequence[Sequence[NodeOffer]]
"""For each place of a replica its workers, one for each replica."""


@dataclass(frozen=True)
class Pipeline:
    """The pipeline's fields of a plan (see Plan); the defaults mean no pipeline.

    `groups` are the workers by place for which the pipeline was planned.
    """

    stage_ends: tuple[int, ...] = ()
    num_chunks: int = 1
    schedule: str = ""
    worker_bytes: tuple[int, ...] = ()
    groups: tuple[tuple[NodeOffer, ...], ...] = ()


def plan_pipeline(
    recipe: Recipe,
    tensors: Sequence[Tensor],
    profiles: Sequence[SegmentProfile],
    workers: Sequence[NodeOffer],
    latency_seconds: float = LATENCY_SECONDS,
) -> tuple[Pipeline, dict[str, str]]:
    """Decide on stages, places and schedule; return them with the reasons for "stages" and "schedule".

    A given number of stages gets as many replicas as possible; the smallest workers are left out if their memory is too
    small. `auto` takes the fewest stages that use every worker, else the number that uses most workers.
    `latency_seconds` is the latency of a message between two workers.

    Raises PlanError when the workers are too few or too small, ConfigError when the model has fewer segments than
    stages or the schedule does not exist for this number of stages.
    """
    config = recipe.pipeline
    costs = segment_costs(recipe, tensors, profiles)
    reduced = reduced_bytes(recipe, tensors)
    given, profiles = profiles, [replace(one, working_bytes=one.working_bytes + reduced) for one in profiles]
    _check(config, len(workers), [cost.name for cost in costs])
    sizes = list(_sizes(config, len(workers), len(costs)))
    # If no size fits, the error comes from the one with the most stages on the fewest replicas: it lacks least.
    nearest = max(sizes, key=lambda item: (item[0], -item[1]))
    refusal: ConfigError | PlanError | None = None
    fitter = Fitter(recipe, costs, profiles)
    # A replica of the largest workers fits if any does, so it rules sizes out for all numbers of replicas.
    alone = {size: group_workers(workers, size, 1) for size in {size for size, _ in sizes}}
    possible = {size for size, found in alone.items() if any(_may_fit(fitter, groups) for groups in found)}
    for size, num_replicas in sizes:
        fitting: list[tuple[float, Pipeline, dict[str, str]]] = []
        if size not in possible and (size, num_replicas) != nearest:
            continue
        for groups in group_workers(workers, size, num_replicas):
            if (size, num_replicas) != nearest and not _may_fit(fitter, groups):
                continue
            try:
                fitting.append(_fit(recipe, profiles, costs, groups, latency_seconds))
            except (ConfigError, PlanError) as error:
                if refusal is None or (size, num_replicas) == nearest:
                    refusal = error
        if fitting:
            _, pipeline, reasons = min(fitting, key=lambda item: item[0])
            spare = num_replicas - recipe.training.num_slots
            if spare > 0:
                holds = f"hold{'s' * (spare == 1)} no slot, as training.num_slots is {recipe.training.num_slots}"
                reasons["stages"] += f"; {_count(spare, 'replica')} {holds}"
            idle = len(workers) - size * num_replicas
            if idle:
                reasons["stages"] += f"; {idle} more worker{'s stay' if idle > 1 else ' stays'} idle"
            return pipeline, reasons
    assert refusal is not None
    if isinstance(refusal, ConfigError):
        raise refusal
    change = smallest_change(recipe, tensors, given, [worker.memory_bytes or NO_LIMIT for worker in workers])
    raise PlanError(f"{refusal}; {change}")


def group_workers(workers: Sequence[NodeOffer], size: int, num_replicas: int) -> list[Groups]:
    """Assign workers to places in one or two ways: largest workers first and, if that differs, largest workers last.

    Early stages hold more activations, and the last stage has the head: either may need most memory.
    """
    largest = sorted(
        workers, key=lambda worker: (-(worker.memory_bytes or NO_LIMIT), -worker.flops_per_second, worker.name)
    )
    groups = [largest[place * num_replicas : (place + 1) * num_replicas] for place in range(size)]
    least = [(_memory(group), speed) for group, speed in zip(groups, group_speeds(groups), strict=True)]
    return [groups] if least == least[::-1] else [groups, groups[::-1]]


def group_speeds(groups: Groups) -> list[float]:
    """Compute for each place the speed of its slowest worker relative to the fastest worker of all.

    Each speed is a short measurement on a machine that may be busy. Differences below NO_DIFFERENCE are ignored.
    """
    measured = [worker.flops_per_second for group in groups for worker in group if worker.flops_per_second]
    fastest = max(measured, default=0.0)
    speeds = [min((w.flops_per_second or fastest) / fastest for w in group) if fastest else 1.0 for group in groups]
    return [1.0 if speed > 1 - NO_DIFFERENCE else speed for speed in speeds]


def num_microbatches(training: TrainingConfig, num_replicas: int) -> int:
    """The number of microbatches in the longest run of a step."""
    return -(-training.num_slots // num_replicas) * (training.slot_batch // training.microbatch)


def stage_costs(
    cut: Sequence[range],
    profiles: Sequence[SegmentProfile],
    latency_seconds: float,
    speeds: Sequence[float],
    recompute: bool,
) -> Costs:
    """Compute the seconds of each op on each stage; a stage's worker has the speed of its place.

    The first stage sends no gradient on: its whole backward pass computes weight gradients. The other stages send the
    input's gradient before they compute weight gradients, unless they recompute.
    """
    compute = []
    for stage, segments in enumerate(cut):
        found = [profiles[segment] for segment in segments]
        backward = sum(profile.backward_seconds for profile in found)
        of_input = sum(profile.backward_input_seconds for profile in found) if stage else 0.0
        of_weights = sum(profile.backward_weight_seconds for profile in found) if stage else backward
        seconds = {
            Op.FORWARD: sum(profile.forward_seconds for profile in found),
            Op.BACKWARD: backward if recompute else of_input + of_weights,
            Op.BACKWARD_INPUT: of_input,
            Op.BACKWARD_WEIGHT: of_weights,
        }
        speed = speeds[stage % len(speeds)]
        compute.append({op: value / speed for op, value in seconds.items()})
    return Costs(compute, latency_seconds, input_first=not recompute)


def _may_fit(fitter: Fitter, groups: Groups) -> bool:
    """Whether a cut fits the groups' memory, as far as memory tells: an error of the schedule is found by `_fit`."""
    try:
        return fitter.fits([_memory(group) for group in groups])
    except ConfigError:
        return True


def segments_of_stages(stage_ends: Sequence[int], profiles: Sequence[SegmentProfile]) -> list[range]:
    """Convert the ends of the stages, given in forward units, to the segments of each stage."""
    ends = _unit_ends(profiles)
    bounds = [0, *(ends.index(end) + 1 for end in stage_ends)]
    return [range(begin, end) for begin, end in pairwise(bounds)]


# --- which sizes are tried --------------------------------------------------------------------------------------------


def _check(config: PipelineConfig, num_workers: int, segments: Sequence[str]) -> None:
    least = config.min_workers
    if num_workers < least:
        chunks = f" ({config.chunks} a worker)" if config.chunks > 1 else ""
        live = "none is" if not num_workers else "1 is" if num_workers == 1 else f"{num_workers} are"
        raise PlanError(
            f"pipeline.stages {config.stages}{chunks} needs {least} worker{'s' * (least > 1)}, {live} live; start "
            f"{least - num_workers} more with `gradstream serve worker`, or set pipeline.stages=auto"
        )
    stages = config.chunks if config.stages == "auto" else config.stages
    if stages > len(segments):
        raise ConfigError(
            f"pipeline.stages {stages} is more than the model's {len(segments)} segments ({segments[0]} to "
            f"{segments[-1]}); use at most {len(segments) // config.chunks * config.chunks}"
        )


def _sizes(config: PipelineConfig, num_workers: int, num_segments: int) -> Iterator[tuple[int, int]]:
    """Yield (workers of a replica, number of replicas), preferred ones first."""
    if config.stages != "auto":
        size = config.min_workers
        for num_replicas in range(num_workers // size, 0, -1):
            yield size, num_replicas
        return
    sizes = range(1, min(num_workers, num_segments // config.chunks) + 1)
    for size in sizes:
        yield size, num_workers // size
    fewer = [(size, replicas) for size in sizes for replicas in range(1, num_workers // size)]
    yield from sorted(fewer, key=lambda item: (-item[0] * item[1], item[0]))


# --- one size ---------------------------------------------------------------------------------------------------------


def _fit(
    recipe: Recipe,
    profiles: Sequence[SegmentProfile],
    costs: Sequence[SegmentCost],
    groups: Groups,
    latency_seconds: float,
) -> tuple[float, Pipeline, dict[str, str]]:
    """Plan the pipeline for these workers; return (seconds of the slowest stage, pipeline, reasons)."""
    config, training = recipe.pipeline, recipe.training
    size, num_replicas, chunks = len(groups), len(groups[0]), config.chunks
    now, runs = num_microbatches(training, training.num_slots if recipe.local else num_replicas), runs_of(recipe)
    names = schedules_for(recipe, size, runs)
    # 1. The cut, with memory for the activations that the schedule holds; for auto, the schedule that holds least.
    cut, cut_reason = _cut(costs, profiles, groups, chunks, lean_live(names, size, runs, chunks))
    speeds = group_speeds(groups)
    stage_cost = stage_costs(cut.segments, profiles, latency_seconds, speeds, training.recompute)
    # 2. The schedule.
    if config.schedule == "auto":
        rooms = [_room(place, size, cut, costs, profiles, groups) for place in range(size)]
        try:
            schedule, schedule_reason = choose_schedule(size, now, stage_cost, rooms, chunks, runs, names)
        except ConfigError as error:
            raise PlanError(str(error)) from None
        if training.recompute:
            schedule_reason += f"; {' and '.join(SPLIT)} would keep the recomputed activations"
    else:
        schedule = make_schedule(config.schedule, size, now, chunks)
        seconds = simulate(schedule, stage_cost).makespan
        schedule_reason = f"{schedule.name} as pipeline.schedule says, it takes {seconds:.3g} s"
    # 3. The memory that each worker needs with this cut and schedule.
    needs = tuple(
        _need(place, schedule.name, size, runs, chunks, cut.segments, costs, profiles) for place in range(size)
    )
    ends = _unit_ends(profiles)
    pipeline = Pipeline(
        tuple(ends[end - 1] for end in cut.ends), chunks, schedule.name, needs, tuple(map(tuple, groups))
    )
    per_worker = f", {chunks} a worker" if chunks > 1 else ""
    cuts = named([costs[end - 1].name for end in cut.ends[:-1]])
    many = len(needs) > MAX_NAMED
    needed = f"{human_bytes(min(needs))} to {human_bytes(max(needs))}" if many else ", ".join(map(human_bytes, needs))
    relative = [f"{speed:.2g}" for speed in ([min(speeds), max(speeds)] if many else speeds)]
    auto = ", the fewest that fit the workers' memory" if config.stages == "auto" else ""
    estimated = [profile.name for profile in profiles if not profile.measured]
    reasons = {
        "stages": f"stages: {len(cut.ends)}{per_worker}{auto}, in {_count(num_replicas, 'replica')} of "
        f"{_count(size, 'worker')}"
        + (f", cut after {cuts}" if cuts else "")
        + f"; {cut_reason}"
        + (f"; speeds by place {(' to ' if many else ', ').join(relative)}" if min(speeds) < 1 else "")
        + f"; a worker needs {needed} by its place"
        + (f"; times of {len(estimated)} of {len(profiles)} segments are estimates" if estimated else ""),
        "schedule": f"schedule: {schedule_reason} for {_count(now, 'microbatch')} a run",
    }
    return max(cut.seconds), pipeline, reasons


def _cut(
    costs: Sequence[SegmentCost],
    profiles: Sequence[SegmentProfile],
    groups: Groups,
    chunks: int,
    live: Sequence[int],
) -> tuple[StageCut, str]:
    """Cut for groups of workers; a stage must fit the smallest worker of its group. Raises PlanError if none fits."""
    # Memory that a worker needs once for all its stages is subtracted; each stage gets an equal share of the rest.
    working = working_bytes(profiles)
    notes = [f"{human_bytes(working)} are reserved to recompute a layer or to add tied gradients"] * bool(working)
    notes += [f"each of a worker's {chunks} stages is offered an equal share"] * (chunks > 1)
    speeds = group_speeds(groups)
    offers = []
    for stage in range(len(groups) * chunks):
        group = groups[stage % len(groups)]
        memory = _memory(group)
        smallest = min(group, key=lambda worker: worker.memory_bytes or NO_LIMIT)
        offered = offered_bytes(memory, working, chunks)
        offers.append(StageOffer(smallest.name, speeds[stage % len(groups)], offered, live[stage]))
    try:
        return cut_stages(costs, offers)
    except ConfigError as error:
        # The notes explain why the offer in the error is below the worker's memory.
        raise PlanError("; ".join([str(error), *notes])) from None


def _memory(group: Sequence[NodeOffer]) -> int:
    """The smallest memory of a group's workers; NO_LIMIT when none reported its memory."""
    return min(worker.memory_bytes or NO_LIMIT for worker in group)


def _room(
    place: int,
    size: int,
    cut: StageCut,
    costs: Sequence[SegmentCost],
    profiles: Sequence[SegmentProfile],
    groups: Groups,
) -> int:
    """The number of microbatches of one stage whose activations a place's workers can hold."""
    stages = [[costs[segment] for segment in cut.segments[stage]] for stage in range(place, len(cut.ends), size)]
    held = sum(segment.held_bytes for stage in stages for segment in stage)
    held += working_bytes(profiles)
    each = max(sum(segment.activation_bytes for segment in stage) for stage in stages)
    return max(0, _memory(groups[place]) - held) // max(1, each)


def _need(
    place: int,
    name: str,
    size: int,
    runs: tuple[int, ...],
    chunks: int,
    cut: Sequence[range],
    costs: Sequence[SegmentCost],
    profiles: Sequence[SegmentProfile],
) -> int:
    """The peak memory in bytes of the worker in a place, over the schedules of all run lengths."""
    mine = [segment for stage in range(place, len(cut), size) for segment in cut[stage]]
    held = sum(costs[segment].held_bytes for segment in mine) + max(profiles[s].working_bytes for s in mine)
    activations = [sum(costs[segment].activation_bytes for segment in segments) for segments in cut]
    if chunks == 1:
        return held + stage_live(name, size, runs, chunks)[place] * activations[place]
    most = 0
    for schedule in make_all(name, size, runs, chunks):
        now = 0
        for action in schedule.rows[place]:
            if action.op is Op.FORWARD:
                now += activations[action.stage]
                most = max(most, now)
            elif action.op is schedule.last_op:
                now -= activations[action.stage]
    return held + most


def _unit_ends(profiles: Sequence[SegmentProfile]) -> list[int]:
    """For each segment, the first forward unit after it."""
    return [max(profile.units) + 1 for profile in profiles]


def _count(number: int, word: str) -> str:
    plural = "es" if word.endswith("ch") else "s"
    return f"{number} {word}" if number == 1 else f"{number} {word}{plural}"
