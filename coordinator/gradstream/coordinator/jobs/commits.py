"""Reports of commits: their check against the recipe, and the slots that counted, for people. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from gradstream.coordinator.state.state import JobRecord
from gradstream.core.errors import ProtocolError
from gradstream.core.plan.leases import slots_text
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.recipe.rounds import Rounds
from gradstream.proto.v1 import coordinator_pb2

MAX_LATE = 8
"""Slots that a line names at most."""


def check_step(report: coordinator_pb2.ReportStepRequest, record: JobRecord, recipe: Recipe) -> int:
    """Check the leader's report of a commit; return its number of steps. Raises ProtocolError if it cannot be right."""
    training, rounds = recipe.training, recipe.rounds
    num_steps = len(rounds.steps_from(report.step)) if report.step < rounds.last_version else 0
    slots = list(report.slots) or list(range(training.num_slots))
    quorum = recipe.local.quorum if recipe.local is not None and rounds.is_round(report.step) else None
    fits = slots == sorted(set(slots)) and slots[-1] < training.num_slots
    if report.slots and (not fits or quorum is None or len(slots) < quorum):
        raise ProtocolError(
            f"step report {report.step} of job {report.job_id} counts {slots_text(report.slots)} of "
            f"{training.num_slots}, which the recipe does not allow"
        )
    max_samples = sum(rounds.num_slot_steps(report.step, slot) for slot in slots) * training.slot_batch
    if (
        not num_steps
        or report.num_samples > max_samples
        or report.num_tokens > max_samples * training.sequence_length
        or (report.epoch == record.epoch and report.step < record.start_version)
    ):
        raise ProtocolError(f"step report {report.step} of job {report.job_id} contradicts the recipe or the plan")
    return num_steps


def counted_line(
    report: coordinator_pb2.ReportStepRequest,
    before: coordinator_pb2.ReportStepRequest | None,
    num_slots: int,
    rounds: Rounds,
) -> str:
    """The event's line on the slots of a round with a quorum, if they are others than in the commit before; else ""."""
    slots = list(report.slots)
    everyone = list(range(num_slots))
    if not slots or slots == ((list(before.slots) if before is not None else []) or everyone):
        return ""
    return f"{rounds.commit_text(report.step)} was committed with {_counted(slots, num_slots)}"


def counted_text(reports: Sequence[coordinator_pb2.ReportStepRequest], num_slots: int, rounds: Rounds) -> str:
    """The slots that counted in the last rounds with a quorum, for `status`; "" before the first one."""
    counted = [report for report in reports if report.slots]
    if not counted:
        return ""
    line = f"slots: {rounds.commit_text(counted[-1].step)} has {_counted(list(counted[-1].slots), num_slots)}"
    times = {slot: sum(slot in report.slots for report in counted) for slot in range(num_slots)}
    late = [f"{slots_text([slot])} counted in {count}" for slot, count in times.items() if count < len(counted)]
    if not late:
        return f"{line}; so had the last {len(counted)}"
    return f"{line}; of the last {len(counted)}, {', '.join(late[:MAX_LATE])}{' …' if len(late) > MAX_LATE else ''}"


def _counted(slots: list[int], num_slots: int) -> str:
    lacking = [slot for slot in range(num_slots) if slot not in slots]
    if not lacking:
        return f"all {num_slots} slots"
    return f"{len(slots)} of {num_slots} slots, without {slots_text(lacking)}"
