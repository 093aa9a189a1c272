"""Decisions about a fine-tuning's phases and state."""

from __future__ import annotations

import math
from typing import Any

import pytest

from gradstream.proto.v1 import jobs_pb2
from gradstream.services.fine_tuning.lifecycle import Phase, after_job, next_phase, result_version
from gradstream.services.fine_tuning.store import Record


def record(**changes: Any) -> Record:
    return Record(name="task", created_unix_ms=1, recipe_json="{}").changed(**changes)


@pytest.mark.parametrize(
    ("changes", "phase"),
    [
        ({}, Phase.PREPARE),
        ({"job_recipe_json": "{}"}, Phase.SUBMIT),
        ({"job_recipe_json": "{}", "job_id": "task-1", "state": "training"}, Phase.FOLLOW),
        ({"job_recipe_json": "{}", "job_id": "task-1", "state": "evaluating"}, Phase.EVALUATE),
        ({"job_recipe_json": "{}", "job_id": "task-1", "state": "finished"}, Phase.NOTHING),
        ({"job_recipe_json": "{}", "state": "cancelled"}, Phase.NOTHING),
        ({"state": "failed"}, Phase.NOTHING),
    ],
)
def test_what_is_next_follows_from_the_record(changes: dict[str, Any], phase: Phase) -> None:
    assert next_phase(record(**changes)) is phase


@pytest.mark.parametrize(
    ("losses", "checkpoints", "best"),
    [
        ({0: 3.0}, [], None),
        # The base is no result.
        ({0: 1.0, 4: 2.0}, [0, 4], 4),
        ({0: 3.0, 4: 2.0, 8: 1.0}, [4, 8], 8),
        # Of equals the earlier.
        ({0: 3.0, 4: 2.0, 8: 2.0}, [8, 4], 4),
        # Only what there is a checkpoint of.
        ({0: 3.0, 4: 1.0, 8: 2.0}, [8], 8),
        ({0: 3.0, 4: math.nan, 8: 2.0}, [4, 8], 8),
        ({0: 3.0, 4: math.inf}, [4], None),
    ],
)
def test_result_version(losses: dict[int, float], checkpoints: list[int], best: int | None) -> None:
    assert result_version(losses, checkpoints, patience=0) == best


def test_what_came_after_the_early_end_does_not_count() -> None:
    losses = {0: 3.0, 4: 2.0, 8: 2.5, 12: 2.4, 16: 1.0}
    assert result_version(losses, [4, 8, 12, 16], patience=2) == 4
    assert result_version(losses, [4, 8, 12, 16], patience=3) == 16


def test_a_job_that_goes_on_changes_nothing() -> None:
    for state in ("QUEUED", "PLANNING", "RUNNING", "PAUSED"):
        assert after_job(jobs_pb2.Job(state=f"JOB_STATE_{state}"), 4) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "best", "then", "reason"),
    [
        ("FINISHED", 4, "evaluating", "version 4"),
        ("FINISHED", None, "failed", "lower optimizer.learning_rate"),
        ("FAILED", 4, "failed", "job task-1 failed: no memory"),
        ("STOPPED", 4, "cancelled", "no memory"),
    ],
)
def test_what_follows_from_the_jobs_end(state: str, best: int | None, then: str, reason: str) -> None:
    job = jobs_pb2.Job(job_id="task-1", state=f"JOB_STATE_{state}", reason="no memory")  # type: ignore[arg-type]
    outcome = after_job(job, best)
    assert outcome is not None
    assert outcome[0] == then
    assert reason in outcome[1]
