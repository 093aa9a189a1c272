"""How long the workers of a pipeline wait: their timelines' passes put together to runs of the schedule.

A replica runs its schedule once over all the slots that it holds, so a run is the passes of some slots on all stages.
Nothing in a timeline names replica or run; both follow from the passes. Workers that share a slot in a version are of
one replica; slots between which one of its workers goes back and forth are of one run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradstream.core.pipeline.simulation import ideal_bubble
from gradstream.core.telemetry.timeline import PASSES, SpanKind, Timeline


class Pass(NamedTuple):
    """A microbatch's pass on a stage. Times in microseconds; `microbatch` counts within the slot."""

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
    """One run of a replica's schedule; times in microseconds.

    `workers` are in the order of the stages and `passes[i]` are those of worker i, in order; `slots` are in the order
    in which they begin. `num_microbatches` counts those of all slots: a replica takes them through its stages one after
    the other without a pause between slots, so the pipeline fills and empties once a run and not once a slot.
    """

    epoch: int
    version: int
    workers: tuple[str, ...]
    slots: tuple[int, ...]
    num_microbatches: int
    passes: tuple[tuple[Pass, ...], ...]

    @property
    def begin_us(self) -> int:
        """When the first pass begins."""
        return min(passes[0].begin_us for passes in self.passes)

    @property
    def end_us(self) -> int:
        """When the last pass ends."""
        return max(one.end_us for passes in self.passes for one in passes)

    @property
    def busy_us(self) -> int:
        """Sum of all passes of all workers."""
        return sum(one.duration_us for passes in self.passes for one in passes)

    @property
    def worker_us(self) -> int:
        """Sum over the workers of the time from the first pass of any of them to the last."""
        return len(self.workers) * (self.end_us - self.begin_us)


class Bubble(NamedTuple):
    """Shares of the workers' time in which they wait: the one measured, and the one that GPipe and 1F1B would have with
    the same microbatches if all stages took equally long and passes were indivisible, which can be more."""

    measured: float
    ideal: float


def bubble(timelines: Iterable[Timeline]) -> float | None:
    """The measured share of the workers' time in which they wait; None when there is no whole run. See `measure`."""
    found = measure(runs(timelines))
    return found.measured if found is not None else None


def measure(found: Sequence[Run]) -> Bubble | None:
    """The bubble of these runs: 1 - busy time / (number of workers * (last end - first begin)), with both sums over all
    runs. None when there are none.

    First begin and last end may be of different machines: by how far their clocks are apart, the time between them is
    too long or too short. It is never shorter than what one worker did by its own clock, so no bubble is less than 0.
    """
    worker_us = sum(run.worker_us for run in found)
    busy_us = sum(run.busy_us for run in found)
    if not worker_us or not busy_us:
        return None
    # What the same work would take if it were ideal.
    ideal_us = sum(run.busy_us / (1 - ideal_bubble(len(run.workers), run.num_microbatches)) for run in found)
    # Less than 0 only where passes overlap, which no worker's do.
    return Bubble(max(0.0, 1 - busy_us / worker_us), 1 - busy_us / ideal_us)


def runs(timelines: Iterable[Timeline], num_stages: int = 0) -> list[Run]:
    """The whole runs of all versions, in order: those of which every stage has every microbatch's passes once.

    The others are left out: those of a replica that lost a worker, of which a report was lost, or of which a worker
    recorded more spans than are kept. An epoch has as many stages as its timelines show, and at least `num_stages`.
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
    """The runs of the newest version of which no slot is missing, or as few as of any."""
    by_version: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for run in found:
        by_version[run.epoch, run.version].append(run)
    if not by_version:
        return []
    return by_version[max(by_version, key=lambda at: (sum(len(run.slots) for run in by_version[at]), at))]


def passes_of(timeline: Timeline) -> list[Pass]:
    """The passes of a timeline that say of which slot, stage and microbatch they are."""
    return [
        Pass(span.begin_us, span.duration_us, span.kind, span.slot, span.stage, span.microbatch)
        for span in timeline.spans
        if span.kind in PASSES and span.slot is not None and span.stage is not None and span.microbatch is not None
    ]


def _put_together(by_worker: Mapping[str, Sequence[Pass]]) -> list[dict[str, list[Pass]]]:
    """The passes of each run by worker, from those of one version, which are in order; runs in order of their slots.

    A worker ends one run before it begins another, by its own clock. Within a run the first worker begins a slot before
    it has ended the one before, as it does not wait for the last microbatch to come back. (One that is alone does wait,
    so that each of its slots is a run.)
    """
    # Each slot's set is that of all slots of its run.
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
    """How many microbatches went through all of the stages; 0 when a stage lacks a pass or has one twice."""
    found: dict[int, dict[SpanKind, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for passes in workers:
        for one in passes:
            found[one.stage][one.kind].append((one.slot, one.microbatch))
    whole = sorted(found[0][SpanKind.FORWARD])
    if len(found) != num_stages or len(set(whole)) != len(whole):
        return 0
    for kinds in found.values():
        # Any kind of backward will do: the first stage has nothing to split.
        if SpanKind.FORWARD not in kinds or len(kinds) < 2:
            return 0
        if any(sorted(microbatches) != whole for microbatches in kinds.values()):
            return 0
    return len(whole)
