"""Ready files, in which a process tells its starter that it is up, and its address."""

from __future__ import annotations

import os
from pathlib import Path


def write_ready_file(path: Path, line: str) -> None:
    """Write a file with one line atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(line + "\n", encoding="utf-8")
    os.replace(temporary, path)
