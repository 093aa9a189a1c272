"""`gradstream plot`: draw the losses of jobs as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradstream.coordinator.cli.options import CoordinatorOption, open_client, write_file
from gradstream.coordinator.cli.pictures.series import XAxis
from gradstream.coordinator.cli.views import terminal


def plot(
    job_ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="JOB",
            help="Ids of jobs or names of fine-tunings; the newest job when left out.",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="Where to write; .png or .svg.", show_default="JOB-loss.png"),
    ] = None,
    x: Annotated[XAxis, typer.Option("--x", help="The horizontal axis.")] = XAxis.steps,
    coordinator: CoordinatorOption = None,
) -> None:
    """Draw the losses of a job or a fine-tuning. Several jobs are compared in one picture.

    The picture has the loss of each step, a smoothed line, validation, the learning rate, and marks where the job was
    resumed or nodes went away.
    """
    from gradstream.client import Event
    from gradstream.coordinator.cli.pictures.curves import draw
    from gradstream.coordinator.cli.pictures.series import series_of
    from gradstream.coordinator.cli.pictures.style import format_of
    from gradstream.core.errors import DataError
    from gradstream.core.extras import require

    require("`gradstream plot`", "plot")
    form = format_of(to) if to is not None else "png"
    found = []
    with open_client(coordinator) as client:
        for job_id in job_ids or [""]:
            job = client.job(job_id)
            rows = list(client.metrics(job.job_id))
            if not rows:
                raise DataError(f"job {job.job_id} is {job.state} and has no step yet; draw it after its first step")
            history = client.watch(job.job_id, follow=False, kinds=["event"])
            found.append(series_of(job, rows, [item for item in history if isinstance(item, Event)], x))
    ids = [series.job.job_id for series in found]
    path = to if to is not None else Path(f"{'-'.join(ids)}-loss.png")
    write_file(path, draw(found, x, form), "--to")
    terminal.print_line(f"{path}: {sum(series.num_steps for series in found)} steps of {', '.join(ids)}")
