"""The validator of schedules, and the activations that a schedule keeps in memory. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradstream.core.errors import ConfigError
from gradstream.core.pipeline.schedule import MAX_MISSING, Action, Op, Row, Schedule


@dataclass(frozen=True)
class Bounds:
    """Upper bounds of a valid table, by worker.

    `live_activations` is the largest number of (stage, microbatch) pairs whose activations the worker holds at once.
    `waiting_messages` is the largest number of activations and gradients from neighbours that wait at the worker, for
    any speeds of the workers.
    """

    live_activations: tuple[int, ...]
    waiting_messages: tuple[int, ...]


def validate(schedule: Schedule) -> Bounds:
    """Check a table: every stage computes every microbatch once, on the right worker, and no worker waits for ever.

    Raises ConfigError with the first action that is wrong.
    """
    rows, num_stages = schedule.rows, schedule.num_stages
    ops = [Op.FORWARD, Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT] if schedule.split else [Op.FORWARD, Op.BACKWARD]
    expected, found = num_stages * schedule.num_microbatches * len(ops), sum(map(len, rows))
    if expected > found + MAX_MISSING:  # the counts cannot be meant: do not build the set of missing actions
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
    waiting = tuple(_max_waiting(schedule, worker) for worker in range(schedule.num_workers))
    return Bounds(live, waiting)


def _advance(schedule: Schedule, done: set[Action], places: list[int], limits: Sequence[int]) -> None:
    """Run every row from its place until an action's inputs are missing, or up to its limit."""
    moved = True
    while moved:
        moved = False
        for worker, row in enumerate(schedule.rows):
            while places[worker] < limits[worker] and done.issuperset(schedule.needs(row[places[worker]])):
                done.add(row[places[worker]])
                places[worker] += 1
                moved = True


def live_activations(schedule: Schedule) -> tuple[int, ...]:
    """By worker, the largest number of (stage, microbatch) pairs whose activations it holds at once."""
    return tuple(_max_live(row, schedule.last_op) for row in schedule.rows)


def _max_live(row: Row, last: Op) -> int:
    live = most = 0
    for action in row:
        live += (action.op is Op.FORWARD) - (action.op is last)
        most = max(most, live)
    return most


def _max_waiting(schedule: Schedule, worker: int) -> int:
    """Largest number of messages that wait at a worker while all other workers run as far ahead as they can."""
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
        # This worker has done `held` of its actions and stops there; the others continue until they need its results.
        limits[worker] = held
        _advance(schedule, done, places, limits)
        most = max(most, sum(item in done and place >= held for item, place in needed.items()))
    return most
