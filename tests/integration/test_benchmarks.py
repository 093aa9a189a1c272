"""Each benchmark runs in its smallest form, and fails when no case matches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = [
    "churn",
    "codecs",
    "fine_tuning",
    "generation",
    "local",
    "overlap",
    "parity",
    "pipeline",
    "scale",
    "server",
    "step",
    "transport",
]


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_every_benchmark_is_tried_here() -> None:
    """A benchmark is what reports; the others are sides of one."""
    reporting = [path.stem for path in (ROOT / "benchmarks").glob("*.py") if "    report(" in path.read_text()]
    assert sorted(reporting) == NAMES


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("churn", []),
        ("codecs", []),
        ("fine_tuning", []),  # with the cluster of bench-step
        ("generation", []),
        ("local", []),
        ("overlap", []),
        ("parity", []),
        ("pipeline", ["--no-gradstream"]),
        ("scale", ["--servers", "1"]),
        ("server", []),
        ("transport", []),
    ],
)
def test_it_runs(name: str, options: list[str]) -> None:
    """With the least of everything; the last line is the report."""
    done = run(name, "--smoke", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["bench"] == name
    assert report["results"]
    assert all(result["value"] == result["value"] for result in report["results"]), "a figure is no number"


@pytest.mark.parametrize("name", NAMES)
def test_one_that_matches_no_case_fails_with_one_line(name: str) -> None:
    done = run(name, "--only", "nonsense")
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: bench-{name}: no case begins with 'nonsense'; there are ")
