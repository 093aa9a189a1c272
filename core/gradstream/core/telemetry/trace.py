"""Timelines in Chrome's trace format, for Perfetto and chrome://tracing."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from gradstream.core.telemetry.timeline import OPS, PASSES, Span, SpanKind, Timeline

_NUM_LANES = 1000


# The tracks of a worker from top to bottom. All passes share one track, because a worker computes one at a time.
_TRACKS: tuple[tuple[str, tuple[SpanKind, ...]], ...] = (
    (str(SpanKind.COMPUTE), (SpanKind.COMPUTE,)),
    ("passes", PASSES),
    *((str(kind), (kind,)) for kind in SpanKind if kind not in (SpanKind.COMPUTE, *PASSES)),
)


def version_name(version: int) -> str:
    """The name of a version in a trace."""
    return f"version {version}"


def chrome_trace(timelines: Sequence[Timeline], name_of: Callable[[int], str] = version_name) -> dict[str, Any]:
    """Timelines in Chrome's trace event format (JSON object form), which Perfetto and chrome://tracing open.

    Each worker is a process. Its threads show the versions, each kind of span, and all passes of a pipeline together.
    Events of one thread must nest: a kind whose spans overlap gets several threads ("send", "send 2", ...).
    A pass has the name that schedules use: "1F3" is the forward pass of microbatch 3 on stage 1. Arrows (flow events)
    lead from a pass to the pass of the next stage that uses its result. Timestamps are microseconds from the earliest
    span. `name_of` gives the name of a version's event.
    """
    origin_us = min((span.begin_us for timeline in timelines for span in timeline.spans), default=0)
    events: list[dict[str, Any]] = []
    passes: list[_Placed] = []
    workers = sorted({timeline.worker for timeline in timelines})
    for process, worker in enumerate(workers, start=1):
        own = [timeline for timeline in timelines if timeline.worker == worker and timeline.spans]
        own.sort(key=lambda timeline: min(span.begin_us for span in timeline.spans))
        events.append(_name("process", process, 0, worker))
        events += _version_events(process, own, origin_us, name_of)
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
    # After all spans: a flow event binds to the enclosing span among the events before it.
    events += _flow_events(passes, origin_us)
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"origin_unix_us": origin_us}}


def _lanes(spans: Sequence[Span]) -> list[int]:
    """The lowest free lane for each span. The spans must be sorted by their begin."""
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


def _version_events(
    process: int, timelines: Sequence[Timeline], origin_us: int, name_of: Callable[[int], str]
) -> list[dict[str, Any]]:
    """An event for each version, from its first span to the next version's first span, or to its own last end."""
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
                "name": name_of(timeline.version),
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
    """A pass, with the process and thread that show it in a trace."""

    process: int
    thread: int
    span: Span
    timeline: Timeline


def _flow_events(passes: Sequence[_Placed], origin_us: int) -> list[dict[str, Any]]:
    """Arrows from each forward pass to the next stage's, and from each backward pass to the previous stage's.

    Where a pass was recomputed after the loss of a worker, the last one counts.
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
        # The last microsecond of the source: at its end the next span may have begun. A gradient may have left earlier.
        out_us = max(begin_us, min(begin_us + source.span.duration_us - 1, in_us))
        events.append({"ph": "s", **common, "pid": source.process, "tid": source.thread, "ts": out_us})
        # Bind to the enclosing span ("bp": "e"), not to the next span that begins.
        events.append({"ph": "f", "bp": "e", **common, "pid": target.process, "tid": target.thread, "ts": in_us})
    return events
