"""Input of the decision on stuck workers, from heartbeats and step reports."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.nodes.benches import WorkerSight
from gradstream.coordinator.nodes.membership import Membership, NodeEntry
from gradstream.core.plan.leases import SLOTS


def worker_sights(active: ActiveJob, members: Membership, now: float) -> list[WorkerSight]:
    """The sights of those workers of the lease table that have a session."""
    lacking = missing_slots(active, members)
    missing: dict[str, list[int]] = {}
    for slot in lacking:
        missing.setdefault(active.holders[slot], []).append(slot)
    for holder in dict.fromkeys(active.holders):
        given = active.work_of(holder)
        if given is not None:
            missing[holder] = [slot for slot in given.slots if slot in lacking]
    chains = [replica.workers for replica in active.replicas] or [(holder,) for holder in dict.fromkeys(active.holders)]
    sights = []
    for number, chain in enumerate(chains):
        slots = tuple(missing.get(chain[0], ()))
        for node_id in chain:
            node = members.get(node_id)
            if node is None or not node.present:
                continue
            given_at = active.given_at.get(node_id, now)
            mine = node.activity if node.activity.job_id == active.job_id else None
            since_given = now - given_at
            sights.append(
                WorkerSight(
                    node_id=node_id,
                    title=node.title,
                    replica=number,
                    slots=slots,
                    still_seconds=min(since_given, now - node.progress_at),
                    waiting=mine is not None and bool(mine.waiting_for),
                    loading=mine is None or mine.phase == "loading",
                    unreachable=mine.unreachable[:200] if mine is not None else "",
                    # Counted from when the worker got slots: before, it did not try to connect.
                    unreachable_seconds=min(since_given, _unreachable_seconds(node, now)),
                )
            )
    return sights


def _unreachable_seconds(node: NodeEntry, now: float) -> float:
    return max(0.0, node.activity.unreachable_seconds) + now - node.last_heartbeat


def missing_slots(active: ActiveJob, members: Membership) -> list[int]:
    """The slots of the step under way whose contributions are missing at some server of the plan."""
    if active.plan is None:
        return []
    missing: set[int] = set()
    for server in active.plan.servers:
        node = members.get(server.node_id)
        if node is not None and node.present and node.activity.job_id == active.job_id:
            missing.update(slot for slot in node.activity.missing_slots if slot < len(active.holders))
    return sorted(missing)


def inner_step_seconds(active: ActiveJob) -> float | None:
    """The median time of a step over the last commits, of a round divided by its inner steps.

    None before the second commit.
    """
    reports = [report for report, _ in active.pace.steps]
    if len(reports) < 2:
        return None
    return statistics.median(
        max(0, after.unix_ms - before.unix_ms) / 1000 / len(active.rounds.steps_from(after.step))
        for before, after in itertools.pairwise(reports)
    )


def step_seconds(active: ActiveJob) -> float | None:
    """The expected time of the step, or round, under way; None before the second commit."""
    seconds = inner_step_seconds(active)
    return seconds * len(active.rounds.steps_from(active.version)) if seconds is not None else None


def seconds_to_commit(active: ActiveJob, now: float) -> float | None:
    """Expected seconds until the step or round under way ends; None before the second commit."""
    seconds = step_seconds(active)
    if seconds is None:
        return None
    return max(0.0, seconds - (now - active.pace.steps[-1][1]))


def slot_seconds(active: ActiveJob) -> float | None:
    """The median time of a slot in a step over the last commits; None before there are two.

    A worker's progress counter moves within a round, so a round does not make this time longer.
    """
    seconds = inner_step_seconds(active)
    if seconds is None:
        return None
    return seconds / max(Counter(filter(None, active.holders)).values(), default=1)


def has_recovered(node: NodeEntry | None, since: float) -> bool:
    """Whether a node that hung or was cut off at `since` gets another attempt.

    It does when it is gone, or when it reaches its peers and has either made progress or released its slots. Without
    slots a worker cannot make progress.
    """
    if node is None or not node.alive:
        return True
    moves = node.progress_at > since or node.activity.waiting_for == SLOTS
    return moves and not node.activity.unreachable
