"""Pipeline schedules: which microbatch each worker computes when, as tables; a validator and a simulator of them.

A pipeline has `num_workers` workers with `num_chunks` stages each. Stage s is on worker s % num_workers, so a worker's
chunk c is stage c * num_workers + worker, and each stage's neighbours are on the neighbouring workers, in a ring.

Tables are in the notation of torch.distributed.pipelining, "2F0" for the forward pass of microbatch 0 on stage 2, and
are what torch's runtime loads as CSV.

All schedules here have one shape: some forwards to fill the pipeline, then a forward and a backward in turn, then the
backwards that are left. They differ in how many forwards come first, and in whether the backward is split:

- gpipe (Huang et al. 2019): all forwards first.
- 1f1b (PipeDream-flush, Narayanan et al. 2021): one for each worker behind this one, so that the first backward arrives
  when it is due.
- eager-1f1b: two for each. The extra ones are on their way while a link with latency carries the others.
- interleaved-1f1b (Narayanan et al. 2021): two for each, and rounds through all chunks but the last.
- zero-bubble (ZB-H1, Qi et al. 2024): the backward pass of the inputs alone, which the worker before waits for, comes
  at once; that of the weights fills the time in which the worker would wait.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import islice

from gradstream.core.errors import ConfigError


class Op(StrEnum):
    """What is computed. A full backward is the same as that of the inputs and then that of the weights."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


@dataclass(frozen=True, order=True)
class Action:
    """One computation of one microbatch on one stage."""

    stage: int
    op: Op
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"


Row = tuple[Action, ...]
"""The actions of one worker, in order."""

SCHEDULES = ("gpipe", "1f1b", "eager-1f1b", "interleaved-1f1b", "zero-bubble")
SPLIT = ("zero-bubble",)
"""Schedules whose backward pass has two parts."""
_ACTION = re.compile(r"([0-9]{1,9})([FBIW])([0-9]{1,9})")
MAX_MISSING = 100_000
"""Actions that a table may lack to be told the first of them."""


@dataclass(frozen=True)
class Schedule:
    """A table: one row a worker."""

    name: str
    num_microbatches: int
    num_chunks: int
    rows: tuple[Row, ...]

    @property
    def num_workers(self) -> int:
        return len(self.rows)

    @property
    def num_stages(self) -> int:
        return self.num_workers * self.num_chunks

    def worker_of(self, stage: int) -> int:
        """The worker that has a stage."""
        return stage % self.num_workers

    @cached_property
    def split(self) -> bool:
        """Whether backward passes are in two parts."""
        return any(action.op in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT) for row in self.rows for action in row)

    @property
    def last_op(self) -> Op:
        """The op after which a microbatch's activations are given up."""
        return Op.BACKWARD_WEIGHT if self.split else Op.BACKWARD

    def needs(self, action: Action) -> list[Action]:
        """The actions whose results an action uses."""
        stage, microbatch = action.stage, action.microbatch
        backward = Op.BACKWARD_INPUT if self.split else Op.BACKWARD
        if action.op is Op.FORWARD:
            return [Action(stage - 1, Op.FORWARD, microbatch)] if stage else []
        if action.op is Op.BACKWARD_WEIGHT:
            return [Action(stage, Op.BACKWARD_INPUT, microbatch)]
        own = Action(stage, Op.FORWARD, microbatch)
        return [own] if stage == self.num_stages - 1 else [own, Action(stage + 1, backward, microbatch)]

    def to_csv(self) -> str:
        """A line a worker, as torch.distributed.pipelining loads it ("compute_only")."""
        return "".join(",".join(map(str, row)) + "\n" for row in self.rows)


