"""`gradstream metrics`: the figures of each step of a job, from the ledger."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from gradstream.coordinator.cli.options import (
    CoordinatorOption,
    NamedJobArgument,
    RowsFormat,
    RowsOutputOption,
    open_client,
)
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.client import Job, StepMetrics

TABLE_ROWS = 15


def metrics(
    job_id: NamedJobArgument = None,
    every: Annotated[
        int,
        typer.Option("--every", min=1, metavar="N", help="Each N-th step, validated versions and the last step."),
    ] = 1,
    last: Annotated[
        int | None,
        typer.Option(
            "--last", min=1, metavar="N", help="The last N rows.", show_default=f"{TABLE_ROWS} in a table, else all"
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    output: RowsOutputOption = RowsFormat.table,
) -> None:
    """Show losses, tokens, learning rate, gradient norm, time and bytes of each step of a job or a fine-tuning.

    The table has the last rows, below a sparkline of the loss over all of them. With -o csv or json, all rows.
    """
    with open_client(coordinator) as client:
        job = client.job(job_id)
        rows: Iterable[StepMetrics] = client.metrics(job.job_id, every=every)
        if output is RowsFormat.table:
            _print_table(job, rows, last or TABLE_ROWS)
            return
        if last is not None:
            rows = deque(rows, maxlen=last)
        if output is RowsFormat.json:
            for row in rows:
                terminal.print_json_line(row.to_dict())
            return
        from gradstream.coordinator.cli.views.metrics import csv_lines

        sys.stdout.writelines(csv_lines(rows))


def _print_table(job: Job, rows: Iterable[StepMetrics], num_rows: int) -> None:
    from gradstream.coordinator.cli.views.metrics import metrics_table, sparkline
    from gradstream.coordinator.cli.views.progress import counted_tokens

    shown: deque[StepMetrics] = deque(maxlen=num_rows)
    losses: list[float] = []
    for row in rows:
        shown.append(row)
        if row.loss is not None:
            losses.append(row.loss)
    if not shown:
        terminal.say(f"job {job.job_id} is {job.state} and has no step yet")
        return
    console = terminal.console()
    tokens = f"{terminal.format_count(job.num_tokens)} {counted_tokens(job)}"
    console.print(f"{job.job_id} {job.state}, {tokens} in {job.step} steps")
    if losses and "utf" in (sys.stdout.encoding or "").lower():
        console.print(f"loss {terminal.format_loss(losses[0])} {sparkline(losses)} {terminal.format_loss(losses[-1])}")
    console.print()
    terminal.show(metrics_table(shown, (job.recipe.get("training") or {}).get("num_slots", 0)))
    terminal.hint(
        f"draw it: gradstream plot {job.job_id}", f"all rows: gradstream metrics {job.job_id} -o csv > metrics.csv"
    )
