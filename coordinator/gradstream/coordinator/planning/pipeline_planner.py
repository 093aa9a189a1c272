"""Plan the pipeline: number of stages, cuts, workers and schedule. Pure functions that return (decision, reason).

Memory is planned for a replica that holds every slot, because it holds all slots once the other replicas are gone. Time
is planned for the current number of replicas. A run computes all slots of a replica one after the other, so the number
of its microbatches depends on the number of replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from gradstream.coordinator.planning.needs import NodeOffer, human_bytes, worker_bytes
from gradstream.coordinator.planning.stages import SegmentCost, StageCut, StageOffer, cut_stages
from gradstream.core.errors import ConfigError, PlanError
from gradstream.core.model.profile import SegmentProfile
from gradstream.core.pipeline.schedule import SCHEDULES, SPLIT, Op, Schedule, make_schedule, unavailable
from gradstream.core.pipeline.simulation import Costs, choose_schedule, simulate
from gradstream.core.plan.fragments import Tensor
from gradstream.core.recipe.recipe import PipelineConfig, Recipe, TrainingConfig

LATENCY_SECONDS = 0.0005
NO_DIFFERENCE = 1 / 3
"""The speeds measured on two threads of one core can differ by as much, depending on the load of the other thread."""
_NO_LIMIT = 1 << 62

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
    _check(config, len(workers), [cost.name for cost in costs])
    sizes = list(_sizes(config, len(workers), len(costs)))
    # If no size fits, the error comes from the one with the most stages on the fewest replicas: it lacks least.
    nearest = max(sizes, key=lambda item: (item[0], -item[1]))
    refusal: ConfigError | PlanError | None = None
    held_bytes = sum(cost.held_bytes for cost in costs)
    for size, num_replicas in sizes:
        fitting: list[tuple[float, Pipeline, dict[str, str]]] = []
        for groups in group_workers(workers, size, num_replicas):
            if held_bytes > sum(map(_memory, groups)) and (size, num_replicas) != nearest:
                continue
            try:
                fitting.append(_fit(recipe, profiles, costs, groups, latency_seconds))
            except (ConfigError, PlanError) as error:
                if refusal is None or (size, num_replicas) == nearest:
                    refusal = error
        if fitting:
            _, pipeline, reasons = min(fitting, key=lambda item: item[0])
            idle = len(workers) - size * num_replicas
            if idle:
                reasons["stages"] += f"; {idle} more worker{'s stay' if idle > 1 else ' stays'} idle"
            return pipeline, reasons
    assert refusal is not None
    raise refusal


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


def group_workers(workers: Sequence[NodeOffer], size: int, num_replicas: int) -> list[Groups]:
    """Assign workers to places in one or two ways: largest workers first and, if that differs, largest workers last.

    Early stages hold more activations, and the last stage has the head: either may need most memory.
    """
    largest = sorted(
        workers, key=lambda worker: (-(worker.memory_bytes or _NO_LIMIT), -worker.flops_per_second, worker.name)
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
    now, runs = num_microbatches(training, num_replicas), _runs(training)
    names: tuple[str, ...] = (config.schedule,)
    if config.schedule == "auto":
        names = tuple(name for name in SCHEDULES if not (training.recompute and name in SPLIT))
    lacks = {name: next(filter(None, (unavailable(name, size, run, chunks) for run in runs)), "") for name in names}
    names = tuple(name for name in names if not lacks[name])
    if not names:
        raise ConfigError(
            f"{list(lacks.values())[-1]}, of training.microbatch={training.microbatch} samples, however many slots a "
            f"replica holds"
        )
    # 1. The cut, with memory for the activations that the schedule holds; for auto, the schedule that holds least.
    lives = {name: _stage_live(name, size, runs, chunks) for name in names}
    lean = min(names, key=lambda name: sum(lives[name]))
    cut, cut_reason = _cut(costs, profiles, groups, chunks, lives[lean])
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
        _need(place, _make_all(schedule.name, size, runs, chunks), cut.segments, costs, profiles)
        for place in range(size)
    )
    ends = _unit_ends(profiles)
    pipeline = Pipeline(
        tuple(ends[end - 1] for end in cut.ends), chunks, schedule.name, needs, tuple(map(tuple, groups))
    )
    per_worker = f", {chunks} a worker" if chunks > 1 else ""
    cuts = ", ".join(costs[end - 1].name for end in cut.ends[:-1])
    auto = ", the fewest that fit the workers' memory" if config.stages == "auto" else ""
    estimated = [profile.name for profile in profiles if not profile.measured]
    reasons = {
        "stages": f"stages: {len(cut.ends)}{per_worker}{auto}, in {_count(num_replicas, 'replica')} of "
        f"{_count(size, 'worker')}"
        + (f", cut after {cuts}" if cuts else "")
        + f"; {cut_reason}"
        + (f"; speeds by place {', '.join(f'{speed:.2g}' for speed in speeds)}" if min(speeds) < 1 else "")
        + f"; a worker needs {', '.join(map(human_bytes, needs))} by its place"
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
    working = max(profile.working_bytes for profile in profiles)
    notes = [f"{human_bytes(working)} are reserved to recompute a layer"] * bool(working)
    notes += [f"each of a worker's {chunks} stages is offered an equal share"] * (chunks > 1)
    speeds = group_speeds(groups)
    offers = []
    for stage in range(len(groups) * chunks):
        group = groups[stage % len(groups)]
        memory = _memory(group)
        smallest = min(group, key=lambda worker: worker.memory_bytes or _NO_LIMIT)
        offered = 0 if memory == _NO_LIMIT else max(1, (memory - working) // chunks)
        offers.append(StageOffer(smallest.name, speeds[stage % len(groups)], offered, live[stage]))
    try:
        return cut_stages(costs, offers)
    except ConfigError as error:
        # The notes explain why the offer in the error is below the worker's memory.
        raise PlanError("; ".join([str(error), *notes])) from None


def _memory(group: Sequence[NodeOffer]) -> int:
    """The smallest memory of a group's workers; _NO_LIMIT when none reported its memory."""
    return min(worker.memory_bytes or _NO_LIMIT for worker in group)


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
    held += max(profiles[segment].working_bytes for segment in range(len(profiles)))
    each = max(sum(segment.activation_bytes for segment in stage) for stage in stages)
    return max(0, _memory(groups[place]) - held) // max(1, each)


