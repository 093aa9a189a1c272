"""Slot leases: which worker computes which slot. A pure function that returns (decision, reason)."""

from __future__ import annotations

from collections.abc import Sequence


def assign_slots(holders: Sequence[str], workers: Sequence[str]) -> tuple[list[str], str]:
    """Give every slot to a live worker, moving as few slots as possible; return (holders, reason).

    `holders[slot]` is the worker that holds the slot now ("" for none); `workers` are the live ones, oldest first.
    After it, the workers' numbers of slots differ by at most one. With no workers every slot is free.
    """
    if not workers:
        return [""] * len(holders), "no live worker"
    base, extra = divmod(len(holders), len(workers))
    count = dict.fromkeys(workers, 0)
    for holder in holders:
        if holder in count:
            count[holder] += 1
    # Whoever holds most keeps the larger share, so that the fewest slots move.
    ranked = sorted(workers, key=lambda worker: -count[worker])
    quota = {worker: base + (rank < extra) for rank, worker in enumerate(ranked)}
    result = [""] * len(holders)
    for slot, holder in enumerate(holders):
        if quota.get(holder, 0) > 0:
            result[slot] = holder
            quota[holder] -= 1
    free = [slot for slot, holder in enumerate(result) if not holder]
    # Deal out in turns, so that slots that are added one after another come from different workers.
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
    if not moved:
        return result, f"all slots stay with their workers ({len(workers)} live)"
    lost = [slot for slot in moved if holders[slot] and holders[slot] not in count]
    new = [slot for slot in moved if not holders[slot]]
    given = [slot for slot in moved if holders[slot] in count]
    causes = [
        f"slots {_join(slots)} {why}"
        for slots, why in (
            (new, "were free"),
            (lost, "lost their worker"),
            (given, "moved for balance"),
        )
        if slots
    ]
    return result, f"{'; '.join(causes)} ({len(workers)} live)"


def _join(slots: Sequence[int]) -> str:
    return ", ".join(map(str, slots))
