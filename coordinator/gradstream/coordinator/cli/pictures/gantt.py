"""Draw a pipeline's passes: which worker computed which microbatch when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradstream.coordinator.cli.pictures import style
from gradstream.coordinator.telemetry.pipeline_timeline import Pass, Run
from gradstream.core.telemetry.timeline import OPS, SpanKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {
    SpanKind.FORWARD: style.BLUE,
    SpanKind.BACKWARD: style.GREEN,
    SpanKind.BACKWARD_INPUT: style.TEAL,
    SpanKind.BACKWARD_WEIGHT: style.YELLOW,
}
_DARK = (SpanKind.FORWARD, SpanKind.BACKWARD)
_LEGEND = {
    SpanKind.FORWARD: "forward",
    SpanKind.BACKWARD: "backward",
    SpanKind.BACKWARD_INPUT: "backward, inputs",
    SpanKind.BACKWARD_WEIGHT: "backward, weights",
}
_BOX_HEIGHT = 0.84
_REPLICA_GAP = 0.5
_MAX_HEIGHT_INCHES = 200
_LABEL_POINTS = (7.0, 4.5)
"""The largest and the smallest font size of labels."""
# A digit's width as a share of the font size, and the space that a label needs at its sides.
_DIGIT_WIDTH = 0.64
_MARGIN_POINTS = 1.0
_LINE_POINTS = 2.0
"""A narrower box is drawn as a line without a label. The first stage has such boxes: it sends no input gradient."""
_WHY_BELOW = (
    "The ideal is that of GPipe and 1F1B with equally long stages and backward passes in one piece. Here a pass hands "
    "on its input's gradient before it ends: the bubble may lie below."
)


@dataclass(frozen=True)
class _Layout:
    """The layout of a picture: the row and the stages of each worker, the rows' height, the begin of the first pass."""

    rows: dict[str, float]
    stages: dict[str, list[int]]
    height: float
    origin_us: int

    @classmethod
    def of(cls, runs: Sequence[Run]) -> _Layout:
        """Lay out the workers of one replica below each other, in the order of the stages."""
        rows: dict[str, float] = {}
        place = 0.0
        for workers in dict.fromkeys(run.workers for run in runs):
            for worker in workers:
                if worker not in rows:
                    rows[worker] = place
                    place += 1
            place += _REPLICA_GAP
        stages = {
            worker: sorted(
                {one.stage for run in runs if worker in run.workers for one in run.passes[_index(run, worker)]}
            )
            for worker in rows
        }
        return cls(rows, stages, place - _REPLICA_GAP, min(run.begin_us for run in runs))

    def ms(self, at_us: float) -> float:
        """Convert a time to milliseconds on the axis."""
        return (at_us - self.origin_us) / 1000


def draw(runs: Sequence[Run], title: str, form: str = "png") -> bytes:
    """Draw one version's runs, in order: a row for each worker, a box for each pass, white while the worker waits.

    `form` is one of style.FORMATS. The label of a box is its microbatch, after "slot." if the run has several slots. If
    one box is too narrow, no box has a label. If workers have several stages, the boxes of later stages are lighter.
    Next to each row is its worker's share of waiting. Times are by each worker's own clock, from the first pass of all.
    """
    layout = _Layout.of(runs)
    # Limited: thousands of rows could not be drawn.
    figure = style.new_figure(14, 1.5 + min(0.42 * layout.height, _MAX_HEIGHT_INCHES))
    axes = figure.add_subplot()
    _draw_frame(axes, layout, runs)
    style.title(axes, title)
    for worker in layout.rows:
        _draw_row(axes, layout, runs, worker)
    _draw_legend(axes, runs)
    figure.draw_without_rendering()  # determines the width of the boxes
    _draw_labels(axes, layout, runs, axes.get_window_extent().width * 72 / figure.dpi / axes.get_xlim()[1])
    return style.encoded(figure, form)


def _draw_frame(axes: Axes, layout: _Layout, runs: Sequence[Run]) -> None:
    axes.set_xlim(0, layout.ms(max(run.end_us for run in runs)))
    axes.set_ylim(layout.height - 1 + 0.6, -0.6)
    style.frame(axes, grid="x")
    axes.spines["left"].set_visible(False)
    _describe(axes, layout)
    axes.set_yticks(list(layout.rows.values()))
    names = [f"{worker}  {_stages_text(layout.stages[worker])}" for worker in layout.rows]
    axes.set_yticklabels(names, parse_math=False)
    axes.tick_params(axis="y", length=0)


