"""Measure how long the workers of a pipeline wait, from the passes in their timelines, grouped into runs.

A replica runs its schedule once over all the slots that it holds, so a run consists of the passes of some slots on all
stages. A timeline does not name replica or run; both follow from the passes. Workers that share a slot in a version
belong to one replica. Slots between which one of its workers alternates belong to one run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradstream.core.pipeline.simulation import ideal_bubble
from gradstream.core.telemetry.timeline import PASSES, SpanKind, Timeline


class Pass(NamedTuple):
    """A microbatch's pass on a stage. Times are in microseconds; `microbatch` counts within the slot."""

    begin_us: int
    duration_us: int
    kind: SpanKind
    slot: int
    stage: int
    microbatch: int

    @property
    def end_us(self) -> int:
        return self.begin_us + self.duration_us


@dataclass(frozen=True)
class Run:
    """One run of a replica's schedule. Times are in microseconds.

    `workers` are in the order of the stages, `passes[i]` are the passes of worker i in order, and `slots` are in the
    order in which they begin. `num_microbatches` is the number of microbatches of all slots: a replica computes them
    without a pause between slots, so the pipeline fills and empties once per run, not once per slot.
    """

    epoch: int
    version: int
    workers: tuple[str, ...]
    slots: tuple[int, ...]
    num_microbatches: int
    passes: tuple[tuple[Pass, ...], ...]

    @property
    def begin_us(self) -> int:
        """The beginning of the first pass."""
        return min(passes[0].begin_us for passes in self.passes)

    @property
    def end_us(self) -> int:
        """The end of the last pass."""
        return max(one.end_us for passes in self.passes for one in passes)

    @property
    def busy_us(self) -> int:
        """The sum of all passes of all workers."""
        return sum(one.duration_us for passes in self.passes for one in passes)

    @property
    def worker_us(self) -> int:
        """The time from the first pass of the run to the last, times the number of workers."""
        return len(self.workers) * (self.end_us - self.begin_us)


class Bubble(NamedTuple):
    """The measured and the ideal share of the workers' time in which they wait.

    The ideal share is that of GPipe and 1F1B for the same microbatches, with equal stages and indivisible passes. It
    can be higher than the measured share.
    """

    measured: float
    ideal: float


def bubble(timelines: Iterable[Timeline]) -> float | None:
    """The measured share of the workers' time in which they wait; None without a complete run. See `measure`."""
    found = measure(runs(timelines))
    return found.measured if found is not None else None


def measure(found: Sequence[Run]) -> Bubble | None:
    """Compute the bubble of runs: 1 - busy time / (number of workers * (last end - first begin)); None without runs.

    Both times are sums over all runs. First begin and last end may come from different machines. The time between them
    is then wrong by the difference of the clocks, but never shorter than the time of one worker by its own clock. The
    result is at least 0.
    """
    worker_us = sum(run.worker_us for run in found)
    busy_us = sum(run.busy_us for run in found)
    if not worker_us or not busy_us:
        return None
    # The workers' time if the same work were ideal.
    ideal_us = sum(run.busy_us / (1 - ideal_bubble(len(run.workers), run.num_microbatches)) for run in found)
    # Below 0 only if passes overlap, and the passes of one worker do not.
    return Bubble(max(0.0, 1 - busy_us / worker_us), 1 - busy_us / ideal_us)