def _need(
    place: int,
    schedules: Sequence[Schedule],
    cut: Sequence[range],
    costs: Sequence[SegmentCost],
    profiles: Sequence[SegmentProfile],
) -> int:
    """The peak memory in bytes of the worker in a place, over the schedules of all run lengths."""
    mine = [segment for stage in range(place, len(cut), schedules[0].num_workers) for segment in cut[stage]]
    held = sum(costs[segment].held_bytes for segment in mine) + max(profiles[s].working_bytes for s in mine)
    activations = [sum(costs[segment].activation_bytes for segment in segments) for segments in cut]
    most = 0
    for schedule in schedules:
        now = 0
        for action in schedule.rows[place]:
            if action.op is Op.FORWARD:
                now += activations[action.stage]
                most = max(most, now)
            elif action.op is schedule.last_op:
                now -= activations[action.stage]
    return held + most


# --- runs -------------------------------------------------------------------------------------------------------------


def _runs(training: TrainingConfig) -> tuple[int, ...]:
    """The numbers of microbatches of all possible runs, for any number of replicas; slots are distributed evenly."""
    slots = training.num_slots
    shares = {share for replicas in range(1, slots + 1) for share in (slots // replicas, -(-slots // replicas))}
    return tuple(share * (training.slot_batch // training.microbatch) for share in sorted(shares))


@lru_cache(maxsize=16)
def _make_all(name: str, size: int, runs: tuple[int, ...], chunks: int) -> tuple[Schedule, ...]:
    """Make a schedule for runs of each of these lengths."""
    return tuple(make_schedule(name, size, run, chunks) for run in runs)


@lru_cache(maxsize=256)
def _stage_live(name: str, size: int, runs: tuple[int, ...], chunks: int) -> tuple[int, ...]:
    """For each stage, the maximum number of microbatches whose activations it holds at once."""
    most = [0] * (size * chunks)
    for schedule in _make_all(name, size, runs, chunks):
        for row in schedule.rows:
            now = dict.fromkeys((action.stage for action in row), 0)
            for action in row:
                now[action.stage] += (action.op is Op.FORWARD) - (action.op is schedule.last_op)
                most[action.stage] = max(most[action.stage], now[action.stage])
    return tuple(most)


def _unit_ends(profiles: Sequence[SegmentProfile]) -> list[int]:
    """For each segment, the first forward unit after it."""
    return [max(profile.units) + 1 for profile in profiles]


def _count(number: int, word: str) -> str:
    plural = "es" if word.endswith("ch") else "s"
    return f"{number} {word}" if number == 1 else f"{number} {word}{plural}"
