"""Hidden communication against a count by microseconds, and traces that Perfetto draws correctly."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.pipelines import simulated_timelines, stage_costs

from gradstream.core.pipeline.schedule import make_schedule
from gradstream.core.telemetry.timeline import PASSES, Span, SpanKind, Timeline, hidden
from gradstream.core.telemetry.trace import chrome_trace
from gradstream.proto.v1 import coordinator_pb2

SPANS = st.lists(
    st.builds(
        Span,
        kind=st.sampled_from(SpanKind),
        begin_us=st.integers(0, 60),
        duration_us=st.integers(0, 30),
        slot=st.none() | st.integers(0, 3),
        item=st.none() | st.integers(0, 9),
        num_bytes=st.integers(0, 100),
        stage=st.none() | st.integers(0, 3),
        microbatch=st.none() | st.integers(0, 3),
    ),
    max_size=30,
)


def covered(spans: list[Span], *kinds: SpanKind) -> set[int]:
    """The microseconds that spans of these kinds cover."""
    return {at for s in spans if s.kind in kinds for at in range(s.begin_us, s.begin_us + s.duration_us)}


def timeline(spans: list[Span], worker: str = "worker-0", version: int = 0) -> Timeline:
    return Timeline(worker, "tiny-1", 1, version, tuple(spans), *hidden(spans))


@given(SPANS)
def test_hidden_is_what_counting_gives(spans: list[Span]) -> None:
    communication = covered(spans, SpanKind.SEND, SpanKind.RECEIVE)
    both = communication & covered(spans, SpanKind.COMPUTE)
    assert hidden(spans) == (len(communication), len(both))


def test_waiting_validating_and_encoding_hide_nothing() -> None:
    others = [Span(kind, 0, 100) for kind in SpanKind if kind is not SpanKind.COMPUTE]
    assert hidden(others) == (100, 0)
    assert hidden([*others, Span(SpanKind.COMPUTE, 90, 30)]) == (100, 10)
    assert hidden([]) == (0, 0)


@given(st.lists(st.tuples(SPANS, st.sampled_from(["worker-0", "worker-1"])), max_size=4))
def test_trace_shows_every_span_once_and_none_over_another(parts: list[tuple[list[Span], str]]) -> None:
    timelines = [timeline(spans, worker, version) for version, (spans, worker) in enumerate(parts)]
    trace = json.loads(json.dumps(chrome_trace(timelines), allow_nan=False))
    origin = trace["otherData"]["origin_unix_us"]
    names: dict[tuple[int, int], str] = {}
    processes: dict[int, str] = {}
    threads: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event["ph"] == "M":
            assert names.setdefault((event["pid"], event["tid"]), event["args"]["name"]) == event["args"]["name"]
        elif event["ph"] not in ("s", "f"):
            assert event["ph"] == "X"
            threads[event["pid"], event["tid"]].append(event)
    # Every thread and process with an event has a name, and no two processes share one.
    assert set(threads) <= set(names)
    assert {pid for pid, _ in threads} <= set(processes)
    assert len(set(processes.values())) == len(processes)
    # Nothing overlaps on a thread.
    for events in threads.values():
        events.sort(key=lambda event: (event["ts"], event["ts"] + event["dur"]))
        for before, after in itertools.pairwise(events):
            assert before["ts"] + before["dur"] <= after["ts"]
    # All spans, with their worker and times, once.
    shown = sorted(
        (processes[pid], event["cat"], event["ts"] + origin, event["dur"], event["args"]["version"])
        for (pid, _), events in threads.items()
        for event in events
        if event["cat"] != "version"
    )
    given_ = sorted(
        (t.worker, str(span.kind), span.begin_us, span.duration_us, t.version) for t in timelines for span in t.spans
    )
    assert shown == given_


def test_lanes_are_named_after_their_kind() -> None:
    spans = [Span(SpanKind.SEND, at, 15, slot=0, item=at, num_bytes=7) for at in (0, 10, 20, 30)]
    events = chrome_trace([timeline(spans)])["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    lanes = [threads[event["tid"]] for event in events if event.get("cat") == "send"]
    assert lanes == ["send", "send 2", "send", "send 2"]
    assert [event for event in events if event.get("cat") == "send"][1]["args"] == {
        "version": 0,
        "slot": 0,
        "bundle": 10,
        "bytes": 7,
    }


@pytest.mark.parametrize(("name", "input_first"), [("1f1b", False), ("1f1b", True), ("zero-bubble", True)])
def test_passes_are_in_one_track_with_arrows_from_stage_to_stage(name: str, input_first: bool) -> None:
    schedule = make_schedule(name, 3, 4)
    costs = replace(stage_costs(schedule, latency_us=10), input_first=input_first)
    timelines = simulated_timelines(schedule, costs, slots=(2, 5))
    events = chrome_trace(timelines)["traceEvents"]
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    passes = [event for event in events if event.get("cat") in PASSES]
    assert {threads[event["pid"], event["tid"]] for event in passes} == {"passes"}
    # Named as the schedule names them, though microbatches count within their slot.
    for process, row in enumerate(schedule.rows, start=1):
        shown = [event["name"] for event in passes if event["pid"] == process]
        assert shown == [f"{action.stage}{action.op}{action.microbatch % 2}" for action in row]
    assert passes[0]["args"] == {"version": 0, "slot": 2, "stage": 0, "microbatch": 0}

    # --- arrows: each from within one pass to the beginning of the one that waited for it
    arrows: dict[int, dict[str, Any]] = defaultdict(dict)
    for event in events:
        if event["ph"] in ("s", "f"):
            arrows[event["id"]][event["ph"]] = event
    found = []
    for ends in arrows.values():
        assert {(end["cat"], end["name"]) for end in ends.values()} == {("flow", ends["s"]["name"])}
        assert ends["f"]["bp"] == "e"
        around = [
            [
                event
                for event in passes
                if (event["pid"], event["tid"]) == (end["pid"], end["tid"])
                and event["ts"] <= end["ts"] < event["ts"] + event["dur"]
            ]
            for end in (ends["s"], ends["f"])
        ]
        assert [len(events) for events in around] == [1, 1]
        assert ends["s"]["ts"] <= ends["f"]["ts"], "a gradient may leave in the middle of its pass"
        assert ends["f"]["ts"] == around[1][0]["ts"]
        assert around[0][0]["args"]["slot"] == around[1][0]["args"]["slot"]
        found.append((ends["s"]["name"], around[0][0]["name"], around[1][0]["name"]))
    back = "I" if schedule.split else "B"
    assert sorted(found) == sorted(
        arrow
        for microbatch in (0, 1)
        for stage in (0, 1)
        for arrow in (
            ("activations", f"{stage}F{microbatch}", f"{stage + 1}F{microbatch}"),
            ("gradients", f"{stage + 1}{back}{microbatch}", f"{stage}{back}{microbatch}"),
        )
        for _ in (2, 5)
    )


def test_what_is_computed_again_has_one_arrow() -> None:
    first = [Span(SpanKind.FORWARD, at, 5, slot=0, stage=0, microbatch=0) for at in (0, 20)]
    second = [Span(SpanKind.FORWARD, 30, 5, slot=0, stage=1, microbatch=0)]
    events = chrome_trace([timeline(first), timeline(second, "worker-1"), timeline(second, "worker-2", version=1)])
    ends = [(event["ph"], event["pid"], event["ts"]) for event in events["traceEvents"] if event["ph"] in ("s", "f")]
    assert ends == [("s", 1, 24), ("f", 2, 30)]


def test_message_and_back() -> None:
    spans = [
        Span(SpanKind.SEND, 5, 6, slot=0, item=0, num_bytes=9),
        Span(SpanKind.WAIT, 1, 2),
        Span(SpanKind.BACKWARD_WEIGHT, 7, 2, slot=1, stage=0, microbatch=3),
    ]
    message = coordinator_pb2.ReportTimelineRequest(
        job_id="tiny-1", epoch=1, version=0, spans=[span.to_proto() for span in spans], communication_us=6, hidden_us=0
    )
    assert Timeline.from_proto("worker-0", message) == timeline(spans)
    # A kind of a later version is left out instead of breaking the trace.
    message.spans.add(kind=coordinator_pb2.SPAN_KIND_UNSPECIFIED)
    assert Timeline.from_proto("worker-0", message) == timeline(spans)


def test_every_kind_on_the_wire_has_a_name() -> None:
    known = {f"SPAN_KIND_{kind.name}" for kind in SpanKind}
    assert known == set(coordinator_pb2.SpanKind.keys()) - {"SPAN_KIND_UNSPECIFIED"}
