"""Ready files: how a process tells whoever started it that it is up, and where."""

from __future__ import annotations

import os
from pathlib import Path


def write_ready_file(path: Path, line: str) -> None:
    """Write one line so that a reader sees all of it or no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(line + "\n", encoding="utf-8")
    os.replace(temporary, path)
