"""`gradstream dev` goes on with a job after Ctrl-C and after it was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from support.cluster import wait_until
from support.tiny import tiny_recipe

DEV = [sys.executable, "-m", "gradstream.coordinator.cli", "dev"]
CLUSTER = ["--servers", "1", "--workers", "1"]


@contextmanager
def dev(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `gradstream dev` that writes to a log; it does not outlive the block."""
    with log.open("wb") as file:
        process = subprocess.Popen([*DEV, *arguments, *CLUSTER], stdout=file, stderr=file, cwd=log.parent)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


def versions(run: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*/manifest.json"))


def interrupt(process: subprocess.Popen[bytes], log: Path, run: Path, number: signal.Signals) -> int:
    """Wait for a checkpoint that is newer than those that are there, send a signal, and return the exit status."""
    newest = max(versions(run), default=0)

    def is_newer() -> bool:
        assert process.poll() is None, log.read_text()
        return max(versions(run), default=0) > newest

    wait_until(is_newer, "a newer checkpoint", 120)
    process.send_signal(number)
    return process.wait(60)


@pytest.mark.timeout(300)
def test_dev_goes_on_with_its_job(tiny_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "my runs"
    recipe = tiny_recipe(
        tiny_data,
        root,
        training={"num_steps": 5000},
        validation={"interval_steps": 0},
        checkpoint={"interval_steps": 5},
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(json.loads(recipe.model_dump_json())))
    run, log = root / "tiny-1", tmp_path / "log"
    # 1. Killed: its state stays where it was.
    with dev(log, "tiny.yaml") as process:
        assert interrupt(process, log, run, signal.SIGKILL) == -signal.SIGKILL
    assert not (run / "state").exists()
    # 2. Ctrl-C: the job rests with a checkpoint, and the command to go on is named.
    with dev(log, "--resume", "tiny-1", "--run-root", str(root)) as process:
        assert interrupt(process, log, run, signal.SIGINT) == 130
    said = log.read_text()
    assert "tiny-1 goes on from version" in said
    assert f"go on with: gradstream dev --resume tiny-1 --run-root '{root}'" in said
    assert (run / "state" / "coordinator.sqlite").exists()
    assert not list(root.glob(".dev-*"))
    stopped = versions(run)[-1]
    assert f"tiny-1 stopped at step {stopped}" in said
    # 3. On to a number of steps of its own.
    with dev(log, "--resume", str(run), "--steps", str(stopped + 3)) as process:
        assert process.wait(120) == 0, log.read_text()
    said = log.read_text()
    assert f"goes on from version {stopped} to {stopped + 3} steps in all (5000 before)" in said
    assert (run / "export" / "model.safetensors").exists()
    assert versions(run)[-1] == stopped + 3
    assert re.search(r"a sample from the exported model", said)
    # 4. With nothing left to do it says so before it starts anything.
    again = subprocess.run([*DEV, "--resume", str(run)], capture_output=True, text=True, check=False, env=os.environ)
    assert again.returncode == 2
    assert f"has done all of its {stopped + 3} steps; give it more with --steps N" in again.stderr
