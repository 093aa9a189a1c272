"""The coordinator's readings for Prometheus: maps the controller's state to the metrics of the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields

from gradstream.coordinator.jobs.active import ActiveJob
from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.nodes.membership import SERVER, WORKER, NodeEntry
from gradstream.coordinator.telemetry.counts import JobCounts
from gradstream.coordinator.telemetry.step_times import Parts, mean
from gradstream.core.job_states import ENDED, STATE_WORDS
from gradstream.core.metrics import table
from gradstream.core.metrics.definition import Reading
from gradstream.core.rpc import access

KINDS = {SERVER: access.SERVER, WORKER: access.WORKER}


def readings(controller: Controller, num_queued: int) -> Iterator[Reading]:
    """Read everything now. `num_queued` is the number of jobs that wait for their turn."""
    yield Reading(table.QUEUE_ITEMS, num_queued, ("queued_jobs",))
    yield Reading(table.QUEUE_ITEMS, controller.nodes.num_directives, ("directives",))
    yield Reading(table.QUEUE_BYTES, controller.timelines.pending_bytes, ("timelines",))
    yield Reading(table.STATE_UNWRITABLE, controller.state.trouble is not None)
    for state in ENDED:
        yield Reading(table.JOBS_ENDED, controller.journal.num_ended[state], (STATE_WORDS[state],))
    for kind in ("servers_back", "rolled_back"):
        yield Reading(table.RECOVERIES, controller.num_recoveries[kind], (kind,))
    for job_id, counts in controller.counts.jobs.items():
        yield from _counts(job_id, counts)
    if controller.active is not None:
        yield from _job(controller.active, controller)
    yield from _nodes(controller)


def _counts(job_id: str, counts: JobCounts) -> Iterator[Reading]:
    own = (job_id,)
    yield Reading(table.JOB_STEPS, counts.steps, own)
    yield Reading(table.JOB_COMMITS, counts.commits, own)
    yield Reading(table.JOB_TOKENS, counts.tokens, own)
    yield Reading(table.JOB_SAMPLES, counts.samples, own)
    yield Reading(table.JOB_SKIPPED, counts.skipped, own)
    for (direction, codec), num_bytes in counts.payload_bytes.items():
        yield Reading(table.JOB_BYTES, num_bytes, (job_id, direction, codec))
    yield Reading(table.JOB_CHECKPOINTS, counts.checkpoints, own)
    yield Reading(table.JOB_CHECKPOINT_BYTES, counts.checkpoint_bytes, own)
    if counts.checkpoint_unix_ms:
        yield Reading(table.JOB_CHECKPOINT_TIME, counts.checkpoint_unix_ms / 1000, own)


def _job(active: ActiveJob, controller: Controller) -> Iterator[Reading]:
    own, totals = (active.job_id,), active.totals
    yield Reading(table.JOB, 1, (active.job_id, STATE_WORDS[active.state]))
    yield Reading(table.JOB_VERSION, active.version, own)
    yield Reading(table.JOB_STEP, active.rounds.steps_at(active.version), own)
    yield Reading(table.JOB_PLANNED_STEPS, active.rounds.num_steps, own)
    yield Reading(table.JOB_LEDGER_TOKENS, totals.num_tokens, own)
    yield Reading(table.JOB_SKIPS_IN_A_ROW, totals.consecutive_skips, own)
    if totals.last is not None:
        yield Reading(table.JOB_LOSS, totals.last.loss, own)
        yield Reading(table.JOB_GRADIENT_NORM, totals.last.grad_norm, own)
        yield Reading(table.JOB_LEARNING_RATE, totals.last.learning_rate, own)
    if active.validations:
        yield Reading(table.JOB_VALIDATION_LOSS, active.validations[max(active.validations)], own)
    yield Reading(table.JOB_IDLE, max(0.0, controller.clock() - active.progress_at), own)
    yield Reading(table.JOB_EPOCH, active.record.epoch, own)
    yield Reading(table.JOB_LEASE_TABLE, active.lease_number, own)
    num_held = sum(map(bool, active.holders))
    yield Reading(table.JOB_SLOTS, num_held, (active.job_id, "held"))
    yield Reading(table.JOB_SLOTS, len(active.holders) - num_held, (active.job_id, "free"))
    yield Reading(table.JOB_BENCHED, len(active.benches.current()), own)
    if active.checkpoints:
        yield Reading(table.JOB_CHECKPOINT_VERSION, max(active.checkpoints), own)
    yield Reading(table.JOB_UNWRITTEN, len(active.unwritten), own)
    yield from _times(active, controller)
    yield from _memory(active, controller)


def _times(active: ActiveJob, controller: Controller) -> Iterator[Reading]:
    timelines, own = controller.timelines, (active.job_id,)
    if (share := timelines.share(active.job_id)) is not None:
        yield Reading(table.JOB_HIDDEN, share, own)
    if (bubble := timelines.bubble(active.job_id)) is not None:
        yield Reading(table.JOB_BUBBLE, bubble.measured, own)
    steps = timelines.steps(active.job_id)
    if steps is not None and steps.measured.workers:
        parts = mean([worker.parts for worker in steps.measured.workers])
        for part in fields(Parts):
            yield Reading(table.JOB_PHASES, getattr(parts, part.name), (active.job_id, part.name))


def _memory(active: ActiveJob, controller: Controller) -> Iterator[Reading]:
    """The memory of the plan's servers that have loaded the job."""
    for index, server in enumerate(active.plan.servers if active.plan is not None else ()):
        node = controller.members.get(server.node_id)
        if node is None or node.activity.job_id != active.job_id or not node.activity.num_parameters:
            continue
        activity, predicted = node.activity, active.predicted_bytes[index]
        yield Reading(table.SERVER_PLANNED_PEAK, predicted.most, (server.name,))
        for part, num_bytes, planned in (
            ("state", activity.state_bytes - activity.newcomer_bytes, predicted.state),
            ("waiting", activity.early_bytes, predicted.early),
            ("newcomer", activity.newcomer_bytes, predicted.newcomer),
        ):
            yield Reading(table.SERVER_MEMORY, num_bytes, (server.name, part))
            yield Reading(table.SERVER_PLANNED, planned, (server.name, part))


