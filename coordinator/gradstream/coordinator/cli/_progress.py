"""A job's progress while one waits: a bar on a terminal, else a plain line every few seconds. Always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gradstream.coordinator.cli import _output as out

if TYPE_CHECKING:
    from gradstream.client import Job

LINE_INTERVAL_SECONDS = 5.0


class ProgressView:
    """Shows each Job given to `update`. A context manager, so that the terminal is left in order."""

    def __init__(self, interactive: bool | None = None):
        self._interactive = sys.stderr.isatty() if interactive is None else interactive
        self._progress: Any = None
        self._task: Any = None
        self._last_line = 0.0
        self._last_text = ""

    def __enter__(self) -> ProgressView:
        if self._interactive:
            from rich.progress import BarColumn, Progress, TextColumn

            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[facts]}", markup=False),
                console=out.console(stderr=True),
                transient=False,
            )
            self._task = self._progress.add_task("starting", total=None, facts="")
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, job: Job) -> None:
        """Show the job's state."""
        facts = progress_facts(job)
        if self._progress is not None:
            self._progress.update(
                self._task,
                description=f"{job.job_id} {job.state}",
                total=job.num_steps or None,
                completed=job.version,
                facts=facts,
            )
            return
        text = f"{job.job_id} {job.state}  {facts}"
        now = time.monotonic()
        if text != self._last_text and (now - self._last_line >= LINE_INTERVAL_SECONDS or job.state.ended):
            self._last_line, self._last_text = now, text
            out.say(text)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False)
        else:
            out.say(text)


def progress_facts(job: Job) -> str:
    """Step, losses, rates and ETA on one line; while nothing moves, what the job waits for."""
    parts = [f"step {job.version}/{job.num_steps}"]
    if job.loss is not None:
        parts.append(f"loss {job.loss:.3f}")
    if job.validation_loss is not None:
        parts.append(f"validation {job.validation_loss:.3f}")
    if job.tokens_per_second:
        parts.append(f"{out.format_count(job.tokens_per_second)} tokens/s")
        parts.append(f"up {out.format_rate(job.push_bytes_per_second)}")
        parts.append(f"down {out.format_rate(job.pull_bytes_per_second)}")
    if job.eta is not None and not job.state.ended:
        parts.append(f"ETA {out.format_duration(job.eta)}")
    if job.waits and not job.state.ended:
        wait = job.waits[0]
        parts.append(f"waits for {wait.what} from {wait.whom} {out.format_since(wait.since)}".strip())
    return "  ".join(parts)
