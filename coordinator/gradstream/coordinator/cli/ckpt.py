"""`gradstream ckpt`: a job's checkpoints."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradstream.coordinator.cli.app import group
from gradstream.coordinator.cli.options import (
    CoordinatorOption,
    NewestJobArgument,
    OutputFormat,
    OutputOption,
    open_client,
)
from gradstream.coordinator.cli.views import terminal
from gradstream.coordinator.cli.views.steps import rounds_of
from gradstream.core.shown import shown

if TYPE_CHECKING:
    from gradstream.client import ExportProgress

app = group("Checkpoints: list, write and export.")


@app.command()
def ls(
    job_id: NewestJobArgument = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """List a job's checkpoints, oldest first."""
    with open_client(coordinator) as client:
        checkpoints = client.checkpoints(job_id)
    if output is OutputFormat.json:
        terminal.print_json(
            [{k: v for k, v in c.to_dict().items() if k not in ("type", "cursor")} for c in checkpoints]
        )
        return
    if not checkpoints:
        terminal.say("no checkpoints yet")
        return
    has_rounds = any(c.step != c.version for c in checkpoints)
    terminal.print_table(
        [">VERSION", *([">STEP"] if has_rounds else []), ">SIZE", "TIME", "STATE SHA256?", "PATH"],
        [
            (
                c.version,
                *([c.step] if has_rounds else []),
                terminal.format_bytes(c.num_bytes),
                terminal.format_time(c.time),
                c.state_sha256[:16],
                c.path,
            )
            for c in checkpoints
        ],
    )
    terminal.hint(f"export the last: gradstream ckpt export {job_id or ''} --to DIR".replace("  ", " "))


@app.command()
def now(
    job_id: NewestJobArgument = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Let a running job write a checkpoint at its next step or round. The job goes on meanwhile."""
    with open_client(coordinator) as client:
        job = client.job(job_id)
        if job.state == "running":
            terminal.say(
                f"{job.job_id}: a checkpoint at the end of {rounds_of(job).commit_text(job.version)}; the job goes on"
            )
        made = client.checkpoint(job.job_id)
    if output is OutputFormat.json:
        terminal.print_json({k: v for k, v in made.to_dict().items() if k not in ("type", "cursor")})
        return
    terminal.print_line(made.path)
    terminal.hint(f"version {made.version}, {terminal.format_bytes(made.num_bytes)}")


@app.command()
def export(
    job_id: NewestJobArgument = None,
    directory: Annotated[Path | None, typer.Argument(hidden=True)] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="New or empty directory.", show_default="needed")
    ] = None,
    version: Annotated[int | None, typer.Option("--version", min=0, help="Which one; the last by default.")] = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Write a checkpoint as a Hugging Face directory: config.json, model.safetensors, tokenizer."""
    from gradstream.core.errors import ConfigError

    # In earlier releases the directory was a second argument.
    to = to if to is not None else directory
    if to is None:
        raise ConfigError("name the directory to write with --to DIR")
    with open_client(coordinator) as client:
        path = client.export(job_id, to, version, ExportReporter())
    if output is OutputFormat.json:
        files = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
        terminal.print_json({"directory": str(path), "files": files})
    else:
        terminal.print_line(str(path))
    terminal.hint(f'try it: gradstream generate {path} --prompt "..."')


class ExportReporter:
    """Shows the progress of an export on a terminal, in a line that is rewritten; elsewhere nothing."""

    def __init__(self) -> None:
        self._last = 0.0
        self._interactive = sys.stderr.isatty()

    def __call__(self, progress: ExportProgress) -> None:
        """Show `progress`, at most ten times a second."""
        done = progress.received_bytes == progress.file_bytes
        if self._interactive and (done or time.monotonic() - self._last > 0.1):
            self._last = time.monotonic()
            whole = terminal.format_bytes(progress.file_bytes)
            sizes = whole if done else f"{terminal.format_bytes(progress.received_bytes)} of {whole}"
            print(f"\r\033[K{shown(progress.file)}: {sizes}", end="\n" if done else "", file=sys.stderr, flush=True)
