"""The tables of the coordinator's SQLite file, and the migration of files of earlier releases."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from google.protobuf.message import DecodeError

from gradstream.coordinator.state.history import ItemFacts, facts_of
from gradstream.coordinator.state.sqlite_sums import NO_LIMIT, SUMS_OF_ALL_STEPS
from gradstream.core.errors import ConfigError
from gradstream.proto.v1 import jobs_pb2

FORMAT_VERSION = 2
"""The format of the file. Format 1 had neither sums of steps nor the facts by which a history is filtered."""
MIGRATED_ITEMS = 10_000
"""Number of items of a history that a migration reads at a time."""

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
    cursor INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, kind TEXT NOT NULL, item BLOB NOT NULL,
    unix_ms INTEGER NOT NULL DEFAULT 0, source TEXT NOT NULL DEFAULT '', rank INTEGER NOT NULL DEFAULT 0
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
CREATE TABLE IF NOT EXISTS step_sums (
    job_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    block INTEGER NOT NULL,
    num_steps INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    num_samples INTEGER NOT NULL,
    num_skipped INTEGER NOT NULL,
    PRIMARY KEY (job_id, epoch, block)
) WITHOUT ROWID;
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
_JOB_INDEXES = """
CREATE UNIQUE INDEX IF NOT EXISTS jobs_by_request ON jobs (request_id) WHERE request_id <> '';
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);
CREATE INDEX IF NOT EXISTS jobs_by_name ON jobs (name, number);
CREATE INDEX IF NOT EXISTS jobs_by_rank ON jobs (rank);
"""
# The columns that files of earlier releases may lack: table, column, type with its default.
_ADDED_COLUMNS = (
    ("jobs", "request_id", "TEXT NOT NULL DEFAULT ''"),
    ("jobs", "without_servers_json", "TEXT NOT NULL DEFAULT '[]'"),
    ("history", "unix_ms", "INTEGER NOT NULL DEFAULT 0"),
    ("history", "source", "TEXT NOT NULL DEFAULT ''"),
    ("history", "rank", "INTEGER NOT NULL DEFAULT 0"),
)

JOB_TABLES = (
    "jobs",
    "plans",
    "history",
    "steps",
    "step_sums",
    "validation_parts",
    "validations",
    "checkpoint_files",
    "residuals",
    "checkpoints",
)
"""The tables with rows of a job."""


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Create or migrate the tables of a file that was just opened, in one transaction.

    Raises ConfigError when another release wrote the file.
    """
    db.execute("PRAGMA journal_mode=WAL")
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if not 0 <= found <= FORMAT_VERSION:
        raise ConfigError(
            f"{path} has format {found}, this gradstream writes {FORMAT_VERSION}; "
            f"use the gradstream that wrote it or another --state directory"
        )
    db.execute("BEGIN IMMEDIATE")
    try:
        _run(db, _SCHEMA)
        for table, column, declared in _ADDED_COLUMNS:
            if column not in {row[1] for row in db.execute(f"PRAGMA table_info({table})")}:
                db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {declared}")
        _run(db, _JOB_INDEXES)
        if found == 1:
            _run(db, SUMS_OF_ALL_STEPS)
            add_facts(db)
        db.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _run(db: sqlite3.Connection, script: str) -> None:
    """Run statements inside the transaction under way, which `executescript` would commit."""
    for statement in script.split(";"):
        if statement.strip():
            db.execute(statement)


def add_facts(db: sqlite3.Connection) -> None:
    """Add to each item of a history the facts by which it is selected.

    An item without a time of its own gets that of the item before it, also one that is damaged.
    """
    after, unix_ms = 0, 0
    while rows := db.execute(
        "SELECT cursor, item FROM history WHERE cursor > ? ORDER BY cursor LIMIT ?", (after, MIGRATED_ITEMS)
    ).fetchall():
        values = []
        for cursor, data in rows:
            facts = _facts_of(data)
            unix_ms = facts.unix_ms or unix_ms
            values.append((min(unix_ms, NO_LIMIT), facts.source, facts.rank, cursor))
        db.executemany("UPDATE history SET unix_ms = ?, source = ?, rank = ? WHERE cursor = ?", values)
        after = rows[-1][0]


def _facts_of(data: bytes) -> ItemFacts:
    try:
        return facts_of(jobs_pb2.WatchJobResponse.FromString(data))
    except DecodeError:
        return ItemFacts("")