def runs(timelines: Iterable[Timeline], num_stages: int = 0) -> list[Run]:
    """The complete runs of all versions, in order. In a complete run every stage has every microbatch's passes once.

    Other runs are left out: a worker was lost, a report was lost, or a worker recorded more spans than are kept. The
    number of stages of an epoch is that in its timelines, but at least `num_stages`.
    """
    versions: dict[tuple[int, int], dict[str, list[Pass]]] = defaultdict(lambda: defaultdict(list))
    known_stages: dict[int, int] = defaultdict(lambda: num_stages)
    for timeline in timelines:
        passes = passes_of(timeline)
        if passes:
            versions[timeline.epoch, timeline.version][timeline.worker] += passes
            shown = 1 + max(one.stage for one in passes)
            known_stages[timeline.epoch] = max(known_stages[timeline.epoch], shown)
    found = []
    for (epoch, version), by_worker in sorted(versions.items()):
        for passes in by_worker.values():
            passes.sort()
        for members in _put_together(by_worker):
            num_microbatches = _num_microbatches(members.values(), known_stages[epoch])
            if num_microbatches:
                workers = tuple(sorted(members, key=lambda worker: min(one.stage for one in members[worker])))
                slots = tuple(dict.fromkeys(one.slot for one in members[workers[0]]))
                rows = tuple(tuple(members[worker]) for worker in workers)
                found.append(Run(epoch, version, workers, slots, num_microbatches, rows))
    return found


def newest(found: Sequence[Run]) -> list[Run]:
    """The runs of the newest version among those with the most slots."""
    by_version: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for run in found:
        by_version[run.epoch, run.version].append(run)
    if not by_version:
        return []
    return by_version[max(by_version, key=lambda at: (sum(len(run.slots) for run in by_version[at]), at))]


def passes_of(timeline: Timeline) -> list[Pass]:
    """The passes of a timeline that have a slot, a stage and a microbatch."""
    return [
        Pass(span.begin_us, span.duration_us, span.kind, span.slot, span.stage, span.microbatch)
        for span in timeline.spans
        if span.kind in PASSES and span.slot is not None and span.stage is not None and span.microbatch is not None
    ]


def _put_together(by_worker: Mapping[str, Sequence[Pass]]) -> list[dict[str, list[Pass]]]:
    """Group the passes of one version, which are in order, into runs in the order of their slots.

    Each run has its passes by worker. A worker ends one run before it begins another, by its own clock. Within a run
    the first worker begins a slot before it has ended the one before, because it does not wait for the gradient of the
    last microbatch. A worker without other stages does wait, so each of its slots is a run.
    """
    # Maps each slot to the set of all slots of its run; they share one set object.
    slots_of: dict[int, set[int]] = {}
    for passes in by_worker.values():
        begins: dict[int, int] = {}
        ends: dict[int, int] = {}
        for one in passes:
            begins.setdefault(one.slot, one.begin_us)
            ends[one.slot] = max(one.end_us, ends.get(one.slot, 0))
        before: set[int] = set()
        end_us = 0
        for slot, begin_us in begins.items():
            slots = slots_of.setdefault(slot, {slot})
            if begin_us < end_us:
                slots |= before
                slots_of.update(dict.fromkeys(slots, slots))
            before = slots
            end_us = max(end_us, ends[slot])
    found: dict[int, dict[str, list[Pass]]] = defaultdict(lambda: defaultdict(list))
    first = {slot: min(slots) for slot, slots in slots_of.items()}
    for worker, passes in by_worker.items():
        for one in passes:
            found[first[one.slot]][worker].append(one)
    return [found[slot] for slot in sorted(found)]


def _num_microbatches(workers: Iterable[Sequence[Pass]], num_stages: int) -> int:
    """The number of microbatches that passed all stages; 0 if a stage lacks a pass or has one twice."""
    found: dict[int, dict[SpanKind, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for passes in workers:
        for one in passes:
            found[one.stage][one.kind].append((one.slot, one.microbatch))
    whole = sorted(found[0][SpanKind.FORWARD])
    if len(found) != num_stages or len(set(whole)) != len(whole):
        return 0
    for kinds in found.values():
        # Any kind of backward pass counts: the first stage does not split its backward pass.
        if SpanKind.FORWARD not in kinds or len(kinds) < 2:
            return 0
        if any(sorted(microbatches) != whole for microbatches in kinds.values()):
            return 0
    return len(whole)
