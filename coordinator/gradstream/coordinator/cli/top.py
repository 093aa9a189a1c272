"""`gradstream top`: watch job and nodes live."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstream.coordinator.cli.options import (
    CoordinatorOption,
    NamedJobArgument,
    OutputFormat,
    OutputOption,
    open_client,
)
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.client import Client
    from gradstream.coordinator.cli.views.top import Choices, Look


def top(
    job_id: NamedJobArgument = None,
    interval: Annotated[float, typer.Option("--interval", "-n", min=0.1, help="Seconds between two updates.")] = 1.0,
    count: Annotated[int | None, typer.Option("--count", min=1, help="Number of updates, then end.")] = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Watch job and nodes live; the last line names the keys. With -o json, one object per line for each update."""
    from gradstream.coordinator.cli.views.jobs import chosen_job
    from gradstream.coordinator.cli.views.top import Choices, view

    choices = Choices(job_id)
    with open_client(coordinator) as client:
        # The first update fails like any other command. Later the coordinator may go away and come back.
        client.nodes()
        if output is OutputFormat.table and sys.stdout.isatty():
            _live(client, choices, interval, count)
            return
        looked = 0
        try:
            while True:
                found = _look(client, job_id)
                if output is OutputFormat.json:
                    job = chosen_job(found.jobs, job_id)
                    document = {
                        "job": job.to_dict() if job else None,
                        "nodes": [node.to_dict() for node in found.nodes],
                        "error": found.trouble or None,
                    }
                    terminal.print_json_line(document)
                else:
                    terminal.show(view(found, choices, terminal.PIPED_COLUMNS, None))
                looked += 1
                if count is not None and looked >= count:
                    return
                time.sleep(interval)
        except KeyboardInterrupt:
            return


def _look(client: Client, job_id: str | None, before: Look | None = None) -> Look:
    """Ask the coordinator for jobs and nodes; if it does not answer, return `before` with the error as `trouble`."""
    from gradstream.coordinator.cli.views.jobs import newest_jobs
    from gradstream.coordinator.cli.views.top import Look
    from gradstream.core.errors import UnreachableError, one_line

    try:
        return Look(client.address, tuple(client.nodes()), tuple(newest_jobs(client, job_id)))
    except UnreachableError as error:
        return replace(before or Look(client.address), trouble=one_line(error))


def _live(client: Client, choices: Choices, interval: float, count: int | None) -> None:
    """Fill the terminal until a person quits or `count` updates are done. The last screen stays on the terminal."""
    from rich.live import Live

    from gradstream.coordinator.cli.views.top import view

    console = terminal.console()

    def shown() -> Any:
        return view(found, chosen, console.width, console.height)

    found, chosen = _look(client, choices.job_id), choices
    looked = 1
    try:
        with _keys() as next_key, Live(shown(), console=console, screen=True, auto_refresh=False) as live:
            due = time.monotonic() + interval
            while count is None or looked < count:
                key = next_key(due - time.monotonic())
                if key is None:
                    found, looked, due = _look(client, chosen.job_id, found), looked + 1, time.monotonic() + interval
                else:
                    after = chosen.after(key, found.jobs)
                    if after is None:
                        break
                    chosen = after
                live.update(shown(), refresh=True)
    except KeyboardInterrupt:
        pass
    terminal.show(view(found, chosen, console.width, console.height, keys=False))


@contextmanager
def _keys() -> Iterator[Any]:
    """Yield a function that waits up to a number of seconds for a key press and returns the key or None.

    If stdin is not a terminal, the function only waits.
    """
    if not sys.stdin.isatty():
        yield lambda seconds: time.sleep(max(0.0, seconds))
        return
    import termios
    import tty

    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)

    def next_key(seconds: float) -> str | None:
        ready, _, _ = select.select([stdin], [], [], max(0.0, seconds))
        # A closed terminal reads as end of file: quit.
        return (os.read(stdin, 1).decode(errors="replace") or "q") if ready else None

    try:
        tty.setcbreak(stdin)
        yield next_key
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)
