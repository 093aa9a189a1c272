"""The limit of open files: raised at the start of a role, and named where it is too low for the peers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gradstream.core.machine.open_files import RESERVED_FILES, max_open_files, shortage


@pytest.mark.parametrize(("soft", "hard"), [(200, 400), (400, 400)])
def test_the_soft_limit_becomes_the_hard_one(soft: int, hard: int) -> None:
    program = (
        "import resource; from gradstream.core.machine.open_files import max_open_files, raise_limit; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); print(max_open_files(), raise_limit())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.split() == [str(soft), str(hard)]
    assert max_open_files() >= 0


def test_too_few_files_for_the_peers() -> None:
    assert not shortage(0, 10**6, "many")
    assert not shortage(1000 + RESERVED_FILES, 1000, "1000 workers")
    line = shortage(1024, 1000, "1000 workers")
    cause, _, cure = line.partition("; ")
    assert cause == "may have only 1024 files open at the same time, and 1000 workers connect to it"
    assert "hard limit" in cure