def _describe(axes: Axes, layout: _Layout, *numbers: str) -> None:
    """Explain the picture below the time axis. `numbers` explains the labels, if there are any."""
    notes = ["ms since the first pass", "white: waiting", *numbers]
    notes += ["lighter: the worker's later stages"] if any(len(found) > 1 for found in layout.stages.values()) else []
    axes.set_xlabel("; ".join(notes) + "\n" + _WHY_BELOW)


def _draw_row(axes: Axes, layout: _Layout, runs: Sequence[Run], worker: str) -> None:
    """Draw a worker's boxes, and next to them its share of waiting."""
    row = layout.rows[worker]
    own = [(run, run.passes[_index(run, worker)]) for run in runs if worker in run.workers]
    for _, passes in own:
        axes.broken_barh(
            [(layout.ms(one.begin_us), one.duration_us / 1000) for one in passes],
            (row - _BOX_HEIGHT / 2, _BOX_HEIGHT),
            facecolors=[_colour(one, layout.stages[worker]) for one in passes],
            edgecolors="white",
            linewidth=min(0.8, 60 / len(passes)),
        )
    worker_us = sum(run.end_us - run.begin_us for run, _ in own)
    busy_us = sum(one.duration_us for _, passes in own for one in passes)
    share = max(0.0, 1 - busy_us / worker_us) if worker_us else 0.0
    axes.annotate(
        f"{100 * share:.0f} %", (1.0, row), (6, 0), ("axes fraction", "data"), textcoords="offset points",
        va="center", fontsize=style.SMALL_POINTS, color=style.MUTED,
    )  # fmt: skip


def _draw_legend(axes: Axes, runs: Sequence[Run]) -> None:
    from matplotlib.patches import Patch

    axes.annotate(
        "waits", (1.0, 1.0), (6, 6), "axes fraction", textcoords="offset points", fontsize=style.SMALL_POINTS,
        color=style.MUTED,
    )  # fmt: skip
    kinds = [kind for kind in OPS if any(one.kind is kind for run in runs for row in run.passes for one in row)]
    style.legend(
        axes,
        handles=[Patch(facecolor=_COLOURS[kind], label=_LEGEND[kind]) for kind in kinds],
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        borderaxespad=0,
        ncols=len(kinds),
    )


def _draw_labels(axes: Axes, layout: _Layout, runs: Sequence[Run], points_per_ms: float) -> None:
    """Label each box with its microbatch, if all labels fit."""
    points = _label_points(runs, points_per_ms)
    if not points:
        return
    _describe(axes, layout, f"numbers: {'slot.' if any(len(run.slots) > 1 for run in runs) else ''}microbatch")
    for run in runs:
        for worker, passes in zip(run.workers, run.passes, strict=True):
            for one in passes:
                if one.duration_us / 1000 * points_per_ms < _LINE_POINTS:
                    continue
                axes.text(
                    layout.ms(one.begin_us + one.duration_us / 2), layout.rows[worker], _label(run, one), ha="center",
                    va="center_baseline", fontsize=points,
                    color="white" if one.kind in _DARK and one.stage == layout.stages[worker][0] else style.TEXT,
                )  # fmt: skip


def _label_points(runs: Sequence[Run], points_per_ms: float) -> float:
    """The font size at which every label fits its box; 0 if it would be too small."""
    largest, smallest = _LABEL_POINTS
    boxes = [
        (one.duration_us / 1000 * points_per_ms, len(_label(run, one)))
        for run in runs
        for passes in run.passes
        for one in passes
    ]
    fits = min(
        ((width - _MARGIN_POINTS) / (length * _DIGIT_WIDTH) for width, length in boxes if width >= _LINE_POINTS),
        default=0.0,
    )
    return min(largest, fits) if fits >= smallest else 0.0


def _label(run: Run, one: Pass) -> str:
    return f"{one.slot}.{one.microbatch}" if len(run.slots) > 1 else str(one.microbatch)


def _index(run: Run, worker: str) -> int:
    return run.workers.index(worker)


def _stages_text(stages: Sequence[int]) -> str:
    return f"stage{'s' * (len(stages) != 1)} {', '.join(map(str, stages))}"


def _colour(one: Pass, stages: Sequence[int]) -> tuple[float, float, float]:
    """The colour of a pass: its kind's colour on the worker's first stage, up to two thirds lighter on the last."""
    code = _COLOURS[one.kind]
    lighter = 0.65 * stages.index(one.stage) / max(1, len(stages) - 1)
    red, green, blue = (int(code[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return (red + (1 - red) * lighter, green + (1 - green) * lighter, blue + (1 - blue) * lighter)
