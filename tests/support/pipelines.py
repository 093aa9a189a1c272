"""Simulated timelines of pipelines, in the form in which workers report them."""

from __future__ import annotations

from collections.abc import Sequence

from gradstream.core.pipeline.schedule import Op, Schedule
from gradstream.core.pipeline.simulation import Costs, simulate
from gradstream.core.telemetry.timeline import Span, SpanKind, Timeline
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

BEGIN_US = 1_700_000_000_000_000
STAGE_US = {Op.FORWARD: 2000, Op.BACKWARD: 4000, Op.BACKWARD_INPUT: 2000, Op.BACKWARD_WEIGHT: 2000}


def stage_costs(schedule: Schedule, slower: Sequence[int] = (), latency_us: int = 0) -> Costs:
    """Make costs in microseconds of stages that are equally long, or with stage s `slower[s]` times as long."""
    factors = [*slower, *[1] * (schedule.num_stages - len(slower))]
    return Costs([{op: us * factor for op, us in STAGE_US.items()} for factor in factors], latency_us)


def simulated_timelines(
    schedule: Schedule,
    costs: Costs,
    slots: Sequence[int] = (0,),
    version: int = 0,
    epoch: int = 1,
    begin_us: int = BEGIN_US,
    prefix: str = "worker",
) -> list[Timeline]:
    """Simulate a schedule over some slots, evenly; return a timeline for each worker. `costs` is in microseconds."""
    each = schedule.num_microbatches // len(slots)
    found = []
    for worker, (row, begins) in enumerate(zip(schedule.rows, simulate(schedule, costs).begins, strict=True)):
        spans = tuple(
            Span(
                SpanKind[action.op.name],
                begin_us + round(begin),
                round(costs.of(action)),
                slot=slots[action.microbatch // each],
                stage=action.stage,
                microbatch=action.microbatch % each,
            )
            for action, begin in zip(row, begins, strict=True)
        )
        found.append(Timeline(f"{prefix}-{worker}", "tiny-1", epoch, version, spans, 0, 0))
    return found


def timeline_message(timeline: Timeline) -> jobs_pb2.GetTimelineResponse:
    """Make the message of a timeline, in the form in which the coordinator keeps and sends it."""
    report = coordinator_pb2.ReportTimelineRequest(
        job_id=timeline.job_id,
        epoch=timeline.epoch,
        version=timeline.version,
        spans=[span.to_proto() for span in timeline.spans],
    )
    return jobs_pb2.GetTimelineResponse(worker=timeline.worker, timeline=report)
