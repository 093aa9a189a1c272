"""Print output of commands: results on stdout as tables or JSON, all else on stderr. Format numbers for people."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from gradstream.core.shown import shown, shown_json

if TYPE_CHECKING:
    from rich.console import Console

STATE_STYLES = {
    "queued": "cyan",
    "planning": "cyan",
    "running": "green",
    "paused": "yellow",
    "finished": "bold green",
    "failed": "bold red",
    "stopped": "yellow",
    "preparing": "cyan",
    "training": "green",
    "evaluating": "green",
    "cancelled": "yellow",
}
LEVEL_STYLES = {"debug": "dim", "info": "green", "warning": "yellow", "error": "bold red", "critical": "bold red"}
PIPED_COLUMNS = 10_000
"""Width of lines if the output is not a terminal; wide enough that no text is cut."""
CUT_COLUMNS = 24
"""The smallest width to which a long text is cut; in still narrower tables columns are left out."""


def console(stderr: bool = False) -> Console:
    """Create a rich console that shows control characters instead of executing them.

    If the output is not a terminal, lines are as long as needed.
    """
    from rich.console import Console
    from rich.segment import Segment

    class Shown(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=shown(segment.text))

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPED_COLUMNS
    return Shown(stderr=stderr, width=width, highlight=False, soft_wrap=False)


def print_json(document: Any) -> None:
    """Print one JSON document on stdout."""
    print(shown_json(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)))


def print_json_line(document: Any) -> None:
    """Print one JSON document of a stream on stdout, and flush."""
    print(shown_json(json.dumps(document, ensure_ascii=False, allow_nan=False)), flush=True)


def print_line(text: str, flush: bool = False) -> None:
    """Print a line on stdout, with control characters shown."""
    print(shown(text), flush=flush)


def print_text(text: str, end: str = "\n") -> None:
    """Print text on stdout and flush: with control characters shown on a terminal, else unchanged."""
    print(shown(text) if sys.stdout.isatty() else text, end=end, flush=True)


def show(renderable: Any) -> None:
    """Print a table or view on stdout. If stdout is not a terminal, no text is cut and no line ends in spaces."""
    if sys.stdout.isatty():
        console().print(renderable)
        return
    wide = console()
    with wide.capture() as captured:
        wide.print(renderable)
    print("\n".join(line.rstrip(" ") for line in captured.get().rstrip("\n").split("\n")))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Print a table on stdout; see `make_table`."""
    show(make_table(columns, rows, title))


def make_table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None, width: int | None = None
) -> Any:
    """Create a rich table without frames. Cells are plain text or rich Text.

    A column whose name starts with '>' is right-aligned. If the table is wider than `width` columns (None: the
    terminal's), only a column whose name ends in '…' is cut, with an ellipsis. If that is not enough, columns whose
    name ends in '?' are left out.
    """
    from rich.table import Table
    from rich.text import Text

    # As Text: rich would take brackets in names and messages for markup.
    cells = [[cell if isinstance(cell, Text) else Text(shown(str(cell))) for cell in row] for row in rows]
    lengths = [
        max([len(_title(column)), *(row[index].cell_len for row in cells)]) for index, column in enumerate(columns)
    ]
    kept = fitting(columns, lengths, width if width is not None else console().width)
    cuts = any(column.endswith("…") for column in columns)
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", header_style="bold")
    for column in (columns[index] for index in kept):
        cut = column.endswith("…")
        table.add_column(
            Text(_title(column), no_wrap=cuts, overflow="ellipsis"),
            justify="right" if column.startswith(">") else "left",
            # rich narrows columns that may wrap; cells of a cut column do not wrap.
            no_wrap=cuts and not cut,
        )
        if cut:
            index = columns.index(column)
            for row in cells:
                row[index].no_wrap, row[index].overflow = True, "ellipsis"
    for row in cells:
        table.add_row(*(row[index] for index in kept))
    return table


def _title(column: str) -> str:
    return column.removeprefix(">").removesuffix("…").removesuffix("?")


