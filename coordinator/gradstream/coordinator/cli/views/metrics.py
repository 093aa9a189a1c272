"""Show a job's metrics: a table with a sparkline of the loss for people, CSV for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gradstream.coordinator.cli.views import terminal
from gradstream.coordinator.cli.views.step_times import seconds_text
from gradstream.coordinator.cli.views.steps import row_steps

if TYPE_CHECKING:
    from gradstream.client import StepMetrics

BARS = "▁▂▃▄▅▆▇█"
SPARKLINE_COLUMNS = 56
COLUMNS = (
    "step", "epoch", "time", "num_tokens", "loss", "validation_loss", "learning_rate", "grad_norm", "step_time_seconds",
    "pushed_bytes", "pulled_bytes", "skipped", "version", "num_steps", "slots",
)  # fmt: skip
"""Of the CSV: the keys of `StepMetrics.to_dict`, in order."""


def csv_lines(rows: Iterable[StepMetrics]) -> Iterator[str]:
    """Yield the rows as lines of CSV, after a header.

    Missing values are empty. A loss or norm that is not finite is `nan`, `inf` or `-inf`. Numbers have all digits.
    Slots are separated by blanks.
    """
    yield _csv_line(COLUMNS)
    for row in rows:
        document = row.to_dict()
        # `to_dict` has no NaN, because JSON has none.
        document |= {"loss": row.loss, "grad_norm": row.grad_norm, "validation_loss": row.validation_loss}
        document["skipped"] = str(row.skipped).lower()
        document["slots"] = " ".join(map(str, row.slots))
        yield _csv_line([document[column] for column in COLUMNS])


def _csv_line(values: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def bucket_means(values: Sequence[float], num_buckets: int) -> list[float]:
    """Compute the means of at most `num_buckets` runs of neighbours, whose lengths differ by at most one.

    Values that are not finite are left out.
    """
    finite = [value for value in values if math.isfinite(value)]
    num_buckets = min(num_buckets, len(finite))
    edges = [len(finite) * index // num_buckets for index in range(num_buckets + 1)] if num_buckets else []
    return [math.fsum(finite[begin:end]) / (end - begin) for begin, end in pairwise(edges)]


def sparkline(values: Sequence[float], num_columns: int = SPARKLINE_COLUMNS) -> str:
    """The values as a line of bars, at most `num_columns` long, scaled from the lowest to the highest mean."""
    means = bucket_means(values, num_columns)
    if not means:
        return ""
    least, span = min(means), max(means) - min(means)
    return "".join(BARS[round((mean - least) / span * (len(BARS) - 1)) if span else 0] for mean in means)


def metrics_table(rows: Collection[StepMetrics], num_slots: int = 0) -> Any:
    """The rows as a rich table of at most 80 columns. In a job with a quorum it says how many of the slots counted."""
    counted = [">SLOTS"] if any(row.slots for row in rows) else []
    return terminal.make_table(
        [">STEP", ">TOKENS", ">LOSS", ">VALIDATION", ">LR", ">NORM", ">TIME", ">UP", ">DOWN", *counted],
        [
            (
                row_steps(row),
                terminal.format_count(row.num_tokens),
                terminal.styled("skipped", "yellow") if row.skipped else terminal.format_loss(row.loss),
                terminal.format_loss(row.validation_loss),
                _number(row.learning_rate, "#.3g"),
                _number(row.grad_norm, "#.3g"),
                seconds_text(row.step_time.total_seconds()) if row.step_time is not None else "-",
                terminal.format_bytes(row.pushed_bytes) if row.pushed_bytes is not None else "-",
                terminal.format_bytes(row.pulled_bytes) if row.pulled_bytes is not None else "-",
                *([f"{len(row.slots)}/{num_slots}" if row.slots else "-"] if counted else []),
            )
            for row in rows
        ],
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}".removesuffix(".")
