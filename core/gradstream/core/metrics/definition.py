"""Definitions of metrics, and readings of their values. Knows no format: `exposition.py` writes the text.

Names follow Prometheus' conventions: the base unit is a suffix (`_seconds`, `_bytes`), ratios are 0 to 1, counters end
in `_total` and constants with labels in `_info`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gradstream.core.rpc.access import COORDINATOR, FINE_TUNING, SERVER, WORKER

Kind = Literal["counter", "gauge", "histogram", "info"]

ROLES = (COORDINATOR, SERVER, WORKER, FINE_TUNING)
NODES = (SERVER, WORKER)


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric of the table. `labels` maps each label to what its values are, for people."""

    name: str
    kind: Kind
    help: str
    roles: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)


class Distribution(NamedTuple):
    """The value of a histogram: for each bound, the number of values at most as large; then their number and sum."""

    bounds: tuple[float, ...]
    cumulative: tuple[int, ...]
    num_values: int
    total: float


class Reading(NamedTuple):
    """A metric's value at one moment. `labels` are the values of the metric's labels, in the order of the table."""

    metric: Metric
    value: float | Distribution
    labels: tuple[str, ...] = ()
