"""Show a job's progress on stderr: a bar on a terminal, else a plain line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gradstream.coordinator.cli.views import terminal
from gradstream.coordinator.cli.views.step_times import step_line, step_word
from gradstream.coordinator.cli.views.steps import rounds_of

if TYPE_CHECKING:
    from gradstream.client import Job

LINE_INTERVAL_SECONDS = 5.0


class ProgressView:
    """Shows each Job given to `update`. A context manager, which restores the terminal at its end."""

    def __init__(self, interactive: bool | None = None):
        self._interactive = sys.stderr.isatty() if interactive is None else interactive
        self._progress: Any = None
        self._live: Any = None
        self._task: Any = None
        self._last_line = 0.0
        self._last_text = ""

    def __enter__(self) -> ProgressView:
        if self._interactive:
            from rich.live import Live
            from rich.progress import BarColumn, Progress, TextColumn

            console = terminal.console(stderr=True)
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[place]}", markup=False),
                console=console,
            )
            self._task = self._progress.add_task("starting", total=None, place="")
            self._live = Live(self._progress, console=console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, job: Job) -> None:
        """Show the job's state."""
        place, facts, wait = "  ".join(progress_place(job)), "  ".join(progress_facts(job)), progress_wait(job)
        if self._live is not None:
            from rich.console import Group
            from rich.text import Text

            self._progress.update(
                self._task,
                description=f"{job.job_id} {job.state}",
                total=job.num_steps or None,
                completed=job.step,
                place=place,
            )
            # Two or three lines: a single one would be cut off on a terminal of 80 columns.
            found = job.step_breakdown
            where = f"a {step_word(found)} takes {step_line(found)}" if found is not None else ""
            lines = [Text(f"  {line}", no_wrap=True, overflow="ellipsis") for line in (facts, where, wait) if line]
            self._live.update(Group(self._progress, *lines))
            return
        text = "  ".join(filter(None, (f"{job.job_id} {job.state}", place, facts, wait)))
        now = time.monotonic()
        if text != self._last_text and (now - self._last_line >= LINE_INTERVAL_SECONDS or job.state.ended):
            self._last_line, self._last_text = now, text
            terminal.say(text)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
        else:
            terminal.say(text)


def progress_place(job: Job) -> list[str]:
    """The progress of a job: step, round if it has local steps, and ETA."""
    parts, rounds = [f"step {job.step}/{job.num_steps}"], rounds_of(job)
    if rounds.length:
        parts.append(f"round {rounds.rounds_at(job.version)}/{rounds.num_rounds}")
    if job.eta is not None and not job.state.ended:
        parts.append(f"ETA {terminal.format_duration(job.eta)}")
    return parts


def progress_facts(job: Job) -> list[str]:
    """Losses and rates."""
    parts = []
    if job.loss is not None:
        parts.append(f"loss {job.loss:.3f}")
    if job.validation_loss is not None:
        parts.append(f"validation {job.validation_loss:.3f}")
    if job.tokens_per_second and not job.state.ended:
        parts.append(f"{terminal.format_count(job.tokens_per_second)} {counted_tokens(job)}/s")
        parts.append(f"up {terminal.format_rate(job.push_bytes_per_second)}")
        parts.append(f"down {terminal.format_rate(job.pull_bytes_per_second)}")
    return parts


def counted_tokens(job: Job) -> str:
    """The name of the tokens that a job counts: a fine-tuning counts only targets."""
    return "target tokens" if is_fine_tuning(job) else "tokens"


def is_fine_tuning(job: Job) -> bool:
    """Whether a job is the training of a fine-tuning."""
    from gradstream.core.recipe.fine_tuning import with_new_key

    return bool(with_new_key(job.recipe).get("fine_tuning"))


def progress_wait(job: Job) -> str:
    """The wait to show while the job makes no progress."""
    if not job.waits or job.state.ended:
        return ""
    wait = job.waits[0]
    return f"waits for {wait.what} from {wait.whom} {terminal.format_since(wait.since)}".strip()
