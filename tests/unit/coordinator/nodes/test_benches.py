"""Benched nodes: one node's failure does not fail the job, and where all nodes fail alike none is benched."""

from __future__ import annotations

from typing import Any

import pytest
from coordinator_fakes import WORKER, Cluster, report_checkpoint, step_report

from gradstream.coordinator.jobs.stalls import has_recovered
from gradstream.coordinator.nodes.benches import Benches, WorkerSight, find_stuck
from gradstream.coordinator.nodes.membership import NodeEntry
from gradstream.coordinator.timing import Timing, parse_timing
from gradstream.core.errors import ConfigError
from gradstream.core.plan.leases import SLOTS
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

TIMING = Timing(stall_seconds=30, stall_factor=10, first_slot_seconds=600, unreachable_seconds=30)
CUT = {"unreachable": "parameter server ps-1 at h:1", "waiting": True}


def sight(name: str, still: float = 0.0, slots: tuple[int, ...] = (), **more: object) -> WorkerSight:
    values = {"replica": ord(name), "waiting": False, **more}
    return WorkerSight(node_id=name, title=f"worker {name}", slots=slots, still_seconds=still, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("workers", "slot_seconds", "stuck"),
    [
        # Missing slots and no progress for longer than slots take.
        ([sight("a", 31, (1, 3)), sight("b")], 1.0, {"a": "no progress on slots 1, 3 for 31 s (a slot takes 1.0 s)"}),
        ([sight("a", 29, (1,)), sight("b")], 1.0, {}),
        ([sight("a", 99, (1,)), sight("b")], 10.0, {}),
        ([sight("a", 101, (1,)), sight("b")], 10.0, {"a": "no progress on slot 1 for 101 s (a slot takes 10.0 s)"}),
        # Before a slot was ever done nobody knows how long one takes.
        ([sight("a", 599, (1,)), sight("b")], None, {}),
        ([sight("a", 600, (1,)), sight("b")], None, {"a": "no progress on slot 1 for 600 s"}),
        ([sight("a", 599, (1,), loading=True), sight("b")], 1.0, {}),
        # Whoever has done its part waits for others.
        (
            [sight("a", 99, ()), sight("b", 99, (1,))],
            1.0,
            {"b": "no progress on slot 1 for 99 s (a slot takes 1.0 s)"},
        ),
        # Cut off from a server.
        (
            [sight("a", 5, (1,), unreachable_seconds=31, **CUT), sight("b")],
            1.0,
            {"a": "cannot reach parameter server ps-1 at h:1 for 31 s"},
        ),
        ([sight("a", 5, (1,), unreachable_seconds=29, **CUT), sight("b")], 1.0, {}),
        # All of them: it is the server.
        ([sight(name, 99, (1,), unreachable_seconds=99, **CUT) for name in "ab"], 1.0, {}),
        ([sight(name, 99, (1,)) for name in "ab"], 1.0, {}),
        ([sight("a", 99, (1,))], 1.0, {}),
        # A replica: the others wait for the one that hangs.
        (
            [
                sight("a", 99, (1,), replica=1, waiting=True),
                sight("b", 99, (1,), replica=1),
                sight("c", 99, (1,), replica=1, waiting=True),
                sight("d", replica=2),
            ],
            1.0,
            {"b": "no progress on slot 1 for 99 s (a slot takes 1.0 s)"},
        ),
        ([sight("a", 99, (1,), replica=1), sight("b", 1, (1,), replica=1), sight("d", replica=2)], 1.0, {}),
    ],
)
def test_who_is_stuck(workers: list[WorkerSight], slot_seconds: float | None, stuck: dict[str, str]) -> None:
    num_able = len({worker.node_id for worker in workers})
    assert dict(find_stuck(workers, num_able, slot_seconds, TIMING)) == stuck


def test_an_idle_worker_can_take_over_from_all_others() -> None:
    assert find_stuck([sight("a", 99, (1,))], 2, 1.0, TIMING)


def test_a_bench_ends_when_its_time_is_over_and_the_node_has_recovered() -> None:
    benches = Benches(bench_seconds=60)
    benches.bench("a", "worker a", "disk full", True, 0)
    benches.bench("b", "worker b", "hung", False, 0)
    assert benches.lift(59, lambda *_: True) == []
    assert [bench.title for bench in benches.lift(60, lambda *_: False)] == ["worker a"]
    assert benches.benched("b")
    assert not benches.failed("b")
    assert [bench.title for bench in benches.lift(61, lambda node, since: (node, since) == ("b", 0))] == ["worker b"]
    # Each time for twice as long.
    benches.bench("a", "worker a", "disk full", True, 100)
    assert benches.lift(219, lambda *_: True) == []
    assert benches.lift(220, lambda *_: True)


