"""What tells one machine from another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gradstream.core.machine import machine_id


def test_processes_of_one_machine_have_one_id(tmp_path: Path) -> None:
    program = "from gradstream.core.machine import machine_id; print(machine_id())"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == machine_id()
    assert machine_id(tmp_path / "none") == ""
