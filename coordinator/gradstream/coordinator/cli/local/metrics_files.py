"""Save the metrics of a local run to files, because its coordinator ends with the run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gradstream.coordinator.cli.views import terminal
from gradstream.core.extras import installed

if TYPE_CHECKING:
    from gradstream.client import AsyncClient, Event, Job, StepMetrics

METRICS_FILE, PICTURE_FILE = "metrics.csv", "loss.png"


async def save_metrics(client: AsyncClient, job: Job) -> None:
    """Write a job's metrics to its directory as CSV and, if matplotlib is installed, as a picture.

    A file that cannot be written is a warning: the job and its export are worth more.
    """
    from gradstream.client import Event

    rows = [row async for row in client.metrics(job.job_id)]
    history = client.watch(job.job_id, follow=False, kinds=["event"])
    events = [item async for item in history if isinstance(item, Event)]
    try:
        await asyncio.to_thread(_write, job, rows, events)
    except OSError as error:
        terminal.warn(f"the metrics of {job.job_id} were not written to {job.run_directory} ({error.strerror})")


def _write(job: Job, rows: Sequence[StepMetrics], events: Sequence[Event]) -> None:
    from gradstream.coordinator.cli.pictures.curves import draw
    from gradstream.coordinator.cli.pictures.series import XAxis, series_of
    from gradstream.coordinator.cli.views.metrics import csv_lines

    directory = Path(job.run_directory)
    (directory / METRICS_FILE).write_text("".join(csv_lines(rows)))
    if rows and "plot" in installed():
        found = [series_of(job, rows, events, XAxis.steps)]
        (directory / PICTURE_FILE).write_bytes(draw(found, XAxis.steps, "png"))