@pytest.mark.parametrize(
    ("changes", "recovered"),
    [
        ({}, False),
        ({"progress_at": 11.0}, True),
        ({"alive": False}, True),
        # It has heard that it has no slots, and has nothing to do.
        ({"activity": {"phase": "waiting", "waiting_for": SLOTS}}, True),
        ({"activity": {"phase": "waiting", "waiting_for": "weights from ps-0"}}, False),
        ({"progress_at": 11.0, "activity": {"unreachable": "ps-1"}}, False),
        ({"activity": {"waiting_for": SLOTS, "unreachable": "ps-1"}}, False),
    ],
)
def test_a_worker_that_hung_or_was_cut_off_has_recovered(changes: dict[str, Any], recovered: bool) -> None:
    node = NodeEntry("w.1", WORKER, "w", "h:1", 1 << 30, "cpu", 1, 10.0, 0, progress_at=5.0)
    for name, value in changes.items():
        setattr(node, name, coordinator_pb2.Activity(**value) if name == "activity" else value)
    assert has_recovered(node, since=10.0) is recovered
    assert has_recovered(None, since=10.0)


def test_failures_in_the_same_words_are_told_once() -> None:
    benches = Benches()
    for name in "abc":
        benches.bench(name, f"worker {name}", "disk full" if name != "b" else "no memory", True, 0)
    assert benches.failures() == "worker a, worker c: disk full; worker b: no memory"


def test_timing_is_given_by_key() -> None:
    assert parse_timing(["lease_seconds=2", "stall_factor=3.5"]) == Timing(lease_seconds=2, stall_factor=3.5)
    for setting, words in (
        ("lease=2", "there is no 'lease'; one of heartbeat_seconds, lease_seconds"),
        ("lease_seconds=x", "write a number above 0, like lease_seconds=5"),
        ("lease_seconds=0", "write a number above 0"),
        ("lease_seconds", "write a number above 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_timing([setting])


async def test_a_failed_worker_is_tried_again(cluster: Cluster) -> None:
    """With the plan, which it has dropped, and only once its time is over."""
    job_id = await cluster.submit()
    _, (first, second) = await cluster.running(job_id, workers=2)
    await first.slots(1)
    active = cluster.coordinator.controller.active
    assert active is not None
    active.benches.bench_seconds = 0.5
    first.directives.clear()
    first.holds.clear()
    first.leases = None
    await first.stub.ReportFailure(
        coordinator_pb2.ReportFailureRequest(job_id=job_id, epoch=1, node_id=first.node_id, message="disk full")
    )
    assert await second.slots(2) == [0, 1]
    assert first.directives == []
    await first.slots(1)
    assert [directive.WhichOneof("directive") for directive in first.directives] == ["plan", "leases"]
    await cluster.event(job_id, "worker worker-0 is no longer benched; the cause was: disk full")


async def test_a_stop_without_workers_keeps_what_the_servers_hold(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    ps, (worker,) = await cluster.running(job_id)
    await worker.slots(2)
    await cluster.stub.ReportStep(step_report(job_id, 0))
    await worker.die()
    await cluster.event(job_id, "none, ")
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id))

    def asked(version: int) -> bool:
        return any(d.HasField("snapshot") and d.snapshot.version == version for node in ps for d in node.directives)

    await ps[1].until(lambda: any(d.HasField("snapshot") for d in ps[1].directives))
    assert asked(1)
    job = await cluster.job(job_id)
    assert [(wait.what, wait.whom) for wait in job.waits][-1] == ("the checkpoint of version 1", "ps-0, ps-1")
    # The step that the last worker had finished was decided after all.
    await cluster.stub.ReportStep(step_report(job_id, 1))
    await ps[1].until(lambda: asked(2))
    await report_checkpoint(ps[0], 2)
    await cluster.event(job_id, "stopped at version 2, with a checkpoint; no worker was live to finish the step")
    # A paused job too.
    await cluster.jobs.ResumeJob(jobs_pb2.ResumeJobRequest(job_id=job_id))
    cluster.node(WORKER, "again")
    await ps[0].plan_of(2)
    await cluster.stub.ReportStep(step_report(job_id, 2, epoch=2))
    await cluster.nodes[-1].die()
    await cluster.jobs.PauseJob(jobs_pb2.PauseJobRequest(job_id=job_id))
    await cluster.event(job_id, "paused at version 3; no worker was live")
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id))
    await ps[1].until(lambda: asked(3))
    await report_checkpoint(ps[0], 3)
    await cluster.event(job_id, "stopped at version 3, with a checkpoint; while paused")
