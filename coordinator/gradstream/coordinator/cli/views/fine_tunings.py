"""Show fine-tunings, examples and comparisons to people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from gradstream.coordinator.cli.views import terminal
from gradstream.core.job_states import after_state

if TYPE_CHECKING:
    from gradstream.client import Evaluation, ExamplesPreview, ExamplesReport, FineTuning, Generation, RenderedExample
    from gradstream.coordinator.cli.views.progress import ProgressView
    from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe

SHOWN_FIELDS = 8
FEW_EXAMPLES = 20
"""Fewer examples than this cause a warning."""
TARGET_STYLE = "bold green"
# Marks for output without colours, which are very rare in texts.
TARGET_MARKS = ("⟦", "⟧")


@dataclass(frozen=True)
class Comparison:
    """The texts of base and result for one prompt. `expected` is None for a person's own prompt."""

    prompt: str
    expected: str | None
    base: str
    result: str

    def to_dict(self) -> dict[str, Any]:
        """The comparison as a dict for `json.dumps`."""
        return {"prompt": self.prompt, "expected": self.expected, "base": self.base, "result": self.result}


class FollowReporter:
    """Prints changes of a fine-tuning, and shows its job's progress."""

    def __init__(self, view: ProgressView):
        self._view = view
        self._said = ""

    def __call__(self, now: FineTuning) -> None:
        said = f"{now.name} {now.state}{after_state(now.state, now.reason)}"
        if said != self._said and now.state != "failed":
            self._said = said
            self._view.say(said)
        if now.job is not None:
            self._view.update(now.job)


def generation_line(generation: Generation) -> str:
    """What the service generates, in one line."""
    held, most = terminal.format_bytes(generation.cache_bytes), terminal.format_bytes(generation.max_cache_bytes)
    waiting = f"{generation.num_waiting} waiting"
    if generation.reason:
        waiting += f" ({generation.reason})"
    return f"generating: {generation.num_running} running, {waiting}; keys and values reserve {held} of {most}"


def fine_tunings_table(fine_tunings: Sequence[FineTuning]) -> Any:
    """All fine-tunings as a rich table."""
    return terminal.make_table(
        ["NAME", "STATE", "METHOD", "BASE?", ">STEP", ">BEFORE", ">AFTER", ">BEST?", "CREATED?", "REASON…"],
        [
            (
                each.name,
                terminal.state_text(state_of(each)),
                each.method,
                short_base(each.base),
                f"{each.job.step}/{each.job.num_steps}" if each.job is not None else "-",
                terminal.format_loss(_first_loss(each)),
                terminal.format_loss(_last_loss(each)),
                each.best_version if each.best_version is not None else "-",
                terminal.format_time(each.created),
                reason_of(each),
            )
            for each in fine_tunings
        ],
    )


def is_resting(each: FineTuning) -> bool:
    """Whether a fine-tuning's training does not progress: its job is queued, planning or paused."""
    return each.state == "training" and each.job is not None and each.job.state in ("queued", "planning", "paused")


def state_of(each: FineTuning) -> str:
    """A fine-tuning's state, or the state of its job while the training does not progress."""
    return each.job.state if each.job is not None and is_resting(each) else each.state


def reason_of(each: FineTuning) -> str:
    """Why a fine-tuning is in its state, and how to resume a resting one."""
    state = state_of(each)
    reason = each.job.reason if each.job is not None and is_resting(each) else each.reason
    cure = f"go on with: gradstream finetune resume {each.name}" if state in ("paused", "failed", "cancelled") else ""
    return "; ".join(filter(None, (reason, cure)))


def short_base(base: str) -> str:
    """A base, shortened for tables: a checkpoint as JOB@STEP, another directory by its name, job:ID unchanged."""
    path = PurePosixPath(base)
    if path.parent.name == "checkpoints" and path.name.startswith("step-"):
        return f"{path.parent.parent.name}@{path.name.removeprefix('step-').lstrip('0') or '0'}"
    return path.name if path.is_absolute() else base


