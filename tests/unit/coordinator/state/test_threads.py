"""A write that does not end delays neither the event loop nor readers, and the order of writes is kept."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from coordinator_fakes import Cluster, step_report

from gradstream.coordinator.state import sqlite
from gradstream.coordinator.state.sqlite import STUCK, SqliteState
from gradstream.core.errors import UnreachableError
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2


def event(message: str) -> jobs_pb2.WatchJobResponse:
    return jobs_pb2.WatchJobResponse(event=jobs_pb2.Event(message=message))


def messages(state: SqliteState) -> list[str]:
    return [item.event.message for item in state.read_history("a-1", 0, 100)]


@contextmanager
def hung_disk(directory: Path) -> Iterator[None]:
    """Hold SQLite's lock on the file, as a flush holds it that does not end."""
    with closing(sqlite3.connect(directory / "coordinator.sqlite", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            db.execute("ROLLBACK")


async def test_a_report_waits_for_a_slow_disk_and_nobody_else_does(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    await cluster.running(job_id)
    await cluster.stub.ReportStep(step_report(job_id, 0))
    controller = cluster.coordinator.controller
    with hung_disk(cluster.directory / "state"):
        reporting = asyncio.create_task(_report(cluster, job_id, 1))
        longest = 0.0
        for _ in range(10):
            began = time.monotonic()
            await asyncio.sleep(0.02)
            job = await cluster.job(job_id)
            controller.notifier.append(job_id, [event("noted meanwhile")])
            longest = max(longest, time.monotonic() - began)
            assert job.version == 1, "stored, then seen"
        assert longest < 1
        assert not reporting.done()
    await reporting
    assert (await cluster.job(job_id)).version == 2
    found = await cluster.watch(job_id, lambda item: item.event.message == "noted meanwhile")
    assert found is not None


async def _report(cluster: Cluster, job_id: str, step: int) -> None:
    await cluster.stub.ReportStep(step_report(job_id, step))


async def test_a_step_whose_report_is_cancelled_is_seen_once_it_is_stored(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    await cluster.running(job_id)
    with hung_disk(cluster.directory / "state"), pytest.raises(TimeoutError):
        await asyncio.wait_for(_report(cluster, job_id, 0), 0.2)
    async with asyncio.timeout(20):
        while (await cluster.job(job_id)).version != 1:  # noqa: ASYNC110 (the coordinator's memory cannot be awaited)
            await asyncio.sleep(0.02)


def test_what_is_added_later_comes_before_the_next_write(tmp_path: Path) -> None:
    state = SqliteState(tmp_path)
    state.append_later("a-1", [event("first"), event("second")])
    state.append_later("a-2", [event("other")])
    assert messages(state) == []
    state.append("a-1", [event("third")])
    assert messages(state) == ["first", "second", "third"]
    state.append_later("a-1", [event("fourth")])
    state.flush()
    state.flush()
    assert messages(state) == ["first", "second", "third", "fourth"]
    # A write that fails takes nothing along.
    state.append_later("a-1", [event("fifth")])
    with pytest.raises(Exception, match="impossibly large"):
        state.record_step(coordinator_pb2.ReportStepRequest(job_id="a-1", epoch=1, num_tokens=2**64 - 1))
    assert messages(state)[-1] == "fourth"
    state.append("a-1", [event("sixth")])
    assert messages(state)[-2:] == ["fifth", "sixth"]
    state.close()


def test_a_write_waits_for_another_one_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "WAIT_SECONDS", 0.1)
    state = SqliteState(tmp_path)
    inside, go_on = threading.Event(), threading.Event()

    def write_slowly() -> None:
        with state._transaction("record_step", durable=True):
            inside.set()
            go_on.wait(30)

    thread = threading.Thread(target=write_slowly)
    thread.start()
    assert inside.wait(30)
    with pytest.raises(UnreachableError, match="a write has not ended"):
        state.append("a-1", [event("too early")])
    assert state.trouble is not None
    assert state.trouble.cause == STUCK
    assert messages(state) == [], "readers do not wait"
    go_on.set()
    thread.join()
    state.append("a-1", [event("later")])
    assert state.trouble is None
    assert messages(state) == ["later"]
    state.close()