def make_schedule(name: str, num_workers: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """The table of a schedule. Raises ConfigError for a combination that does not exist."""
    reason = unavailable(name, num_workers, num_microbatches, num_chunks)
    if reason:
        raise ConfigError(reason)
    rows = tuple(_row(name, worker, num_workers, num_microbatches, num_chunks) for worker in range(num_workers))
    return Schedule(name, num_microbatches, num_chunks, rows)


def unavailable(name: str, num_workers: int, num_microbatches: int, num_chunks: int) -> str:
    """Why there is no such schedule; empty if there is."""
    if name not in SCHEDULES:
        return f"schedule '{name}' is not known; there are {', '.join(SCHEDULES)}"
    if min(num_workers, num_microbatches, num_chunks) < 1:
        return f"schedule {name}: workers, microbatches and chunks must each be at least 1"
    if num_chunks > 1 and name not in ("interleaved-1f1b", "zero-bubble"):
        return (
            f"schedule {name} has one chunk a worker, not {num_chunks}; interleaved-1f1b and zero-bubble have several"
        )
    if num_chunks == 1 and name == "interleaved-1f1b":
        return "schedule interleaved-1f1b needs at least 2 chunks a worker; with one it is eager-1f1b"
    rounds = _num_rounds(num_workers, num_microbatches)
    if num_chunks > 1 and num_microbatches % rounds:
        return (
            f"schedule {name}: {num_microbatches} microbatches cannot go in {rounds} equal rounds through the "
            f"{num_chunks} chunks of {num_workers} workers; use a multiple of {num_workers}"
        )
    return ""


def most_slots(name: str, num_workers: int, per_slot: int, num_chunks: int, num_slots: int) -> int:
    """How many of `num_slots` slots with `per_slot` microbatches each one table can take one after the other."""
    if not name:
        return 1
    return next(
        (
            count
            for count in range(num_slots, 1, -1)
            if not unavailable(name, num_workers, count * per_slot, num_chunks)
        ),
        1,
    )


def parse_csv(text: str, name: str = "custom") -> Schedule:
    """A table in torch's notation; empty cells are idle time and are left out. Raises ConfigError."""
    rows = []
    for line in text.strip().splitlines():
        actions = []
        for cell in filter(None, (cell.strip() for cell in line.split(","))):
            match = _ACTION.fullmatch(cell)
            if match is None:
                raise ConfigError(f"schedule: '{cell}' is not an action such as 0F3, 2B0, 1I0 or 1W0")
            actions.append(Action(int(match[1]), Op(match[2]), int(match[3])))
        rows.append(tuple(actions))
    actions = [action for row in rows for action in row]
    if not actions:
        raise ConfigError("schedule: the table is empty")
    num_stages = 1 + max(action.stage for action in actions)
    if num_stages % len(rows):
        raise ConfigError(f"schedule: {num_stages} stages cannot be dealt to {len(rows)} workers")
    num_microbatches = 1 + max(action.microbatch for action in actions)
    return Schedule(name, num_microbatches, num_stages // len(rows), tuple(rows))


# --- tables -----------------------------------------------------------------------------------------------------------


def _num_rounds(num_workers: int, num_microbatches: int) -> int:
    """Through all its chunks a worker goes with one round of microbatches after another."""
    return max(1, num_microbatches // num_workers)


def _row(name: str, worker: int, num_workers: int, num_microbatches: int, num_chunks: int) -> Row:
    round_size = num_microbatches // _num_rounds(num_workers, num_microbatches) if num_chunks > 1 else num_microbatches
    behind = num_workers - 1 - worker
    total = num_chunks * num_microbatches
    fill = {
        "gpipe": total,
        "1f1b": behind,
        "eager-1f1b": 2 * behind,
        "interleaved-1f1b": (num_chunks - 1) * round_size + 2 * behind,
        "zero-bubble": (num_chunks - 1) * round_size + behind,
    }[name]
    split = name == "zero-bubble"
    forwards = _passes(worker, num_workers, num_microbatches, num_chunks, round_size, Op.FORWARD)
    backward = Op.BACKWARD_INPUT if split else Op.BACKWARD
    backwards = _passes(worker, num_workers, num_microbatches, num_chunks, round_size, backward)
    weights = _passes(worker, num_workers, num_microbatches, num_chunks, round_size, Op.BACKWARD_WEIGHT)
    row = list(islice(forwards, min(fill, total)))
    for number, action in enumerate(backwards):
        row += islice(forwards, 1)
        row.append(action)
        # A worker late in the pipeline has little to wait for: its weights' passes come later, when those before it
        # have nothing else to do either.
        if split and number >= worker:
            row += islice(weights, 1)
    if split:
        row += weights
    return tuple(row)


def _passes(
    worker: int, num_workers: int, num_microbatches: int, num_chunks: int, round_size: int, op: Op
) -> Iterator[Action]:
    """One pass over all microbatches and chunks of a worker: forwards go up through the chunks, backwards down."""
    chunks = range(num_chunks) if op is Op.FORWARD else range(num_chunks - 1, -1, -1)
    for begin in range(0, num_microbatches, round_size):
        for chunk in chunks:
            for microbatch in range(begin, begin + round_size):
                yield Action(chunk * num_workers + worker, op, microbatch)


# --- validity ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """What the validator finds of a valid table, by worker: `live_activations` is the largest number of (stage,
    microbatch) whose activations a worker holds at once; `waiting_messages` the largest number of activations and
    gradients from neighbours that wait at a worker, however the workers' speeds may be."""

    live_activations: tuple[int, ...]
    waiting_messages: tuple[int, ...]


def validate(schedule: Schedule) -> Bounds:
    """Check that a table computes every microbatch on every stage once, each stage on its own worker, and can be run to
    its end. Raises ConfigError with the first action that is wrong."""
    rows, num_stages = schedule.rows, schedule.num_stages
    ops = [Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT] if schedule.split else [Op.FORWARD, Op.BACKWARD]
    expected, found = num_stages * schedule.num_microbatches * len(ops), sum(map(len, rows))
    if expected > found + MAX_MISSING:  # by a number that means nothing: the rest is not even listed
        raise ConfigError(
            f"schedule: {found} actions, where {num_stages} stages and {schedule.num_microbatches} microbatches need "
            f"{expected}"
        )
    missing = {
        Action(stage, op, microbatch)
        for stage in range(num_stages)
        for op in ops
        for microbatch in range(schedule.num_microbatches)
    }
    for worker, row in enumerate(rows):
        for action in row:
            if schedule.worker_of(action.stage) != worker:
                raise ConfigError(f"schedule: {action} is in the row of worker {worker}, which does not have its stage")
            if action not in missing:
                raise ConfigError(f"schedule: {action} is there twice, or beside the other kind of backward")
            missing.remove(action)
    if missing:
        raise ConfigError(f"schedule: {min(missing)} is missing")
    places = [0] * schedule.num_workers
    _advance(schedule, set(), places, list(map(len, rows)))
    for worker, (row, place) in enumerate(zip(rows, places, strict=True)):
        if place < len(row):
            waits = " and ".join(map(str, schedule.needs(row[place])))
            raise ConfigError(f"schedule: worker {worker} waits for ever at {row[place]}, which needs {waits}")
    live = live_activations(schedule)
    waiting = tuple(_most_waiting(schedule, worker) for worker in range(schedule.num_workers))
    return Bounds(live, waiting)


def _advance(schedule: Schedule, done: set[Action], places: list[int], limits: Sequence[int]) -> None:
    """Run every row from its place as far as it goes, or to its limit."""
    moved = True
    while moved:
        moved = False
        for worker, row in enumerate(schedule.rows):
            while places[worker] < limits[worker] and done.issuperset(schedule.needs(row[places[worker]])):
                done.add(row[places[worker]])
                places[worker] += 1
                moved = True


def live_activations(schedule: Schedule) -> tuple[int, ...]:
    """By worker, the largest number of (stage, microbatch) whose activations it holds at once."""
    return tuple(_most_live(row, schedule.last_op) for row in schedule.rows)


def _most_live(row: Row, last: Op) -> int:
    live = most = 0
    for action in row:
        live += (action.op is Op.FORWARD) - (action.op is last)
        most = max(most, live)
    return most


def _most_waiting(schedule: Schedule, worker: int) -> int:
    """Messages that wait at a worker when all others run ahead as far as they can without it."""
    row = schedule.rows[worker]
    # Neighbours' actions, and where in this row they are used.
    needed = {
        item: place
        for place, action in enumerate(row)
        for item in schedule.needs(action)
        if schedule.worker_of(item.stage) != worker
    }
    done: set[Action] = set()
    places = [0] * schedule.num_workers
    limits = list(map(len, schedule.rows))
    most = 0
    for held in range(len(row) + 1):
        # This worker has done `held` of its actions, and stands still; the others go on until they need it.
        limits[worker] = held
        _advance(schedule, done, places, limits)
        most = max(most, sum(item in done and place >= held for item, place in needed.items()))
    return most


# --- time -------------------------------------------------------------------------------------------------------------


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
