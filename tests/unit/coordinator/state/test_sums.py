"""Sums over steps: kept as steps come in any order, and made for files of earlier releases."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from gradstream.coordinator.state import sqlite_schema
from gradstream.coordinator.state.history import HistoryFilter
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.coordinator.state.sqlite_sums import BLOCK_STEPS
from gradstream.coordinator.state.state import JobRecord, StepTotals
from gradstream.core.errors import ConfigError
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

# The tables of a file of format 1 that differ from those of today.
FORMAT_1 = """
CREATE TABLE history (
    cursor INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, kind TEXT NOT NULL, item BLOB NOT NULL
);
CREATE INDEX history_by_job ON history (job_id, cursor);
CREATE TABLE steps (
    job_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    step INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    num_samples INTEGER NOT NULL,
    skipped INTEGER NOT NULL,
    report BLOB NOT NULL,
    PRIMARY KEY (job_id, epoch, step)
) WITHOUT ROWID;
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    recipe_json TEXT NOT NULL,
    manifest_json TEXT NOT NULL,
    run_directory TEXT NOT NULL,
    submitted_unix_ms INTEGER NOT NULL,
    state INTEGER NOT NULL,
    reason TEXT NOT NULL,
    desired TEXT NOT NULL,
    rank INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    start_version INTEGER NOT NULL,
    plan_held INTEGER NOT NULL,
    ended_unix_ms INTEGER NOT NULL,
    leases BLOB NOT NULL,
    decisions_json TEXT NOT NULL
);
PRAGMA user_version=1;
"""


def make_step(step: int, epoch: int, random_numbers: random.Random) -> coordinator_pb2.ReportStepRequest:
    return coordinator_pb2.ReportStepRequest(
        job_id="a-1",
        epoch=epoch,
        step=step,
        num_tokens=random_numbers.randrange(1000),
        num_samples=random_numbers.randrange(9),
        skipped=random_numbers.random() < 0.1,
        unix_ms=1000 * step,
    )


def make_ledger() -> list[coordinator_pb2.ReportStepRequest]:
    """Three epochs that went back over blocks' limits, with holes as a lost report leaves them, in random order."""
    random_numbers = random.Random(5)
    rows = []
    for epoch, start, end in ((1, 0, 900), (2, 500, 800), (3, 256, 1100)):
        rows += [make_step(step, epoch, random_numbers) for step in range(start, end) if random_numbers.random() < 0.95]
    random_numbers.shuffle(rows)
    return rows


def added_up(
    rows: list[coordinator_pb2.ReportStepRequest], epoch: int, start: int, below: int | None = None
) -> StepTotals:
    """The sums over a trajectory, from all rows."""
    highest = {row.step: row for row in sorted(rows, key=lambda row: row.epoch)}
    path = [row for step, row in highest.items() if step < start]
    path += [row for row in rows if row.epoch == epoch and row.step >= start]
    path = sorted((row for row in path if below is None or row.step < below), key=lambda row: row.step)
    if not path:
        return StepTotals(version=start)
    end = path[-1].step + 1
    return StepTotals(
        len(path),
        max(start, end) if below is None else end,
        sum(row.num_tokens for row in path),
        sum(row.num_samples for row in path),
        sum(row.skipped for row in path),
        path[-1],
    )


QUESTIONS = [
    (epoch, start, below)
    for epoch, start in ((3, 256), (2, 500), (4, 700), (4, 1100), (4, 0), (3, 250))
    for below in (None, 0, 1, 255, 256, 257, 511, 600, 1024, 1100, 5000)
]


def test_sums_are_those_of_all_rows_in_whatever_order_they_came(tmp_path: Path) -> None:
    state = SqliteState(tmp_path)
    rows = make_ledger()
    for index, row in enumerate(rows):
        assert state.record_step(row)
        assert not state.record_step(row)
        if index % 500 == 0:
            assert state.step_totals("a-1", 3, 256) == added_up(rows[: index + 1], 3, 256)
    for question in QUESTIONS:
        assert state.step_totals("a-1", *question) == added_up(rows, *question), question
    state.close()


