"""The numbers for the picture of a job's losses: points, smoothed lines and marks."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradstream.client import Event, Job, StepMetrics

MAX_POINTS = 4000
"""Maximum number of points of a line; a picture has fewer columns."""
WINDOWS = 50
"""Approximate length of a job in windows of the smoothed line."""
_GONE = re.compile(r" is gone: | is lost: | has lost its state")
"""In events of nodes: a node went away (`Controller.close_session`), or its state is lost (`nodes/reunion.py`)."""
_RESUMED = re.compile(r"resumed\b")
"""The first word of an event of `Orders.resume`."""


class XAxis(StrEnum):
    """The horizontal axis of a picture."""

    steps = "steps"
    tokens = "tokens"


class MarkKind(StrEnum):
    """The kinds of marks, for events in a job's history."""

    RESUMED = "resumed"
    GONE = "node gone"


@dataclass(frozen=True)
class Mark:
    """An event before a step was committed; `x` is the step's place on the axis."""

    kind: MarkKind
    x: int


@dataclass(frozen=True)
class Series:
    """A job's points. `xs` belong to `losses`, `rate_xs` to `rates`; a validation pass has its own x.

    `num_steps` is the number of steps that the points stand for: of a round all of its inner steps.
    """

    job: Job
    xs: Sequence[int]
    losses: Sequence[float]
    rate_xs: Sequence[int]
    rates: Sequence[float]
    num_steps: int
    validations: Sequence[tuple[int, float]]
    marks: Sequence[Mark]


def series_of(job: Job, rows: Sequence[StepMetrics], events: Iterable[Event], axis: XAxis) -> Series:
    """The points of a job's rows, and the marks of its rows and events."""
    steps = [row for row in rows if row.loss is not None]
    places = _places(rows, axis)
    return Series(
        job=job,
        xs=_within(steps, rows, places, axis, 2),
        losses=[row.loss if row.loss is not None else math.nan for row in steps],
        rate_xs=_within(steps, rows, places, axis, 1),
        num_steps=sum(row.num_steps or 1 for row in steps),
        rates=[row.learning_rate if row.learning_rate is not None else math.nan for row in steps],
        validations=[(places[row.step], row.validation_loss) for row in rows if row.validation_loss is not None],
        marks=marks(steps, events, places),
    )


def _places(rows: Sequence[StepMetrics], axis: XAxis) -> dict[int, int]:
    """The place of each step on the axis: that of the version from which it starts, because its losses are of it."""
    if axis is XAxis.steps:
        return {row.step: row.step for row in rows}
    # The tokens before each step, up to the end of the row before. A row without a step adds none.
    before = [0, *(row.num_tokens for row in rows)]
    return {row.step: tokens for row, tokens in zip(rows, before, strict=False)}


def _within(
    steps: Sequence[StepMetrics], rows: Sequence[StepMetrics], places: dict[int, int], axis: XAxis, part: int
) -> list[int]:
    """The place of each value: that of its step, and of a round that of its middle (`part` 2) or last (1) step.

    A round's loss is a mean over its steps, and its learning rate that of its last step.
    """
    ends = {row.step: row.step + (row.num_steps or 1) if axis is XAxis.steps else row.num_tokens for row in rows}
    found = []
    for row in steps:
        begin, count = places[row.step], row.num_steps or 1
        found.append(begin + (ends[row.step] - begin) * (count - 1) // (part * count))
    return found


def marks(steps: Sequence[StepMetrics], events: Iterable[Event], places: dict[int, int]) -> list[Mark]:
    """Find where a job was resumed (a new epoch, or an order) and where nodes went away; one mark per kind and step."""
    found = {(MarkKind.RESUMED, step.step) for before, step in pairwise(steps) if step.epoch != before.epoch}
    # The times of one trajectory's commits rise: steps that were rolled back are not in it.
    times = [step.time.timestamp() if step.time is not None else 0.0 for step in steps]
    for event in events:
        gone = event.kind == "node" and _GONE.search(event.message) is not None
        resumed = event.kind == "state" and _RESUMED.match(event.message) is not None
        next_step = bisect_right(times, event.time.timestamp())
        if (gone or resumed) and 0 < next_step < len(steps):
            found.add((MarkKind.GONE if gone else MarkKind.RESUMED, steps[next_step].step))
    return [Mark(kind, places[step]) for kind, step in sorted(found, key=lambda mark: (mark[1], mark[0]))]


def smoothed(values: Sequence[float], half_width: int) -> list[float]:
    """Smooth values: each value's mean with up to `half_width` neighbours per side; NaN if none of them is finite.

    Near the beginning, where losses fall fast, only as many neighbours on the right are used as there are on the left:
    more would lower the line. Near the end there are fewer neighbours on the right.
    """
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    means = []
    for index in range(len(values)):
        reach = min(half_width, index)
        begin, end = index - reach, min(len(values), index + reach + 1)
        count = counts[end] - counts[begin]
        means.append((sums[end] - sums[begin]) / count if count else math.nan)
    return means


def half_width_of(num_steps: int) -> int:
    """The number of neighbours per side for a job of `num_steps` steps; 0 for a job of a few steps."""
    return max(0, min(num_steps // 10, max(2, num_steps // (2 * WINDOWS))))


def envelope(xs: Sequence[int], values: Sequence[float], max_points: int = MAX_POINTS) -> tuple[list[int], list[float]]:
    """Reduce points to about `max_points` that draw the same picture: the lowest and highest of each run of points."""
    run = -(-2 * len(values) // max_points)
    if run <= 2:
        return list(xs), list(values)
    chosen: list[int] = []
    for begin in range(0, len(values), run):
        finite = [index for index in range(begin, min(begin + run, len(values))) if math.isfinite(values[index])]
        if finite:
            ends = {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
            chosen += sorted(ends)
    return [xs[index] for index in chosen], [values[index] for index in chosen]


def thinned(xs: Sequence[int], values: Sequence[float], max_points: int = MAX_POINTS) -> tuple[list[int], list[float]]:
    """Reduce a smooth line to about `max_points` evenly spaced points, and the last one."""
    stride = max(1, -(-len(xs) // max_points))
    chosen = sorted({*range(0, len(xs), stride), *([len(xs) - 1] if xs else [])})
    return [xs[index] for index in chosen], [values[index] for index in chosen]
