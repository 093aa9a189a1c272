"""The slots that counted in rounds with a quorum, as a plan carries them for rounds that are computed again.

A round with a quorum is committed without the slots that are late, so its bits depend on time. The ledger has which
slots counted. A plan that walks the same rounds again therefore names them, and its servers wait for exactly these.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class RecordedSlots:
    """The slots, in rising order, that counted in each round from a version `begin` on, before version `end`."""

    begin: int
    end: int
    slots: tuple[int, ...]


def runs_of(rounds: Iterable[tuple[int, tuple[int, ...]]]) -> tuple[RecordedSlots, ...]:
    """Gather rounds, given as (version, slots) by rising version, into runs of neighbours with the same slots."""
    runs: list[RecordedSlots] = []
    for version, slots in rounds:
        last = runs[-1] if runs else None
        if last is not None and last.end == version and last.slots == slots:
            runs[-1] = replace(last, end=version + 1)
        else:
            runs.append(RecordedSlots(version, version + 1, slots))
    return tuple(runs)


def slots_at(runs: Sequence[RecordedSlots], version: int) -> tuple[int, ...] | None:
    """The slots that counted in the round from a version; None if that is not recorded."""
    place = bisect_right(runs, version, key=lambda run: run.begin) - 1
    return runs[place].slots if place >= 0 and version < runs[place].end else None


def rounds_of(runs: Iterable[RecordedSlots]) -> dict[int, tuple[int, ...]]:
    """The slots that counted, by version."""
    return {version: run.slots for run in runs for version in range(run.begin, run.end)}


def problem_of(runs: Sequence[RecordedSlots], num_slots: int) -> str:
    """What is impossible about recorded slots that came in a message; "" if nothing is."""
    end = 0
    for run in runs:
        if not end <= run.begin < run.end:
            return f"rounds from version {run.begin} up to {run.end} after those up to {end}"
        if not run.slots or list(run.slots) != sorted(set(run.slots)) or run.slots[-1] >= num_slots:
            return f"slots {list(run.slots)[:8]} of {num_slots} from version {run.begin} on"
        end = run.end
    return ""
