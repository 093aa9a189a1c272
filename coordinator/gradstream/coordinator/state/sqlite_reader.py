"""Reads the coordinator's SQLite file. Each reader has a connection of its own and belongs to one thread at a time."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Collection, Sequence
from heapq import merge
from itertools import islice
from pathlib import Path
from typing import Any

from gradstream.coordinator.state import sqlite_sums
from gradstream.coordinator.state.history import ALL, HistoryFilter, names_one, rank_of
from gradstream.coordinator.state.state import JobRecord, StateReader, StepTotals, Trouble
from gradstream.core.errors import ConfigError, UnreachableError
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

FILE_NAME = "coordinator.sqlite"
TROUBLE_SECONDS = 60.0
"""A failure that has not occurred for this time is over: its operation is not tried any more."""
BUSY_SECONDS = 5.0

JOB_COLUMNS = (
    "job_id, name, recipe_json, manifest_json, run_directory, submitted_unix_ms, state, reason, desired, rank, epoch, "
    "start_version, plan_held, ended_unix_ms, leases, decisions_json, request_id, without_servers_json"
)


class Troubles:
    """The operations that fail, shared by the threads that use a file."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # For each failed operation: the trouble, and when (monotonic seconds) it last occurred.
        self._troubles: dict[str, tuple[Trouble, float]] = {}

    @property
    def oldest(self) -> Trouble | None:
        """The trouble that has lasted longest; None without any."""
        now = time.monotonic()
        with self._lock:
            current = [trouble for trouble, seen in self._troubles.values() if now - seen < TROUBLE_SECONDS]
        return min(current, key=lambda trouble: trouble.since_unix_ms, default=None)

    def failed(self, what: str, cause: str) -> UnreachableError:
        """Note that an operation failed; return the error to raise."""
        now = time.monotonic()
        with self._lock:
            before, seen = self._troubles.get(what, (None, 0.0))
            goes_on = before is not None and now - seen < TROUBLE_SECONDS
            since = before.since_unix_ms if before is not None and goes_on else int(time.time() * 1000)
            self._troubles[what] = Trouble(cause, since), now
        return UnreachableError(cause)

    def succeeded(self, what: str, all_others: bool = False) -> None:
        """Note that an operation succeeded, and with `all_others` that every operation can."""
        with self._lock:
            self._troubles.pop(what, None)
            if all_others:
                self._troubles.clear()


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection whose use by several threads the caller orders. Raises sqlite3.Error."""
    return sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS, check_same_thread=False)


class SqliteReader(StateReader):
    """Reads what is committed. A writer never makes a reader wait (WAL)."""

    def __init__(self, path: Path, troubles: Troubles):
        """Open the file, which must exist. Raises ConfigError when it cannot be opened."""
        self._path = path
        self._troubles = troubles
        try:
            self._reads = connect(path)
            self._reads.execute("PRAGMA query_only=ON")
            self._reads.create_function("names_one", 2, _names_one, deterministic=True)
        except sqlite3.Error as error:
            raise ConfigError(f"the state in {path} cannot be opened ({error}); make the directory writable") from None

    def _read(self, query: str, values: Sequence[object] | dict[str, object] = ()) -> list[Any]:
        """Return all rows of a query. Raises UnreachableError."""
        try:
            rows = self._reads.execute(query, values).fetchall()
        except sqlite3.Error as error:
            cause = f"the coordinator cannot read its state ({error}); is its disk damaged?"
            raise self._troubles.failed("read", cause) from None
        self._troubles.succeeded("read")
        return rows

    # --- jobs -------------------------------------------------------------------------------------------------------

    def get_job(self, job_id: str) -> JobRecord | None:
        return self._job("WHERE job_id = ?", job_id)

    def job_of_request(self, request_id: str) -> JobRecord | None:
        # The second condition lets SQLite use the index, which has no rows of empty ids.
        return self._job("WHERE request_id = ? AND request_id <> ''", request_id)

    def newest_job(self, name: str = "") -> JobRecord | None:
        if name:
            return self._job("WHERE name = ? ORDER BY number DESC LIMIT 1", name)
        return self._job("ORDER BY number DESC LIMIT 1")

    def _job(self, condition: str, *values: object) -> JobRecord | None:
        rows = self._read(f"SELECT {JOB_COLUMNS} FROM jobs {condition}", values)
        return _job_record(rows[0]) if rows else None

    def list_jobs(self, states: Collection[int] = ()) -> list[JobRecord]:
        among = f"WHERE state IN ({_marks(states)})" if states else ""
        rows = self._read(f"SELECT {JOB_COLUMNS} FROM jobs {among} ORDER BY number", tuple(map(int, states)))
        return [_job_record(row) for row in rows]

    def page_of_jobs(self, before: str, limit: int, states: Collection[int] = ()) -> list[JobRecord] | None:
        number = sqlite_sums.NO_LIMIT
        if before:
            found = self._read("SELECT number FROM jobs WHERE job_id = ?", (before,))
            if not found:
                return None
            number = found[0][0]
        among = f"AND state IN ({_marks(states)})" if states else ""
        rows = self._read(
            f"SELECT {JOB_COLUMNS} FROM jobs WHERE number < ? {among} ORDER BY number DESC LIMIT ?",
            (number, *map(int, states), limit),
        )
        return [_job_record(row) for row in rows]

    def job_ids(self) -> list[str]:
        return [job_id for (job_id,) in self._read("SELECT job_id FROM jobs ORDER BY number")]

    def ranks(self) -> tuple[int, int]:
        lowest, highest = self._read("SELECT MIN(rank), MAX(rank) FROM jobs")[0]
        return lowest or 0, highest or 0

    def load_plan(self, job_id: str, epoch: int) -> bytes | None:
        rows = self._read("SELECT plan FROM plans WHERE job_id = ? AND epoch = ?", (job_id, epoch))
        return rows[0][0] if rows else None

    # --- history ----------------------------------------------------------------------------------------------------

    def read_history(
        self, job_id: str, after_cursor: int, limit: int, wanted: HistoryFilter = ALL
    ) -> list[jobs_pb2.WatchJobResponse]:
        after_cursor = min(after_cursor, sqlite_sums.NO_LIMIT)
        pages = [
            self._read(
                f"SELECT cursor, item FROM history WHERE {condition} AND cursor > ? ORDER BY cursor LIMIT ?",
                (*values, after_cursor, limit),
            )
            for condition, values in _conditions(job_id, wanted)
        ]
        items = []
        for cursor, data in islice(merge(*pages), limit):
            item = jobs_pb2.WatchJobResponse.FromString(data)
            item.cursor = cursor
            items.append(item)
        return items

    def cursor_before_last(self, job_id: str, count: int, wanted: HistoryFilter = ALL) -> int:
        found: list[int] = []
        for condition, values in _conditions(job_id, wanted):
            rows = self._read(
                f"SELECT cursor FROM history WHERE {condition} ORDER BY cursor DESC LIMIT ?", (*values, count)
            )
            found += [cursor for (cursor,) in rows]
        return sorted(found)[-count] - 1 if len(found) >= count else 0

    # --- ledger -----------------------------------------------------------------------------------------------------

    def step_totals(self, job_id: str, epoch: int, start_version: int, below: int | None = None) -> StepTotals:
        return sqlite_sums.step_totals(self._read, job_id, epoch, start_version, below)

    def read_steps(
        self, job_id: str, epoch: int, start_version: int, first: int, limit: int
    ) -> list[coordinator_pb2.ReportStepRequest]:
        values = {"job": job_id, "epoch": epoch, "start": start_version, "below": sqlite_sums.NO_LIMIT}
        rows = self._read(
            f"SELECT report FROM steps WHERE {sqlite_sums.TRAJECTORY} AND step >= :first ORDER BY step LIMIT :limit",
            {**values, "first": min(first, sqlite_sums.NO_LIMIT), "limit": limit},
        )
        return [coordinator_pb2.ReportStepRequest.FromString(report) for (report,) in rows]

    def validation_parts(self, job_id: str, version: int) -> dict[int, tuple[float, int]]:
        rows = self._read(
            "SELECT slot, loss_sum, num_tokens FROM validation_parts WHERE job_id = ? AND version = ?"
            " ORDER BY slot, epoch DESC",
            (job_id, version),
        )
        # For each slot the last one, of the earliest epoch, counts. Parts of two epochs are equal anyway.
        return {slot: (float(loss_sum), num_tokens) for slot, loss_sum, num_tokens in rows}

    def validations(self, job_id: str) -> list[jobs_pb2.Validation]:
        rows = self._read("SELECT item FROM validations WHERE job_id = ? ORDER BY version", (job_id,))
        return [jobs_pb2.Validation.FromString(item) for (item,) in rows]

    def first_and_last_validation(self, job_id: str) -> tuple[jobs_pb2.Validation, jobs_pb2.Validation] | None:
        found = []
        for order in ("ASC", "DESC"):
            query = f"SELECT item FROM validations WHERE job_id = ? ORDER BY version {order} LIMIT 1"
            found += [jobs_pb2.Validation.FromString(item) for (item,) in self._read(query, (job_id,))]
        return (found[0], found[1]) if len(found) == 2 else None

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoint_files(self, job_id: str, epoch: int) -> list[coordinator_pb2.ReportCheckpointRequest]:
        rows = self._read(
            "SELECT report FROM checkpoint_files WHERE job_id = ? AND epoch = ? ORDER BY version, server",
            (job_id, epoch),
        )
        return [coordinator_pb2.ReportCheckpointRequest.FromString(report) for (report,) in rows]

    def residuals(self, job_id: str, epoch: int) -> list[coordinator_pb2.ReportResidualRequest]:
        rows = self._read(
            "SELECT report FROM residuals WHERE job_id = ? AND epoch = ? ORDER BY version, slot", (job_id, epoch)
        )
        return [coordinator_pb2.ReportResidualRequest.FromString(report) for (report,) in rows]

    def checkpoint_versions(self, job_id: str) -> list[int]:
        rows = self._read("SELECT version FROM checkpoints WHERE job_id = ? ORDER BY version", (job_id,))
        return [version for (version,) in rows]

    def close(self) -> None:
        self._reads.close()


def _conditions(job_id: str, wanted: HistoryFilter) -> list[tuple[str, tuple[object, ...]]]:
    """Conditions on rows of the history, with their values, which together select each wanted item once.

    There is one condition a kind, so that the index by kind gives the rows in order.
    """
    if wanted.selects_all:
        return [("job_id = ?", (job_id,))]
    found: list[tuple[str, tuple[object, ...]]] = []
    for kind in wanted.wanted_kinds:
        condition, values = "job_id = ? AND kind = ?", (job_id, kind)
        more: list[tuple[str, tuple[object, ...]]] = []
        if wanted.since_unix_ms:
            more.append(("unix_ms >= ?", (min(wanted.since_unix_ms, sqlite_sums.NO_LIMIT),)))
        if kind == "event" and wanted.event_kinds:
            more.append((f"source IN ({_marks(wanted.event_kinds)})", wanted.event_kinds))
        if kind == "event" and wanted.nodes:
            more.append(("names_one(item, ?)", ("\n".join(wanted.nodes),)))
        if kind == "log" and wanted.nodes:
            more.append((f"source IN ({_marks(wanted.nodes)})", wanted.nodes))
        if kind == "log" and wanted.level:
            more.append(("rank >= ?", (rank_of(wanted.level),)))
        condition = " AND ".join([condition, *(text for text, _ in more)])
        found.append((condition, (*values, *(value for _, each in more for value in each))))
    return found


def _names_one(item: bytes, nodes: str) -> bool:
    return names_one(jobs_pb2.WatchJobResponse.FromString(item).event.message, nodes.split("\n"))


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" * len(values))


def _job_record(row: Sequence[object]) -> JobRecord:
    """A record from the values of `JOB_COLUMNS`."""
    names = [column.strip() for column in JOB_COLUMNS.split(",")]
    values = dict(zip(names, row, strict=True))
    decisions = json.loads(str(values.pop("decisions_json")))
    values["plan_held"] = bool(values["plan_held"])
    without_servers = tuple(json.loads(str(values.pop("without_servers_json"))))
    return JobRecord(**values, decisions=decisions, without_servers=without_servers)  # type: ignore[arg-type]
