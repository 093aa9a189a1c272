"""How every benchmark reports: a table for people and, as the last line, one line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Result:
    """One figure. `value` compares two things measured in the same run, mostly as a ratio; `target` is what it should
    reach, or with `at_most` not exceed, 0 where there is no target."""

    name: str
    value: float
    target: float
    met: bool
    detail: str = ""
    at_most: bool = False


def result(name: str, value: float, target: float, detail: str = "") -> Result:
    """A figure that should be at least `target`."""
    return Result(name, round(value, 3), target, value >= target, detail)


def at_most(name: str, value: float, target: float, detail: str = "") -> Result:
    """A figure that should be at most `target`, such as a difference that should be small."""
    return Result(name, round(value, 5), target, not target or value <= target, detail, at_most=True)


def report(bench: str, results: list[Result]) -> None:
    """Print the table and the line of JSON."""
    table = Table(title=bench)
    for column in ("name", "value", "target", "met", "detail"):
        table.add_column(column, justify="right" if column in ("value", "target") else "left", overflow="fold")
    for item in results:
        bound, value = (
            (f"≤ {item.target:g}", f"{item.value:+.4f}") if item.at_most else (f"{item.target:g}", f"{item.value:.3f}")
        )
        target, met = (bound, "yes" if item.met else "no") if item.target else ("-", "-")
        table.add_row(item.name, value, target, met, item.detail)
    Console().print(table)
    print(json.dumps({"bench": bench, "results": [asdict(item) for item in results]}))
