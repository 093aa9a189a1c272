"""Nodes that are kept from the active job for a time, and the decision which: a failure of one node is not the job's.

A worker is benched that reported a failure, that cannot reach a peer, or that heartbeats but gets nothing done while
slots of its are missing. Its slots go to the others. Where all are alike it is not they who are at fault, and nobody is
benched. A server is benched that reported a failure: the next plan does without it.
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
    failed: bool  # it reported a failure; else it was slow or cut off, and is better than nobody


@dataclass(frozen=True, slots=True)
class WorkerSight:
    """How a worker that holds slots, or belongs to a replica that does, looks now."""

    node_id: str
    title: str
    replica: int  # workers of one replica share it
    slots: tuple[int, ...]  # the replica's, of those that a server misses
    still_seconds: float  # since it got anything done, or was given its slots
    waiting: bool  # it says that it waits for a peer
    loading: bool = False  # it builds the model, which takes as long as a first slot may
    unreachable: str = ""  # a peer that it cannot reach
    unreachable_seconds: float = 0.0


def find_stuck(
    workers: Sequence[WorkerSight], num_able: int, slot_seconds: float | None, timing: Timing
) -> list[tuple[str, str]]:
    """The workers whose slots must move, as (node id, reason); none where no other could take them. `num_able` workers
    could hold slots; `slot_seconds` is the median time of a slot, None before there is one."""
    found = stuck_workers(workers, slot_seconds, timing)
    return list(found.items()) if len(found) < num_able else []


def stuck_workers(workers: Sequence[WorkerSight], slot_seconds: float | None, timing: Timing) -> dict[str, str]:
    """The workers that get nothing done, with the reason, by node id. In a replica that hangs it is one of them."""
    limit = timing.first_slot_seconds
    if slot_seconds is not None:
        limit = max(timing.stall_seconds, timing.stall_factor * slot_seconds)
    found: dict[str, str] = {}
    for worker in workers:
        if worker.unreachable and worker.unreachable_seconds >= timing.unreachable_seconds:
            found[worker.node_id] = f"cannot reach {worker.unreachable} for {worker.unreachable_seconds:.0f} s"
    for replica in dict.fromkeys(worker.replica for worker in workers):
        chain = [worker for worker in workers if worker.replica == replica]
        still = [
            worker
            for worker in chain
            if worker.slots and worker.still_seconds >= (timing.first_slot_seconds if worker.loading else limit)
        ]
        if len(still) < len(chain) or any(worker.node_id in found for worker in chain):
            continue
        # In a replica the others wait for the one that hangs.
        culprit = next((worker for worker in still if not worker.waiting), still[0])
        usual = "" if slot_seconds is None else f" (a slot takes {slot_seconds:.1f} s)"
        found[culprit.node_id] = f"no progress on {slots_text(culprit.slots)} for {culprit.still_seconds:.0f} s{usual}"
    return found


@dataclass
class Benches:
    """The benched nodes of a job by node id. Kept in memory: what still is the case after a restart is seen again."""

    bench_seconds: float = 60.0
    _current: dict[str, Bench] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def bench(self, node_id: str, title: str, reason: str, failed: bool, now: float) -> None:
        """Keep a node from the job; each time for twice as long as before."""
        count = self._counts.get(node_id, 0)
        self._counts[node_id] = count + 1
        seconds = self.bench_seconds * 2 ** min(count, MAX_DOUBLINGS)
        self._current[node_id] = Bench(title, reason, now, now + seconds, failed)
        while len(self._current) > MAX_BENCHES:
            del self._current[next(iter(self._current))]

    def lift(self, now: float, recovered: Callable[[str, float], bool]) -> list[Bench]:
        """Take up again those whose time is over; return them. One that hung or was cut off must have recovered since:
        `recovered` is given its id and since when it is benched."""
        over = [
            node_id
            for node_id, bench in self._current.items()
            if now >= bench.until and (bench.failed or recovered(node_id, bench.since))
        ]
        return [self._current.pop(node_id) for node_id in over]

    def benched(self, node_id: str) -> bool:
        """Whether the node is kept from the job."""
        return node_id in self._current

    def failed(self, node_id: str) -> bool:
        """Whether the node is kept from the job because it reported a failure."""
        return node_id in self._current and self._current[node_id].failed

    def current(self) -> list[Bench]:
        """Those benched now."""
        return list(self._current.values())

    def line(self) -> str:
        """Those benched now, for people."""
        return "; ".join(f"{bench.title} is benched: {bench.reason}" for bench in self._current.values())

    def failures(self) -> str:
        """What nodes reported, the same words once."""
        titles: dict[str, list[str]] = {}
        for bench in self._current.values():
            if bench.failed:
                titles.setdefault(bench.reason, []).append(bench.title)
        return "; ".join(f"{', '.join(who)}: {reason}" for reason, who in titles.items())

    def clear(self) -> None:
        """Give every node another chance, as after a person's `resume`."""
        self._current.clear()
        self._counts.clear()