def fine_tuning_view(each: FineTuning) -> Any:
    """A fine-tuning as rich text, one fact per line."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: Any) -> None:
        table.add_row(name, value if isinstance(value, Text) else Text(str(value)))

    row("fine-tuning", each.name)
    state = state_of(each)
    row("state", terminal.state_text(state) + Text(after_state(state, reason_of(each))))
    row("base", f"{each.base} (sha256 {each.base_sha256[:16]})" if each.base_sha256 else each.base)
    trained = f", {terminal.format_count(each.num_trained_parameters)} parameters trained"
    row("method", each.method + (trained if each.num_trained_parameters else ""))
    if each.examples is not None:
        row("examples", report_text(each.examples))
    if each.job is not None:
        job = each.job
        # The reason of a resting job is already shown above, as that of the fine-tuning.
        reason = after_state(job.state, job.reason if not is_resting(each) else "")
        row("job", terminal.styled(f"{job.job_id} ", None) + terminal.state_text(job.state) + Text(reason))
        eta = f", ETA {terminal.format_duration(job.eta)}" if not job.state.ended else ""
        row("step", f"{job.step} of {job.num_steps}{rates_text(each)}{eta}")
        row("training loss", f"{terminal.format_loss(job.loss)} nats a token")
        # A paused job waits for a person; the state already shows the command that resumes it.
        for wait in job.waits if job.state != "paused" else ():
            row(
                "waits for", Text(f"{wait.what}, from {wait.whom}, {terminal.format_since(wait.since)}", style="yellow")
            )
    if each.pushed_bytes_per_step:
        row("push", f"{terminal.format_bytes(each.pushed_bytes_per_step)} a step over all workers")
    row("before", evaluation_text(each.before, _first_loss(each)))
    row("after", evaluation_text(each.after, _last_loss(each)))
    if each.best_version is not None:
        row("best version", each.best_version)
    row("created", terminal.format_time(each.created))
    return table


def rates_text(each: FineTuning) -> str:
    """Tokens per second, of targets and of all tokens, after a comma; empty if they are not measured."""
    target = each.job.tokens_per_second if each.job is not None else 0.0
    if not target:
        return ""
    report = each.examples
    share = report.num_target_tokens / report.num_tokens if report is not None and report.num_tokens else 0.0
    every = f" ({terminal.format_count(target / share)} tokens/s in all)" if share else ""
    return f", {terminal.format_count(target)} target tokens/s{every}"


def chat_flag(each: FineTuning) -> str:
    """The flag with which `generate` renders a prompt as the examples were rendered."""
    return " --chat" if each.examples is not None and each.examples.format == "chat" else ""


def evaluation_text(evaluation: Evaluation | None, loss: float | None = None) -> str:
    """An evaluation on one line; without one, the loss if it is known."""
    if evaluation is None:
        return f"validation loss {loss:.4f} nats a token" if loss is not None else "not evaluated yet"
    prompts = f"{evaluation.num_exact} of {evaluation.num_prompts} different held-out prompts completed exactly"
    exact = f", {prompts}" if evaluation.num_prompts else ""
    return f"validation loss {evaluation.loss:.4f} nats a token, perplexity {evaluation.perplexity:.3f}{exact}"


def report_text(report: ExamplesReport) -> str:
    """The counts of used and unused rows, on one line."""
    left_out = [
        f"{count} {what}"
        for count, what in (
            (report.num_bad, "bad"),
            (report.num_too_long, "too long"),
            (report.num_truncated, "truncated"),
        )
        if count
    ]
    return (
        f"{report.num_rows} rows of {report.format or 'no format'}: {report.num_train} to train on, "
        f"{report.num_validation} held out{''.join(f', {text}' for text in left_out)}; "
        f"{terminal.format_count(report.num_target_tokens)} target tokens in {report.num_packed_rows} rows of tokens"
        f"{f'; {unused}' if (unused := unused_text(report)) else ''}"
    )


def unused_text(report: ExamplesReport) -> str:
    """The fields that no example uses, on one line; empty when there are none."""
    fields = sorted(report.unused_fields.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{name} ({count} rows)" for name, count in fields[:SHOWN_FIELDS])
    more = f" and {len(fields) - SHOWN_FIELDS} more" if len(fields) > SHOWN_FIELDS else ""
    return f"fields not used: {shown}{more}" if fields else ""


def example_text(example: RenderedExample, colours: bool) -> Any:
    """A rendered example with its targets in colour, or between marks in output without colours."""
    from rich.text import Text

    text = Text()
    for piece in example.pieces:
        if not piece.is_target:
            text.append(piece.text)
        elif colours:
            text.append(piece.text, style=TARGET_STYLE)
        else:
            text.append(piece.text.join(TARGET_MARKS))
    return text


def steps_text(asked: FineTuningRecipe, report: ExamplesReport) -> str:
    """The number of steps for these rows, on one line."""
    from gradstream.core.recipe.fine_tuning_recipe import FEW_STEPS, MORE_STEPS

    steps = asked.count_steps(report.num_packed_rows)
    few = f"; few: {MORE_STEPS}" if steps < FEW_STEPS else ""
    rounds = f" in rounds of {asked.local.steps}" if asked.local is not None else ""
    return f"{steps} steps of {asked.training.global_batch} rows{rounds}{few}"


def print_preview(preview: ExamplesPreview, asked: FineTuningRecipe) -> None:
    """Print rendered examples, the counts of used and unused rows, and the number of steps."""
    from rich.text import Text

    console = terminal.console()
    colours = console.is_terminal and console.color_system is not None
    how = "in green" if colours else f"between {TARGET_MARKS[0]} and {TARGET_MARKS[1]}"
    console.print(Text(f"what is trained on is {how}", style="dim"))
    for example in preview.examples:
        title = f"{example.origin}: {example.num_tokens} tokens, {example.num_targets} of them targets"
        console.print()
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(example_text(example, colours), soft_wrap=True)
    console.print()
    console.print(Text(report_text(preview.report)), soft_wrap=True)
    console.print(Text(steps_text(asked, preview.report)), soft_wrap=True)
    for line in preview.report.notes:
        console.print(Text(f"note: {line}"), soft_wrap=True)
    for line in preview.report.bad_rows:
        console.print(Text(f"bad: {line}", style="yellow"), soft_wrap=True)
    for line in preview_warnings(preview.report):
        terminal.warn(line)


def preview_warnings(report: ExamplesReport) -> list[str]:
    """Warnings on the data for a person before a fine-tuning begins."""
    warnings = []
    if report.num_train + report.num_validation < FEW_EXAMPLES:
        count = report.num_train + report.num_validation
        warnings.append(
            f"{count} examples are few: a model memorizes them and learns little else; add rows to data.path"
        )
    if not report.num_validation:
        warnings.append(
            "no example is held out, so the best version cannot be found; add rows to data.path, raise "
            "data.validation_fraction or name a data.validation_path"
        )
    return warnings


def held_out(found: FineTuning) -> list[Comparison]:
    """The texts of base and result for the held-out prompts; empty without prompts, as for text.

    Raises ConfigError when there is no result yet.
    """
    from gradstream.core.errors import ConfigError

    if found.before is None or found.after is None:
        ended = found.state in ("failed", "cancelled")
        cure = "go on with it: gradstream finetune resume" if ended else "wait for its end"
        raise ConfigError(f"{found.name} is {found.state} and has no result yet; {cure}, or compare with --prompt")
    base = {sample.prompt: sample.generated for sample in found.before.samples}
    samples = [sample for sample in found.after.samples if sample.prompt in base]
    return [Comparison(each.prompt, each.expected, base[each.prompt], each.generated) for each in samples]


def print_comparisons(each: FineTuning, comparisons: Iterable[Comparison]) -> None:
    """Print the texts of base and result side by side, prompt by prompt."""
    from rich.text import Text

    console = terminal.console()
    terminal.print_table(
        ["", ">LOSS", ">PERPLEXITY", ">EXACT"],
        [
            (
                name,
                f"{evaluation.loss:.4f}",
                f"{evaluation.perplexity:.3f}",
                f"{evaluation.num_exact} of {evaluation.num_prompts}" if evaluation.num_prompts else "-",
            )
            for name, evaluation in (("base", each.before), (each.name, each.after))
            if evaluation is not None
        ],
    )
    width = max(len("expected"), len("base"), len(each.name))
    for comparison in comparisons:
        console.print()
        console.print(Text(comparison.prompt, style="bold"), soft_wrap=True)
        said = [("base", comparison.base, "yellow"), (each.name, comparison.result, "green")]
        if comparison.expected is not None:
            said.insert(0, ("expected", comparison.expected, "cyan"))
        for name, text, style in said:
            # Drop blank lines: an undertrained model often writes many.
            lines = [line for line in text.splitlines() if line.strip()]
            indented = ("\n" + " " * (width + 2)).join(lines) if lines else "(blank)"
            console.print(Text.assemble((f"{name:<{width}}  ", style), indented), soft_wrap=True)


def _first_loss(each: FineTuning) -> float | None:
    if each.before is not None:
        return each.before.loss
    return each.job.initial_validation_loss if each.job is not None else None


def _last_loss(each: FineTuning) -> float | None:
    if each.after is not None:
        return each.after.loss
    # Until there is a second validation pass, the job's last pass is that of the base, whatever the number of steps.
    return each.job.validation_loss if each.job is not None and each.best_version is not None else None
