"""A job's metrics: rows of the ledger, in pages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.coordinator.state.state import JobRecord
from gradstream.coordinator.telemetry import metrics
from gradstream.core.recipe.rounds import Rounds
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

RECORD = JobRecord("a-1", "a", "{}", "{}", "/runs/a-1", submitted_unix_ms=5, epoch=1)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[SqliteState]:
    state = SqliteState(tmp_path)
    state.create_job(RECORD)
    yield state
    state.close()


def report(step: int, epoch: int = 1, **more: Any) -> coordinator_pb2.ReportStepRequest:
    values = {"num_tokens": 10, "loss": 9.0 - step, "unix_ms": 1000 * step, "learning_rate": 0.5, "grad_norm": 2.0}
    values |= {"pushed_bytes": 100, "pulled_bytes": 200, **more}
    return coordinator_pb2.ReportStepRequest(job_id="a-1", epoch=epoch, step=step, **values)


def validate(state: SqliteState, *versions: int) -> None:
    for version in versions:
        state.record_validation("a-1", jobs_pb2.Validation(version=version, loss=5.0 + version, num_tokens=4))


def rows(
    state: SqliteState, record: JobRecord = RECORD, first_step: int = 0, every: int = 1
) -> list[jobs_pb2.StepMetrics]:
    return [row for page in metrics.pages(state, record, Rounds(9), first_step, every) for row in page]


def test_a_row_has_what_the_ledger_has(state: SqliteState) -> None:
    state.record_step(report(0))
    state.record_step(report(1, loss=math.nan, skipped=True, unix_ms=1250))
    validate(state, 0)
    first, second = rows(state)
    assert (first.step, first.epoch, first.num_tokens, first.loss, first.validation_loss) == (0, 1, 10, 9.0, 5.0)
    assert (first.learning_rate, first.grad_norm, first.pushed_bytes, first.pulled_bytes) == (0.5, 2.0, 100, 200)
    assert not first.HasField("step_seconds")
    assert (second.step_seconds, second.num_tokens, second.skipped) == (1.25, 20, True)
    assert math.isnan(second.loss)
    assert not second.HasField("validation_loss")


def test_the_last_versions_validation_has_a_row_without_a_step(state: SqliteState) -> None:
    validate(state, 0)
    (only,) = rows(state)
    assert (only.step, only.epoch, only.validation_loss, only.HasField("loss")) == (0, 0, 5.0, False)
    state.record_step(report(0))
    validate(state, 1, 7)  # what a trajectory that was left had at version 7 is not shown
    assert [(row.step, row.HasField("loss"), row.HasField("validation_loss")) for row in rows(state)] == [
        (0, True, True),
        (1, False, True),
    ]
    assert rows(state)[1].num_tokens == 10


def test_a_step_takes_no_time_that_the_job_may_have_rested(state: SqliteState) -> None:
    for each in (report(0), report(1, halted=True), report(2), report(3), report(3, epoch=2), report(4, epoch=2)):
        state.record_step(each)
    state.record_step(report(5, epoch=2, unix_ms=10))  # the clock was set back
    found = rows(state, replace(RECORD, epoch=2, start_version=3))
    seconds = [row.step_seconds if row.HasField("step_seconds") else None for row in found]
    assert seconds == [None, 1.0, None, None, 1.0, 0.0]
    assert [row.epoch for row in found] == [1, 1, 1, 2, 2, 2]


def test_every_keeps_validated_versions_and_the_last_step(state: SqliteState) -> None:
    for step in range(9):
        state.record_step(report(step))
    validate(state, 3, 9)
    assert [row.step for row in rows(state, every=4)] == [0, 3, 4, 8, 9]
    assert [row.step for row in rows(state, every=5)] == [0, 3, 5, 8, 9]
    assert [row.num_tokens for row in rows(state, every=5)] == [10, 40, 60, 90, 90]
    assert rows(state, every=5)[2].step_seconds == 1.0


def test_rows_from_the_middle_are_those_of_the_whole(state: SqliteState) -> None:
    for step in range(5):
        state.record_step(report(step))
    validate(state, 5)
    assert rows(state, first_step=3) == rows(state)[3:]
    assert rows(state, first_step=6) == rows(state, first_step=2**64 - 1) == []


def test_a_row_of_an_earlier_gradstream_has_a_blank(state: SqliteState) -> None:
    old = report(0)
    old.ClearField("pulled_bytes")
    state.record_step(old)
    (row,) = rows(state)
    assert (row.HasField("pulled_bytes"), row.pushed_bytes) == (False, 100)


def test_no_page_is_long(state: SqliteState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PAGE_STEPS", 4)
    for step in range(10):
        state.record_step(report(step))
    validate(state, 10)
    found = list(metrics.pages(state, RECORD, Rounds(9), 0, 1))
    assert [len(page) for page in found] == [4, 4, 2, 1]
    assert [row.step for page in found for row in page] == list(range(11))
    assert sum(map(len, metrics.pages(state, RECORD, Rounds(9), 0, 100))) == 3
