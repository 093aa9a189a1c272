"""The amount of memory: the machine's, or the container's if that is less. Tensors use huge pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gradstream.core.machine.memory import available_bytes


def test_a_limit_counts_where_it_is_less(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().total
    limit = tmp_path / "memory.max"
    assert available_bytes([tmp_path / "missing"]) == machine
    for text, wanted in (("max\n", machine), ("1073741824\n", 1 << 30), ("9223372036854771712\n", machine)):
        limit.write_text(text)
        assert available_bytes([tmp_path / "missing", limit]) == wanted


_TENSORS = """
import resource, sys
from gradstream.core.machine import memory

memory.use_huge_pages()
import torch

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.ones(1)
before = faults()
torch.ones(100 << 18)
print(faults() - before)
"""
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="this kernel gives no huge pages"
)
@pytest.mark.parametrize("setting", [None, "0"])
def test_tensors_are_of_huge_pages_unless_the_user_says_no(setting: str | None) -> None:
    environment = {**os.environ, **({} if setting is None else {"THP_MEM_ALLOC_ENABLE": setting})}
    answer = subprocess.run(
        [sys.executable, "-c", _TENSORS], capture_output=True, text=True, check=True, env=environment
    )
    small_pages = (100 << 20) // 4096
    if setting is None:
        assert int(answer.stdout) < small_pages // 4
    else:
        assert int(answer.stdout) >= small_pages