def test_a_file_of_format_1_gets_sums_and_facts(tmp_path: Path) -> None:
    rows = make_ledger()
    items = [
        jobs_pb2.WatchJobResponse(event=jobs_pb2.Event(unix_ms=1000, kind="plan", message="epoch 1: worker-1")),
        jobs_pb2.WatchJobResponse(validation=jobs_pb2.Validation(version=2, loss=1.0)),
        jobs_pb2.WatchJobResponse(
            log=jobs_pb2.NodeLogLine(node="worker-1", line=coordinator_pb2.LogLine(unix_ms=2000, level="error"))
        ),
    ]
    record = JobRecord("a-1", "a", "{}", "{}", "/runs/a-1", submitted_unix_ms=5, epoch=3, start_version=256)
    with closing(sqlite3.connect(tmp_path / "coordinator.sqlite", isolation_level=None)) as db:
        db.executescript(FORMAT_1)
        db.execute("BEGIN")
        db.execute(
            "INSERT INTO jobs VALUES (1, 'a-1', 'a', '{}', '{}', '/runs/a-1', 5, ?, '', 'run', 0, 3, 256, 0, 0, x'',"
            " '{}')",
            (int(record.state),),
        )
        for item in items:
            row = ("a-1", item.WhichOneof("item"), item.SerializeToString())
            db.execute("INSERT INTO history (job_id, kind, item) VALUES (?, ?, ?)", row)
        for row in rows:
            values = (row.epoch, row.step, row.num_tokens, row.num_samples, row.skipped, row.SerializeToString())
            db.execute("INSERT INTO steps VALUES ('a-1', ?, ?, ?, ?, ?, ?)", values)
        db.execute("COMMIT")
    for _ in range(2):  # the second time there is nothing left to do
        state = SqliteState(tmp_path)
        assert state.get_job("a-1") == record
        for question in QUESTIONS:
            assert state.step_totals("a-1", *question) == added_up(rows, *question), question
        found = [
            [item.WhichOneof("item") for item in state.read_history("a-1", 0, 9, wanted)]
            for wanted in (
                HistoryFilter(kinds=("event", "validation", "log"), event_kinds=("plan",)),
                HistoryFilter(kinds=("event", "validation"), event_kinds=("node",), since_unix_ms=1000),
                HistoryFilter(nodes=("worker-1",), since_unix_ms=1001),
                HistoryFilter(kinds=("log",), level="error"),
            )
        ]
        assert found == [["event", "validation", "log"], ["validation"], ["log"], ["log"]]
        # What comes later is added to the sums.
        state.record_step(make_step(1200, 3, random.Random(0)))
        state.close()
        rows = [row for row in rows if row.step != 1200] + [make_step(1200, 3, random.Random(0))]


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(sqlite3.connect(tmp_path / "coordinator.sqlite", isolation_level=None)) as db:
        db.executescript(FORMAT_1)
        # A damaged item, which cannot be read, has no facts. It does not keep the coordinator from starting.
        db.execute("INSERT INTO history (job_id, kind, item) VALUES ('a-1', 'event', x'FF')")

        def fails(item: object) -> None:
            raise sqlite3.OperationalError("disk I/O error")

        with monkeypatch.context() as patched:
            patched.setattr(sqlite_schema, "add_facts", fails)
            with pytest.raises(ConfigError, match="disk I/O error"):
                SqliteState(tmp_path)
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert len(db.execute("PRAGMA table_info(history)").fetchall()) == 4
    SqliteState(tmp_path).close()


def test_the_work_of_a_sum_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    """Counted in instructions of SQLite's machine."""
    state = SqliteState(tmp_path)
    work = [0]

    def count() -> int:
        work[0] += 1
        return 0

    costs = []
    for num_steps in (2 * BLOCK_STEPS, 8 * BLOCK_STEPS):
        for step in range(num_steps):
            state.record_step(make_step(step, 1, random.Random(step)))
        state._reads.set_progress_handler(count, 1)
        work[0] = 0
        assert state.step_totals("a-1", 1, 0).num_steps == num_steps
        costs.append(work[0])
        state._reads.set_progress_handler(None, 1)
    # Each further block of 256 steps is one row, and a row takes about a dozen instructions.
    assert costs[1] < costs[0] + 6 * 20
    state.close()


def test_the_work_of_recording_a_step_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    """Counted likewise. The steps are within one block."""
    state = SqliteState(tmp_path)
    work = [0]

    def count() -> int:
        work[0] += 1
        return 0

    costs = []
    for step in range(BLOCK_STEPS):
        work[0] = 0
        state._db.set_progress_handler(count, 1)
        state.record_step(make_step(step, 1, random.Random(step)))
        state._db.set_progress_handler(None, 1)
        costs.append(work[0])
    assert max(costs[-50:]) < 1.2 * max(costs[2:52])
    state.close()


def test_jobs_are_read_in_pages_by_state_and_by_name(tmp_path: Path) -> None:
    state = SqliteState(tmp_path)
    assert (state.newest_job(), state.job_ids(), state.ranks(), state.page_of_jobs("", 9)) == (None, [], (0, 0), [])
    for number in range(1, 8):
        record = JobRecord(f"a-{number}", f"n{number % 2}", "{}", "{}", "/runs", submitted_unix_ms=5, rank=number - 3)
        state.create_job(replace(record, state=jobs_pb2.JOB_STATE_RUNNING if number % 3 == 0 else record.state))

    def page(before: str, limit: int, *states: int) -> list[str]:
        found = state.page_of_jobs(before, limit, states)
        assert found is not None
        return [job.job_id for job in found]

    assert (page("", 3), page("a-5", 3), page("a-1", 3)) == (["a-7", "a-6", "a-5"], ["a-4", "a-3", "a-2"], [])
    assert page("", 1, jobs_pb2.JOB_STATE_RUNNING) == ["a-6"]
    assert page("a-6", 9, jobs_pb2.JOB_STATE_RUNNING, jobs_pb2.JOB_STATE_PAUSED) == ["a-3"]
    assert state.page_of_jobs("b-1", 3) is None
    assert [job.job_id for job in state.list_jobs((jobs_pb2.JOB_STATE_RUNNING,))] == ["a-3", "a-6"]
    newest, named = state.newest_job(), state.newest_job("n0")
    assert newest is not None
    assert named is not None
    assert (newest.job_id, named.job_id, state.newest_job("n2"), state.ranks()) == ("a-7", "a-6", None, (-2, 4))
    assert state.job_ids() == [f"a-{number}" for number in range(1, 8)]
    state.close()
