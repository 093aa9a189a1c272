"""How much memory there is: the machine's, or the container's where that is less."""

from __future__ import annotations

from pathlib import Path

import psutil

from gradstream.core.memory import available_bytes


def test_a_limit_counts_where_it_is_less(tmp_path: Path) -> None:
    machine = psutil.virtual_memory().total
    limit = tmp_path / "memory.max"
    assert available_bytes([tmp_path / "missing"]) == machine
    for text, wanted in (("max\n", machine), ("1073741824\n", 1 << 30), ("9223372036854771712\n", machine)):
        limit.write_text(text)
        assert available_bytes([tmp_path / "missing", limit]) == wanted
