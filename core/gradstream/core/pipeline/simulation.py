"""Simulation of schedules with measured costs, and the choice of the fastest one. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gradstream.core.errors import ConfigError
from gradstream.core.pipeline.schedule import SCHEDULES, Action, Op, Schedule, make_schedule, num_live, unavailable
from gradstream.core.pipeline.validation import live_activations


@dataclass(frozen=True)
class Costs:
    """The costs of a pipeline in seconds.

    `compute[stage][op]` is the time of each op on each stage, `latency` the time of a message between two workers.
    Where a full backward is missing, its time is the sum of its two parts. Where a part is missing, its time is half of
    the full backward. With `input_first` a full backward computes the gradient of the inputs first, and sends it before
    it computes the gradients of the weights.
    """

    compute: Sequence[Mapping[Op, float]]
    latency: float = 0.0
    input_first: bool = False

    def of(self, action: Action) -> float:
        """Seconds of an action."""
        seconds = self.compute[action.stage]
        if action.op in seconds:
            return seconds[action.op]
        if action.op is Op.BACKWARD:
            return seconds[Op.BACKWARD_INPUT] + seconds[Op.BACKWARD_WEIGHT]
        return seconds[Op.BACKWARD] / 2

    def until_given(self, action: Action) -> float:
        """Seconds from an action's begin until its result can be sent."""
        if self.input_first and action.op is Op.BACKWARD:
            action = Action(action.stage, Op.BACKWARD_INPUT, action.microbatch)
        return self.of(action)


@dataclass(frozen=True)
class Simulation:
    """The result of a simulation.

    `makespan` is the duration in seconds. `bubble` is the share of the workers' time in which they wait.
    `begins[worker][i]` is the time at which action i of the worker's row begins.
    """

    makespan: float
    bubble: float
    begins: tuple[tuple[float, ...], ...]


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Simulate a valid table: each worker keeps its row's order and begins an action once its inputs have arrived."""
    given: dict[Action, float] = {}
    begins: list[list[float]] = [[] for _ in schedule.rows]
    free = [0.0] * schedule.num_workers
    left = sum(map(len, schedule.rows))
    while left:
        before = left
        for worker, row in enumerate(schedule.rows):
            while len(begins[worker]) < len(row):
                action = row[len(begins[worker])]
                needed = schedule.needs(action)
                if any(item not in given for item in needed):
                    break
                arrivals = [
                    given[item] + (costs.latency if schedule.worker_of(item.stage) != worker else 0.0)
                    for item in needed
                ]
                begin = max([free[worker], *arrivals])
                begins[worker].append(begin)
                free[worker] = begin + costs.of(action)
                given[action] = begin + costs.until_given(action)
                left -= 1
        if left == before:
            raise ConfigError("schedule: the table cannot be run to its end; validate it first")
    makespan = max(free)
    busy = sum(costs.of(action) for row in schedule.rows for action in row)
    bubble = 1 - busy / (makespan * schedule.num_workers) if makespan else 0.0
    return Simulation(makespan, bubble, tuple(map(tuple, begins)))


def ideal_bubble(num_workers: int, num_microbatches: int) -> float:
    """The bubble of GPipe and 1F1B when all stages take equally long and send at the end of a pass.

    It is (P - 1) / (M + P - 1), for P workers and M microbatches.
    """
    return (num_workers - 1) / (num_microbatches + num_workers - 1)


def choose_schedule(
    num_workers: int,
    num_microbatches: int,
    costs: Costs,
    max_live: Sequence[int],
    num_chunks: int = 1,
    other_runs: Collection[int] = (),
    names: Collection[str] = SCHEDULES,
) -> tuple[Schedule, str]:
    """Choose the fastest schedule in `names` whose activations fit into every worker's memory; return it and why.

    `costs` has the stages of all chunks. `max_live[worker]` is the number of microbatches of one stage that the
    worker's memory holds. The schedule must also exist and fit for runs of `other_runs` microbatches, which a replica
    may have to compute later. Of equally fast schedules, the one that holds fewer activations wins. Raises ConfigError
    when none fits.
    """
    runs = sorted({num_microbatches, *other_runs})
    tried: list[tuple[float, int, int, Schedule]] = []
    too_large: dict[str, int] = {}  # schedule: the worker that lacks the most memory
    reasons = []
    for order, name in enumerate(names):
        reason = next(filter(None, (unavailable(name, num_workers, run, num_chunks) for run in runs)), "")
        if reason:
            reasons.append(reason)
            continue
        # `validate` is not called: it takes long for many microbatches, and tables of `make_schedule` are valid.
        if num_chunks == 1:
            live = tuple(num_live(name, num_workers, runs[-1], worker) for worker in range(num_workers))
        else:
            made = [make_schedule(name, num_workers, run, num_chunks) for run in runs]
            live = tuple(map(max, zip(*map(live_activations, made), strict=True)))
        lacking = [max(0, held - most) for held, most in zip(live, max_live, strict=True)]
        if any(lacking):
            too_large[name] = lacking.index(max(lacking))
            continue
        schedule = make_schedule(name, num_workers, num_microbatches, num_chunks)
        # Rounded to the microsecond: rounding errors must not decide between equal schedules.
        makespan = round(simulate(schedule, costs).makespan, 6)
        tried.append((makespan, max(live), order, schedule))
    if not tried and not too_large:
        raise ConfigError(reasons[-1])
    if not tried:
        worker = too_large.get("1f1b", next(iter(too_large.values())))
        raise ConfigError(
            f"no schedule fits: worker {worker} holds the activations of {max_live[worker]} microbatches; use smaller "
            f"microbatches, recomputation or more workers"
        )
    tried.sort(key=lambda item: item[:3])
    best = tried[0]
    others = ", ".join(f"{schedule.name} {makespan:.3g} s" for makespan, _, _, schedule in tried[1:])
    reason = f"{best[3].name} takes {best[0]:.3g} s"
    if others:
        reason += f"; {others}"
    if too_large:
        reason += f"; not enough memory for {', '.join(too_large)}"
    return best[3], reason
