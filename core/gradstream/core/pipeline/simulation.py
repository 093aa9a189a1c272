"""How long a schedule takes with the costs at hand, and which schedule is the fastest. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gradstream.core.errors import ConfigError
from gradstream.core.pipeline.schedule import SCHEDULES, Action, Op, Schedule, make_schedule, unavailable
from gradstream.core.pipeline.validation import live_activations


@dataclass(frozen=True)
class Costs:
    """Seconds: of each op on each stage, `compute[stage][op]`, and of a message between two workers, `latency`. A full
    backward may be given as its two parts, and a split one by halves of the full one. `input_first`: also a full one
    makes the gradient of the inputs first, and gives it away before it makes those of the weights."""

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
        """Seconds from an action's begin until others can have what it gives."""
        if self.input_first and action.op is Op.BACKWARD:
            action = Action(action.stage, Op.BACKWARD_INPUT, action.microbatch)
        return self.of(action)


@dataclass(frozen=True)
class Simulation:
    """What a schedule takes. `begins[worker][i]` is when the row's action i begins; `bubble` is the share of the
    workers' time in which they wait."""

    makespan: float
    bubble: float
    begins: tuple[tuple[float, ...], ...]


def simulate(schedule: Schedule, costs: Costs) -> Simulation:
    """Run a valid table with each worker in its own order, each action as soon as what it needs is there."""
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
    """The share of time that GPipe and 1F1B wait when all stages take equally long and give what the neighbour needs at
    the end of a pass: (P - 1) / (M + P - 1)."""
    return (num_workers - 1) / (num_microbatches + num_workers - 1)


def choose_schedule(
    num_workers: int,
    num_microbatches: int,
    costs: Costs,
    most_live: Sequence[int],
    num_chunks: int = 1,
    other_runs: Collection[int] = (),
    names: Collection[str] = SCHEDULES,
) -> tuple[Schedule, str]:
    """The fastest schedule, of those named, of which every worker can hold the activations, and why.

    `costs` has the stages of all chunks; `most_live[worker]` is how many microbatches of one stage its memory holds.
    The schedule must exist and fit for runs of `other_runs` microbatches too, which a replica may come to compute.
    Between equals the one that holds less wins. Raises ConfigError when none fits.
    """
    runs = sorted({num_microbatches, *other_runs})
    tried: list[tuple[float, int, int, Schedule]] = []
    too_large: dict[str, int] = {}  # with the worker that lacks most
    reasons = []
    for order, name in enumerate(names):
        reason = next(filter(None, (unavailable(name, num_workers, run, num_chunks) for run in runs)), "")
        if reason:
            reasons.append(reason)
            continue
        schedule = make_schedule(name, num_workers, num_microbatches, num_chunks)
        # Not by `validate`, which takes long for many microbatches: made tables are valid.
        made = [make_schedule(name, num_workers, run, num_chunks) for run in runs]
        live = tuple(map(max, zip(*map(live_activations, made), strict=True)))
        lacking = [max(0, held - most) for held, most in zip(live, most_live, strict=True)]
        if any(lacking):
            too_large[name] = lacking.index(max(lacking))
            continue
        # To the microsecond, so that rounding does not decide.
        makespan = round(simulate(schedule, costs).makespan, 6)
        tried.append((makespan, max(live), order, schedule))
    if not tried and not too_large:
        raise ConfigError(reasons[-1])
    if not tried:
        worker = too_large.get("1f1b", next(iter(too_large.values())))
        raise ConfigError(
            f"no schedule fits: worker {worker} holds the activations of {most_live[worker]} microbatches; use smaller "
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
