"""The contract of State. A new backend adds a factory to `FACTORIES` and nothing else."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradstream.coordinator.state.history import HistoryFilter
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.coordinator.state.sqlite_schema import JOB_TABLES
from gradstream.coordinator.state.state import JobRecord, State
from gradstream.core.errors import ConfigError, ProtocolError, UnreachableError
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

Factory = Callable[[Path], State]
FACTORIES: dict[str, Factory] = {"sqlite": lambda directory: SqliteState(directory, max_log_lines=20)}


@pytest.fixture(params=FACTORIES.values(), ids=FACTORIES.keys())
def factory(request: pytest.FixtureRequest) -> Factory:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def state(factory: Factory, tmp_path: Path) -> Iterator[State]:
    state = factory(tmp_path)
    yield state
    state.close()


def make_record(job_id: str = "a-1") -> JobRecord:
    return JobRecord(job_id, "a", "{}", "{}", "/runs/a-1", submitted_unix_ms=5)


def make_step(step: int, epoch: int = 1, tokens: int = 10, skipped: bool = False) -> coordinator_pb2.ReportStepRequest:
    return coordinator_pb2.ReportStepRequest(
        job_id="a-1", epoch=epoch, step=step, num_tokens=tokens, num_samples=2, skipped=skipped
    )


def event(text: str) -> jobs_pb2.WatchJobResponse:
    return jobs_pb2.WatchJobResponse(event=jobs_pb2.Event(message=text))


def test_a_job_comes_back_as_it_was_stored(state: State, factory: Factory, tmp_path: Path) -> None:
    state.create_job(make_record())
    state.create_job(make_record("a-2"))
    changed = replace(
        make_record(),
        state=jobs_pb2.JOB_STATE_RUNNING,
        epoch=2,
        plan_held=True,
        leases=b"table",
        decisions={"placement": "even"},
    )
    state.store_job(changed, plan=b"plan")
    state.close()
    reopened = factory(tmp_path)
    assert reopened.get_job("a-1") == changed
    assert [job.job_id for job in reopened.list_jobs()] == ["a-1", "a-2"]
    assert reopened.load_plan("a-1", 2) == b"plan"
    assert reopened.load_plan("a-1", 1) is None
    assert reopened.get_job("b") is None
    reopened.close()


def test_history_is_read_in_pages_by_cursor(state: State) -> None:
    state.append("a-1", [event(str(number)) for number in range(5)])
    state.append("other", [event("x")])
    first = state.read_history("a-1", 0, 3)
    rest = state.read_history("a-1", first[-1].cursor, 3)
    assert [item.event.message for item in [*first, *rest]] == list("01234")
    assert first[0].cursor < first[1].cursor < rest[0].cursor


def test_history_of_some_kinds(state: State) -> None:
    line = jobs_pb2.WatchJobResponse(log=jobs_pb2.NodeLogLine(node="w"))
    state.append("a-1", [event("0"), line, event("1"), line, event("2")])
    assert [item.event.message for item in state.read_history("a-1", 0, 2, HistoryFilter(kinds=("event",)))] == [
        "0",
        "1",
    ]
    assert len(state.read_history("a-1", 0, 9, HistoryFilter(kinds=("event", "log")))) == 5
    assert state.read_history("a-1", 0, 9, HistoryFilter(kinds=("step",))) == []


def test_log_lines_are_bounded_and_other_items_are_not(state: State) -> None:
    state.append("a-1", [event("kept")])
    line = jobs_pb2.NodeLogLine(node="w", line=coordinator_pb2.LogLine(text="x"))
    for _ in range(10):
        state.append("a-1", [jobs_pb2.WatchJobResponse(log=line)] * 10)
    items = state.read_history("a-1", 0, 1000)
    assert items[0].event.message == "kept"
    assert 20 <= len(items) - 1 <= 40


def test_a_step_counts_once(state: State) -> None:
    assert state.record_step(make_step(0))
    assert not state.record_step(make_step(0, tokens=99))
    totals = state.step_totals("a-1", 1, 0)
    assert (totals.version, totals.num_tokens, totals.num_samples) == (1, 10, 2)
    assert len(state.read_history("a-1", 0, 10)) == 1


def test_totals_follow_the_current_trajectory_over_rollbacks(state: State) -> None:
    for step in range(6):
        state.record_step(make_step(step, epoch=1, tokens=1))
    # Epoch 2 starts from version 4: what epoch 1 did from there on does not count until it is walked again.
    assert state.step_totals("a-1", 2, 4).version == 4
    assert state.step_totals("a-1", 2, 4).num_tokens == 4
    state.record_step(make_step(4, epoch=2, tokens=10, skipped=True))
    totals = state.step_totals("a-1", 2, 4)
    assert (totals.version, totals.num_tokens, totals.num_steps, totals.num_skipped) == (5, 14, 5, 1)
    # Epoch 3 starts from version 2: of the steps before it the highest epoch's rows count.
    state.record_step(make_step(2, epoch=3, tokens=100))
    assert state.step_totals("a-1", 3, 2).num_tokens == 102
    assert state.step_totals("a-1", 3, 5).num_tokens == 1 + 1 + 100 + 1 + 10
    below = state.step_totals("a-1", 3, 2, below=2)
    assert (below.num_steps, below.num_tokens, below.version) == (2, 2, 2)


def test_steps_are_read_in_pages_along_the_current_trajectory(state: State) -> None:
    for step in range(6):
        state.record_step(make_step(step, epoch=1))
    # Epoch 2 starts from version 4: what epoch 1 did from there on is not read.
    assert [(row.step, row.epoch) for row in state.read_steps("a-1", 2, 4, 0, 10)] == [(s, 1) for s in range(4)]
    state.record_step(make_step(4, epoch=2))
    pages = [state.read_steps("a-1", 2, 4, first, 2) for first in (0, 2, 4, 6)]
    assert [[(row.step, row.epoch) for row in page] for page in pages] == [
        [(0, 1), (1, 1)],
        [(2, 1), (3, 1)],
        [(4, 2)],
        [],
    ]
    assert state.read_steps("a-1", 2, 4, 2**64 - 1, 2) == []


def test_no_steps_means_the_start_version(state: State) -> None:
    assert state.step_totals("a-1", 3, 7).version == 7


def test_validation_parts_and_passes_count_once(state: State) -> None:
    part = coordinator_pb2.ReportValidationRequest(job_id="a-1", epoch=1, version=2, slot=1, loss_sum=3.5, num_tokens=7)
    assert state.record_validation_part(part)
    assert not state.record_validation_part(part)
    part.epoch = 2
    state.record_validation_part(part)
    assert state.validation_parts("a-1", 2) == {1: (3.5, 7)}
    done = jobs_pb2.Validation(version=2, loss=0.5, num_tokens=7)
    assert state.record_validation("a-1", done)
    assert not state.record_validation("a-1", done)
    assert state.validations("a-1") == [done]


def test_checkpoint_files_are_forgotten_with_the_manifest_and_not_taken_again(state: State) -> None:
    report = coordinator_pb2.ReportCheckpointRequest(job_id="a-1", epoch=1, version=2, server=0, file="f")
    assert state.record_checkpoint_file(report)
    assert not state.record_checkpoint_file(report)
    assert state.checkpoint_files("a-1", 1) == [report]
    state.record_checkpoint("a-1", 1, jobs_pb2.Checkpoint(version=2))
    assert state.checkpoint_files("a-1", 1) == []
    assert not state.record_checkpoint_file(report)
    report.epoch = 2
    assert state.record_checkpoint_file(report)


def test_checkpoints_are_known_until_a_person_goes_back(state: State) -> None:
    state.create_job(make_record())
    for version in (2, 4, 6):
        state.record_checkpoint("tiny-1", 1, jobs_pb2.Checkpoint(version=version))
    assert state.checkpoint_versions("tiny-1") == [2, 4, 6]
    assert state.checkpoint_versions("b-1") == []
    state.forget_checkpoints("tiny-1", 2)
    assert state.checkpoint_versions("tiny-1") == [2]


def test_a_request_is_known_by_its_id(state: State) -> None:
    for job_id, request_id in (("a-1", ""), ("a-2", "one"), ("a-3", ""), ("a-4", "two")):
        state.create_job(replace(make_record(job_id), request_id=request_id))
    found = state.job_of_request("two")
    assert found is not None
    assert found.job_id == "a-4"
    assert state.job_of_request("three") is None
    with pytest.raises(UnreachableError):
        state.create_job(replace(make_record("a-5"), request_id="one"))
    assert state.get_job("a-5") is None


def test_a_file_of_an_earlier_gradstream_gets_what_it_lacks(tmp_path: Path) -> None:
    first = SqliteState(tmp_path)
    first.create_job(make_record())
    first.close()
    with closing(sqlite3.connect(tmp_path / "coordinator.sqlite", isolation_level=None)) as db:
        db.execute("DROP INDEX jobs_by_request")
        db.execute("ALTER TABLE jobs DROP COLUMN request_id")
        db.execute("ALTER TABLE jobs DROP COLUMN without_servers_json")
    again = SqliteState(tmp_path)
    try:
        assert again.get_job("a-1") == make_record()
        new = replace(make_record("a-2"), request_id="one", without_servers=("ps-0", "ps-1"))
        again.create_job(new)
        assert again.job_of_request("one") == new
    finally:
        again.close()


def test_a_number_too_large_is_the_peers_fault(state: State) -> None:
    with pytest.raises(ProtocolError):
        state.record_step(make_step(0, tokens=2**64 - 1))
    assert state.read_history("a-1", 0, 10) == []


def test_check_writable(state: State) -> None:
    state.check_writable()


def test_sqlite_survives_kill(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.proto.v1 import coordinator_pb2
state = SqliteState(Path({str(tmp_path)!r}))
for step in range(20):
    state.record_step(coordinator_pb2.ReportStepRequest(job_id="a-1", epoch=1, step=step, num_tokens=1))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    state = SqliteState(tmp_path)
    assert state.step_totals("a-1", 1, 0).num_tokens == 20
    state.close()


def test_sqlite_refuses_a_file_of_another_format(tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "coordinator.sqlite") as db:
        db.execute("PRAGMA user_version=99")
    with pytest.raises(ConfigError, match="format 99"):
        SqliteState(tmp_path)


def make_residual(slot: int, file: str = "a.safetensors", version: int = 2, epoch: int = 1) -> Any:
    return coordinator_pb2.ReportResidualRequest(job_id="a-1", epoch=epoch, version=version, slot=slot, file=file)


def test_residuals_wait_for_their_manifest(state: State) -> None:
    for report in (make_residual(0), make_residual(1), make_residual(1, file=""), make_residual(0, version=4)):
        assert state.record_residual(report)
        assert not state.record_residual(report)
    assert not state.record_residual(make_residual(0, file="b.safetensors")), "the first one counts"
    found = [(report.version, report.slot, bool(report.file)) for report in state.residuals("a-1", 1)]
    assert sorted(found) == [(2, 0, True), (2, 1, False), (2, 1, True), (4, 0, True)]
    state.record_checkpoint("a-1", 1, jobs_pb2.Checkpoint(version=2))
    found = [(report.version, report.slot, bool(report.file)) for report in state.residuals("a-1", 1)]
    assert found == [(2, 1, False), (4, 0, True)]
    assert not state.record_residual(make_residual(2)), "its manifest is written"
    assert state.record_residual(make_residual(0, epoch=2))
    state.record_checkpoint("a-1", 2, jobs_pb2.Checkpoint(version=6))
    assert state.residuals("a-1", 1) == []
    assert len(state.residuals("a-1", 2)) == 1


def test_a_deleted_job_leaves_nothing_and_no_other_job_changes(state: State) -> None:
    validation = jobs_pb2.Validation(version=2, loss=1.0, num_tokens=8)
    for job_id in ("a-1", "a-2"):
        state.create_job(make_record(job_id), [jobs_pb2.WatchJobResponse(event=jobs_pb2.Event(message="submitted"))])
        state.store_job(replace(make_record(job_id), epoch=1), plan=b"plan")
        report = make_step(0)
        report.job_id = job_id
        state.record_step(report)
        state.record_validation(job_id, validation)
        state.record_checkpoint(job_id, 1, jobs_pb2.Checkpoint(version=2))
    state.delete_job("a-1")
    assert state.get_job("a-1") is None
    assert not state.read_history("a-1", 0, 10)
    assert state.load_plan("a-1", 1) is None
    assert (state.step_totals("a-1", 1, 0).num_steps, state.validations("a-1")) == (0, [])
    assert state.checkpoint_versions("a-1") == []
    assert [job.job_id for job in state.list_jobs()] == ["a-2"]
    assert len(state.read_history("a-2", 0, 10)) == 4
    assert state.load_plan("a-2", 1) == b"plan"
    assert (state.step_totals("a-2", 1, 0).num_steps, state.validations("a-2")) == (1, [validation])
    state.delete_job("a-1")  # once more, without effect


def test_no_table_is_forgotten_when_a_job_is_deleted(tmp_path: Path) -> None:
    SqliteState(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "coordinator.sqlite")) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        of_jobs = [name for name in tables if "job_id" in {row[1] for row in db.execute(f"PRAGMA table_info({name})")}]
    assert sorted(of_jobs) == sorted(JOB_TABLES)
