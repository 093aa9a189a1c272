"""Nodes that may have too few files open for their peers are named, for `gradstream status` and `doctor`."""

from __future__ import annotations

from gradstream.coordinator.nodes.membership import SERVER, WORKER, NodeEntry
from gradstream.coordinator.nodes.open_files import shortages
from gradstream.proto.v1 import coordinator_pb2, probe_pb2


def nodes(kind: coordinator_pb2.NodeKind.ValueType, count: int, limit: int) -> list[NodeEntry]:
    vitals = coordinator_pb2.Vitals(machine=probe_pb2.Machine(max_open_files=limit))
    named = [f"n-{number:04d}" for number in range(count)]
    return [NodeEntry(name, kind, name, "h:1", 0, "cpu", 0, 0.0, 0, vitals=vitals) for name in named]


def test_enough_for_all() -> None:
    assert shortages(20_000, [*nodes(SERVER, 64, 20_000), *nodes(WORKER, 1000, 1024)]) == []
    assert shortages(0, nodes(SERVER, 64, 0)) == []


def test_too_few_for_the_nodes_there_are() -> None:
    found = shortages(1024, [*nodes(SERVER, 3, 1024), *nodes(WORKER, 1000, 1024)])
    assert [line.partition("; ")[0] for line in found] == [
        "the coordinator may have only 1024 files open at the same time, and 1003 nodes connect to it",
        "parameter server n-0000 (and 2 more) may have only 1024 files open at the same time, and 1000 workers and "
        "3 servers connect to it",
    ]


def test_the_dead_do_not_count() -> None:
    workers = nodes(WORKER, 1000, 1024)
    for worker in workers[:200]:
        worker.alive = False
    assert shortages(1024, workers) == []


def test_a_node_that_has_not_reported_is_not_judged() -> None:
    server = nodes(SERVER, 1, 256)[0]
    server.vitals = None
    assert shortages(20_000, [server, *nodes(WORKER, 1000, 20_000)]) == []
