"""The table of metrics keeps to Prometheus' conventions for names, and each metric is read somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gradstream.core.metrics import table
from gradstream.core.metrics.definition import ROLES, Metric
from gradstream.core.metrics.table import TABLE

ROOT = Path(__file__).parents[4]
NOT_BASE = ("milliseconds", "microseconds", "ms", "us", "minutes", "hours", "kib", "mib", "gib", "percent", "bits")
"""Units that a name must not have: base units are seconds, bytes, and ratios from 0 to 1."""


@pytest.mark.parametrize("metric", TABLE, ids=lambda metric: metric.name)
def test_a_name_says_what_it_counts(metric: Metric) -> None:
    words = metric.name.split("_")
    assert re.fullmatch(r"(gradstream|rpc)(_[a-z]+)+", metric.name)
    assert not set(words) & set(NOT_BASE)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.endswith("_info") == (metric.kind == "info")
    for unit in ("seconds", "bytes", "ratio"):
        # The unit is the last word, before the suffix of the type.
        assert unit not in words or words[-1 - (metric.kind == "counter")] == unit
    assert metric.help.endswith(".")
    assert set(metric.roles) <= set(ROLES)
    assert metric.roles


def test_names_are_unique() -> None:
    names = [metric.name for metric in TABLE]
    assert len(set(names)) == len(names) > 40
    # A counter's or an info's family is called without the suffix, so that name must be free as well.
    families = [name.removesuffix("_total").removesuffix("_info") for name in names]
    assert len(set(families)) == len(families)


def test_every_metric_is_read_somewhere() -> None:
    read = "\n".join(
        path.read_text("utf-8")
        for part in ("core", "coordinator", "services", "worker")
        for path in (ROOT / part).rglob("*.py")
        if path.name != "table.py"
    )
    constants = {name: value for name, value in vars(table).items() if isinstance(value, Metric)}
    assert set(constants.values()) == set(TABLE)
    assert [name for name in constants if not re.search(rf"\btable\.{name}\b", read)] == []
