"""The common style of all pictures: colours, frame, title and file format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstream.core.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED = "#4c78a8", "#f58518", "#59a14f", "#e45756"
TEAL, YELLOW, PURPLE, BROWN = "#76b7b2", "#edc949", "#b07aa1", "#9c755f"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL, BROWN, YELLOW)
"""The colours of series, in order; further series start with the first colour again."""
TEXT, MUTED, GRID = "#333333", "#666666", "#e4e4e4"
SMALL_POINTS, TITLE_POINTS = 9.0, 11.0
RAW_ALPHA = 0.28
"""Opacity of the single values below the smoothed line."""
DOTS_PER_INCH = 140
FORMATS = ("png", "svg")


def format_of(path: Path) -> str:
    """The format of a file by its suffix, PNG without a suffix. Raises ConfigError for any other suffix."""
    form = path.suffix.lower().removeprefix(".") or FORMATS[0]
    if form not in FORMATS:
        raise ConfigError(f"{path} is no picture's name; let it end in .png or .svg")
    return form


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """Create a figure without a window, with a layout in which parts do not overlap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def frame(axes: Axes, grid: str = "both") -> None:
    """Give axes the common frame: a light grid below everything, small text, no box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=SMALL_POINTS, color=MUTED, labelcolor=TEXT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=SMALL_POINTS, color=TEXT)


def title(axes: Axes, text: str, note: str = "", room_points: float = 6.0) -> None:
    """Add a title at the left, a line in small print below it, and `room_points` of space below both.

    Dollar signs in a name do not start a formula.
    """
    pad = room_points + (1.6 * SMALL_POINTS if note else 0.0)
    axes.set_title(text, loc="left", fontsize=TITLE_POINTS, color=TEXT, pad=pad, parse_math=False)
    if note:
        axes.annotate(
            note, (0, 1), (0, room_points), "axes fraction", textcoords="offset points", va="bottom",
            fontsize=SMALL_POINTS, color=MUTED, parse_math=False,
        )  # fmt: skip


def legend(axes: Axes, **place: Any) -> None:
    """Add a legend without a box, if a line has a label."""
    if "handles" in place or axes.get_legend_handles_labels()[0]:
        axes.legend(framealpha=0.8, edgecolor="none", fontsize=SMALL_POINTS, labelcolor=TEXT, **place)


def encoded(figure: Figure, form: str) -> bytes:
    """Encode the figure in one of FORMATS; equal figures give equal bytes."""
    import matplotlib

    stream = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if form == "svg" else {}
    with matplotlib.rc_context({"svg.hashsalt": "gradstream"}):
        figure.savefig(stream, format=form, dpi=DOTS_PER_INCH, metadata=metadata)
    return stream.getvalue()
