"""Leases: the workers of each replica, and the worker of each slot. Pure functions that return (decision, reason)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

MIN_GAIN = 0.15
MIN_GAIN_SECONDS = 0.05
"""Slots move between workers of different speeds where a step becomes shorter by both the share and the seconds."""
SLOTS = "slots from the coordinator"
"""The reason for which a worker without slots waits, as it reports it."""


@dataclass(frozen=True)
class Replica:
    """A chain of workers, as node ids in the order of the stages.

    `number` is the number of the lease table that formed the chain. A chain that loses a member ends, even if another
    worker takes the member's place.
    """

    number: int
    workers: tuple[str, ...]


def form_replicas(
    replicas: Sequence[Replica], workers: Sequence[str], size: int, number: int, fits: Callable[[str, int], bool]
) -> tuple[list[Replica], str]:
    """Form as many chains of `size` live workers as possible; return (replicas, reason).

    Chains whose members are all alive stay. Of the other chains, those with the most members left are filled up first,
    with free workers and then with members of the remaining chains. A member keeps its place if possible, because it
    has the weights of that place. `workers` are the live workers, oldest first. `fits(worker, place)` says if a
    worker's memory holds the stages of a place. `number` is the number of the new lease table.
    """
    live = set(workers)
    intact = [replica for replica in replicas if live.issuperset(replica.workers)]
    broken = [replica for replica in replicas if not live.issuperset(replica.workers)]
    broken.sort(key=lambda replica: -len(live.intersection(replica.workers)))
    busy = {worker for replica in intact for worker in replica.workers}
    last_place = {worker: place for replica in broken for place, worker in enumerate(replica.workers)}
    free = [worker for worker in workers if worker not in busy]
    formed: list[Replica] = []
    rest = list(broken)
    while len(free) >= size:
        old = rest.pop(0).workers if rest else ()
        kept = {place: worker for place, worker in enumerate(old) if worker in free}
        # Members of the chains that are filled up next are taken last.
        wanted = {worker: order for order, replica in enumerate(rest) for worker in replica.workers}
        spare = sorted(
            (worker for worker in free if worker not in kept.values()),
            key=lambda worker: -wanted.get(worker, len(rest)),
        )
        chain = _fill(kept, spare, size, last_place, fits)
        if chain is None:
            if not old:
                break
            continue  # this chain cannot be filled up: its members are free for the others
        formed.append(Replica(number, chain))
        free = [worker for worker in free if worker not in chain]
    idle = f"; {len(free)} more stay idle" if free else ""
    if not formed and not intact:
        missing = size - len(free)
        lack = f"{missing} more worker{'s' * (missing != 1)} needed" if missing > 0 else "their memory is too small"
        return [], f"no replica: {len(free)} of {size} workers, {lack}"
    kinds = [
        f"{len(found)} {verb}"
        for found, verb in ((intact, "stay" if len(intact) > 1 else "stays"), (formed, "formed"))
        if found
    ]
    return [*intact, *formed], f"replicas of {size} workers: {', '.join(kinds)}{idle}"


def _fill(
    kept: dict[int, str], spare: list[str], size: int, last_place: dict[str, int], fits: Callable[[str, int], bool]
) -> tuple[str, ...] | None:
    """Fill a chain of `kept` members with spare workers, earlier ones first; None when none fits an open place."""
    chain, left = dict(kept), list(spare)
    open_places = [place for place in range(size) if place not in chain]
    # The places that the fewest workers can take come first.
    for place in sorted(open_places, key=lambda place: sum(fits(worker, place) for worker in left)):
        able = [worker for worker in left if fits(worker, place)]
        if not able:
            return None
        # Prefer a worker that has these weights, then one that has none, then any other.
        chosen = min(
            able, key=lambda worker: (last_place.get(worker, -1) not in (place, -1), last_place.get(worker) != place)
        )
        chain[place] = chosen
        left.remove(chosen)
    return tuple(chain[place] for place in range(size))


def assign_slots(
    holders: Sequence[str], workers: Sequence[str], slot_seconds: Mapping[str, float] | None = None
) -> tuple[list[str], str]:
    """Give every slot to a live worker, moving as few slots as possible; return (holders, reason).

    `holders[slot]` is the worker that holds the slot now ("" for none); `workers` are the live ones, oldest first.
    `slot_seconds` is how long a slot takes each worker, where that was measured. The workers' numbers of slots differ
    by at most one, unless other numbers make a step notably shorter. With no workers every slot is free.
    """
    if not workers:
        return [""] * len(holders), "no live worker"
    held = {worker: sum(holder == worker for holder in holders) for worker in workers}
    count = dict(held)
    quota, uneven = _quotas(len(holders), workers, held, slot_seconds or {})
    result = [""] * len(holders)
    for slot, holder in enumerate(holders):
        if quota.get(holder, 0) > 0:
            result[slot] = holder
            quota[holder] -= 1
    free = [slot for slot, holder in enumerate(result) if not holder]
    # Assign in turns: slots that the server adds one after another then come from different workers.
    queue = [worker for worker in workers if quota[worker] > 0]
    moved = []
    while free:
        for worker in list(queue):
            if not free:
                break
            slot = free.pop(0)
            result[slot] = worker
            moved.append(slot)
            quota[worker] -= 1
            if quota[worker] == 0:
                queue.remove(worker)
    why = f"{len(workers)} live{uneven}"
    if not moved:
        return result, f"all slots stay with their workers ({why})"
    lost = [slot for slot in moved if holders[slot] and holders[slot] not in count]
    new = [slot for slot in moved if not holders[slot]]
    given = [slot for slot in moved if holders[slot] in count]
    causes = [
        f"{slots_text(slots)} {one if len(slots) == 1 else many}"
        for slots, one, many in (
            (new, "was free", "were free"),
            (lost, "lost its worker", "lost their worker"),
            (given, "moved to share the work evenly", "moved to share the work evenly"),
        )
        if slots
    ]
    return result, f"{'; '.join(causes)} ({why})"


def _quotas(
    num_slots: int, workers: Sequence[str], held: Mapping[str, int], slot_seconds: Mapping[str, float]
) -> tuple[dict[str, int], str]:
    """(how many slots each worker gets, why they are uneven or "")."""
    base, extra = divmod(num_slots, len(workers))
    # The workers that hold most keep the larger share, so that the fewest slots move.
    ranked = sorted(workers, key=lambda worker: -held[worker])
    even = {worker: base + (rank < extra) for rank, worker in enumerate(ranked)}
    if num_slots < len(workers) or not all(slot_seconds.get(worker, 0.0) > 0 for worker in workers):
        return even, ""
    # As short a step as can be, with a slot at least for each worker: else its speed would not be known any longer.
    best = dict.fromkeys(workers, 1)
    for _ in range(num_slots - len(workers)):
        best[min(workers, key=lambda worker: (best[worker] + 1) * slot_seconds[worker])] += 1

    def step_seconds(quota: Mapping[str, int]) -> float:
        return max(quota[worker] * slot_seconds[worker] for worker in workers)

    shortest = step_seconds(best)
    chosen = best
    # What stands stays, and even numbers come before uneven ones, unless the step becomes notably shorter.
    for other in (held, even):
        gain = step_seconds(other) - shortest
        is_whole = sum(other.values()) == num_slots and min(other.values()) > 0
        if is_whole and gain < max(MIN_GAIN * shortest, MIN_GAIN_SECONDS):
            chosen = dict(other)
            break
    if max(chosen.values()) - min(chosen.values()) <= 1:
        return chosen, ""
    return chosen, "; uneven, by how long a slot takes each worker"


def slots_text(slots: Iterable[int]) -> str:
    """Slots for people: "slot 3", "slots 1, 2"."""
    numbers = list(map(str, slots))
    return f"slot{'s' if len(numbers) != 1 else ''} {', '.join(numbers)}"
