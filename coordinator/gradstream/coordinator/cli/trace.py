"""`gradstream trace`: a job's timeline as a file for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gradstream.coordinator.cli._options import CoordinatorOption, NewestJobArgument, open_client


def trace(
    job_id: NewestJobArgument = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write.", show_default="JOB-trace.json"),
    ] = None,
    coordinator: CoordinatorOption = None,
) -> None:
    """Write what a job's workers did over its last versions as a Chrome trace: compute, wait, send, receive and so on.

    Open it in https://ui.perfetto.dev or in chrome://tracing. Each worker is a process; overlapping transfers lie side
    by side.
    """
    from gradstream.core import files
    from gradstream.core.errors import ConfigError
    from gradstream.core.timeline import chrome_trace

    with open_client(coordinator) as client:
        timelines = client.timeline(job_id)
    path = output if output is not None else Path(f"{timelines[0].job_id}-trace.json")
    text = json.dumps(chrome_trace(timelines), allow_nan=False, separators=(",", ":"))
    try:
        files.write_atomic(str(path.expanduser().absolute()), lambda stream: stream.write(text.encode()))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another file with -o") from None
    num_versions = len({(timeline.epoch, timeline.version) for timeline in timelines})
    num_workers = len({timeline.worker for timeline in timelines})
    print(
        f"{path}: {num_versions} version{'s' * (num_versions != 1)} of {timelines[0].job_id} by {num_workers} "
        f"worker{'s' * (num_workers != 1)}; open it in https://ui.perfetto.dev or chrome://tracing"
    )