def fitting(columns: Sequence[str], lengths: Sequence[int], width: int) -> list[int]:
    """Choose the columns that fit into `width`: all, or without the last ones whose name ends in '?'.

    `lengths` are the lengths of the columns' longest cells.
    """
    kept = list(range(len(columns)))
    least = [
        min(length, CUT_COLUMNS) if name.endswith("…") else length
        for name, length in zip(columns, lengths, strict=True)
    ]
    optional = [index for index in kept if columns[index].endswith("?")]
    while optional and sum(least[index] for index in kept) + 2 * (len(kept) - 1) > width:
        kept.remove(optional.pop())
    return kept


def styled(text: str, style: str | None) -> Any:
    """Text in a style."""
    from rich.text import Text

    return Text(shown(text), style=style or "")


def state_text(state: str) -> Any:
    """The state of a job or a fine-tuning in its colour."""
    return styled(state, STATE_STYLES.get(state))


def say(text: str) -> None:
    """Print a line of progress or news on stderr."""
    print(shown(text), file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    yellow, normal = ("\033[33m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "")
    print(f"{yellow}warning: {shown(text)}{normal}", file=sys.stderr, flush=True)


def hint(*commands: str) -> None:
    """Print possible next commands on stderr, dim, only on a terminal."""
    if not sys.stderr.isatty():
        return
    dim, normal = ("\033[2m", "\033[0m") if "NO_COLOR" not in os.environ else ("", "")
    for command in commands:
        print(f"{dim}{command}{normal}", file=sys.stderr)


class WorkingLine:
    """A line on stderr with the current activity, until it is replaced or cleared; only on a terminal."""

    def __init__(self, interactive: bool | None = None):
        self._interactive = sys.stderr.isatty() if interactive is None else interactive

    def __enter__(self) -> WorkingLine:
        return self

    def __exit__(self, *_: object) -> None:
        self("")

    def __call__(self, text: str) -> None:
        """Replace the line by `text`; "" clears the line."""
        if self._interactive:
            print(f"\r\033[K{shown(text)}", end="", file=sys.stderr, flush=True)


def format_bytes(count: float) -> str:
    """Format bytes, as 12.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_rate(bytes_per_second: float) -> str:
    """Format bytes per second, as 12.3 MiB/s."""
    return f"{format_bytes(bytes_per_second)}/s"


def format_bit_rate(bytes_per_second: float) -> str:
    """Format a link's speed in bits per second, as 94 Mb/s."""
    bits = 8 * bytes_per_second
    for unit in ("b/s", "kb/s", "Mb/s"):
        if bits < 999.5:
            return f"{bits:.3g} {unit}"
        bits /= 1000
    return f"{bits:.3g} Gb/s"


def format_count(count: float) -> str:
    """Format a count, as 12.3 M."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} T"


def format_share(share: float) -> str:
    """Format a share, as 42 %."""
    return f"{100 * share:.0f} %"


def format_duration(duration: timedelta | float | None) -> str:
    """Format a duration, as 42 s, 3 min 05 s or 2 h 07 min; - for None."""
    if duration is None:
        return "-"
    seconds = max(0, int(duration.total_seconds() if isinstance(duration, timedelta) else duration))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600:02d} h"


def format_loss(loss: float | None) -> str:
    """Format a loss, as 4.1234; - for None."""
    return "-" if loss is None else f"{loss:.4f}"


def format_time(time: datetime | None) -> str:
    """Format a time as local time, with the date if it is not today's."""
    if time is None:
        return "-"
    local = time.astimezone()
    return f"{local:%H:%M:%S}" if local.date() == datetime.now().date() else f"{local:%Y-%m-%d %H:%M:%S}"


def format_since(time: datetime | None) -> str:
    """Format the begin of a wait, as since 12:01:05 (42 s)."""
    if time is None:
        return ""
    return f"since {format_time(time)} ({format_duration(datetime.now(UTC) - time)})"
