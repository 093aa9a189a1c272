"""Pipeline schedules as tables: the order in which each worker computes its microbatches.

`validation` checks a table, `simulation` computes its duration.

A pipeline has `num_workers` workers with `num_chunks` stages each. Stage s is on worker s % num_workers, so a worker's
chunk c is stage c * num_workers + worker, and each stage's neighbours are on the neighbouring workers, in a ring.

Tables use the notation of torch.distributed.pipelining: "2F0" is the forward pass of microbatch 0 on stage 2. Torch's
runtime can load them as CSV.

All schedules have three phases: forwards that fill the pipeline, then a forward and a backward in turn, then the
remaining backwards. They differ in the number of forwards in the first phase, and in whether the backward is split:

- gpipe (Huang et al. 2019): all forwards.
- 1f1b (PipeDream-flush, Narayanan et al. 2021): one forward for each worker behind this one. The first backward then
  arrives when it is due.
- eager-1f1b: two forwards for each worker behind this one. The second ones overlap the latency of the links.
- interleaved-1f1b (Narayanan et al. 2021): two forwards for each worker behind this one, and one round through all
  chunks but the last.
- zero-bubble (ZB-H1, Qi et al. 2024): split backwards. The pass for the inputs, for which the worker before waits,
  comes at once. The pass for the weights fills the time in which the worker would wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import islice

from gradstream.core.errors import ConfigError


class Op(StrEnum):
    """Kinds of computation. BACKWARD does the work of BACKWARD_INPUT and then BACKWARD_WEIGHT."""

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
MAX_MISSING = 100_000
"""Number of missing actions up to which the validator names the first one."""


@dataclass(frozen=True)
class Schedule:
    """A schedule's table, with one row for each worker."""

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
        """Whether backward passes are split into two parts."""
        return any(action.op in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT) for row in self.rows for action in row)

    @property
    def last_op(self) -> Op:
        """The op after which a microbatch's activations are freed."""
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
        """The table as CSV, one line for each worker, as torch.distributed.pipelining loads it ("compute_only")."""
        return "".join(",".join(map(str, row)) + "\n" for row in self.rows)


def make_schedule(name: str, num_workers: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """The table of a schedule. Raises ConfigError for a combination that does not exist."""
    reason = unavailable(name, num_workers, num_microbatches, num_chunks)
    if reason:
        raise ConfigError(reason)
    rows = tuple(_row(name, worker, num_workers, num_microbatches, num_chunks) for worker in range(num_workers))
    return Schedule(name, num_microbatches, num_chunks, rows)


def unavailable(name: str, num_workers: int, num_microbatches: int, num_chunks: int) -> str:
    """The reason why there is no such schedule; empty if there is one."""
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


def max_slots(name: str, num_workers: int, per_slot: int, num_chunks: int, num_slots: int) -> int:
    """The largest number of slots, at most `num_slots`, that one table can compute one after the other.

    Each slot has `per_slot` microbatches.
    """
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


def num_live(name: str, num_workers: int, num_microbatches: int, worker: int) -> int:
    """The maximum number of microbatches whose activations a worker with one chunk holds at once.

    It never falls with `num_microbatches`.
    """
    behind = num_workers - 1 - worker
    limit = {
        "gpipe": num_microbatches,
        "1f1b": behind + 1,
        "eager-1f1b": 2 * behind + 1,
        "zero-bubble": num_workers,
    }[name]
    return min(num_microbatches, limit)


# --- tables -----------------------------------------------------------------------------------------------------------


def _num_rounds(num_workers: int, num_microbatches: int) -> int:
    """Number of rounds. A worker takes one round of microbatches through all its chunks before the next round."""
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
        # A worker late in the pipeline waits little at first. Its passes for the weights come later, when the workers
        # before it compute theirs too.
        if split and number >= worker:
            row += islice(weights, 1)
    if split:
        row += weights
    return tuple(row)


def _passes(
    worker: int, num_workers: int, num_microbatches: int, num_chunks: int, round_size: int, op: Op
) -> Iterator[Action]:
    """The actions of one op over all microbatches and chunks of a worker.

    Forwards go through the chunks in ascending order, backwards in descending order.
    """
    chunks = range(num_chunks) if op is Op.FORWARD else range(num_chunks - 1, -1, -1)
    for begin in range(0, num_microbatches, round_size):
        for chunk in chunks:
            for microbatch in range(begin, begin + round_size):
                yield Action(chunk * num_workers + worker, op, microbatch)
