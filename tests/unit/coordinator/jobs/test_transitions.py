"""Transitions are stored, then seen, then sent: a transition that a failing disk prevents is retried."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc.aio
import pytest
from coordinator_fakes import (
    SERVER,
    WORKER,
    Cluster,
    FakeNode,
    make_recipe,
    report_checkpoint,
    report_validation,
    step_report,
)

from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.core.errors import UnreachableError
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

PATIENCE_SECONDS = 30.0
CAUSE = "the coordinator cannot write its state (attempt to write a readonly database); is its disk full?"


@contextmanager
def failing_disk(cluster: Cluster) -> Iterator[None]:
    """The state's file system is remounted read-only, and writable again."""
    state = cluster.coordinator.controller.state
    assert isinstance(state, SqliteState)
    state._db.execute("PRAGMA query_only=ON")
    try:
        yield
    finally:
        state._db.execute("PRAGMA query_only=OFF")


def controller_of(cluster: Cluster) -> Controller:
    return cluster.coordinator.controller


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 (the coordinator's memory cannot be awaited)
            await asyncio.sleep(0.01)


async def refused(order: Awaitable[object]) -> None:
    """An order that cannot be stored is answered with the cause."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await order
    error = error_from_rpc(caught.value, "coordinator")
    assert isinstance(error, UnreachableError)
    assert str(error) == CAUSE


async def events(cluster: Cluster, job_id: str, text: str) -> list[str]:
    request = jobs_pb2.WatchJobRequest(job_id=job_id)
    return [item.event.message async for item in cluster.jobs.WatchJob(request) if text in item.event.message]


async def test_leases_that_could_not_be_stored_are_due_again(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    _, (first, second) = await cluster.running(job_id, workers=2)
    await first.slots(1)
    await second.slots(1)
    controller = controller_of(cluster)
    active = controller.active
    assert active is not None
    before = (list(active.holders), active.lease_number)
    tables = [d for d in first.directives if d.HasField("leases")]
    with failing_disk(cluster):
        await second.die()
        await until(lambda: controller.retry.trouble is not None)
        job = await cluster.job(job_id)
        await asyncio.sleep(0.5)  # attempts go on meanwhile
        # Neither seen nor sent.
        assert (active.holders, active.lease_number) == before
        assert [d for d in first.directives if d.HasField("leases")] == tables
        # status says why, and since when.
        later = await cluster.job(job_id)
        for seen in (job, later):
            assert (seen.waits[0].what, seen.waits[0].whom) == (CAUSE, "the coordinator")
        assert later.waits[0].since_unix_ms == job.waits[0].since_unix_ms
    assert await first.slots(2) == [0, 1]
    assert all(wait.what != CAUSE for wait in (await cluster.job(job_id)).waits)
    stored = controller.state.get_job(job_id)
    assert stored is not None
    assert stored == active.record


async def test_tries_of_a_full_disk_are_spaced(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = await cluster.submit()
    _, (first, second) = await cluster.running(job_id, workers=2)
    await first.slots(1)
    controller = controller_of(cluster)
    attempts = []
    store = controller.state.store_job
    monkeypatch.setattr(controller.state, "store_job", lambda *args, **more: (attempts.append(1), store(*args, **more)))
    with failing_disk(cluster):
        await second.die()
        await until(lambda: controller.retry.trouble is not None)
        del attempts[:]
        for _ in range(50):  # whatever asks for a look
            controller.reconcile()
            await asyncio.sleep(0.02)
        assert 1 <= len(attempts) <= 12
    await first.slots(2)


async def test_a_full_disk_is_a_full_disk(cluster: Cluster, tmp_path: Path) -> None:
    """Not "no transaction is active": SQLite has rolled back by itself."""
    job_id = await cluster.submit()
    state = controller_of(cluster).state
    assert isinstance(state, SqliteState)
    pages = state._db.execute("PRAGMA page_count").fetchone()[0]
    state._db.execute(f"PRAGMA max_page_count={pages}")
    record = state.get_job(job_id)
    assert record is not None
    with pytest.raises(UnreachableError, match=r"cannot write its state \(database or disk is full\)"):
        state.store_job(record, plan=b"x" * 1_000_000)
    assert state.trouble is not None
    since = state.trouble.since_unix_ms
    state.check_writable()  # a small one finds room, which says nothing of a large one
    with pytest.raises(UnreachableError):
        state.store_job(record, plan=b"x" * 1_000_000)
    assert state.trouble.since_unix_ms == since
    state._db.execute("PRAGMA max_page_count=1000000")
    state.store_job(record, plan=b"x" * 1_000_000)
    assert state.trouble is None


async def test_orders_that_could_not_be_stored_have_not_been_given(cluster: Cluster) -> None:
    job_id, second = await cluster.submit(), await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await worker.slots(2)
    jobs = cluster.jobs
    active = controller_of(cluster).active
    assert active is not None
    # --- a pause: refused, then given, and the leader hears of it
    with failing_disk(cluster):
        await refused(jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id)))
        assert active.record.desired == "run"
    await jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    await ps[0].until(lambda: any(d.HasField("boundary") for d in ps[0].directives))
    assert len(await events(cluster, job_id, "a pause was asked for")) == 1
    await cluster.stub.ReportStep(step_report(job_id, 0, halted=True))
    await worker.slots(0)
    # --- a resume: refused, it still rests; then it goes on
    with failing_disk(cluster):
        await refused(jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id)))
        assert active.state == jobs_pb2.JOB_STATE_PAUSED
        assert active.halted_version == 1
    await jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id))
    await worker.slots(2)
    # --- a stop at once: refused, it goes on; then it ends and the next one has its turn
    with failing_disk(cluster):
        await refused(jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id, now=True)))
        assert controller_of(cluster).active is active
        assert job_id in worker.holds
    await jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id, now=True))
    await worker.until(lambda: second in worker.holds)
    assert len(await events(cluster, job_id, "stopped at once")) == 1
    # --- a submission: refused, it leaves nothing behind
    recipe = make_recipe(cluster.directory)
    with failing_disk(cluster):
        await refused(jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json())))
    assert (await cluster.submit()) == "tiny-3"


async def start(cluster: Cluster, job_id: str, nodes: list[FakeNode]) -> str:
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id, now=True))
    for node in nodes:
        await node.released()
    return "planning: its turn has come"


async def end(cluster: Cluster, job_id: str, nodes: list[FakeNode]) -> str:
    for step in range(4):
        await cluster.stub.ReportStep(step_report(job_id, step))
    await report_validation(nodes[2], job_id, 4)
    await report_checkpoint(nodes[0], 4)
    return "finished: all 4 steps are done"


async def skip(cluster: Cluster, job_id: str, nodes: list[FakeNode]) -> str:
    for step in range(2):
        await cluster.stub.ReportStep(step_report(job_id, step, skipped=True, consecutive_skips=step + 1))
    return "failed: 2 steps in a row"


async def lose(cluster: Cluster, job_id: str, nodes: list[FakeNode]) -> str:
    await nodes[1].die()
    return "going back to the last checkpoint"


async def halt(cluster: Cluster, job_id: str, nodes: list[FakeNode]) -> str:
    await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    await cluster.stub.ReportStep(step_report(job_id, 0, halted=True))
    return "paused at version 1"


@pytest.mark.parametrize("cause", [start, end, skip, lose, halt])
async def test_a_transition_that_could_not_be_stored_is_due_again(
    cluster: Cluster,
    cause: Callable[[Cluster, str, list[FakeNode]], Awaitable[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first write of each transition fails, for whatever reason; it is made once all the same."""
    job_id = await cluster.submit()
    next_id = await cluster.submit() if cause is start else job_id
    ps, (worker,) = await cluster.running(job_id)
    await worker.slots(2)
    controller = controller_of(cluster)
    store, failed = controller.state.store_job, set[int]()

    def fails_first(record: object, items: list[jobs_pb2.WatchJobResponse], plan: bytes | None = None) -> None:
        assert items, "a transition without an event"
        if record.state not in failed and record.desired == controller_desired():  # type: ignore[attr-defined]
            failed.add(record.state)  # type: ignore[attr-defined]
            raise UnreachableError("database is locked")
        store(record, items, plan)  # type: ignore[arg-type]

    def controller_desired() -> str:
        return controller.active.record.desired if controller.active is not None else "run"

    if cause is start:
        # The stop itself goes through.
        failed.add(jobs_pb2.JOB_STATE_STOPPED)
    monkeypatch.setattr(controller.state, "store_job", fails_first)
    expected = await cause(cluster, job_id, [*ps, worker])
    await cluster.event(next_id, expected)
    assert len(await events(cluster, next_id, expected)) <= 2  # "node" and "state" may share the words
    assert failed
    await until(lambda: controller.retry.trouble is None)


async def test_a_restart_after_a_halt_that_was_taken_back_publishes_the_leases_again(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await worker.slots(2)
    assert worker.leases is not None
    number = worker.leases.number
    state = controller_of(cluster).state
    # The coordinator dies right after the step is stored.
    state.record_step(step_report(job_id, 0, halted=True))
    await cluster.restart()
    for node in (*ps, worker):
        await node.reconnect(cluster.address)
    await worker.until(lambda: worker.leases is not None and worker.leases.number > number)
    assert list(worker.leases.holders) == [worker.node_id] * 2


async def test_a_checkpoint_that_a_person_waits_for_is_asked_for_again(cluster: Cluster) -> None:
    """Of the leader's next stream, if the first one broke."""
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await worker.slots(2)
    waiting = asyncio.ensure_future(cluster.jobs.CheckpointJob(jobs_pb2.CheckpointJobRequest(job_id=job_id)))
    for _ in range(2):
        await ps[0].until(lambda: any(d.HasField("boundary") for d in ps[0].directives))
        ps[0].directives.clear()
        await ps[0].reconnect(cluster.address)
    await cluster.stub.ReportStep(step_report(job_id, 0, halted=True))
    await report_checkpoint(ps[0], 1)
    assert (await waiting).checkpoint.version == 1


async def test_a_job_whose_record_cannot_be_read_ends_and_the_next_has_its_turn(cluster: Cluster) -> None:
    first, second = await cluster.submit(), await cluster.submit()
    state = controller_of(cluster).state
    record = state.get_job(first)
    assert record is not None
    record.recipe_json = '{"unknown": 1}'
    state.store_job(record)
    await cluster.restart()
    nodes = [cluster.node(SERVER, "ps-0"), cluster.node(SERVER, "ps-1"), cluster.node(WORKER, "w")]
    for node in nodes:
        await node.until(lambda node=node: second in node.holds)  # type: ignore[misc]
    stored = controller_of(cluster).state.get_job(first)
    assert stored is not None
    assert stored.state == jobs_pb2.JOB_STATE_FAILED
    assert "its record cannot be used" in stored.reason


def test_a_transition_is_one_transaction(tmp_path: Path) -> None:
    from gradstream.coordinator.state.state import JobRecord

    state = SqliteState(tmp_path)
    state.create_job(JobRecord("a-1", "a", "{}", "{}", "/a-1", 5))
    record = state.get_job("a-1")
    assert record is not None
    state._db.execute("CREATE TRIGGER refuse BEFORE INSERT ON history BEGIN SELECT RAISE(ABORT, 'no'); END")
    record.reason = "new"
    item = jobs_pb2.WatchJobResponse(event=jobs_pb2.Event(message="new"))
    with pytest.raises(UnreachableError, match="no"):
        state.store_job(record, [item], plan=b"plan")
    with pytest.raises(UnreachableError, match="no"):
        state.record_step(coordinator_pb2.ReportStepRequest(job_id="a-1", epoch=1, step=0))
    stored = state.get_job("a-1")
    assert stored is not None
    assert stored.reason == ""
    assert state.load_plan("a-1", 0) is None
    assert state.step_totals("a-1", 1, 0).num_steps == 0
    state.close()


async def test_a_table_goes_to_the_workers_that_it_concerns(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    _, (first, second) = await cluster.running(job_id, workers=2)
    await first.slots(1)
    await second.slots(1)
    spare = cluster.node(WORKER, "spare")
    await spare.plan_of(1)
    assert spare.leases is None  # no table names it
    tables = [d for d in second.directives if d.HasField("leases")]
    await first.die()
    await spare.slots(1)
    assert [d for d in second.directives if d.HasField("leases")] == tables
    # A new session brings the table in force.
    active = controller_of(cluster).active
    assert active is not None
    await second.reconnect(cluster.address)
    await second.until(lambda: second.leases is not None and second.leases.number == active.lease_number)
    assert await second.slots(1)
