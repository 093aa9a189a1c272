"""`gradstream logs` and `gradstream events`: a job's history as streams."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from gradstream.coordinator.cli.options import (
    CoordinatorOption,
    NamedJobArgument,
    OutputFormat,
    OutputOption,
    open_client,
)
from gradstream.coordinator.cli.role_options import LogLevel
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.client import Client, Event, LogLine, WatchItem

    Parts = Sequence[tuple[str, str]]
    """The parts of a line after its time: texts with their styles."""
    Shown = tuple[Event | LogLine, Parts]

FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")]
TailOption = Annotated[
    int | None,
    typer.Option("--tail", "-n", min=1, metavar="N", help="Begin with the last N lines.", show_default="all"),
]
KindOption = Annotated[
    list[str] | None,
    typer.Option("--kind", metavar="KIND", help="Events of this kind, such as failure; may be repeated."),
]
SinceOption = Annotated[
    str | None,
    typer.Option(
        "--since",
        metavar="TIME",
        help="From this time on: 90s, 10m, 2h or 1d ago, or a time such as 2026-01-31T12:00.",
        show_default="the beginning",
    ),
]
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
HEARD_LINES = 1000
"""Number of last log lines among which nodes are looked for when none of a named node was found."""


def logs(
    job_id: NamedJobArgument = None,
    nodes: Annotated[
        list[str] | None, typer.Option("--node", metavar="NAME", help="Lines of this node; may be repeated.")
    ] = None,
    level: Annotated[LogLevel, typer.Option("--level", help="Lines of this level and above.")] = LogLevel.debug,
    since: SinceOption = None,
    tail: TailOption = None,
    follow: FollowOption = False,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show the log lines of a job's nodes. With -o json, one object a line."""
    from gradstream.client import LogLine

    def shown(item: WatchItem) -> Shown | None:
        if not isinstance(item, LogLine):
            return None
        style = terminal.LEVEL_STYLES.get(item.level, "")
        return item, ((f" {item.node:<14} ", ""), (f"{item.level:<7}", style), (f" {item.text}", ""))

    begin = parse_since(since)

    def watched(client: Client, job_id: str) -> Iterable[WatchItem]:
        return client.watch(
            job_id, follow=follow, kinds=["log"], nodes=nodes or (), level=level.value, since=begin, tail=tail
        )

    def none_found(client: Client, job_id: str) -> None:
        last = client.watch(job_id, follow=False, kinds=["log"], tail=HEARD_LINES)
        heard = {line.node for line in last if isinstance(line, LogLine)}
        if heard:
            terminal.say(f"no line matches; lines came from {', '.join(sorted(heard))}")

    _stream(coordinator, job_id, follow, output, watched, shown, none_found, "logs -f")


def events(
    job_id: NamedJobArgument = None,
    kinds: KindOption = None,
    nodes: Annotated[
        list[str] | None, typer.Option("--node", metavar="NAME", help="Events that name this node; may be repeated.")
    ] = None,
    since: SinceOption = None,
    tail: TailOption = None,
    follow: FollowOption = False,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show a job's history of events: states, plans, leases, nodes, checkpoints. With -o json, one object a line."""
    from gradstream.client import Checkpoint, Event

    # A written checkpoint is an item of its own, which people see as an event of this kind.
    with_checkpoints = output is not OutputFormat.json and (not kinds or "checkpoint" in kinds)
    wanted = ["event", "checkpoint"] if with_checkpoints else ["event"]

    def shown(item: WatchItem) -> Shown | None:
        if isinstance(item, Checkpoint) and with_checkpoints:
            at = f" (step {item.step})" if item.step != item.version else ""
            written = f"written version {item.version}{at}, {terminal.format_bytes(item.num_bytes)}"
            item = Event(item.cursor, item.time, "checkpoint", written)
        if not isinstance(item, Event):
            return None
        style = "red" if item.kind == "failure" else "yellow" if item.kind == "skip" else "cyan"
        return item, ((" ", ""), (f"{item.kind:<10}", style), (f" {item.message}", ""))

    begin = parse_since(since)

    def watched(client: Client, job_id: str) -> Iterable[WatchItem]:
        return client.watch(
            job_id, follow=follow, kinds=wanted, event_kinds=kinds or (), nodes=nodes or (), since=begin, tail=tail
        )

    def none_found(client: Client, job_id: str) -> None:
        if kinds or nodes or since:
            terminal.say("no event matches")

    _stream(coordinator, job_id, follow, output, watched, shown, none_found, "events -f")


def parse_since(text: str | None) -> datetime | None:
    """The time of a `--since`. Raises ConfigError."""
    from gradstream.core.errors import ConfigError

    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    try:
        if match:
            return datetime.now(UTC) - timedelta(**{UNITS[match[2]]: int(match[1])})
        return datetime.fromisoformat(text).astimezone()
    except (ValueError, OverflowError):
        raise ConfigError(
            f"--since {text[:100]} is no time; give 90s, 10m, 2h or 1d, or a time such as 2026-01-31T12:00"
        ) from None


def _stream(
    coordinator: str | None,
    job_id: str | None,
    follow: bool,
    output: OutputFormat,
    watched: Callable[[Client, str], Iterable[WatchItem]],
    shown: Callable[[WatchItem], Shown | None],
    none_found: Callable[[Client, str], None],
    command: str,
) -> None:
    """Show the watched items; Ctrl-C detaches from a stream that is followed."""
    printed = _printer(output)
    found = False
    with open_client(coordinator) as client:
        try:
            job_id = client.job(job_id).job_id
            for item in watched(client, job_id):
                line = shown(item)
                if line is not None:
                    found = True
                    printed(*line)
            if not found:
                none_found(client, job_id)
        except KeyboardInterrupt:
            if not follow:
                raise
            terminal.say(f"\ndetached; {job_id} goes on. Look again with: gradstream {command} {job_id}")


def _printer(output: OutputFormat) -> Callable[[Event | LogLine, Parts], None]:
    """A function that prints an item: one object of JSON, or its time and its parts, in colour on a terminal."""
    if output is OutputFormat.json:
        return lambda item, parts: terminal.print_json_line(item.to_dict())
    if not sys.stdout.isatty():
        # Much faster than a console, which has nothing to add.
        return lambda item, parts: terminal.print_line(
            terminal.format_time(item.time) + "".join(text for text, _ in parts), flush=True
        )
    from rich.text import Text

    console = terminal.console()

    def show(item: Event | LogLine, parts: Parts) -> None:
        console.print(Text.assemble((terminal.format_time(item.time), "dim"), *parts), soft_wrap=True)

    return show
