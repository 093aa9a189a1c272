"""The picture of a pipeline: which worker computed which microbatch when."""

from __future__ import annotations

import io
from collections.abc import Sequence

from gradstream.coordinator.telemetry.pipeline_timeline import Pass, Run
from gradstream.core.telemetry.timeline import OPS, SpanKind

_COLOURS = {
    SpanKind.FORWARD: "#4c78a8",
    SpanKind.BACKWARD: "#59a14f",
    SpanKind.BACKWARD_INPUT: "#76b7b2",
    SpanKind.BACKWARD_WEIGHT: "#edc949",
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
_LABEL_POINTS = 7.0
# Of a digit in that font, and the room that a label needs at its sides.
_DIGIT_POINTS = 0.64 * _LABEL_POINTS
_MARGIN_POINTS = 2.0


def draw(runs: Sequence[Run], title: str) -> bytes:
    """A PNG of one version's runs, in order: a row for each worker, a box for each pass, white where the worker waits.

    A box that is wide enough names its microbatch, after "slot." where the run has several slots; the further down the
    model the lighter, where workers have several stages. Beside each row is its worker's share of waiting. Times are by
    each worker's own clock, from the first pass of all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    # --- rows: the workers of one replica below each other, in the order of the stages
    rows: dict[str, float] = {}
    replicas = list(dict.fromkeys(run.workers for run in runs))
    place = 0.0
    for workers in replicas:
        for worker in workers:
            if worker not in rows:
                rows[worker] = place
                place += 1
        place += _REPLICA_GAP
    height = place - _REPLICA_GAP
    stages = {
        worker: sorted({one.stage for run in runs if worker in run.workers for one in run.passes[_index(run, worker)]})
        for worker in rows
    }
    origin_us = min(run.begin_us for run in runs)

    # --- frame
    # Of thousands of rows there is no picture that could be drawn.
    figure = Figure(figsize=(14, 1.3 + min(0.42 * height, _MAX_HEIGHT_INCHES)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlim(0, (max(run.end_us for run in runs) - origin_us) / 1000)
    axes.set_ylim(height - 1 + 0.6, -0.6)
    # Names are not formulas, whatever dollar signs they have.
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    notes = ["ms since the first pass", "white: waiting"]
    notes += ["numbers: slot.microbatch"] if any(len(run.slots) > 1 for run in runs) else ["numbers: microbatch"]
    notes += ["lighter: the worker's later stages"] if any(len(found) > 1 for found in stages.values()) else []
    axes.set_xlabel("; ".join(notes), fontsize=9)
    axes.set_yticks(list(rows.values()))
    axes.set_yticklabels([f"{worker}  {_stages_text(stages[worker])}" for worker in rows], fontsize=9, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)

    # --- boxes
    for worker, row in rows.items():
        own = [(run, run.passes[_index(run, worker)]) for run in runs if worker in run.workers]
        for _, passes in own:
            boxes = [((one.begin_us - origin_us) / 1000, one.duration_us / 1000) for one in passes]
            colours = [_colour(one, stages[worker]) for one in passes]
            axes.broken_barh(
                boxes,
                (row - _BOX_HEIGHT / 2, _BOX_HEIGHT),
                facecolors=colours,
                edgecolors="white",
                linewidth=min(0.8, 60 / len(passes)),
            )
        worker_us = sum(run.end_us - run.begin_us for run, _ in own)
        busy_us = sum(one.duration_us for _, passes in own for one in passes)
        share = max(0.0, 1 - busy_us / worker_us) if worker_us else 0.0
        axes.annotate(
            f"{100 * share:.0f} %", (1.0, row), (6, 0), ("axes fraction", "data"), textcoords="offset points",
            va="center", fontsize=9, color="#666666",
        )  # fmt: skip
    axes.annotate("waits", (1.0, 1.0), (6, 6), "axes fraction", textcoords="offset points", fontsize=9, color="#666666")
    kinds = [kind for kind in OPS if any(one.kind is kind for run in runs for row in run.passes for one in row)]
    axes.legend(
        handles=[Patch(facecolor=_COLOURS[kind], label=_LEGEND[kind]) for kind in kinds], loc="lower right",
        bbox_to_anchor=(1.0, 1.0), borderaxespad=0, ncols=len(kinds), frameon=False, fontsize=9,
    )  # fmt: skip

    # --- labels, once it is known how wide the boxes are
    figure.draw_without_rendering()
    points_per_ms = axes.get_window_extent().width * 72 / figure.dpi / axes.get_xlim()[1]
    for run in runs:
        for worker, passes in zip(run.workers, run.passes, strict=True):
            for one in passes:
                text = f"{one.slot}.{one.microbatch}" if len(run.slots) > 1 else str(one.microbatch)
                if one.duration_us / 1000 * points_per_ms < len(text) * _DIGIT_POINTS + _MARGIN_POINTS:
                    continue
                axes.text(
                    (one.begin_us + one.duration_us / 2 - origin_us) / 1000, rows[worker], text, ha="center",
                    va="center_baseline", fontsize=_LABEL_POINTS,
                    color="white" if one.kind in _DARK and one.stage == stages[worker][0] else "#222222",
                )  # fmt: skip
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=140)
    return stream.getvalue()


def _index(run: Run, worker: str) -> int:
    return run.workers.index(worker)


def _stages_text(stages: Sequence[int]) -> str:
    return f"stage{'s' * (len(stages) != 1)} {', '.join(map(str, stages))}"


def _colour(one: Pass, stages: Sequence[int]) -> tuple[float, float, float]:
    """Of a kind: its own on the first of a worker's stages, and up to two thirds of the way to white on the last."""
    code = _COLOURS[one.kind]
    lighter = 0.65 * stages.index(one.stage) / max(1, len(stages) - 1)
    red, green, blue = (int(code[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return (red + (1 - red) * lighter, green + (1 - green) * lighter, blue + (1 - blue) * lighter)
