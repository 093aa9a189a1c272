"""Timelines: what a worker did and when, how much of its communication compute hid, and Chrome's trace format.

Pure functions over spans. A span's kind says what happened (`SpanKind`). Times are Unix microseconds of the worker's
own clock: those of one worker compare exactly, those of several as well as their clocks agree. How long the workers of
a pipeline wait is in `core/pipeline_timeline`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from gradstream.core.schedules import Op
from gradstream.proto.v1 import coordinator_pb2

MAX_SPANS = 4096
"""Most spans of one version that a worker keeps and the coordinator takes."""

_NUM_LANES = 1000


class SpanKind(StrEnum):
    """What a span shows."""

    COMPUTE = "compute"
    WAIT = "wait"
    VALIDATE = "validate"
    ENCODE = "encode"
    SEND = "send"
    RECEIVE = "receive"
    DECODE = "decode"
    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_INPUT = "backward input"
    BACKWARD_WEIGHT = "backward weight"


_COMMUNICATION = (SpanKind.SEND, SpanKind.RECEIVE)
_WIRE = {kind: coordinator_pb2.SpanKind.Value(f"SPAN_KIND_{kind.name}") for kind in SpanKind}
_KINDS = {number: kind for kind, number in _WIRE.items()}
PASSES = (SpanKind.FORWARD, SpanKind.BACKWARD, SpanKind.BACKWARD_INPUT, SpanKind.BACKWARD_WEIGHT)
"""What a worker of a pipeline does with a microbatch."""
OPS = {SpanKind[op.name]: op for op in Op}
"""The passes as schedules call them."""
# The tracks of a worker from top to bottom. All passes are in one, as a worker computes one after the other.
_TRACKS: tuple[tuple[str, tuple[SpanKind, ...]], ...] = (
    (str(SpanKind.COMPUTE), (SpanKind.COMPUTE,)),
    ("passes", PASSES),
    *((str(kind), (kind,)) for kind in SpanKind if kind not in (SpanKind.COMPUTE, *PASSES)),
)


class Span(NamedTuple):
    """Something that a worker did.

    `item` is the bundle, for what is done to one; `num_bytes` counts payload. `stage` and `microbatch` say which pass
    of a pipeline it is.
    """

    kind: SpanKind
    begin_us: int
    duration_us: int
    slot: int | None = None
    item: int | None = None
    num_bytes: int = 0
    stage: int | None = None
    microbatch: int | None = None

    def to_proto(self) -> coordinator_pb2.Span:
        """The span as a message."""
        return coordinator_pb2.Span(
            kind=_WIRE[self.kind],
            begin_unix_us=self.begin_us,
            duration_us=self.duration_us,
            slot=self.slot,
            item=self.item,
            num_bytes=self.num_bytes,
            stage=self.stage,
            microbatch=self.microbatch,
        )


@dataclass(frozen=True, slots=True)
class Timeline:
    """A worker's spans from installing version `version` to installing the next.

    During `communication_us` microseconds something was being sent or received, and during `hidden_us` of them the
    worker computed as well.
    """

    worker: str
    job_id: str
    epoch: int
    version: int
    spans: tuple[Span, ...]
    communication_us: int
    hidden_us: int

    @classmethod
    def from_proto(cls, worker: str, message: coordinator_pb2.ReportTimelineRequest) -> Timeline:
        """The timeline that a message describes. Spans of a kind that this version does not know are left out."""
        return cls(
            worker=worker,
            job_id=message.job_id,
            epoch=message.epoch,
            version=message.version,
            spans=tuple(
                Span(
                    _KINDS[span.kind],
                    span.begin_unix_us,
                    span.duration_us,
                    span.slot if span.HasField("slot") else None,
                    span.item if span.HasField("item") else None,
                    span.num_bytes,
                    span.stage if span.HasField("stage") else None,
                    span.microbatch if span.HasField("microbatch") else None,
                )
                for span in message.spans
                if span.kind in _KINDS
            ),
            communication_us=message.communication_us,
            hidden_us=message.hidden_us,
        )


def hidden(spans: Iterable[Span]) -> tuple[int, int]:
    """How much of the communication compute hid; return (communication, hidden), both in microseconds.

    Communication is the time during which at least one SEND or RECEIVE is under way, hidden that part of it during
    which a COMPUTE span is, too. Overlapping spans count once.
    """
    communication: list[tuple[int, int]] = []
    compute: list[tuple[int, int]] = []
    for span in spans:
        if span.kind in _COMMUNICATION:
            communication.append((span.begin_us, span.begin_us + span.duration_us))
        elif span.kind is SpanKind.COMPUTE:
            compute.append((span.begin_us, span.begin_us + span.duration_us))
    left, right = union(communication), union(compute)
    both = at = 0
    for begin, end in left:
        while at < len(right) and right[at][1] <= begin:
            at += 1
        # An interval of compute may reach into the next one of communication: `at` stays on it.
        for begin_other, end_other in right[at:]:
            if begin_other >= end:
                break
            both += min(end, end_other) - max(begin, begin_other)
    return sum(end - begin for begin, end in left), both


def chrome_trace(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """The timelines as Chrome's trace event format (JSON object form), which Perfetto and chrome://tracing open.

    One process a worker; below it a thread that shows the versions and one for each kind of span, with one for all
    passes of a pipeline. Spans of a kind that overlap get as many threads ("send", "send 2", ...) as are under way at
    once, since events of one thread must nest. A pass is called as in schedules: "1F3" is the forward pass of
    microbatch 3 on stage 1. Arrows (flow events) lead from it to what waits for it on the next stage. Timestamps are
    microseconds from the earliest span.
    """
    origin_us = min((span.begin_us for timeline in timelines for span in timeline.spans), default=0)
    events: list[dict[str, Any]] = []
    passes: list[_Placed] = []
    workers = sorted({timeline.worker for timeline in timelines})
    for process, worker in enumerate(workers, start=1):
        own = [timeline for timeline in timelines if timeline.worker == worker and timeline.spans]
        own.sort(key=lambda timeline: min(span.begin_us for span in timeline.spans))
        events.append(_name("process", process, 0, worker))
        events += _version_events(process, own, origin_us)
        for number, (name, kinds) in enumerate(_TRACKS, start=1):
            found = [(span, timeline) for timeline in own for span in timeline.spans if span.kind in kinds]
            found.sort(key=lambda pair: (pair[0].begin_us, pair[0].duration_us))
            lanes = _lanes([span for span, _ in found])
            for lane in range(max(lanes, default=-1) + 1):
                events.append(
                    _name("thread", process, number * _NUM_LANES + lane, f"{name} {lane + 1}" if lane else name)
                )
            for (span, timeline), lane in zip(found, lanes, strict=True):
                thread = number * _NUM_LANES + lane
                events.append(_span_event(process, thread, span, timeline, origin_us))
                if kinds is PASSES:
                    passes.append(_Placed(process, thread, span, timeline))
    # After all spans: a flow event belongs to the span before it that is around its time.
    events += _flow_events(passes, origin_us)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"origin_unix_us": origin_us}}


def union(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint intervals in order that cover what the given ones cover."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged


def _lanes(spans: Sequence[Span]) -> list[int]:
    """A lane for each span, which must be in order of begin: the lowest one that is free."""
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    lanes: list[int] = []
    num_lanes = 0
    for span in spans:
        while busy and busy[0][0] <= span.begin_us:
            heapq.heappush(free, heapq.heappop(busy)[1])
        if free:
            lane = heapq.heappop(free)
        else:
            lane = num_lanes
            num_lanes += 1
        heapq.heappush(busy, (span.begin_us + span.duration_us, lane))
        lanes.append(lane)
    return lanes


def _name(what: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": f"{what}_name", "pid": process, "tid": thread, "args": {"name": name}}


def _version_events(process: int, timelines: Sequence[Timeline], origin_us: int) -> list[dict[str, Any]]:
    """Each version from its first span to the next one's first, or to its own last."""
    if not timelines:
        return []
    begins = [min(span.begin_us for span in timeline.spans) for timeline in timelines]
    end_us = max(span.begin_us + span.duration_us for span in timelines[-1].spans)
    events = [_name("thread", process, 1, "version")]
    for timeline, begin, end in zip(timelines, begins, [*begins[1:], end_us], strict=True):
        share = timeline.hidden_us / timeline.communication_us if timeline.communication_us else None
        events.append(
            {
                "ph": "X",
                "cat": "version",
                "name": f"version {timeline.version}",
                "pid": process,
                "tid": 1,
                "ts": begin - origin_us,
                "dur": end - begin,
                "args": {
                    "epoch": timeline.epoch,
                    "communication_us": timeline.communication_us,
                    "hidden_us": timeline.hidden_us,
                    **({} if share is None else {"hidden_share": round(share, 4)}),
                },
            }
        )
    return events


