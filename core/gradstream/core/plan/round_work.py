"""Who computes which slot in the round under way. A pure function that returns (decision, reasons).

The lease table says which worker holds which slot in every round. Within one round more is known: slots that are done
although their worker died, workers that are idle, and how far each one is. So the coordinator gives workers other slots
for this round alone. A slot that nobody has begun *moves* to the worker that is done with it first. Of a slot that a
worker computes, an idle one computes a *copy*, if it will be done first. Both send the same bits, and the servers take
each contribution once.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

MIN_GAIN = 0.1
MIN_GAIN_SECONDS = 1.0
"""A slot moves, or is copied, if it is done earlier by the share of its time and by the seconds. Heartbeats, which the
forecast is made of, are a second old."""
MAX_REASONS = 8
"""Maximum number of moves and copies that a line for people names."""


@dataclass(frozen=True)
class RoundWorker:
    """A worker in the round under way, by its heartbeat. `slots` are what it computes unless it is told otherwise.

    `slots` are in order, and may include slots that are computed or complete. `is_told` says whether the worker was
    given them for this round; else it holds them by the lease table.
    """

    node_id: str
    name: str
    slots: tuple[int, ...]
    is_told: bool = False
    holds: tuple[int, ...] = ()
    computed: tuple[int, ...] = ()
    """the slots that it has computed, and sends"""
    slot: int | None = None
    """the slot that it computes"""
    num_done: int = 0
    """inner steps of that slot that are done"""
    inner_step_seconds: float = 0.0
    """0: not known"""
    begins_in: float = 0.0
    """expected seconds until it has the version; 0 if it does"""
    kept: Mapping[int, int] = field(default_factory=dict)
    """number of inner steps that its disk has, by slot"""


@dataclass(frozen=True)
class Share:
    """The slots that a worker computes in the rest of a round, in order. Those in `copies` another one computes too."""

    slots: tuple[int, ...] = ()
    copies: tuple[int, ...] = ()


def share_round(
    num_steps: Sequence[int], missing: Collection[int], workers: Sequence[RoundWorker]
) -> tuple[dict[str, Share], list[str]]:
    """Decide what each worker computes in the rest of a round; return (shares by node id, reasons of what is new).

    `num_steps[slot]` is the number of a slot's inner steps. `missing` are the slots of which a server lacks
    contributions. A slot that a worker has computed and still sends is in no share. `workers` are live, and each slot
    without progress belongs to one of them. While no worker's speed is known, nothing moves.
    """
    return _Round(num_steps, missing, workers).share()


class _Round:
    """One decision. `self._lists` has what each worker computes, by node id; it begins as what they do now."""

    def __init__(self, num_steps: Sequence[int], missing: Collection[int], workers: Sequence[RoundWorker]):
        self._num_steps = num_steps
        self._workers = {worker.node_id: worker for worker in workers}
        sent = {slot for worker in workers for slot in worker.computed}
        self._open = {slot for slot in missing if slot not in sent}
        known = [worker.inner_step_seconds for worker in workers if worker.inner_step_seconds > 0]
        self._usual_seconds = statistics.median(known) if known else 0.0
        self._under_way: dict[int, list[str]] = {}
        for worker in workers:
            # A worker abandons the slot that it is no longer told to compute; its heartbeat may not say so yet.
            stays = not worker.is_told or worker.slot in worker.slots
            if worker.slot is not None and worker.slot in self._open and stays:
                self._under_way.setdefault(worker.slot, []).append(worker.node_id)
        self._lists = self._present()
        self._reasons: list[str] = []

    def share(self) -> tuple[dict[str, Share], list[str]]:
        if self._usual_seconds:
            while self._move_one():
                pass
            self._copy()
        counts = self._counts()
        shares = {
            node_id: Share(tuple(slots), tuple(slot for slot in slots if counts[slot] > 1))
            for node_id, slots in self._lists.items()
        }
        return shares, self._reasons

    def _counts(self) -> Counter[int]:
        """How many workers compute each slot."""
        return Counter(slot for slots in self._lists.values() for slot in slots)

    def _present(self) -> dict[str, list[int]]:
        """What each worker computes now: first the slot that it has begun, then open slots that nobody has begun.

        Such a slot belongs to the worker that was given it for this round, else to its holder. Of what others have
        begun a worker keeps what it was told to copy.
        """
        lists: dict[str, list[int]] = {node_id: [] for node_id in self._workers}
        for slot, node_ids in self._under_way.items():
            for node_id in node_ids:
                lists[node_id].append(slot)
        taken: set[int] = set()
        for is_told in (True, False):
            for worker in self._workers.values():
                for slot in worker.slots if worker.is_told == is_told else ():
                    begun = self._under_way.get(slot, [])
                    is_free = slot not in taken if not begun else is_told and worker.node_id not in begun
                    if slot in self._open and is_free:
                        lists[worker.node_id].append(slot)
                        taken.add(slot)
        # What was given to a worker that is gone returns to its holder.
        for worker in self._workers.values():
            for slot in worker.holds:
                if slot in self._open and slot not in taken and slot not in self._under_way:
                    lists[worker.node_id].append(slot)
                    taken.add(slot)
        return lists

    # -- the forecast ----------------------------------------------------------------------------------------------

    def _seconds(self, node_id: str, slot: int) -> float:
        """How long a worker needs for a slot, or for the rest of it."""
        worker = self._workers[node_id]
        has_begun = node_id in self._under_way.get(slot, ())
        done = worker.num_done if has_begun else worker.kept.get(slot, 0)
        return max(0, self._num_steps[slot] - done) * (worker.inner_step_seconds or self._usual_seconds)

    def _end(self, node_id: str) -> float:
        """Seconds until a worker has computed all that it has to."""
        return self._workers[node_id].begins_in + sum(self._seconds(node_id, slot) for slot in self._lists[node_id])

    def _needed(self, node_id: str, slot: int) -> float:
        """The least gain for which a worker takes a slot."""
        return max(MIN_GAIN * self._seconds(node_id, slot), MIN_GAIN_SECONDS)

    # -- changes ---------------------------------------------------------------------------------------------------

    def _move_one(self) -> bool:
        """Move the slot whose move gains most from the worker that is done last; return whether one moved."""
        ends = {node_id: self._end(node_id) for node_id in self._workers}
        waiting = [node_id for node_id in ends if any(slot not in self._under_way for slot in self._lists[node_id])]
        if not waiting:
            return False
        last = max(waiting, key=lambda node_id: ends[node_id])
        best: tuple[float, int, str] | None = None
        for slot in self._lists[last]:
            if slot in self._under_way:
                continue
            for node_id, worker in self._workers.items():
                if node_id == last or not worker.holds:  # without slots it rests after the one under way
                    continue
                there = ends[node_id] + self._seconds(node_id, slot)
                gain = ends[last] - max(there, ends[last] - self._seconds(last, slot))
                if gain >= self._needed(node_id, slot) and (best is None or gain > best[0]):
                    best = (gain, slot, node_id)
        if best is None:
            return False
        _, slot, node_id = best
        self._lists[last].remove(slot)
        self._lists[node_id].append(slot)
        names = [self._workers[each].name for each in (last, node_id)]
        self._reasons.append(
            f"slot {slot} goes from {names[0]} to {names[1]}: computed in about {self._end(node_id):.0f} s, not "
            f"{ends[last]:.0f} s"
        )
        return True

    def _copy(self) -> None:
        """Give idle workers, the fastest first, a copy each of the slot that is done last, if that is earlier."""
        idle = [worker for worker in self._workers.values() if worker.holds and not worker.begins_in]
        idle = [worker for worker in idle if not self._lists[worker.node_id]]
        idle.sort(key=lambda worker: worker.inner_step_seconds or self._usual_seconds)
        counts = self._counts()
        single = [(begun[0], slot) for slot, begun in self._under_way.items() if counts[slot] == 1]
        ends = {slot: self._workers[node_id].begins_in + self._seconds(node_id, slot) for node_id, slot in single}
        for worker in idle if ends else ():
            slot = max(ends, key=lambda slot: ends[slot])
            own = self._seconds(worker.node_id, slot)
            if ends[slot] - own < self._needed(worker.node_id, slot):
                continue
            self._lists[worker.node_id].append(slot)
            other = self._workers[self._under_way[slot][0]]
            self._reasons.append(
                f"{worker.name} computes a copy of slot {slot}: in about {own:.0f} s, while {other.name} needs "
                f"{ends[slot]:.0f} s more"
            )
            del ends[slot]
            if not ends:
                break


def reasons_text(reasons: Sequence[str]) -> str:
    """Reasons for people, on one line; of more than MAX_REASONS only the first ones."""
    shown = "; ".join(reasons[:MAX_REASONS])
    return f"{shown}; and {len(reasons) - MAX_REASONS} more" if len(reasons) > MAX_REASONS else shown
