"""`gradstream metrics`: the table, the sparkline, CSV and JSON of a job's steps."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from canned_jobs import CannedJobs, canned_metrics

from gradstream.client import StepMetrics
from gradstream.coordinator.cli.app import main
from gradstream.coordinator.cli.views.metrics import COLUMNS, bucket_means, csv_lines, sparkline


def test_buckets_have_the_means_of_neighbours() -> None:
    assert bucket_means([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]
    assert bucket_means([1.0, 3.0, 5.0], 2) == [1.0, 4.0]
    assert bucket_means([1.0, math.nan, 3.0, math.inf], 8) == [1.0, 3.0]
    assert bucket_means([math.nan], 8) == bucket_means([], 8) == []
    long = bucket_means([float(n) for n in range(100_000)], 56)
    assert len(long) == 56
    assert long == sorted(long)


def test_a_sparkline_goes_from_the_least_to_the_greatest() -> None:
    assert sparkline([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == "█▇▆▅▄▃▂▁"
    assert sparkline([5.0, 5.0, 5.0]) == "▁▁▁"
    assert sparkline([1.0, math.nan, 2.0]) == "▁█"
    assert sparkline([math.nan]) == ""
    assert len(sparkline([float(n % 7) for n in range(1000)], 20)) == 20


def test_csv_has_every_digit_and_blanks_for_what_is_not_known() -> None:
    rows = [StepMetrics.from_proto(message) for message in canned_metrics()]
    lines = list(csv_lines(rows))
    assert lines[0] == ",".join(COLUMNS) + "\n"
    assert set(COLUMNS) == set(rows[0].to_dict())
    first, second, third, last = csv.DictReader(io.StringIO("".join(lines)))
    assert (first["step"], first["time"], first["loss"]) == ("0", "2023-11-14T22:13:20.000+00:00", "8.0")
    assert (first["step_time_seconds"], first["pulled_bytes"], first["validation_loss"]) == ("", "", "")
    assert (second["loss"], second["skipped"], second["step_time_seconds"]) == ("nan", "true", "0.5")
    assert (third["learning_rate"], third["pushed_bytes"], third["skipped"]) == ("0.001", str(3 << 20), "false")
    assert {key for key, value in last.items() if value} == {
        "step",
        "version",
        "num_tokens",
        "validation_loss",
        "skipped",
    }


def test_the_table_has_the_last_rows_below_a_sparkline(
    jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.metrics = canned_metrics(30)
    assert main(["metrics", "-c", address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny-1 running, 12.0 k tokens in 12 steps"
    assert lines[1].startswith("loss 8.0000 █")
    assert lines[1].endswith("▁ -6.5000")
    assert lines[3].split() == ["STEP", "TOKENS", "LOSS", "VALIDATION", "LR", "NORM", "TIME", "UP", "DOWN"]
    assert [line.split()[0] for line in lines[4:]] == [str(step) for step in range(16, 31)]
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert main(["metrics", "tiny-1", "-c", address, "--every", "7", "--last", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[4:]] == ["29", "30"]
    assert jobs.requests[-1].every == 7


def test_a_skipped_step_says_so(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "-c", address]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[4:]]
    assert rows[0][:4] == ["0", "1.0", "k", "8.0000"]
    assert (rows[1][3], rows[1][7:9]) == ("skipped", ["500", "ms"])
    assert rows[3] == ["3", "3.0", "k", "-", "6.2500", "-", "-", "-", "-", "-"]


def test_a_norm_has_three_digits(jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.metrics = canned_metrics(4)
    for row, norm in zip(jobs.metrics, (132.4, 12.34, 0.5), strict=False):
        row.grad_norm = norm
    assert main(["metrics", "-c", address]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[4:]]
    assert (rows[0][6], rows[2][6]) == ("132", "0.500")


def test_programs_get_all_rows(jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.metrics = canned_metrics(1500)
    assert main(["metrics", "-c", address, "-o", "csv"]) == 0
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 1501
    assert main(["metrics", "-c", address, "-o", "json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["step"] for row in rows] == list(range(1501))
    assert (rows[1]["loss"], rows[1]["skipped"]) == (None, True)
    assert main(["metrics", "-c", address, "-o", "csv", "--last", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("1500,,,")


def test_a_job_without_a_step(jobs: CannedJobs, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.metrics = []
    assert main(["metrics", "-c", address]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "job tiny-1 is running and has no step yet\n")
    assert main(["metrics", "-c", address, "-o", "csv"]) == 0
    assert capsys.readouterr().out.splitlines() == [",".join(COLUMNS)]
    assert main(["metrics", "-c", address, "-o", "json"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["metrics", "nope", "-c", address]) == 2
    assert "no job 'nope'" in capsys.readouterr().err
