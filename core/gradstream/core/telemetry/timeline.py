"""Timelines: what a worker did and when, how much of its communication compute hid, and Chrome's trace format.

Pure functions over spans. A span's kind says what happened (`SpanKind`). Times are Unix microseconds of the worker's
own clock: those of one worker compare exactly, those of several as well as their clocks agree. How long the workers of
a pipeline wait is in `coordinator/telemetry/pipeline_timeline`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from gradstream.core.pipeline.schedule import Op
from gradstream.proto.v1 import coordinator_pb2

MAX_SPANS = 4096
"""Most spans of one version that a worker keeps and the coordinator takes."""


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
