"""`gradstream rm`: remove jobs that have ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gradstream.coordinator.cli.options import CoordinatorOption, OutputFormat, OutputOption, name_it, open_client
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.client import RemovedJob


def rm(
    jobs: Annotated[
        list[str] | None,
        typer.Argument(metavar="JOB", help="The ids of the jobs; they must be named.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go, and how many bytes.")] = False,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Remove jobs that have ended: record, history, ledger, checkpoints.

    Exports and other files in a job's directory stay. If one of the jobs may not be removed, none is.
    """
    with open_client(coordinator) as client:
        if not jobs:
            raise name_it("gradstream rm", "removes jobs", client.job().job_id)
        # First all of them without effect, so that one that must stay is known before another one is gone.
        found = [client.remove(job_id, dry_run=True) for job_id in dict.fromkeys(jobs)]
        if not dry_run:
            found = [client.remove(job.job_id) for job in found]
    if output is OutputFormat.json:
        terminal.print_json([{**job.to_dict(), "removed": not dry_run} for job in found])
        return
    for job in found:
        terminal.print_line(removed_text(job, dry_run))
    if dry_run:
        total = terminal.format_bytes(sum(job.num_bytes for job in found))
        terminal.hint(f"{total} in all; remove for good: gradstream rm {' '.join(job.job_id for job in found)}")


def removed_text(job: RemovedJob, dry_run: bool) -> str:
    """What a removal took away, on one line."""
    count = len(job.versions)
    went = f"{count} checkpoint{'s' * (count != 1)}, {terminal.format_bytes(job.num_bytes)}"
    left = f"; {', '.join(job.left)} in {job.run_directory} stay" if job.left else ""
    return f"{job.job_id} {'would be removed' if dry_run else 'removed'}: {went}{left}"
