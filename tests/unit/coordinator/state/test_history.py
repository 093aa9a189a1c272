"""What a reader asks of a history: the filter as a function, and the same filter in every backend of the state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gradstream.coordinator.state.history import ALL, HistoryFilter, facts_of, names_one
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.coordinator.state.state import State
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

FACTORIES: dict[str, Callable[[Path], State]] = {"sqlite": SqliteState}


@pytest.fixture(params=FACTORIES.values(), ids=FACTORIES.keys())
def state(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[State]:
    state = request.param(tmp_path)
    yield state
    state.close()


def event(kind: str, message: str, unix_ms: int) -> jobs_pb2.WatchJobResponse:
    return jobs_pb2.WatchJobResponse(event=jobs_pb2.Event(kind=kind, message=message, unix_ms=unix_ms))


def line(node: str, level: str, unix_ms: int) -> jobs_pb2.WatchJobResponse:
    log = coordinator_pb2.LogLine(level=level, text=f"of {node}", unix_ms=unix_ms)
    return jobs_pb2.WatchJobResponse(log=jobs_pb2.NodeLogLine(node=node, line=log))


ITEMS = [
    event("node", "worker worker-1 is here (cpu)", 1000),
    line("worker-1", "info", 2000),
    line("worker-10", "warning", 3000),
    event("node", "worker worker-10 is gone: its stream ended", 4000),
    event("failure", "worker-1: no memory.", 5000),
    line("worker-1", "odd", 6000),
    jobs_pb2.WatchJobResponse(step=coordinator_pb2.ReportStepRequest(step=3, unix_ms=7000)),
    jobs_pb2.WatchJobResponse(checkpoint=jobs_pb2.Checkpoint(version=4, unix_ms=8000)),
    line("worker-1", "error", 9000),
]
FILTERS = {
    "all": (ALL, range(9)),
    "kinds": (HistoryFilter(kinds=("log", "step", "log")), [1, 2, 5, 6, 8]),
    "kinds of events": (HistoryFilter(event_kinds=("failure", "plan")), [1, 2, 4, 5, 6, 7, 8]),
    "events of a kind": (HistoryFilter(kinds=("event",), event_kinds=("node",)), [0, 3]),
    "a node": (HistoryFilter(nodes=("worker-1",)), [0, 1, 4, 5, 8]),
    "lines of two nodes": (HistoryFilter(kinds=("log",), nodes=("worker-1", "worker-10")), [1, 2, 5, 8]),
    "events of a node": (HistoryFilter(kinds=("event",), nodes=("worker-10",)), [3]),
    "a level": (HistoryFilter(kinds=("log",), level="warning"), [2, 5, 8]),
    "since": (HistoryFilter(since_unix_ms=6000), [5, 6, 7, 8]),
    "all at once": (HistoryFilter(("log",), ("node",), ("worker-1",), "info", 2001), [5, 8]),
    "kinds that name no node": (HistoryFilter(kinds=("step",), nodes=("worker-1",)), []),
}


@pytest.mark.parametrize(("wanted", "expected"), FILTERS.values(), ids=FILTERS.keys())
def test_a_filter_selects_the_same_items_in_the_state_as_in_memory(
    state: State, wanted: HistoryFilter, expected: list[int]
) -> None:
    state.append("other-1", ITEMS)
    state.append("a-1", ITEMS)
    assert [index for index, item in enumerate(ITEMS) if wanted.selects(item)] == list(expected)
    whole = [item.cursor for item in state.read_history("a-1", 0, 100)]
    found = state.read_history("a-1", 0, 100, wanted)
    assert [whole.index(item.cursor) for item in found] == list(expected)
    # In pages, the same.
    pages, cursor = [], 0
    while page := state.read_history("a-1", cursor, 2, wanted):
        pages += page
        cursor = page[-1].cursor
    assert pages == found
    # From the last ones on, the same.
    for count in range(1, len(found) + 2):
        begin = state.cursor_before_last("a-1", count, wanted)
        assert state.read_history("a-1", begin, 100, wanted) == found[-count:]


def test_an_item_without_a_time_has_that_of_its_recording(state: State) -> None:
    state.record_validation("a-1", jobs_pb2.Validation(version=2))
    assert len(state.read_history("a-1", 0, 9, HistoryFilter(since_unix_ms=1))) == 1
    assert state.read_history("a-1", 0, 9, HistoryFilter(since_unix_ms=2**64 - 1)) == []


def test_names_are_whole_words() -> None:
    assert names_one("slots 0, 1 → worker-1: 0, 1; ps.a gone.", ["worker-1"])
    assert names_one("slots 0, 1 → worker-1: 0, 1; ps.a gone.", ["x", "ps.a"])
    assert not names_one("worker-10 and my-worker-1 and worker-1.b", ["worker-1"])
    assert names_one("it waits for worker-1.", ["worker-1"])
    assert not names_one("ps-a", ["ps.a"]), "a name is no pattern"


def test_an_item_of_a_later_release_has_facts_too() -> None:
    assert facts_of(jobs_pb2.WatchJobResponse()).kind == ""
