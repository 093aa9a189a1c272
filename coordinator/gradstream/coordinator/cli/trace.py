"""`gradstream trace`: a job's timeline as a file for Perfetto or chrome://tracing, and its pipeline as a picture."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradstream.coordinator.cli.options import CoordinatorOption, NewestJobArgument, open_client, write_file
from gradstream.coordinator.cli.views import terminal
from gradstream.coordinator.cli.views.step_times import print_step_table, step_line, step_word
from gradstream.coordinator.cli.views.steps import round_name, rounds_of

if TYPE_CHECKING:
    from gradstream.client import Pipeline, Timeline
    from gradstream.core.recipe.rounds import Rounds


def trace(
    job_id: NewestJobArgument = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="Where to write.", show_default="JOB-trace.json"),
    ] = None,
    gantt: Annotated[
        Path | None,
        typer.Option(
            "--gantt",
            metavar="FILE",
            help="Draw the last complete version of a job with a pipeline (.png or .svg), instead of the trace; with "
            "--to, both.",
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
) -> None:
    """Write the timelines of a job's workers as a Chrome trace: compute, wait, send, receive and so on.

    Open it in https://ui.perfetto.dev or in chrome://tracing. Each worker is a process. Overlapping transfers lie side
    by side, and arrows lead from stage to stage of a pipeline.
    """
    if gantt is not None:
        from gradstream.coordinator.cli.pictures.style import format_of
        from gradstream.core.extras import require

        require("`gradstream trace --gantt`", "plot")
        format_of(gantt)
    with open_client(coordinator) as client:
        timelines = client.timeline(job_id)
        job = client.job(timelines[0].job_id)
    if gantt is not None:
        _write_gantt(gantt, timelines, job.pipeline)
    if gantt is None or to is not None:
        _write_trace(to if to is not None else Path(f"{timelines[0].job_id}-trace.json"), timelines, rounds_of(job))
    if job.step_breakdown is not None:
        print()
        print_step_table(job.step_breakdown)
        terminal.print_line(f"a {step_word(job.step_breakdown)} takes {step_line(job.step_breakdown)}")
        terminal.print_line(job.step_breakdown.advice)


def _write_trace(path: Path, timelines: list[Timeline], rounds: Rounds) -> None:
    from gradstream.core.telemetry.trace import chrome_trace

    text = json.dumps(chrome_trace(timelines, partial(round_name, rounds)), allow_nan=False, separators=(",", ":"))
    write_file(path, text.encode(), "--to")
    num_versions = len({(timeline.epoch, timeline.version) for timeline in timelines})
    word = "round" if all(rounds.is_round(timeline.version) for timeline in timelines) else "version"
    num_workers = len({timeline.worker for timeline in timelines})
    terminal.print_line(
        f"{path}: {num_versions} {word}{'s' * (num_versions != 1)} of {timelines[0].job_id} by {num_workers} "
        f"worker{'s' * (num_workers != 1)}; open it in https://ui.perfetto.dev or chrome://tracing"
    )


def _write_gantt(path: Path, timelines: list[Timeline], pipeline: Pipeline | None) -> None:
    from gradstream.coordinator.cli.pictures import gantt as _gantt
    from gradstream.coordinator.cli.pictures.style import format_of
    from gradstream.coordinator.telemetry.pipeline_timeline import measure, newest, runs
    from gradstream.core.errors import ConfigError, DataError

    job_id = timelines[0].job_id
    if pipeline is None:
        raise ConfigError(f"job {job_id} has no pipeline to draw; leave out --gantt for a trace of it")
    found = newest(runs(timelines, pipeline.num_stages))
    bubble = measure(found)
    if bubble is None:
        raise DataError(f"job {job_id} has no version yet for which the passes of all stages are known")
    version = found[0].version
    shares = f"bubble {terminal.format_share(bubble.measured)} (ideal {terminal.format_share(bubble.ideal)})"
    title = f"{job_id}, version {version}: {pipeline.schedule}, {shares}"
    write_file(path, _gantt.draw(found, title, format_of(path)), "--gantt")
    num_workers = len({worker for run in found for worker in run.workers})
    terminal.print_line(
        f"{path}: version {version} of {job_id} by {num_workers} worker{'s' * (num_workers != 1)}, {shares}"
    )
