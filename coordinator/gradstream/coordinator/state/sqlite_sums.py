"""Sums over the steps of a job, kept as steps are stored.

The ledger may have a step in several epochs. The trajectory of a job in epoch E that started from version S has two
parts: below S the row of each step's highest epoch, from S on the rows of E. Sums are kept for blocks of steps: over
the rows of each epoch, and over the rows of the highest epochs. The sum over a trajectory adds up whole blocks, and the
rows of at most two blocks that the limits cut. So no call reads all rows, in whatever order reports come.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from gradstream.coordinator.state.state import StepTotals
from gradstream.proto.v1 import coordinator_pb2

BLOCK_STEPS = 256
"""Number of steps of a block. The file format depends on it."""
HIGHEST = 0
"""Stands in `step_sums` for the rows of the highest epochs; epochs begin with 1."""
NO_LIMIT = 2**63 - 1

Read = Callable[[str, dict[str, object]], list[Any]]

# The rows whose epoch is the highest of their step.
_IS_HIGHEST = (
    "epoch = (SELECT MAX(epoch) FROM steps AS other WHERE other.job_id = steps.job_id AND other.step = steps.step)"
)
_COLUMNS = "COUNT(*), SUM(num_tokens), SUM(num_samples), SUM(skipped)"

# The sums of a file of an earlier release, which has none.
SUMS_OF_ALL_STEPS = f"""
INSERT INTO step_sums SELECT job_id, epoch, step / {BLOCK_STEPS} AS block, {_COLUMNS} FROM steps
    GROUP BY job_id, epoch, block;
INSERT INTO step_sums SELECT job_id, {HIGHEST}, step / {BLOCK_STEPS} AS block, {_COLUMNS} FROM steps
    WHERE {_IS_HIGHEST} GROUP BY job_id, block;
"""

TRAJECTORY = f"""
    job_id = :job AND step < :below AND (
        epoch = :epoch OR (step < :start AND {_IS_HIGHEST})
    )
"""
"""Selects the rows of the trajectory that epoch :epoch continues from version :start, below step :below."""


# Without the index by name SQLite takes the primary key, for its order, and reads every step of the job.
OTHER_ROWS = (
    "SELECT epoch, num_tokens, num_samples, skipped FROM steps INDEXED BY steps_by_step"
    " WHERE job_id = ? AND step = ? AND epoch <> ? ORDER BY epoch DESC LIMIT 1"
)
"""The rows of a step in other epochs, highest epoch first."""


def add_step(db: sqlite3.Connection, report: coordinator_pb2.ReportStepRequest) -> None:
    """Add a step that was just inserted to the sums."""
    row = (1, report.num_tokens, report.num_samples, int(report.skipped))
    _add(db, report.job_id, report.epoch, report.step, row)
    others = db.execute(OTHER_ROWS, (report.job_id, report.step, report.epoch)).fetchone()
    if others is None:
        _add(db, report.job_id, HIGHEST, report.step, row)
    elif others[0] < report.epoch:
        changes = [new - old for new, old in zip(row, (1, *others[1:]), strict=True)]
        _add(db, report.job_id, HIGHEST, report.step, changes)


def _add(db: sqlite3.Connection, job_id: str, epoch: int, step: int, values: Sequence[int]) -> None:
    db.execute(
        "INSERT INTO step_sums VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
        " num_steps = num_steps + excluded.num_steps, num_tokens = num_tokens + excluded.num_tokens,"
        " num_samples = num_samples + excluded.num_samples, num_skipped = num_skipped + excluded.num_skipped",
        (job_id, epoch, step // BLOCK_STEPS, *values),
    )


def step_totals(read: Read, job_id: str, epoch: int, start_version: int, below: int | None) -> StepTotals:
    """The sums over a trajectory, as `StateReader.step_totals` says."""
    limit = NO_LIMIT if below is None else min(below, NO_LIMIT)
    start = min(start_version, NO_LIMIT)
    parts = [
        *_sums(read, {"job": job_id, "epoch": HIGHEST, "first": 0, "below": min(start, limit)}, _IS_HIGHEST),
        *_sums(read, {"job": job_id, "epoch": epoch, "first": start, "below": limit}, "epoch = :epoch"),
    ]
    num_steps, num_tokens, num_samples, num_skipped = map(sum, zip(*parts, strict=True)) if parts else (0, 0, 0, 0)
    if not num_steps:
        return StepTotals(version=start_version)
    last = _last_report(read, job_id, epoch, start, limit)
    return StepTotals(
        num_steps=num_steps,
        version=max(start_version, last.step + 1) if below is None else last.step + 1,
        num_tokens=num_tokens,
        num_samples=num_samples,
        num_skipped=num_skipped,
        last=last,
    )


def _sums(read: Read, values: dict[str, object], rows: str) -> list[Sequence[int]]:
    """The sums over the steps from :first up to :below: of the cut blocks from the rows, of the others as kept."""
    first, below = int(str(values["first"])), int(str(values["below"]))
    if first >= below:
        return []
    first_block, last_block = -(-first // BLOCK_STEPS), below // BLOCK_STEPS
    found: list[Sequence[int]] = []
    if first_block < last_block:
        found += read(
            "SELECT SUM(num_steps), SUM(num_tokens), SUM(num_samples), SUM(num_skipped) FROM step_sums"
            " WHERE job_id = :job AND epoch = :epoch AND block >= :first AND block < :below",
            {**values, "first": first_block, "below": last_block},
        )
    # --- the rows of the blocks that the limits cut, which may be one and the same block
    cut = [(first, min(first_block * BLOCK_STEPS, below)), (max(last_block * BLOCK_STEPS, first), below)]
    for begin, end in cut if first_block <= last_block else [(first, below)]:
        if begin < end:
            query = f"SELECT {_COLUMNS} FROM steps WHERE job_id = :job AND step >= :first AND step < :below AND {rows}"
            found += read(query, {**values, "first": begin, "below": end})
    return [row for row in found if row[0]]


def _last_report(read: Read, job_id: str, epoch: int, start: int, limit: int) -> coordinator_pb2.ReportStepRequest:
    """The report of the trajectory's last step below `limit`, of a trajectory that has one."""
    values = {"job": job_id, "epoch": epoch, "start": start, "below": limit, "until": min(start, limit)}
    rows = read(
        "SELECT report FROM steps WHERE job_id = :job AND epoch = :epoch AND step >= :start AND step < :below"
        " ORDER BY step DESC LIMIT 1",
        values,
    ) or read(
        "SELECT report FROM steps WHERE job_id = :job AND step < :until ORDER BY step DESC, epoch DESC LIMIT 1", values
    )
    return coordinator_pb2.ReportStepRequest.FromString(rows[0][0])
