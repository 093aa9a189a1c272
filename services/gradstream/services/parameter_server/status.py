"""What a shard says of itself: its activity in heartbeats, and its state for GetServerStatus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradstream.core.plan.leases import slots_text
from gradstream.proto.v1 import coordinator_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb

if TYPE_CHECKING:
    from gradstream.services.parameter_server.shard import Shard


def missing_slots(shard: Shard) -> list[int]:
    """The slots of the step under way of which a contribution is still missing."""
    if not shard.loaded or shard.version >= shard.plan.last_version:
        return []
    return shard.accumulation.missing_slots()


def activity_of(shard: Shard) -> coordinator_pb2.Activity:
    """The shard's activity, for heartbeats."""
    plan, phase = shard.plan, shard.phase
    waiting_for = ""
    missing = missing_slots(shard) if phase.name == "accumulating" else []
    if missing:
        waiting_for = f"{slots_text(missing)} of step {shard.version}"
    elif phase.name == "committing":
        absent = shard.leader.missing if shard.leader is not None else [plan.leader]
        names = ", ".join(plan.servers[server].name for server in absent)
        waiting_for = f"the commit of step {shard.version} by {names}" if names else ""
    since = phase.since
    if (waiting := shard.checkpoints.waiting()) is not None:
        waiting_for, since = waiting
    finished = shard.version >= plan.last_version
    states = shard.bundles.values()
    return coordinator_pb2.Activity(
        job_id=plan.job_id,
        phase="idle" if finished else phase.name,
        step=max(0, shard.version),
        waiting_for=waiting_for,
        waiting_since_unix_ms=int(since * 1000) if waiting_for else 0,
        sent_bytes=shard.sent_bytes,
        received_bytes=shard.accumulation.received_bytes,
        missing_slots=missing,
        state_bytes=sum(state.state_bytes for state in states),
        newcomer_bytes=sum(state.newcomer_bytes for state in states),
        early_bytes=shard.accumulation.waiting_bytes,
        num_parameters=shard.num_parameters if shard.loaded else 0,
    )


def status_of(shard: Shard) -> pb.GetServerStatusResponse:
    """The shard's state, for GetServerStatus."""
    states = shard.bundles.values()
    return pb.GetServerStatusResponse(
        epoch=shard.plan.epoch,
        version=max(0, shard.version),
        num_fragments=sum(len(state.bundle.fragments) for state in shard.weights.values()),
        num_parameters=shard.num_parameters,
        state_bytes=sum(state.state_bytes for state in states),
        newcomer_bytes=sum(state.newcomer_bytes for state in states),
        early_bytes=shard.accumulation.waiting_bytes,
        missing_slots=missing_slots(shard),
        num_dropped=shard.accumulation.num_dropped,
    )
