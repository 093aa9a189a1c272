"""Draw the losses of jobs: each step in a light colour, a smoothed line, validation passes, the learning rate below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradstream.coordinator.cli.pictures import style
from gradstream.coordinator.cli.pictures.series import (
    MarkKind,
    Series,
    XAxis,
    envelope,
    half_width_of,
    smoothed,
    thinned,
)
from gradstream.coordinator.cli.views.progress import counted_tokens
from gradstream.coordinator.cli.views.terminal import format_count, format_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from gradstream.client import Job

_MARKERS = {MarkKind.RESUMED: "D", MarkKind.GONE: "v"}
_MARKER_SIGNS = {MarkKind.RESUMED: "◆", MarkKind.GONE: "▼"}
_MARK_COLOURS = {MarkKind.RESUMED: style.MUTED, MarkKind.GONE: style.RED}
_MARK_POINTS = {MarkKind.RESUMED: 3.0, MarkKind.GONE: 10.0}
"""Height of the marks above the losses in points. It differs by kind, because two marks may be at the same step."""


def draw(found: Sequence[Series], axis: XAxis, form: str) -> bytes:
    """Draw the losses of one or several jobs; `form` is one of style.FORMATS."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = style.new_figure(9, 5.6)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4.5, 1))
    alone = len(found) == 1
    jobs = [series.job for series in found]
    for number, series in enumerate(found):
        colour = style.SERIES[number % len(style.SERIES)]
        name = "training" if alone else _legend(series.job)
        losses.plot(*envelope(series.xs, series.losses), color=colour, alpha=style.RAW_ALPHA, linewidth=0.8)
        line = smoothed(series.losses, half_width_of(len(series.losses)))
        losses.plot(*thinned(series.xs, line), color=colour, linewidth=1.8, label=name)
        _draw_validations(losses, series, style.ORANGE if alone else colour, "validation" if alone else "")
        _draw_marks(figure, losses, rates, series, colour, alone)
        rates.plot(*thinned(series.rate_xs, series.rates), color=style.MUTED if alone else colour, linewidth=1.2)

    style.frame(losses)
    style.frame(rates)
    losses.set_ylabel("loss (nats a token)")
    rates.set_ylabel("learning rate")
    tokens = {counted_tokens(job) for job in jobs}
    rates.set_xlabel("step" if axis is XAxis.steps else " / ".join(sorted(tokens)))
    rates.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    rates.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    rates.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # After the first step of a warmup all rates may be 0.
    highest = max((rate for series in found for rate in series.rates if math.isfinite(rate)), default=0.0) or 1.0
    rates.set_yticks([0, highest])
    rates.set_ylim(0, 1.1 * highest)
    rates.margins(x=0.01)
    room = 7 + max((_MARK_POINTS[mark.kind] for series in found for mark in series.marks), default=0.0)
    style.title(losses, *heading(found), room)
    figure.align_ylabels((losses, rates))
    style.legend(losses, loc="upper right")
    return style.encoded(figure, form)


def heading(found: Sequence[Series]) -> tuple[str, str]:
    """The title and the line below it."""
    if len(found) > 1:
        kinds = [kind for kind in MarkKind if any(mark.kind is kind for series in found for mark in series.marks)]
        marks = [f"{_MARKER_SIGNS[kind]} {kind}" for kind in kinds]
        return f"Losses of {len(found)} jobs", "; ".join(
            ["light: each step", "line: smoothed", "dots: validation", *marks]
        )
    job = found[0].job
    parts = [job.job_id]
    if job.num_parameters:
        trained = " trained" if job.recipe.get("fine_tuning") else ""
        parts.append(f"{format_count(job.num_parameters)}{trained} parameters")
    parts.append(f"{format_count(job.num_tokens)} {counted_tokens(job)}")
    steps = f"{job.step} steps" if job.state == "finished" else f"{job.state} at step {job.step} of {job.num_steps}"
    notes = [steps]
    fine_tuning = job.recipe.get("fine_tuning")
    if fine_tuning:
        # A person may have named the base by a long path.
        base = (fine_tuning.get("base") or {}).get("title", "").rstrip("/").rpartition("/")[2]
        notes.insert(0, f"{'LoRA on' if fine_tuning.get('method') == 'lora' else 'fine-tuning of'} {base}")
    if job.validation_loss is not None and job.initial_validation_loss is not None:
        notes.append(f"validation {format_loss(job.initial_validation_loss)} → {format_loss(job.validation_loss)}")
    return ", ".join(parts), "; ".join(notes)


def format_tick(value: float) -> str:
    """Format a number on an axis, as 0, 500, 20 k or 1.5 M."""
    for least, factor, unit in ((1e9, 1e9, " G"), (1e6, 1e6, " M"), (1e4, 1e3, " k")):
        if abs(value) >= least:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def _legend(job: Job) -> str:
    size = f"{format_count(job.num_parameters)} parameters, " if job.num_parameters else ""
    end = f", validation {format_loss(job.validation_loss)}" if job.validation_loss is not None else ""
    return f"{job.job_id}: {size}{format_count(job.num_tokens)} {counted_tokens(job)}{end}"


def _draw_validations(axes: Axes, series: Series, colour: str, name: str) -> None:
    if not series.validations:
        return
    xs, values = zip(*series.validations, strict=True)
    dots: dict[str, Any] = {"marker": "o", "markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.8}
    axes.plot(xs, values, color=colour, linewidth=1, zorder=3, label=name or None, **dots)


def _draw_marks(figure: Figure, losses: Axes, rates: Axes, series: Series, colour: str, alone: bool) -> None:
    """Draw marks above the losses; if there is only one job, also a line down to the axis where it was resumed."""
    from matplotlib.transforms import offset_copy

    for kind in MarkKind:
        xs = [mark.x for mark in series.marks if mark.kind is kind]
        if not xs:
            continue
        if kind is MarkKind.RESUMED and alone:
            for axes in (losses, rates):
                for x in xs:
                    axes.axvline(x, color=style.MUTED, linewidth=0.8, linestyle=":", zorder=1)
        above = offset_copy(losses.get_xaxis_transform(), figure, y=_MARK_POINTS[kind], units="points")
        losses.plot(
            xs, [1.0] * len(xs), _MARKERS[kind], color=_MARK_COLOURS[kind] if alone else colour, markersize=5,
            clip_on=False, transform=above, zorder=4,
            label=f"{kind} ({len(xs)})" if alone else None,
        )  # fmt: skip
