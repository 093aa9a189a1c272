"""Decide which nodes are benched, that is, get no work of the active job for a time.

So a failure of one node does not end the job. A worker is benched when it reports a failure, cannot reach a peer, or
heartbeats without progress while contributions of its slots are missing. Other workers get its slots. If all workers
are equally affected, the cause is elsewhere and no worker is benched. A server is benched when it reports a failure:
the next plan leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gradstream.coordinator.timing import Timing
from gradstream.core.plan.leases import slots_text

MAX_DOUBLINGS = 4
MAX_BENCHES = 1024


@dataclass(frozen=True, slots=True)
class Bench:
    """Why a node is benched, since when and until when at least (the coordinator's clock)."""

    title: str
    reason: str
    since: float
    until: float
    failed: bool  # it reported a failure; else it was slow or cut off, and still gets slots if no other worker can


@dataclass(frozen=True, slots=True)
class WorkerSight:
    """The current situation of a worker that holds slots, or belongs to a replica that does."""

    node_id: str
    title: str
    replica: int  # the same number for all workers of a replica
    slots: tuple[int, ...]  # the replica's slots of which a server misses contributions
    still_seconds: float  # since its last progress, or since it got its slots
    waiting: bool  # it reports that it waits for a peer
    loading: bool = False  # it builds the model, which may take as long as a first slot
    unreachable: str = ""  # a peer that it cannot reach
    unreachable_seconds: float = 0.0


def find_stuck(
    workers: Sequence[WorkerSight], num_able: int, slot_seconds: float | None, timing: Timing
) -> list[tuple[str, str]]:
    """Find the workers whose slots must move, as (node id, reason); none if no other worker could take the slots.

    `num_able` is the number of workers that can hold slots. `slot_seconds` is the median time of a slot, None while it
    is not known.
    """
    found = stuck_workers(workers, slot_seconds, timing)
    return list(found.items()) if len(found) < num_able else []


def stuck_workers(workers: Sequence[WorkerSight], slot_seconds: float | None, timing: Timing) -> dict[str, str]:
    """The workers without progress, with the reason, by node id. Of a replica that hangs only one worker is named."""
    limit = timing.first_slot_seconds
    if slot_seconds is not None:
        limit = max(timing.stall_seconds, timing.stall_factor * slot_seconds)
    found: dict[str, str] = {}
    for worker in workers:
        if worker.unreachable and worker.unreachable_seconds >= timing.unreachable_seconds:
            found[worker.node_id] = f"cannot reach {worker.unreachable} for {worker.unreachable_seconds:.0f} s"
    chains: dict[int, list[WorkerSight]] = {}
    for worker in workers:
        chains.setdefault(worker.replica, []).append(worker)
    for chain in chains.values():
        still = [
            worker
            for worker in chain
            if worker.slots and worker.still_seconds >= (timing.first_slot_seconds if worker.loading else limit)
        ]
        if len(still) < len(chain) or any(worker.node_id in found for worker in chain):
            continue
        # In a replica the other workers wait for the one that hangs.
        culprit = next((worker for worker in still if not worker.waiting), still[0])
        usual = "" if slot_seconds is None else f" (a slot takes {slot_seconds:.1f} s)"
        found[culprit.node_id] = f"no progress on {slots_text(culprit.slots)} for {culprit.still_seconds:.0f} s{usual}"
    return found


@dataclass
class Benches:
    """The benched nodes of a job by node id. Kept in memory only: after a restart a lasting problem is found again."""

    bench_seconds: float = 60.0
    _current: dict[str, Bench] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def bench(self, node_id: str, title: str, reason: str, failed: bool, now: float) -> None:
        """Bench a node, each time for twice as long as before."""
        count = self._counts.get(node_id, 0)
        self._counts[node_id] = count + 1
        seconds = self.bench_seconds * 2 ** min(count, MAX_DOUBLINGS)
        self._current[node_id] = Bench(title, reason, now, now + seconds, failed)
        while len(self._current) > MAX_BENCHES:
            del self._current[next(iter(self._current))]

    def lift(self, now: float, recovered: Callable[[str, float], bool]) -> list[Bench]:
        """End the benches whose time is over; return them.

        A node that hung or was cut off must also have recovered: `recovered` gets its id and the time of its benching.
        """
        over = [
            node_id
            for node_id, bench in self._current.items()
            if now >= bench.until and (bench.failed or recovered(node_id, bench.since))
        ]
        return [self._current.pop(node_id) for node_id in over]

    def benched(self, node_id: str) -> bool:
        """Whether the node is benched."""
        return node_id in self._current

    def failed(self, node_id: str) -> bool:
        """Whether the node is benched because it reported a failure."""
        return node_id in self._current and self._current[node_id].failed

    def current(self) -> list[Bench]:
        """The benches in force."""
        return list(self._current.values())

    def line(self) -> str:
        """The benched nodes with their reasons, for people."""
        return "; ".join(f"{bench.title} is benched: {bench.reason}" for bench in self._current.values())

    def failures(self) -> str:
        """The failures that nodes reported; nodes with the same failure are listed together."""
        titles: dict[str, list[str]] = {}
        for bench in self._current.values():
            if bench.failed:
                titles.setdefault(bench.reason, []).append(bench.title)
        return "; ".join(f"{', '.join(who)}: {reason}" for reason, who in titles.items())

    def clear(self) -> None:
        """End all benches, as after a person's `resume`."""
        self._current.clear()
        self._counts.clear()
