"""Decisions in a fine-tuning's life, as pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum

from gradstream.core import job_states
from gradstream.core.recipe.early_stopping import best_version, stops_early
from gradstream.proto.v1 import jobs_pb2
from gradstream.services.fine_tuning.store import Record, State


class Phase(Enum):
    """What is to be done next for a fine-tuning."""

    PREPARE = "prepare its data"
    SUBMIT = "submit its job"
    FOLLOW = "follow its job"
    EVALUATE = "evaluate its result"
    NOTHING = "nothing"


def next_phase(record: Record) -> Phase:
    """What is to be done next, from the record alone: the same after a restart as before it."""
    if record.has_ended:
        return Phase.NOTHING
    if record.state == "evaluating":
        return Phase.EVALUATE
    if record.job_id:
        return Phase.FOLLOW
    return Phase.SUBMIT if record.job_recipe_json else Phase.PREPARE


def after_job(job: jobs_pb2.Job, version: int | None) -> tuple[State, str] | None:
    """State and reason that follow from the job's; None while it goes on."""
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
    """The version that is the result so far: the best that has a checkpoint; None when there is none.

    Of a job that ended early those count that it took to see so, however far the job had got by then.
    """
    found, _ = stops_early(losses, patience)
    return found if found in checkpoints else best_version(losses, checkpoints)
