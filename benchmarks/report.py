"""How every benchmark reports: a table for people and, as the last line, one line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Result:
    """One figure. `value` is a ratio of two things measured in the same run; `target` is what it should reach."""

    name: str
    value: float
    target: float
    met: bool
    detail: str = ""


def result(name: str, value: float, target: float, detail: str = "") -> Result:
    """A figure that should be at least `target`."""
    return Result(name, round(value, 3), target, value >= target, detail)


def report(bench: str, results: list[Result]) -> None:
    """Print the table and the line of JSON."""
    table = Table(title=bench)
    for column in ("name", "value", "target", "met", "detail"):
        table.add_column(column, justify="right" if column in ("value", "target") else "left")
    for item in results:
        table.add_row(item.name, f"{item.value:.3f}", f"{item.target:g}", "yes" if item.met else "no", item.detail)
    Console().print(table)
    print(json.dumps({"bench": bench, "results": [asdict(item) for item in results]}))
