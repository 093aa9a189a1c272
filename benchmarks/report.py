"""The common parts of benchmarks: `--only`, `--smoke`, and a report (a table for people, then one line of JSON).

A benchmark that measures nothing fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

from rich.console import Console
from rich.table import Table

C = TypeVar("C")


def arguments_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Make a parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PREFIX", help="cases whose name begins with this")
    parser.add_argument("--smoke", action="store_true", help="a minimal run, only to check that it works")
    return parser


def chosen(bench: str, cases: Mapping[str, C], only: str) -> dict[str, C]:
    """Choose the cases, by name, whose name begins with `only`. Ends the process with exit code 1 if there is none."""
    found = {name: case for name, case in cases.items() if name.startswith(only)}
    if not found:
        fail(bench, f"no case begins with '{only}'; there are {', '.join(cases)}")
    return found


def fail(bench: str, reason: str) -> None:
    """End the process with one line on stderr and exit code 1."""
    print(f"error: bench-{bench}: {reason}", file=sys.stderr)
    raise SystemExit(1)


def named(cases: Iterable[C]) -> dict[str, C]:
    """Cases by their `name`."""
    return {str(getattr(case, "name")): case for case in cases}  # noqa: B009


@dataclass(frozen=True)
class Result:
    """One figure. `value` compares two measurements of the same run, usually as a ratio.

    `target` is the value to reach or, with `at_most`, not to exceed; 0 means no target.
    """

    name: str
    value: float
    target: float
    met: bool
    detail: str = ""
    at_most: bool = False


def result(name: str, value: float, target: float, detail: str = "") -> Result:
    """Make a figure that should be at least `target`."""
    return Result(name, round(value, 3), target, value >= target, detail)


def at_most(name: str, value: float, target: float, detail: str = "") -> Result:
    """Make a figure that should be at most `target`, such as a difference that should be small."""
    return Result(name, round(value, 5), target, not target or value <= target, detail, at_most=True)


def report(bench: str, results: list[Result]) -> None:
    """Print the table and the line of JSON. Ends the process with exit code 1 if there is no result."""
    if not results:
        fail(bench, "nothing was measured; leave fewer sides out")
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
