"""Decisions about a fine-tuning's phases and state, as pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum

from gradstream.core import job_states
from gradstream.core.recipe.early_stopping import best_version, stops_early
from gradstream.proto.v1 import jobs_pb2
from gradstream.services.fine_tuning.store import Record, State


class Phase(Enum):
    """The next work on a fine-tuning."""

    PREPARE = "prepare its data"
    SUBMIT = "submit its job"
    FOLLOW = "follow its job"
    EVALUATE = "evaluate its result"
    NOTHING = "nothing"


def next_phase(record: Record) -> Phase:
    """Return the next phase. It follows from the record alone, so it is the same after a restart."""
    if record.has_ended:
        return Phase.NOTHING
    if record.state == "evaluating":
        return Phase.EVALUATE
    if record.job_id:
        return Phase.FOLLOW
    return Phase.SUBMIT if record.job_recipe_json else Phase.PREPARE


def after_job(job: jobs_pb2.Job, version: int | None) -> tuple[State, str] | None:
    """Return the state and reason that follow from the job's state; None while the job goes on."""
    if job.state not in job_states.ENDED:
        return None
    if job.state == job_states.FAILED:
        return "failed", f"job {job.job_id} failed: {job.reason}"
    if job.state == job_states.STOPPED:
        return "cancelled", f"job {job.job_id} {job.reason or 'was stopped'}"
    if version is None:
        return "failed", (
            "no version with a checkpoint has a finite validation loss; lower optimizer.learning_rate and create it "
            "under another name"
        )
    return "evaluating", f"version {version} is the best; its completions are compared"


def result_version(losses: Mapping[int, float], checkpoints: Collection[int], patience: int) -> int | None:
    """Return the version that is the result so far: the best one with a checkpoint, None if there is none.

    For a job that ends early, only the versions up to the one that caused its end are considered, even if the job had
    gone further by then.
    """
    found, _ = stops_early(losses, patience)
    return found if found in checkpoints else best_version(losses, checkpoints)
