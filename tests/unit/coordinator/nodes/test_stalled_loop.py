"""Leases while the coordinator's loop stalls, and many nodes that go at once. The clock is set by the tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.nodes.membership import WORKER, NodeEntry
from gradstream.coordinator.nodes.registry import missed_seconds
from gradstream.coordinator.nodes.sessions import OpenSession
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.coordinator.timing import Timing
from gradstream.proto.v1 import coordinator_pb2

TICK = 0.2
LEASE = 10.0


class Bench:
    """A controller without a loop: a test moves the clock, ticks and sends heartbeats."""

    def __init__(self, directory: Path) -> None:
        self.now = 100.0
        self.state = SqliteState(directory)
        self.controller = Controller(self.state, Timing(tick_seconds=TICK, lease_seconds=LEASE), lambda: self.now)
        self.num_reconciles = 0
        reconcile = self.controller.reconcile

        def counted() -> None:
            self.num_reconciles += 1
            reconcile()

        self.controller.reconcile = counted  # type: ignore[method-assign]

    def join(self, name: str) -> tuple[NodeEntry, OpenSession]:
        node = self.controller.register(
            coordinator_pb2.RegisterRequest(kind=WORKER, name=name, incarnation=name, address="127.0.0.1:1")
        )
        session = self.controller.open_session(node.node_id)
        assert session is not None
        return node, session

    def tick(self, after_seconds: float = TICK) -> None:
        self.now += after_seconds
        self.controller._tick()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    bench.state.close()


def test_a_tick_may_be_late_by_a_tick() -> None:
    assert missed_seconds(5.0, 5.0 + TICK, TICK) == 0.0
    assert missed_seconds(0.0, 2 * TICK, TICK) == 0.0
    assert missed_seconds(5.0, 17.0, TICK) == pytest.approx(12.0 - 2 * TICK)


def test_a_stall_of_many_short_transitions_ends_no_lease(bench: Bench) -> None:
    node, _ = bench.join("worker-0")
    # For twice a lease the loop reconciles without a pause, and reads no heartbeat.
    for _ in range(200):
        bench.now += LEASE / 100
        bench.controller.reconcile()
    assert node.alive
    bench.tick()
    assert node.alive


def test_a_loop_that_is_slow_for_long_ends_no_lease_of_a_node_that_heartbeats(bench: Bench) -> None:
    node, session = bench.join("worker-0")
    for turn in range(60):
        bench.tick(after_seconds=3.0)
        # A heartbeat is read only in every fourth turn of the loop: 12 s after the last one.
        if turn % 4 == 0:
            assert bench.controller.nodes.heartbeat(session, coordinator_pb2.Activity(), bench.now)
    assert node.alive


def test_a_silent_node_ends_after_its_lease_of_ticks_on_time(bench: Bench) -> None:
    node, _ = bench.join("worker-0")
    for _ in range(round(LEASE / TICK) - 1):
        bench.tick()
    assert node.alive
    bench.tick()
    bench.tick()
    assert not node.alive


def test_a_silent_node_ends_also_in_a_slow_loop(bench: Bench) -> None:
    node, _ = bench.join("worker-0")
    for _ in range(round(LEASE / (2 * TICK)) + 2):
        bench.tick(after_seconds=3.0)
    assert not node.alive


def test_nodes_that_go_at_once_share_a_reconcile(bench: Bench) -> None:
    joined = [bench.join(f"worker-{number}") for number in range(100)]
    assert bench.num_reconciles == 1
    bench.tick()
    before = bench.num_reconciles
    for _, session in joined[:50]:
        bench.controller.close_session(session, "its stream ended")
    # The first one at once, the others at the next tick.
    assert bench.num_reconciles == before + 1
    bench.tick()
    assert bench.num_reconciles == before + 2
    assert [node.alive for node, _ in joined].count(True) == 50


def test_a_directive_to_many_nodes_is_one_object(bench: Bench) -> None:
    joined = [bench.join(f"worker-{number}") for number in range(3)]
    directive = coordinator_pb2.SessionResponse().SerializeToString()
    bench.controller.nodes.send_all([node for node, _ in joined], directive)
    queued = [session._queue.get_nowait() for _, session in joined]
    assert all(each is directive for each in queued)
