"""Views of a job with local steps: steps are inner steps, and a commit is called a round."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from canned_jobs import SUBMITTED_MS, CannedJobs, canned_job, canned_metrics, canned_node

from gradstream.client import Job, StepMetrics
from gradstream.coordinator.cli import main
from gradstream.coordinator.cli.pictures.series import XAxis, series_of
from gradstream.coordinator.cli.views import jobs as jobs_views
from gradstream.coordinator.cli.views.steps import progress_text, round_name
from gradstream.core.recipe.rounds import Rounds
from gradstream.core.telemetry.timeline import Span, SpanKind, Timeline
from gradstream.core.telemetry.trace import chrome_trace
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

RECIPE = {"name": "tiny", "local": {"steps": 30, "after": 10}}


def local_job(**changes: Any) -> jobs_pb2.Job:
    fields = {"version": 13, "step": 100, "num_steps": 2410, "recipe_json": json.dumps(RECIPE), "eta_seconds": 231.0}
    return canned_job(**{**fields, **changes})


def rows() -> list[jobs_pb2.StepMetrics]:
    """An ordinary step, two rounds, and the validation of the last version."""
    common = {"epoch": 1, "unix_ms": SUBMITTED_MS, "learning_rate": 0.1, "grad_norm": 1.0}
    return [
        jobs_pb2.StepMetrics(step=9, version=9, num_steps=1, num_tokens=100, loss=8.0, **common),
        jobs_pb2.StepMetrics(step=10, version=10, num_steps=30, num_tokens=3100, loss=7.0, **common),
        jobs_pb2.StepMetrics(step=40, version=11, num_steps=30, num_tokens=6100, loss=6.0, **common),
        jobs_pb2.StepMetrics(step=70, version=12, num_steps=0, num_tokens=6100, validation_loss=5.0),
    ]


def test_status_counts_steps_and_rounds(jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    parts = jobs_pb2.StepParts(compute_seconds=2.0)
    jobs.jobs = [local_job(step_breakdown=jobs_pb2.StepBreakdown(num_steps=3, mean=parts, round_steps=30))]
    detail = "inner step 7 of 30 of slot 2"
    activity = coordinator_pb2.Activity(job_id="tiny-1", phase="computing", step=13, detail=detail)
    jobs.nodes = [canned_node(activity=activity)]
    assert main(["status", "-c", address]) == 0
    out = capsys.readouterr().out
    assert "100 of 2410 (4 %), 3 of 80 rounds of 30 steps, epoch 2" in out
    assert "a round takes" in out
    assert detail in out
    assert main(["ls", "-c", address]) == 0
    assert " 100/2410 " in capsys.readouterr().out
    assert main(["top", "--count", "1", "-c", address]) == 0
    out = capsys.readouterr().out
    assert "step 100/2410  round 3/80" in out
    assert " 100 " in out
    assert detail in out


def test_a_coordinator_of_an_earlier_release_gives_versions() -> None:
    job = Job.from_proto(canned_job())
    assert (job.step, progress_text(job)) == (12, "12 of 100 (12 %)")
    row = StepMetrics.from_proto(jobs_pb2.StepMetrics(step=4, epoch=1))
    assert (row.version, row.num_steps) == (4, 1)
    row = StepMetrics.from_proto(jobs_pb2.StepMetrics(step=4))
    assert (row.version, row.num_steps) == (4, None)


def test_a_wait_is_judged_by_the_time_of_a_round() -> None:
    assert jobs_views.step_seconds(Job.from_proto(local_job())) == pytest.approx(3.0)
    assert jobs_views.step_seconds(Job.from_proto(local_job(version=4, step=4, eta_seconds=240.6))) == pytest.approx(
        0.1
    )
    assert jobs_views.step_seconds(Job.from_proto(local_job(version=90, step=2410, eta_seconds=0.0))) is None


def test_metrics_show_the_steps_of_each_row(jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.jobs, jobs.metrics = [local_job()], rows()
    assert main(["metrics", "-c", address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("in 100 steps")
    assert [line.split()[0] for line in lines[4:]] == ["9", "10-39", "40-69", "70"]
    assert all(len(line.rstrip()) <= 80 for line in lines)


def test_a_rounds_loss_lies_in_its_middle() -> None:
    found = series_of(Job.from_proto(local_job()), [StepMetrics.from_proto(row) for row in rows()], [], XAxis.steps)
    assert (found.xs, found.rate_xs, found.validations) == ([9, 24, 54], [9, 39, 69], [(70, 5.0)])
    assert found.num_steps == 61
    found = series_of(Job.from_proto(local_job()), [StepMetrics.from_proto(row) for row in rows()], [], XAxis.tokens)
    assert (found.xs, found.validations) == ([0, 1550, 4550], [(6100, 5.0)])
    plain = [StepMetrics.from_proto(row) for row in canned_metrics(30)]
    found = series_of(Job.from_proto(canned_job()), plain, [], XAxis.steps)
    assert found.xs == found.rate_xs == [row.step for row in plain[:-1]]


def test_checkpoints_have_their_step(jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.jobs = [local_job()]
    assert main(["ckpt", "now", "-c", address]) == 0
    assert "a checkpoint at the end of round 4; the job goes on" in capsys.readouterr().err


def test_a_trace_names_rounds() -> None:
    span = Span(kind=SpanKind.COMPUTE, begin_us=0, duration_us=5)
    timelines = [Timeline("worker-0", "a-1", 1, version, (span,), 0, 0) for version in (9, 10)]
    events = chrome_trace(timelines, partial(round_name, Rounds(100, 30, 10)))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "version"]
    assert names == ["version 9", "round 1, steps 10 to 39"]
