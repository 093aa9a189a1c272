"""`gradstream logs` and `gradstream events`: a job's history as streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

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
    from gradstream.client import Client, Event, LogLine

FollowOption = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")]
TailOption = Annotated[
    int | None,
    typer.Option("--tail", "-n", min=1, metavar="N", help="Begin with the last N lines.", show_default="all"),
]
LEVELS = [*LogLevel, "critical"]


def logs(
    job_id: NamedJobArgument = None,
    nodes: Annotated[
        list[str] | None, typer.Option("--node", metavar="NAME", help="Lines of this node; may be repeated.")
    ] = None,
    level: Annotated[LogLevel, typer.Option("--level", help="Lines of this level and above.")] = LogLevel.debug,
    tail: TailOption = None,
    follow: FollowOption = False,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show the log lines of a job's nodes. With -o json, one object a line."""
    from rich.text import Text

    from gradstream.client import LogLine

    heard: set[str] = set()
    shown = 0

    def wanted(line: LogLine) -> bool:
        heard.add(line.node)
        loud = line.level not in LEVELS or LEVELS.index(line.level) >= LEVELS.index(level)
        return loud and (not nodes or line.node in nodes)

    def show(line: LogLine) -> None:
        nonlocal shown
        shown += 1
        if output is OutputFormat.json:
            terminal.print_json_line(line.to_dict())
            return
        style = terminal.LEVEL_STYLES.get(line.level, "")
        console.print(
            Text.assemble(
                (terminal.format_time(line.time), "dim"),
                f" {line.node:<14} ",
                (f"{line.level:<7}", style),
                f" {line.text}",
            ),
            soft_wrap=True,
        )

    console = terminal.console()
    _stream(coordinator, job_id, {"log": LogLine}, follow, tail, wanted, show, "logs -f")
    if heard and not shown:
        terminal.say(f"no line matches --node and --level; lines came from {', '.join(sorted(heard))}")


def events(
    job_id: NamedJobArgument = None,
    tail: TailOption = None,
    follow: FollowOption = False,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show a job's history of events: states, plans, leases, nodes, checkpoints. With -o json, one object a line."""
    from rich.text import Text

    from gradstream.client import Checkpoint, Event

    def show(event: Event | Checkpoint) -> None:
        if output is OutputFormat.json:
            terminal.print_json_line(event.to_dict())
            return
        if isinstance(event, Checkpoint):
            written = f"written version {event.version}, {terminal.format_bytes(event.num_bytes)}"
            event = Event(event.cursor, event.time, "checkpoint", written)
        style = "red" if event.kind == "failure" else "yellow" if event.kind == "skip" else "cyan"
        console.print(
            Text.assemble(
                (terminal.format_time(event.time), "dim"), " ", (f"{event.kind:<10}", style), " ", event.message
            ),
            soft_wrap=True,
        )

    console = terminal.console()
    kinds: dict[str, type] = {"event": Event}
    if output is not OutputFormat.json:
        kinds["checkpoint"] = Checkpoint
    _stream(coordinator, job_id, kinds, follow, tail, lambda event: True, show, "events -f")


def _stream(
    coordinator: str | None,
    job_id: str | None,
    kinds: Mapping[str, type],
    follow: bool,
    tail: int | None,
    wanted: Callable[[Any], bool],
    show: Callable[[Any], None],
    command: str,
) -> None:
    """Show the wanted items of some kinds (names in messages, types); of the recorded ones at most `tail`."""
    with open_client(coordinator) as client:
        try:
            job_id = client.job(job_id).job_id
            for item in _items(client, job_id, kinds, follow, tail, wanted):
                show(item)
        except KeyboardInterrupt:
            if not follow:
                raise
            terminal.say(f"\ndetached; {job_id} goes on. Look again with: gradstream {command} {job_id}")


def _items(
    client: Client,
    job_id: str,
    kinds: Mapping[str, type],
    follow: bool,
    tail: int | None,
    wanted: Callable[[Any], bool],
) -> Iterator[Any]:
    names, types = list(kinds), tuple(kinds.values())
    cursor = 0
    if tail is not None:
        last: deque[Any] = deque(maxlen=tail)
        for item in client.watch(job_id, follow=False, kinds=names):
            cursor = item.cursor
            if isinstance(item, types) and wanted(item):
                last.append(item)
        yield from last
        if not follow:
            return
    for item in client.watch(job_id, follow=follow, after_cursor=cursor, kinds=names):
        if isinstance(item, types) and wanted(item):
            yield item
