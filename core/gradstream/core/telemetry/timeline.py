"""Timelines: the spans of a worker's work, and how much of its communication overlapped compute.

Pure functions over spans. Times are Unix microseconds by the worker's own clock: times of one worker compare exactly,
times of several workers as exactly as their clocks agree. `coordinator/telemetry/pipeline_timeline` computes how long
the workers of a pipeline wait.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from gradstream.core.pipeline.schedule import Op
from gradstream.proto.v1 import coordinator_pb2

MAX_SPANS = 4096
"""Maximum number of spans of one version that a worker keeps and the coordinator accepts."""


class SpanKind(StrEnum):
    """Kinds of spans."""

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
"""The passes of a pipeline."""
OPS = {SpanKind[op.name]: op for op in Op}
"""The op of a schedule for each kind of pass."""


class Span(NamedTuple):
    """One piece of a worker's work, with its begin and duration.

    `item` is the number of the bundle that the work is about, if any. `num_bytes` counts payload bytes. `stage` and
    `microbatch` are set for the passes of a pipeline.
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

    `communication_us` is the time in microseconds during which the worker sent or received; during `hidden_us` of it
    the worker computed as well.
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
        """The timeline in a message. Spans of a kind that this version of gradstream does not know are left out."""
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
    """Measure the overlap of communication with compute; return (communication, hidden), both in microseconds.

    Communication is the time during which at least one SEND or RECEIVE span is under way. Hidden is the part of it
    during which a COMPUTE span is under way as well. Overlapping spans count once.
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
        # An interval of compute may reach into the next interval of communication: `at` does not move past it.
        for begin_other, end_other in right[at:]:
            if begin_other >= end:
                break
            both += min(end, end_other) - max(begin, begin_other)
    return sum(end - begin for begin, end in left), both


def union(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of intervals, as disjoint intervals in order."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged
