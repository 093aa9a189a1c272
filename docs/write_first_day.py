"""Writes what commands print into docs/first-day.md: runs the day on a real cluster, as its test does.

.venv/bin/python docs/write_first_day.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.first_day import PAGE, at_work, walk
from support.person import refreshed


def main() -> None:
    """Run the day, then write the page."""
    with at_work() as (person, cluster):
        walk(person, cluster)
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8"), person.transcript), encoding="utf-8")


if __name__ == "__main__":
    main()