def _nodes(controller: Controller) -> Iterator[Reading]:
    members, now = controller.members, controller.clock()
    nodes = members.all()
    refused = Counter(node.kind for node in members.refused())
    for kind, word in KINDS.items():
        num_live = sum(node.alive for node in nodes if node.kind == kind)
        num_gone = sum(not node.alive for node in nodes if node.kind == kind)
        for state, number in (("live", num_live), ("gone", num_gone), ("refused", refused[kind])):
            yield Reading(table.NODES, number, (word, state))
        yield Reading(table.NODES_LOST, controller.nodes.num_lost[kind], (word,))
    yield Reading(table.LEASE, controller.timing.lease_seconds)
    for node in nodes:
        if node.alive:
            yield from _node(node, now)


def _node(node: NodeEntry, now: float) -> Iterator[Reading]:
    own = (node.name, KINDS[node.kind])
    yield Reading(table.NODE_HEARTBEAT_AGE, max(0.0, now - node.last_heartbeat), own)
    yield Reading(table.NODE_MEMORY_LIMIT, node.memory_bytes, own)
    yield Reading(table.NODE_RESIDENT, node.activity.resident_bytes, own)
    yield Reading(table.NODE_UNREACHABLE, node.activity.unreachable_seconds, own)
    if node.vitals is None:
        return
    machine = node.vitals.machine
    yield Reading(table.NODE_MEMORY_FREE, machine.available_memory_bytes, own)
    if machine.HasField("free_disk_bytes"):
        yield Reading(table.NODE_DISK_FREE, machine.free_disk_bytes, own)
    if node.vitals.linked:
        yield Reading(table.NODE_CLOCK_AHEAD, node.vitals.clock_ahead_ms / 1000, own)
        yield Reading(table.NODE_ROUND_TRIP, node.vitals.round_trip_microseconds / 1e6, own)
