"""The coordinator's state in one SQLite file (WAL).

Job records and the step ledger are flushed to the disk before a call returns (`synchronous=FULL`). The history, which
only people read, may lose its last items in a power failure (`NORMAL`). A killed process loses nothing of either.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gradstream.coordinator.state.state import MAX_LOG_LINES, JobRecord, State, StepTotals, Trouble
from gradstream.core.errors import ConfigError, ProtocolError, UnreachableError
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

FORMAT_VERSION = 1
TROUBLE_SECONDS = 60.0
"""A failure that has not occurred for this time is over: its operation is not tried any more."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
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
    decisions_json TEXT NOT NULL,
    request_id TEXT NOT NULL DEFAULT '',
    without_servers_json TEXT NOT NULL DEFAULT '[]'
);
CREATE TABLE IF NOT EXISTS plans (
    job_id TEXT NOT NULL, epoch INTEGER NOT NULL, plan BLOB NOT NULL, PRIMARY KEY (job_id, epoch)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS history (
    cursor INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, kind TEXT NOT NULL, item BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS history_by_job ON history (job_id, cursor);
CREATE INDEX IF NOT EXISTS history_by_kind ON history (job_id, kind, cursor);
CREATE TABLE IF NOT EXISTS steps (
    job_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    step INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    num_samples INTEGER NOT NULL,
    skipped INTEGER NOT NULL,
    report BLOB NOT NULL,
    PRIMARY KEY (job_id, epoch, step)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS steps_by_step ON steps (job_id, step, epoch);
CREATE TABLE IF NOT EXISTS validation_parts (
    job_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    version INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    loss_sum REAL NOT NULL,
    num_tokens INTEGER NOT NULL,
    PRIMARY KEY (job_id, version, slot, epoch)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS validations (
    job_id TEXT NOT NULL, version INTEGER NOT NULL, item BLOB NOT NULL, PRIMARY KEY (job_id, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoint_files (
    job_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    version INTEGER NOT NULL,
    server INTEGER NOT NULL,
    report BLOB NOT NULL,
    PRIMARY KEY (job_id, epoch, version, server)
);
CREATE TABLE IF NOT EXISTS residuals (
    job_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    version INTEGER NOT NULL,
    slot INTEGER NOT NULL,
    has_file INTEGER NOT NULL,
    report BLOB NOT NULL,
    PRIMARY KEY (job_id, epoch, version, slot, has_file)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS checkpoints (
    job_id TEXT NOT NULL,
    version INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    unix_ms INTEGER NOT NULL,
    PRIMARY KEY (job_id, version)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pulse (id INTEGER PRIMARY KEY, count INTEGER NOT NULL);
"""

# The tables with rows of a job.
JOB_TABLES = (
    "jobs",
    "plans",
    "history",
    "steps",
    "validation_parts",
    "validations",
    "checkpoint_files",
    "residuals",
    "checkpoints",
)
_JOB_COLUMNS = (
    "job_id, name, recipe_json, manifest_json, run_directory, submitted_unix_ms, state, reason, desired, rank, epoch, "
    "start_version, plan_held, ended_unix_ms, leases, decisions_json, request_id, without_servers_json"
)
# The rows of the trajectory that epoch :epoch continues from version :start.
_TRAJECTORY = """
    job_id = :job AND step < :below AND (
        epoch = :epoch OR (step < :start AND epoch = (
            SELECT MAX(epoch) FROM steps AS other WHERE other.job_id = steps.job_id AND other.step = steps.step
        ))
    )
"""


class SqliteState(State):
    """State in `directory`/coordinator.sqlite. Raises ConfigError when the file belongs to another version."""

    def __init__(self, directory: Path, max_log_lines: int = MAX_LOG_LINES):
        self._max_log_lines = max_log_lines
        # Lines added since the last trim, by job. A trim at every line would cost more than the line.
        self._untrimmed: dict[str, int] = {}
        # For each failed operation: the trouble, and when (monotonic seconds) it last occurred.
        self._troubles: dict[str, tuple[Trouble, float]] = {}
        path = directory / "coordinator.sqlite"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
            self._db.execute("PRAGMA journal_mode=WAL")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found not in (0, FORMAT_VERSION):
                raise ConfigError(
                    f"{path} has format {found}, this gradstream writes {FORMAT_VERSION}; "
                    f"use the gradstream that wrote it or another --state directory"
                )
            self._db.executescript(_SCHEMA)
            self._add_columns()
            self._db.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"the state in {path} cannot be opened ({error}); make the directory writable") from None

    def _add_columns(self) -> None:
        """Add the missing columns to a file of an earlier release."""
        known = {row[1] for row in self._db.execute("PRAGMA table_info(jobs)")}
        for column, default in (("request_id", ""), ("without_servers_json", "[]")):
            if column not in known:
                self._db.execute(f"ALTER TABLE jobs ADD COLUMN {column} TEXT NOT NULL DEFAULT '{default}'")
        self._db.execute(
            "CREATE UNIQUE INDEX IF NOT EXISTS jobs_by_request ON jobs (request_id) WHERE request_id <> ''"
        )

    @property
    def trouble(self) -> Trouble | None:
        now = time.monotonic()
        current = [trouble for trouble, seen in self._troubles.values() if now - seen < TROUBLE_SECONDS]
        return min(current, key=lambda trouble: trouble.since_unix_ms, default=None)

    @contextmanager
    def _transaction(self, what: str, durable: bool) -> Iterator[sqlite3.Connection]:
        """Run a transaction; with `durable` flush it to the disk.

        `what` names the operation whose trouble is noted: a nearly full disk may take a log line but not a transition.
        """
        try:
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                # After a full disk SQLite has rolled back already; the error of a second rollback would hide the cause.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
            cure = "does another program use it?" if "locked" in str(error) else "is its disk full?"
            raise self._failed(what, f"the coordinator cannot write its state ({error}); {cure}") from None
        except OverflowError:
            raise ProtocolError("a number in the message is impossibly large") from None
        if durable:
            self._troubles.clear()
        self._troubles.pop(what, None)

    def _read(self, query: str, values: Sequence[object] | dict[str, object] = ()) -> list[Any]:
        """Return all rows of a query. Raises UnreachableError."""
        try:
            rows = self._db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            cause = f"the coordinator cannot read its state ({error}); is its disk damaged?"
            raise self._failed("read", cause) from None
        self._troubles.pop("read", None)
        return rows

    def _failed(self, what: str, cause: str) -> UnreachableError:
        now = time.monotonic()
        before, seen = self._troubles.get(what, (None, 0.0))
        goes_on = before is not None and now - seen < TROUBLE_SECONDS
        since = before.since_unix_ms if before is not None and goes_on else int(time.time() * 1000)
        self._troubles[what] = Trouble(cause, since), now
        return UnreachableError(cause)

    def create_job(self, record: JobRecord, items: Sequence[jobs_pb2.WatchJobResponse] = ()) -> None:
        with self._transaction("create_job", durable=True) as db:
            marks = ", ".join("?" * len(_job_row(record)))
            db.execute(f"INSERT INTO jobs ({_JOB_COLUMNS}) VALUES ({marks})", _job_row(record))
            for item in items:
                _append(db, record.job_id, item)

    def store_job(
        self, record: JobRecord, items: Sequence[jobs_pb2.WatchJobResponse] = (), plan: bytes | None = None
    ) -> None:
        with self._transaction("store_job", durable=True) as db:
            assignments = ", ".join(f"{column.strip()} = ?" for column in _JOB_COLUMNS.split(","))
            db.execute(f"UPDATE jobs SET {assignments} WHERE job_id = ?", (*_job_row(record), record.job_id))
            if plan is not None:
                db.execute("INSERT OR REPLACE INTO plans VALUES (?, ?, ?)", (record.job_id, record.epoch, plan))
                # Older plans are never used again, and a large model's plan has megabytes.
                db.execute("DELETE FROM plans WHERE job_id = ? AND epoch < ?", (record.job_id, record.epoch))
            for item in items:
                _append(db, record.job_id, item)

    def get_job(self, job_id: str) -> JobRecord | None:
        rows = self._read(f"SELECT {_JOB_COLUMNS} FROM jobs WHERE job_id = ?", (job_id,))
        return _job_record(rows[0]) if rows else None

    def job_of_request(self, request_id: str) -> JobRecord | None:
        rows = self._read(f"SELECT {_JOB_COLUMNS} FROM jobs WHERE request_id = ?", (request_id,))
        return _job_record(rows[0]) if rows else None

    def list_jobs(self) -> list[JobRecord]:
        return [_job_record(row) for row in self._read(f"SELECT {_JOB_COLUMNS} FROM jobs ORDER BY number")]

    def load_plan(self, job_id: str, epoch: int) -> bytes | None:
        rows = self._read("SELECT plan FROM plans WHERE job_id = ? AND epoch = ?", (job_id, epoch))
        return rows[0][0] if rows else None

    def append(self, job_id: str, items: Sequence[jobs_pb2.WatchJobResponse]) -> None:
        with self._transaction("append", durable=False) as db:
            for item in items:
                _append(db, job_id, item)
            lines = sum(item.WhichOneof("item") == "log" for item in items)
            pending = self._untrimmed.get(job_id, 0) + lines
            if pending >= min(1000, self._max_log_lines):
                db.execute(
                    "DELETE FROM history WHERE job_id = :job AND kind = 'log' AND cursor <= ("
                    " SELECT cursor FROM history WHERE job_id = :job AND kind = 'log'"
                    " ORDER BY cursor DESC LIMIT 1 OFFSET :keep)",
                    {"job": job_id, "keep": self._max_log_lines},
                )
                pending = 0
            self._untrimmed[job_id] = pending

    def read_history(
        self, job_id: str, after_cursor: int, limit: int, kinds: Sequence[str] = ()
    ) -> list[jobs_pb2.WatchJobResponse]:
        items = []
        among = f" AND kind IN ({', '.join('?' * len(kinds))})" if kinds else ""
        for cursor, data in self._read(
            f"SELECT cursor, item FROM history WHERE job_id = ? AND cursor > ?{among} ORDER BY cursor LIMIT ?",
            (job_id, min(after_cursor, 2**63 - 1), *kinds, limit),
        ):
            item = jobs_pb2.WatchJobResponse.FromString(data)
            item.cursor = cursor
            items.append(item)
        return items

    def record_step(
        self, report: coordinator_pb2.ReportStepRequest, items: Sequence[jobs_pb2.WatchJobResponse] = ()
    ) -> bool:
        with self._transaction("record_step", durable=True) as db:
            added = db.execute(
                "INSERT OR IGNORE INTO steps VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    report.job_id,
                    report.epoch,
                    report.step,
                    report.num_tokens,
                    report.num_samples,
                    report.skipped,
                    report.SerializeToString(),
                ),
            ).rowcount
            for item in (jobs_pb2.WatchJobResponse(step=report), *items) if added else ():
                _append(db, report.job_id, item)
        return bool(added)

    def step_totals(self, job_id: str, epoch: int, start_version: int, below: int | None = None) -> StepTotals:
        values: dict[str, object] = {"job": job_id, "epoch": epoch, "start": start_version}
        values["below"] = 2**63 - 1 if below is None else below
        count, tokens, samples, skipped, last_step = self._read(
            "SELECT COUNT(*), SUM(num_tokens), SUM(num_samples), SUM(skipped), MAX(step) FROM steps"
            f" WHERE {_TRAJECTORY}",
            values,
        )[0]
        if not count:
            return StepTotals(version=start_version)
        report = self._read(
            f"SELECT report FROM steps WHERE {_TRAJECTORY} AND step = :last", {**values, "last": last_step}
        )[0][0]
        return StepTotals(
            num_steps=count,
            version=max(start_version, last_step + 1) if below is None else last_step + 1,
            num_tokens=tokens,
            num_samples=samples,
            num_skipped=skipped,
            last=coordinator_pb2.ReportStepRequest.FromString(report),
        )

    def read_steps(
        self, job_id: str, epoch: int, start_version: int, first: int, limit: int
    ) -> list[coordinator_pb2.ReportStepRequest]:
        values = {"job": job_id, "epoch": epoch, "start": start_version, "below": 2**63 - 1}
        rows = self._read(
            f"SELECT report FROM steps WHERE {_TRAJECTORY} AND step >= :first ORDER BY step LIMIT :limit",
            {**values, "first": min(first, 2**63 - 1), "limit": limit},
        )
        return [coordinator_pb2.ReportStepRequest.FromString(report) for (report,) in rows]

    def record_validation_part(self, report: coordinator_pb2.ReportValidationRequest) -> bool:
        with self._transaction("record_validation_part", durable=True) as db:
            # SQLite stores NaN as NULL, which the column refuses.
            loss_sum = "nan" if math.isnan(report.loss_sum) else report.loss_sum
            row = (report.job_id, report.epoch, report.version, report.slot, loss_sum, report.num_tokens)
            return bool(db.execute("INSERT OR IGNORE INTO validation_parts VALUES (?, ?, ?, ?, ?, ?)", row).rowcount)

    def validation_parts(self, job_id: str, version: int) -> dict[int, tuple[float, int]]:
        rows = self._read(
            "SELECT slot, loss_sum, num_tokens FROM validation_parts WHERE job_id = ? AND version = ?"
            " ORDER BY slot, epoch DESC",
            (job_id, version),
        )
        # Of a slot with several rows the last one, of the earliest epoch, counts. Parts of two epochs are equal anyway.
        return {slot: (float(loss_sum), num_tokens) for slot, loss_sum, num_tokens in rows}

    def record_validation(self, job_id: str, validation: jobs_pb2.Validation) -> bool:
        with self._transaction("record_validation", durable=True) as db:
            row = (job_id, validation.version, validation.SerializeToString())
            added = db.execute("INSERT OR IGNORE INTO validations VALUES (?, ?, ?)", row).rowcount
            if added:
                _append(db, job_id, jobs_pb2.WatchJobResponse(validation=validation))
        return bool(added)

    def validations(self, job_id: str) -> list[jobs_pb2.Validation]:
        rows = self._read("SELECT item FROM validations WHERE job_id = ? ORDER BY version", (job_id,))
        return [jobs_pb2.Validation.FromString(item) for (item,) in rows]

    def record_checkpoint_file(self, report: coordinator_pb2.ReportCheckpointRequest) -> bool:
        with self._transaction("record_checkpoint_file", durable=True) as db:
            if _is_written(db, report.job_id, report.epoch, report.version):
                return False
            row = (report.job_id, report.epoch, report.version, report.server, report.SerializeToString())
            return bool(db.execute("INSERT OR IGNORE INTO checkpoint_files VALUES (?, ?, ?, ?, ?)", row).rowcount)

    def checkpoint_files(self, job_id: str, epoch: int) -> list[coordinator_pb2.ReportCheckpointRequest]:
        rows = self._read(
            "SELECT report FROM checkpoint_files WHERE job_id = ? AND epoch = ? ORDER BY version, server",
            (job_id, epoch),
        )
        return [coordinator_pb2.ReportCheckpointRequest.FromString(report) for (report,) in rows]

    def record_residual(self, report: coordinator_pb2.ReportResidualRequest) -> bool:
        with self._transaction("record_residual", durable=True) as db:
            if report.file and _is_written(db, report.job_id, report.epoch, report.version):
                return False
            row = (report.job_id, report.epoch, report.version, report.slot, bool(report.file))
            return bool(
                db.execute(
                    "INSERT OR IGNORE INTO residuals VALUES (?, ?, ?, ?, ?, ?)", (*row, report.SerializeToString())
                ).rowcount
            )

    def residuals(self, job_id: str, epoch: int) -> list[coordinator_pb2.ReportResidualRequest]:
        rows = self._read(
            "SELECT report FROM residuals WHERE job_id = ? AND epoch = ? ORDER BY version, slot", (job_id, epoch)
        )
        return [coordinator_pb2.ReportResidualRequest.FromString(report) for (report,) in rows]

    def record_checkpoint(
        self,
        job_id: str,
        epoch: int,
        checkpoint: jobs_pb2.Checkpoint,
        items: Sequence[jobs_pb2.WatchJobResponse] = (),
    ) -> None:
        with self._transaction("record_checkpoint", durable=True) as db:
            db.execute(
                "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?)",
                (job_id, checkpoint.version, epoch, checkpoint.unix_ms),
            )
            db.execute(
                "DELETE FROM checkpoint_files WHERE job_id = ? AND version = ? AND epoch <= ?",
                (job_id, checkpoint.version, epoch),
            )
            db.execute(
                "DELETE FROM residuals WHERE job_id = ? AND (epoch < ? OR (epoch = ? AND version = ? AND has_file))",
                (job_id, epoch, epoch, checkpoint.version),
            )
            for item in (jobs_pb2.WatchJobResponse(checkpoint=checkpoint), *items):
                _append(db, job_id, item)

    def checkpoint_versions(self, job_id: str) -> list[int]:
        rows = self._read("SELECT version FROM checkpoints WHERE job_id = ? ORDER BY version", (job_id,))
        return [version for (version,) in rows]

    def forget_checkpoints(self, job_id: str, after: int, items: Sequence[jobs_pb2.WatchJobResponse] = ()) -> None:
        with self._transaction("forget_checkpoints", durable=True) as db:
            db.execute("DELETE FROM checkpoints WHERE job_id = ? AND version > ?", (job_id, after))
            for item in items:
                _append(db, job_id, item)

    def delete_job(self, job_id: str) -> None:
        with self._transaction("delete_job", durable=True) as db:
            for table in JOB_TABLES:
                db.execute(f"DELETE FROM {table} WHERE job_id = ?", (job_id,))
        self._untrimmed.pop(job_id, None)

    def check_writable(self) -> None:
        with self._transaction("check_writable", durable=False) as db:
            db.execute("INSERT INTO pulse VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET count = count + 1")

    def close(self) -> None:
        self._db.close()


def _is_written(db: sqlite3.Connection, job_id: str, epoch: int, version: int) -> bool:
    """Whether the manifest of a version was written under this epoch."""
    query = "SELECT 1 FROM checkpoints WHERE job_id = ? AND version = ? AND epoch = ?"
    return db.execute(query, (job_id, version, epoch)).fetchone() is not None


def _append(db: sqlite3.Connection, job_id: str, item: jobs_pb2.WatchJobResponse) -> None:
    row = (job_id, item.WhichOneof("item"), item.SerializeToString())
    db.execute("INSERT INTO history (job_id, kind, item) VALUES (?, ?, ?)", row)


def _job_row(record: JobRecord) -> tuple[str | int | bytes, ...]:
    """The values of `_JOB_COLUMNS`."""
    return (
        record.job_id,
        record.name,
        record.recipe_json,
        record.manifest_json,
        record.run_directory,
        record.submitted_unix_ms,
        int(record.state),
        record.reason,
        record.desired,
        record.rank,
        record.epoch,
        record.start_version,
        int(record.plan_held),
        record.ended_unix_ms,
        record.leases,
        json.dumps(record.decisions),
        record.request_id,
        json.dumps(record.without_servers),
    )


def _job_record(row: Sequence[object]) -> JobRecord:
    """A record from the values of `_JOB_COLUMNS`."""
    names = [column.strip() for column in _JOB_COLUMNS.split(",")]
    values = dict(zip(names, row, strict=True))
    decisions = json.loads(str(values.pop("decisions_json")))
    values["plan_held"] = bool(values["plan_held"])
    without_servers = tuple(json.loads(str(values.pop("without_servers_json"))))
    return JobRecord(**values, decisions=decisions, without_servers=without_servers)  # type: ignore[arg-type]
