"""Leases: the workers of each replica, and the worker of each slot. Pure functions that return (decision, reason)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

MIN_GAIN = 0.15
MIN_GAIN_SECONDS = 0.05
"""Slots move between workers of different speeds where a step becomes shorter by both the share and the seconds."""
MAX_SHOWN = 32
"""Maximum number of slots, and of workers with their slots, that a line for people names."""
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
    holders: Sequence[str],
    workers: Sequence[str],
    slot_seconds: Mapping[str, float] | None = None,
    slot_costs: Sequence[float] = (),
) -> tuple[list[str], str]:
    """Give every slot to a live worker, moving as few slots as possible; return (holders, reason).

    `holders[slot]` is the worker that holds the slot now ("" for none); `workers` are the live ones, oldest first.
    `slot_seconds` is how long a slot takes each worker, where that was measured. The workers' numbers of slots differ
    by at most one, unless other numbers make a step notably shorter. With no workers every slot is free.

    `slot_costs` are the costs of slots that differ, such as their inner steps in a round. `slot_seconds` is then the
    time for a cost of 1, and each slot goes to the worker that is done with it first.
    """
    if not workers:
        return [""] * len(holders), "no live worker"
    if len(set(slot_costs)) > 1:
        result, uneven = _by_cost(holders, workers, slot_seconds or {}, slot_costs)
    else:
        result, uneven = _by_number(holders, workers, slot_seconds or {})
    why = f"{len(workers)} live{uneven}"
    moved = [slot for slot, holder in enumerate(result) if holder != holders[slot]]
    if not moved:
        return result, f"all slots stay with their workers ({why})"
    lost = [slot for slot in moved if holders[slot] and holders[slot] not in workers]
    new = [slot for slot in moved if not holders[slot]]
    given = [slot for slot in moved if holders[slot] in workers]
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


def _by_number(
    holders: Sequence[str], workers: Sequence[str], slot_seconds: Mapping[str, float]
) -> tuple[list[str], str]:
    """Assign slots of one cost; return the holders, and why the workers' numbers of slots are uneven or ""."""
    counts = Counter(holders)
    held = {worker: counts[worker] for worker in workers}
    quota, uneven = _quotas(len(holders), workers, held, slot_seconds)
    result = [""] * len(holders)
    for slot, holder in enumerate(holders):
        if quota.get(holder, 0) > 0:
            result[slot] = holder
            quota[holder] -= 1
    free = [slot for slot, holder in enumerate(result) if not holder]
    # Assign in turns: slots that the server adds one after another then come from different workers.
    queue = deque(worker for worker in workers if quota[worker] > 0)
    for slot in free:
        worker = queue.popleft()
        result[slot] = worker
        quota[worker] -= 1
        if quota[worker]:
            queue.append(worker)
    return result, uneven


def _by_cost(
    holders: Sequence[str], workers: Sequence[str], seconds: Mapping[str, float], costs: Sequence[float]
) -> tuple[list[str], str]:
    """Assign slots of different costs; return the holders, and by what.

    The slots of live workers stay, unless the step becomes notably shorter when all slots are assigned again.
    """
    is_known = all(seconds.get(worker, 0.0) > 0 for worker in workers)
    pace = {worker: seconds[worker] if is_known else 1.0 for worker in workers}
    kept = [holder if holder in pace else "" for holder in holders]
    stay, stay_seconds = _fill_slots(kept, holders, pace, costs)
    again, again_seconds = _fill_slots([""] * len(holders), holders, pace, costs)
    gain = stay_seconds - again_seconds
    is_better = gain >= max(MIN_GAIN * again_seconds, MIN_GAIN_SECONDS)
    return again if is_better else stay, "; slots of different numbers of inner steps"


def _fill_slots(
    kept: Sequence[str], holders: Sequence[str], pace: Mapping[str, float], costs: Sequence[float]
) -> tuple[list[str], float]:
    """Give the free slots, the most costly first, to the worker that is done first; return (holders, seconds)."""
    result, busy = list(kept), dict.fromkeys(pace, 0.0)
    for slot, holder in enumerate(kept):
        if holder:
            busy[holder] += costs[slot] * pace[holder]
    free = [slot for slot, holder in enumerate(kept) if not holder]
    for slot in sorted(free, key=lambda slot: -costs[slot]):
        done = {worker: busy[worker] + costs[slot] * pace[worker] for worker in pace}
        # Of equal workers the present holder takes the slot.
        result[slot] = min(done, key=lambda worker: (done[worker], worker != holders[slot]))
        busy[result[slot]] = done[result[slot]]
    return result, max(busy.values())


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
    with_one_more = [(2 * slot_seconds[worker], order, worker) for order, worker in enumerate(workers)]
    heapify(with_one_more)
    for _ in range(num_slots - len(workers)):
        _, order, worker = with_one_more[0]
        best[worker] += 1
        heapreplace(with_one_more, ((best[worker] + 1) * slot_seconds[worker], order, worker))

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


def moved_workers(
    holders: Sequence[str], new_holders: Sequence[str], replicas: Sequence[Replica], new_replicas: Sequence[Replica]
) -> set[str]:
    """The workers whose slots or place differ between two lease tables. The other workers need not hear of the second.

    `holders[slot]` and `new_holders[slot]` are the holders of a slot in the two tables, "" for none.
    """
    moved = {worker for pair in zip(holders, new_holders, strict=True) if pair[0] != pair[1] for worker in pair}
    moved.discard("")
    for replica in set(replicas) ^ set(new_replicas):
        moved.update(replica.workers)
    # The first worker of a replica holds the slots of all.
    for replica in new_replicas:
        if replica.workers[0] in moved:
            moved.update(replica.workers)
    return moved


def slots_text(slots: Iterable[int]) -> str:
    """Slots for people: "slot 3", "slots 1, 2"; of more than MAX_SHOWN only the first ones."""
    numbers = list(slots)
    return f"slot{'s' if len(numbers) != 1 else ''} {numbers_text(numbers)}"


def numbers_text(numbers: Sequence[int]) -> str:
    """Numbers for people, separated by commas; of more than MAX_SHOWN only the first ones."""
    shown = ", ".join(map(str, numbers[:MAX_SHOWN]))
    return f"{shown} and {len(numbers) - MAX_SHOWN} more" if len(numbers) > MAX_SHOWN else shown
