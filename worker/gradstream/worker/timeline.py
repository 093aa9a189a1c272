"""Records a worker's timeline of the version that it works on, from all its threads.

The timeline is sent when the version is over and all of the next one has arrived. Recording must cost next to nothing:
a span is one tuple appended to a deque, which is atomic without a lock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from gradstream.core.telemetry.timeline import MAX_SPANS, Span, SpanKind, hidden, union
from gradstream.proto.v1 import coordinator_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb

clock_ns = time.perf_counter_ns
"""The monotonic clock of `begin_ns` and `end_ns`, in nanoseconds."""

WORK = (SpanKind.COMPUTE, SpanKind.VALIDATE, SpanKind.WAIT)
"""The kinds of spans of the compute thread: a few for each slot."""

RawSpan = tuple[SpanKind, int, int, int | None, int | None, int, int | None, int | None]
"""A recorded span: the fields of Span, but with begin and end in nanoseconds of `clock_ns`."""


class Timeline:
    """Records spans. `add` may be called from any thread, `computing` and `waiting` from the compute thread alone."""

    def __init__(self) -> None:
        self._spans: deque[RawSpan] = deque()
        # The monotonic clock's zero in Unix time. It is read once, so setting the clock makes no jump in a timeline.
        self._epoch_ns = time.time_ns() - clock_ns()
        self._computing: _Piece | None = None

    def add(
        self,
        kind: SpanKind,
        begin_ns: int,
        end_ns: int,
        slot: int | None = None,
        item: int | None = None,
        num_bytes: int = 0,
        stage: int | None = None,
        microbatch: int | None = None,
    ) -> None:
        """Record a span by its two times on `clock_ns`.

        After the first MAX_SPANS of a version only spans of WORK are kept. They count in `step_times` but are not
        reported.
        """
        num_spans = len(self._spans)
        if num_spans < MAX_SPANS or (kind in WORK and num_spans < 2 * MAX_SPANS):
            self._spans.append((kind, begin_ns, end_ns, slot, item, num_bytes, stage, microbatch))

    @contextmanager
    def span(
        self, kind: SpanKind, slot: int | None = None, item: int | None = None, num_bytes: int = 0
    ) -> Iterator[None]:
        """Record the body of the `with` statement as a span."""
        begin_ns = clock_ns()
        try:
            yield
        finally:
            self.add(kind, begin_ns, clock_ns(), slot, item, num_bytes)

    @contextmanager
    def computing(self, kind: SpanKind, slot: int) -> Iterator[None]:
        """Record a pass of the model as spans of `kind` (COMPUTE or VALIDATE), one for each piece between waits."""
        piece = self._computing = _Piece(kind, slot, clock_ns())
        try:
            yield
        finally:
            self._computing = None
            self.add(piece.kind, piece.begin_ns, clock_ns(), piece.slot)

    @contextmanager
    def waiting(self, bundle: int | None = None) -> Iterator[None]:
        """Record a WAIT, during which the compute thread does not compute.

        `bundle` is set where it waits for the acknowledgement of an earlier slot: the first bundle of that slot that is
        missing.
        """
        begin_ns = clock_ns()
        piece = self._computing
        if piece is not None:
            self.add(piece.kind, piece.begin_ns, begin_ns, piece.slot)
        try:
            yield
        finally:
            end_ns = clock_ns()
            self.add(SpanKind.WAIT, begin_ns, end_ns, None if piece is None else piece.slot, bundle)
            if piece is not None:
                piece.begin_ns = end_ns

    def take(self) -> list[RawSpan]:
        """Remove and return the spans recorded since the last `take`. Spans still under way come with the next one."""
        # Take the number that is there now: other threads go on adding.
        return [self._spans.popleft() for _ in range(len(self._spans))]

    def report(
        self,
        taken: list[RawSpan],
        job_id: str,
        epoch: int,
        version: int,
        node_id: str,
        period_ns: tuple[int, int] | None = None,
        server_of: Sequence[int] = (),
        has_spans: bool = True,
    ) -> coordinator_pb2.ReportTimelineRequest:
        """Make the report of taken spans. It costs a few milliseconds, so call it in a thread.

        `period_ns` is begin and end of the version on `clock_ns`; None if the worker was not at work all the time.
        `server_of` is the server of each bundle. Without `has_spans` the report has the times, but no spans.
        """
        spans = []
        for kind, begin_ns, end_ns, slot, item, num_bytes, stage, microbatch in taken[:MAX_SPANS]:
            # Both times are rounded the same way, so adjacent spans stay adjacent.
            begin_us, end_us = (self._epoch_ns + begin_ns) // 1000, (self._epoch_ns + end_ns) // 1000
            spans.append(Span(kind, begin_us, end_us - begin_us, slot, item, num_bytes, stage, microbatch))
        communication_us, hidden_us = hidden(spans)
        return coordinator_pb2.ReportTimelineRequest(
            job_id=job_id,
            epoch=epoch,
            version=version,
            node_id=node_id,
            spans=[span.to_proto() for span in spans] if has_spans else [],
            communication_us=communication_us,
            hidden_us=hidden_us,
            times=step_times(taken, *period_ns, server_of) if period_ns is not None else None,
        )


def step_times(
    taken: Sequence[RawSpan], begin_ns: int, end_ns: int, server_of: Sequence[int] = ()
) -> coordinator_pb2.StepTimes | None:
    """Divide the period of a version into the worker's activities.

    Returns None when the worker computed nothing, or ran a validation pass.
    """
    passes = [span for span in taken if span[0] is SpanKind.COMPUTE]
    if not passes or any(span[0] is SpanKind.VALIDATE for span in taken):
        return None
    compute_ns = sum(end - begin for begin, end in union([(begin, end) for _, begin, end, *_ in passes]))
    waits = [span for span in taken if span[0] is SpanKind.WAIT and span[3] is not None]
    weights_ns = sum(end - begin for _, begin, end, _, bundle, *_ in waits if bundle is None)
    acknowledged_ns = sum(end - begin for _, begin, end, _, bundle, *_ in waits if bundle is not None)
    computed_ns = max(end for _, _, end, *_ in passes)
    sent_ns = max((end for kind, _, end, *_ in taken if kind is SpanKind.SEND), default=computed_ns)
    sent_ns = min(max(sent_ns, computed_ns), end_ns)
    return coordinator_pb2.StepTimes(
        period_us=max(0, end_ns - begin_ns) // 1000,
        compute_us=compute_ns // 1000,
        weights_us=weights_ns // 1000,
        send_us=(max(0, sent_ns - computed_ns) + acknowledged_ns) // 1000,
        rest_us=max(0, end_ns - sent_ns) // 1000,
        push_bytes_per_second=_bytes_per_second(taken, SpanKind.SEND),
        pull_bytes_per_second=_bytes_per_second(taken, SpanKind.RECEIVE),
        num_slots=len({slot for kind, _, _, slot, *_ in taken if kind is SpanKind.ENCODE}),
        server_us=_server_us(taken, server_of),
    )


def _server_us(taken: Sequence[RawSpan], server_of: Sequence[int]) -> list[int]:
    """For each server, the microseconds during which at least one contribution to it was under way."""
    sends: list[list[tuple[int, int]]] = [[] for _ in range(max(server_of, default=-1) + 1)]
    for kind, begin, end, _, bundle, *_ in taken:
        if kind is SpanKind.SEND and bundle is not None and bundle < len(server_of):
            sends[server_of[bundle]].append((begin, end))
    return [sum(end - begin for begin, end in union(spans)) // 1000 for spans in sends]


def measure(taken: Sequence[RawSpan]) -> pb.LinkMeasurement | None:
    """Compute this worker's speed and its links' rates from a version's spans.

    Returns None when the worker computed, sent or received nothing.
    """
    compute_ns = sum(end - begin for kind, begin, end, *_ in taken if kind is SpanKind.COMPUTE)
    push, pull = _bytes_per_second(taken, SpanKind.SEND), _bytes_per_second(taken, SpanKind.RECEIVE)
    if not compute_ns or not push or not pull:
        return None
    return pb.LinkMeasurement(compute_seconds=compute_ns / 1e9, push_bytes_per_second=push, pull_bytes_per_second=pull)


def _bytes_per_second(taken: Sequence[RawSpan], kind: SpanKind) -> float:
    """Payload bytes of a kind of span, divided by the time during which at least one such span was under way."""
    spans = [span for span in taken if span[0] is kind]
    busy_ns = sum(end - begin for begin, end in union([(begin, end) for _, begin, end, *_ in spans]))
    return 1e9 * sum(span[5] for span in spans) / busy_ns if busy_ns else 0.0


@dataclass(slots=True)
class _Piece:
    """The piece of a pass that the compute thread is working on."""

    kind: SpanKind
    slot: int
    begin_ns: int
