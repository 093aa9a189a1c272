"""`gradstream top`: nodes and job, live."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from gradstream.coordinator.cli.options import (
    CoordinatorOption,
    NewestJobArgument,
    OutputFormat,
    OutputOption,
    open_client,
)
from gradstream.coordinator.cli.views import terminal


def top(
    job_id: NewestJobArgument = None,
    interval: Annotated[float, typer.Option("--interval", "-n", min=0.1, help="Seconds between two looks.")] = 1.0,
    count: Annotated[int | None, typer.Option("--count", min=1, help="Look this many times, then end.")] = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Watch nodes and job live; Ctrl-C ends. With -o json, one object a line for each look."""
    from gradstream.core.errors import UnreachableError, one_line

    with open_client(coordinator) as client:
        # The first look fails like any other command; later the coordinator may go away and come back.
        client.nodes()
        live: Any = None
        looked = 0
        try:
            while True:
                try:
                    nodes, jobs = client.nodes(), client.jobs()
                    trouble = ""
                except UnreachableError as error:
                    nodes, jobs, trouble = [], [], one_line(error)
                job = next((job for job in jobs if job.job_id == job_id), None) if job_id else None
                if job is None and not job_id:
                    job = next((job for job in jobs if not job.state.ended), jobs[0] if jobs else None)
                if output is OutputFormat.json:
                    document = {
                        "job": job.to_dict() if job else None,
                        "nodes": [node.to_dict() for node in nodes],
                        "error": trouble or None,
                    }
                    terminal.print_json_line(document)
                else:
                    shown = view(client.address, nodes, job, trouble)
                    if sys.stdout.isatty():
                        if live is None:
                            from rich.live import Live

                            live = Live(shown, console=terminal.console(), screen=False, auto_refresh=False)
                            live.start()
                        live.update(shown, refresh=True)
                    else:
                        terminal.show(shown)
                looked += 1
                if count is not None and looked >= count:
                    return
                time.sleep(interval)
        except KeyboardInterrupt:
            return
        finally:
            if live is not None:
                live.stop()


def view(address: str, nodes: list[Any], job: Any, trouble: str) -> Any:
    """What is shown at one look: nodes, and the job with its decisions and slots; `trouble` in red."""
    from rich.console import Group
    from rich.text import Text

    from gradstream.coordinator.cli.views.jobs import job_view, nodes_table

    alive = sum(node.alive for node in nodes)
    parts: list[Any] = [Text(f"coordinator {address}: {alive} of {len(nodes)} nodes alive", style="bold")]
    if trouble:
        parts.append(Text(trouble, style="red"))
    if nodes:
        parts += [Text(), nodes_table(nodes, job)]
    if job is not None:
        parts += [Text(), job_view(job, nodes)]
    return Group(*parts)
