"""`gradstream plot`: the points, lines and marks of a job's picture, and the files."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from canned_jobs import SUBMITTED_MS, CannedJobs, canned_job, canned_metrics

from gradstream.client import Event, Job, StepMetrics
from gradstream.coordinator.cli.app import main
from gradstream.coordinator.cli.pictures.curves import draw, format_tick, heading
from gradstream.coordinator.cli.pictures.series import (
    Mark,
    MarkKind,
    Series,
    XAxis,
    envelope,
    half_width_of,
    series_of,
    smoothed,
    thinned,
)
from gradstream.coordinator.cli.pictures.style import format_of
from gradstream.core.errors import ConfigError
from gradstream.proto.v1 import jobs_pb2

BEGIN = datetime.fromtimestamp(SUBMITTED_MS / 1000, UTC)


def row(step: int, epoch: int = 1, **changes: Any) -> StepMetrics:
    fields: dict[str, Any] = {
        "step": step,
        "epoch": epoch,
        "time": BEGIN + timedelta(seconds=step),
        "num_tokens": 100 * (step + 1),
        "loss": 8.0 - step,
        "validation_loss": None,
        "learning_rate": 0.01,
        "grad_norm": 1.0,
        "step_time": None,
        "pushed_bytes": None,
        "pulled_bytes": None,
        "skipped": False,
        "version": step,
        "num_steps": 1,
    }
    return StepMetrics(**{**fields, **changes})


def event(seconds: float, kind: str, message: str) -> Event:
    return Event(cursor=1, time=BEGIN + timedelta(seconds=seconds), kind=kind, message=message)


def series(rows: list[StepMetrics], events: list[Event], axis: XAxis = XAxis.steps, **job: Any) -> Series:
    return series_of(Job.from_proto(canned_job(**job)), rows, events, axis)


# ---- Points ----------------------------------------------------------------------------------------------------------


def test_points_lie_where_their_version_is() -> None:
    last = row(3, validation_loss=4.0, loss=None, epoch=None, time=None, num_tokens=300, learning_rate=None)
    rows = [row(0, validation_loss=9.0), row(1), row(2), last]
    found = series(rows, [])
    assert (found.xs, found.losses, found.rates) == ([0, 1, 2], [8.0, 7.0, 6.0], [0.01] * 3)
    assert found.validations == [(0, 9.0), (3, 4.0)]
    # Of a version, the tokens that were trained on before it.
    by_tokens = series(rows, [], XAxis.tokens)
    assert (by_tokens.xs, by_tokens.validations) == ([0, 100, 200], [(0, 9.0), (300, 4.0)])


def test_smoothing_follows_a_steep_beginning_and_needs_no_value_after_the_end() -> None:
    assert smoothed([9.0, 5.0, 4.0, 3.0, 5.0], 1) == [9.0, 6.0, 4.0, 4.0, 4.0]
    assert smoothed([9.0, 5.0, 1.0], 5) == [9.0, 5.0, 5.0]
    assert smoothed([1.0, 2.0, 3.0], 0) == [1.0, 2.0, 3.0]
    assert smoothed([], 3) == []


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    assert smoothed([1.0, math.nan, 3.0], 1) == [1.0, 2.0, 3.0]
    assert math.isnan(smoothed([math.nan, 1.0], 0)[0])
    assert smoothed([4.0, math.inf, 2.0], 1)[1] == 3.0


def test_a_window_is_a_fiftieth_of_the_steps_and_none_of_a_few() -> None:
    assert [half_width_of(steps) for steps in (0, 9, 10, 40, 400, 100_000)] == [0, 0, 1, 2, 4, 1000]


def test_long_lines_are_thinned_and_keep_their_extremes() -> None:
    values = [math.sin(n / 50) for n in range(100_000)]
    values[12_345], values[54_321], values[7] = 50.0, -50.0, math.nan
    xs, kept = envelope(range(100_000), values)
    assert len(xs) <= 4001
    assert xs == sorted(xs)
    assert (max(kept), min(kept)) == (50.0, -50.0)
    assert envelope([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0])
    xs, kept = thinned(range(100_001), [*values, 7.0])
    assert len(xs) <= 4002
    assert (xs[0], xs[-1], kept[-1]) == (0, 100_000, 7.0)
    assert thinned([], []) == ([], [])


# ---- Marks -----------------------------------------------------------------------------------------------------------


def test_marks_are_new_epochs_orders_to_resume_and_nodes_that_went_away() -> None:
    rows = [row(0), row(1), row(2, epoch=2), row(3, epoch=2), row(4, epoch=2), row(5, epoch=2)]
    events = [
        event(1.5, "node", "parameter server s is gone: its stream ended"),
        event(1.6, "node", "parameter server s is lost: its machine refuses connections to it; the job goes back"),
        event(3.5, "state", "resumed by anna"),
        event(3.6, "state", "running: resumed"),
        event(4.5, "node", "worker w is here (cpu)"),
        event(4.6, "node", "worker w-1 is gone: its lease ran out"),
        event(9.0, "node", "worker w-2 is gone: the cluster ends"),  # after the last step
        event(4.6, "log", "worker w-3 is gone: this is no event of a node"),
    ]
    assert series(rows, events).marks == [
        Mark(MarkKind.GONE, 2),
        Mark(MarkKind.RESUMED, 2),
        Mark(MarkKind.RESUMED, 4),
        Mark(MarkKind.GONE, 5),
    ]
    assert [mark.x for mark in series(rows, events, XAxis.tokens).marks] == [200, 200, 400, 500]


# ---- The picture -----------------------------------------------------------------------------------------------------


def test_the_title_says_size_tokens_and_how_far_it_is() -> None:
    one = series([row(0)], [])
    assert heading([one]) == (
        "tiny-1, 10.0 M parameters, 12.0 k tokens",
        "running at step 12 of 100; validation 8.0000 → 4.5000",
    )
    fine_tuned = '{"fine_tuning": {"method": "lora", "base": {"title": "/models/llama-$x_1$"}}}'
    tuned = series([row(0)], [], recipe_json=fine_tuned, state=jobs_pb2.JOB_STATE_FINISHED)
    title, note = heading([tuned])
    assert title == "tiny-1, 10.0 M trained parameters, 12.0 k target tokens"
    assert note.startswith("LoRA on llama-$x_1$; 12 steps; validation ")
    marked = series([row(0), row(1, epoch=2)], [])
    assert heading([one, marked])[0] == "Losses of 2 jobs"
    assert heading([one, marked])[1].endswith("◆ resumed")
    assert draw([tuned], XAxis.steps, "svg").startswith(b"<?xml")


@pytest.mark.parametrize("changes", [{"loss": math.nan, "skipped": True}, {"learning_rate": 0.0}, {"loss": None}])
def test_a_job_of_one_step_can_be_drawn(changes: dict[str, Any]) -> None:
    assert draw([series([row(0, **changes)], [])], XAxis.tokens, "png").startswith(b"\x89PNG")


def test_ticks() -> None:
    assert [format_tick(value) for value in (0, 500, 2500, 20_000, 1.5e6, 2e9)] == [
        "0",
        "500",
        "2500",
        "20 k",
        "1.5 M",
        "2 G",
    ]


def test_a_file_says_its_format() -> None:
    assert [format_of(Path(name)) for name in ("a.png", "b.SVG", "c")] == ["png", "svg", "png"]
    with pytest.raises(ConfigError, match=r"a.jpg is no picture's name; let it end in .png or .svg"):
        format_of(Path("a.jpg"))


def test_plot_writes_one_picture_of_all_jobs(
    jobs: CannedJobs,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    jobs.metrics = canned_metrics(40)
    jobs.jobs = [canned_job(), canned_job("tiny-2")]
    assert main(["plot", "-c", address]) == 0
    assert capsys.readouterr().out == "tiny-1-loss.png: 40 steps of tiny-1\n"
    assert Path("tiny-1-loss.png").read_bytes().startswith(b"\x89PNG")
    assert [list(request.kinds) for request in jobs.requests if isinstance(request, jobs_pb2.WatchJobRequest)] == [
        ["event"]
    ]
    assert main(["plot", "tiny-1", "tiny-2", "-c", address, "--to", "both.svg", "--x", "tokens"]) == 0
    assert capsys.readouterr().out == "both.svg: 80 steps of tiny-1, tiny-2\n"
    assert main(["plot", "tiny-1", "tiny-2", "-c", address, "--to", "again.svg", "--x", "tokens"]) == 0
    assert Path("both.svg").read_bytes() == Path("again.svg").read_bytes(), "the same job, the same bytes"
    capsys.readouterr()
    # What cannot be done is said in one line, and leaves nothing behind.
    for arguments, rows, code, message in [
        (["--to", "x.jpg"], jobs.metrics, 2, "x.jpg is no picture's name"),
        (["--to", "nowhere/x.png"], jobs.metrics, 2, "nowhere/x.png cannot be written (No such file or directory)"),
        (["nope"], jobs.metrics, 2, "no job 'nope'"),
        ([], [], 3, "job tiny-1 is running and has no step yet"),
    ]:
        jobs.metrics = rows
        assert main(["plot", *arguments, "-c", address]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.svg", "both.svg", "tiny-1-loss.png"]