def _span_event(process: int, thread: int, span: Span, timeline: Timeline, origin_us: int) -> dict[str, Any]:
    arguments: dict[str, Any] = {"version": timeline.version}
    if span.slot is not None:
        arguments["slot"] = span.slot
    if span.item is not None:
        arguments["bundle"] = span.item
    if span.num_bytes:
        arguments["bytes"] = span.num_bytes
    if span.stage is not None:
        arguments["stage"] = span.stage
    if span.microbatch is not None:
        arguments["microbatch"] = span.microbatch
    return {
        "ph": "X",
        "cat": str(span.kind),
        "name": _title(span),
        "pid": process,
        "tid": thread,
        "ts": span.begin_us - origin_us,
        "dur": span.duration_us,
        "args": arguments,
    }


def _title(span: Span) -> str:
    if span.kind in OPS and span.stage is not None and span.microbatch is not None:
        return f"{span.stage}{OPS[span.kind]}{span.microbatch}"
    if span.item is not None:
        return f"{span.kind} {span.item}"
    return str(span.kind) if span.slot is None else f"{span.kind} slot {span.slot}"


class _Placed(NamedTuple):
    """A pass and where a trace shows it."""

    process: int
    thread: int
    span: Span
    timeline: Timeline


def _flow_events(passes: Sequence[_Placed], origin_us: int) -> list[dict[str, Any]]:
    """Arrows from each forward pass to that of the next stage, and from each backward pass to that of the stage before.

    Where a pass was computed again, after a worker was lost, the last of each kind counts.
    """
    steps = {SpanKind.FORWARD: 1, SpanKind.BACKWARD: -1, SpanKind.BACKWARD_INPUT: -1}
    found: dict[tuple[int, ...], _Placed] = {}
    for placed in sorted(passes, key=lambda placed: placed.span.begin_us):
        span, timeline = placed.span, placed.timeline
        if span.kind in steps and span.slot is not None and span.stage is not None and span.microbatch is not None:
            step = steps[span.kind]
            found[timeline.epoch, timeline.version, span.slot, span.microbatch, step, span.stage] = placed
    events: list[dict[str, Any]] = []
    for number, (key, target) in enumerate(found.items(), start=1):
        step, stage = key[-2:]
        source = found.get((*key[:-1], stage - step))
        if source is None:
            continue
        common = {"cat": "flow", "name": "activations" if step == 1 else "gradients", "id": number}
        in_us = target.span.begin_us - origin_us
        begin_us = source.span.begin_us - origin_us
        # Its last microsecond, as at its end the next span may have begun; a gradient may have left earlier.
        out_us = max(begin_us, min(begin_us + source.span.duration_us - 1, in_us))
        events.append({"ph": "s", **common, "pid": source.process, "tid": source.thread, "ts": out_us})
        # To the span around this time, not to the next one to begin.
        events.append({"ph": "f", "bp": "e", **common, "pid": target.process, "tid": target.thread, "ts": in_us})
    return events
