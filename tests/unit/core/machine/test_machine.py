"""The identity of a machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gradstream.core.machine.facts import MAX_THREADS, arithmetic_threads, machine_id


def test_processes_of_one_machine_have_one_id(tmp_path: Path) -> None:
    program = "from gradstream.core.machine.facts import machine_id; print(machine_id())"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == machine_id()
    assert machine_id(tmp_path / "none") == ""


def test_servers_that_share_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert [arithmetic_threads(), arithmetic_threads(2), arithmetic_threads(4), arithmetic_threads(9)] == [6, 3, 1, 1]
    monkeypatch.setattr("os.cpu_count", lambda: 96)
    assert arithmetic_threads(3) == MAX_THREADS
