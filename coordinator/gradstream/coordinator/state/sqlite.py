"""The coordinator's state in one SQLite file (WAL).

Job records and the step ledger are flushed to the disk before a call returns (`synchronous=FULL`). The history, which
only people read, may lose its last items in a power failure (`NORMAL`). A killed process loses nothing of either, apart
from the items of `append_later` that wait for the next write.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gradstream.coordinator.state import sqlite_schema, sqlite_sums
from gradstream.coordinator.state.history import facts_of
from gradstream.coordinator.state.sqlite_reader import FILE_NAME, JOB_COLUMNS, SqliteReader, Troubles, connect
from gradstream.coordinator.state.state import MAX_LOG_LINES, MAX_WAITING_ITEMS, WAIT_SECONDS, JobRecord, State, Trouble
from gradstream.core.errors import ConfigError, ProtocolError, UnreachableError
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

STUCK = "the coordinator cannot write its state (a write has not ended); is its disk slow?"


class SqliteState(SqliteReader, State):
    """State in `directory`/coordinator.sqlite. Writes have their own connection, and one thread at a time writes.

    Raises ConfigError when the file belongs to another version.
    """

    def __init__(self, directory: Path, max_log_lines: int = MAX_LOG_LINES):
        self._max_log_lines = max_log_lines
        # Lines added since the last trim, by job. A trim at every line would cost more than the line.
        self._untrimmed: dict[str, int] = {}
        self._writing = threading.Lock()
        # When the write under way began; 0 without one.
        self._began_unix_ms = 0
        # Items of `append_later`, with their jobs. The oldest are dropped when there are too many.
        self._waiting: deque[tuple[str, jobs_pb2.WatchJobResponse]] = deque(maxlen=MAX_WAITING_ITEMS)
        path = directory / FILE_NAME
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._db = connect(path)
            sqlite_schema.prepare(self._db, path)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"the state in {path} cannot be opened ({error}); make the directory writable") from None
        super().__init__(path, Troubles())

    def open_reader(self) -> SqliteReader:
        return SqliteReader(self._path, self._troubles)

    @property
    def trouble(self) -> Trouble | None:
        began = self._began_unix_ms
        if began and time.time() * 1000 - began > 1000 * WAIT_SECONDS:
            return Trouble(STUCK, began)
        return self._troubles.oldest

    @contextmanager
    def _transaction(self, what: str, durable: bool) -> Iterator[sqlite3.Connection]:
        """Run a transaction; with `durable` flush it to the disk.

        `what` names the operation whose trouble is noted: a nearly full disk may take a log line but not a transition.
        """
        if not self._writing.acquire(timeout=WAIT_SECONDS):
            raise self._troubles.failed(what, STUCK)
        waiting: list[tuple[str, jobs_pb2.WatchJobResponse]] = []
        try:
            self._began_unix_ms = int(time.time() * 1000)
            try:
                self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    waiting = self._take_waiting()
                    self._store_items(waiting)
                    yield self._db
                except BaseException:
                    # After a full disk SQLite has rolled back already; the error of a second rollback would hide the
                    # cause.
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                if self._db.in_transaction:
                    with suppress(sqlite3.Error):
                        self._db.execute("ROLLBACK")
                cure = "does another program use it?" if "locked" in str(error) else "is its disk full?"
                cause = f"the coordinator cannot write its state ({error}); {cure}"
                raise self._troubles.failed(what, cause) from None
            except OverflowError:
                raise ProtocolError("a number in the message is impossibly large") from None
        except BaseException:
            # Nothing was stored. What waits goes on waiting, in its order.
            self._waiting.extendleft(reversed(waiting))
            raise
        finally:
            self._began_unix_ms = 0
            self._writing.release()
        self._troubles.succeeded(what, all_others=durable)

    def create_job(self, record: JobRecord, items: Sequence[jobs_pb2.WatchJobResponse] = ()) -> None:
        with self._transaction("create_job", durable=True) as db:
            marks = ", ".join("?" * len(_job_row(record)))
            db.execute(f"INSERT INTO jobs ({JOB_COLUMNS}) VALUES ({marks})", _job_row(record))
            for item in items:
                _append(db, record.job_id, item)

    def store_job(
        self, record: JobRecord, items: Sequence[jobs_pb2.WatchJobResponse] = (), plan: bytes | None = None
    ) -> None:
        with self._transaction("store_job", durable=True) as db:
            assignments = ", ".join(f"{column.strip()} = ?" for column in JOB_COLUMNS.split(","))
            db.execute(f"UPDATE jobs SET {assignments} WHERE job_id = ?", (*_job_row(record), record.job_id))
            if plan is not None:
                db.execute("INSERT OR REPLACE INTO plans VALUES (?, ?, ?)", (record.job_id, record.epoch, plan))
                # Older plans are never used again, and a large model's plan has megabytes.
                db.execute("DELETE FROM plans WHERE job_id = ? AND epoch < ?", (record.job_id, record.epoch))
            for item in items:
                _append(db, record.job_id, item)

    def append_later(self, job_id: str, items: Sequence[jobs_pb2.WatchJobResponse]) -> None:
        self._waiting.extend((job_id, item) for item in items)

    def flush(self) -> None:
        if not self._waiting:
            return
        try:
            with self._transaction("append", durable=False):
                pass
        except UnreachableError:
            self._waiting.clear()
            raise

    def append(self, job_id: str, items: Sequence[jobs_pb2.WatchJobResponse]) -> None:
        with self._transaction("append", durable=False):
            self._store_items([(job_id, item) for item in items])

    def _store_items(self, items: Sequence[tuple[str, jobs_pb2.WatchJobResponse]]) -> None:
        """Add items to histories inside a transaction, and delete the log lines that are too many."""
        num_lines: Counter[str] = Counter()
        for job_id, item in items:
            _append(self._db, job_id, item)
            num_lines[job_id] += item.WhichOneof("item") == "log"
        for job_id, lines in num_lines.items():
            pending = self._untrimmed.get(job_id, 0) + lines
            if pending >= min(1000, self._max_log_lines):
                self._db.execute(
                    "DELETE FROM history WHERE job_id = :job AND kind = 'log' AND cursor <= ("
                    " SELECT cursor FROM history WHERE job_id = :job AND kind = 'log'"
                    " ORDER BY cursor DESC LIMIT 1 OFFSET :keep)",
                    {"job": job_id, "keep": self._max_log_lines},
                )
                pending = 0
            self._untrimmed[job_id] = pending

    def _take_waiting(self) -> list[tuple[str, jobs_pb2.WatchJobResponse]]:
        waiting = []
        while self._waiting:
            waiting.append(self._waiting.popleft())
        return waiting

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
            if added:
                sqlite_sums.add_step(db, report)
            for item in (jobs_pb2.WatchJobResponse(step=report), *items) if added else ():
                _append(db, report.job_id, item)
        return bool(added)

    def record_validation_part(self, report: coordinator_pb2.ReportValidationRequest) -> bool:
        with self._transaction("record_validation_part", durable=True) as db:
            # SQLite stores NaN as NULL, which the column refuses.
            loss_sum = "nan" if math.isnan(report.loss_sum) else report.loss_sum
            row = (report.job_id, report.epoch, report.version, report.slot, loss_sum, report.num_tokens)
            return bool(db.execute("INSERT OR IGNORE INTO validation_parts VALUES (?, ?, ?, ?, ?, ?)", row).rowcount)

    def record_validation(self, job_id: str, validation: jobs_pb2.Validation) -> bool:
        with self._transaction("record_validation", durable=True) as db:
            row = (job_id, validation.version, validation.SerializeToString())
            added = db.execute("INSERT OR IGNORE INTO validations VALUES (?, ?, ?)", row).rowcount
            if added:
                _append(db, job_id, jobs_pb2.WatchJobResponse(validation=validation))
        return bool(added)

    def record_checkpoint_file(self, report: coordinator_pb2.ReportCheckpointRequest) -> bool:
        with self._transaction("record_checkpoint_file", durable=True) as db:
            if _is_written(db, report.job_id, report.epoch, report.version):
                return False
            row = (report.job_id, report.epoch, report.version, report.server, report.SerializeToString())
            return bool(db.execute("INSERT OR IGNORE INTO checkpoint_files VALUES (?, ?, ?, ?, ?)", row).rowcount)

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

    def forget_checkpoints(self, job_id: str, after: int, items: Sequence[jobs_pb2.WatchJobResponse] = ()) -> None:
        with self._transaction("forget_checkpoints", durable=True) as db:
            db.execute("DELETE FROM checkpoints WHERE job_id = ? AND version > ?", (job_id, after))
            for item in items:
                _append(db, job_id, item)

    def delete_job(self, job_id: str) -> None:
        with self._transaction("delete_job", durable=True) as db:
            for table in sqlite_schema.JOB_TABLES:
                db.execute(f"DELETE FROM {table} WHERE job_id = ?", (job_id,))
        self._untrimmed.pop(job_id, None)

    def check_writable(self) -> None:
        with self._transaction("check_writable", durable=False) as db:
            db.execute("INSERT INTO pulse VALUES (1, 1) ON CONFLICT (id) DO UPDATE SET count = count + 1")

    def close(self) -> None:
        super().close()
        self._db.close()


def _is_written(db: sqlite3.Connection, job_id: str, epoch: int, version: int) -> bool:
    """Whether the manifest of a version was written under this epoch."""
    query = "SELECT 1 FROM checkpoints WHERE job_id = ? AND version = ? AND epoch = ?"
    return db.execute(query, (job_id, version, epoch)).fetchone() is not None


def _append(db: sqlite3.Connection, job_id: str, item: jobs_pb2.WatchJobResponse) -> None:
    facts = facts_of(item)
    unix_ms = facts.unix_ms or int(time.time() * 1000)
    row = (job_id, facts.kind, item.SerializeToString(), min(unix_ms, sqlite_sums.NO_LIMIT), facts.source, facts.rank)
    db.execute("INSERT INTO history (job_id, kind, item, unix_ms, source, rank) VALUES (?, ?, ?, ?, ?, ?)", row)


def _job_row(record: JobRecord) -> tuple[str | int | bytes, ...]:
    """The values of `JOB_COLUMNS`."""
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
