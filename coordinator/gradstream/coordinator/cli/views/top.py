"""The screen of `gradstream top`: the job first, then its nodes by role, one line each.

Pure functions of the coordinator's answers, of the person's choices and of the terminal's size.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby
from typing import TYPE_CHECKING, Any

from gradstream.coordinator.cli.views import terminal
from gradstream.coordinator.cli.views.jobs import (
    chosen_job,
    holders_text,
    memory_text,
    pipeline_text,
    step_seconds,
    step_wait,
)
from gradstream.coordinator.cli.views.progress import progress_facts, progress_place
from gradstream.coordinator.cli.views.step_times import step_line, step_word
from gradstream.coordinator.cli.views.steps import node_step, rounds_of
from gradstream.core.shown import shown

if TYPE_CHECKING:
    from rich.text import Text

    from gradstream.client import Job, Node

PHASE_STYLES = {"idle": "dim", "waiting": "", "loading": "cyan"}
BUSY_STYLE = "green"
ROLE_TITLES = {"parameter-server": "PARAMETER SERVER", "worker": "WORKER"}
COLUMNS = (">STEP", "DOES", "HOLDS?", ">MEMORY?", ">SENT?", ">RECEIVED?", "NOTE…")

BEHIND_SECONDS = 5.0
"""A node is slow when it is this long behind. Its last report may be as old as a heartbeat interval."""

SORTS: dict[str, Callable[[Node], Any]] = {
    "name": lambda node: _natural(node.name),
    "step": lambda node: (node.activity.step, _natural(node.name)),
    "memory": lambda node: (-node.activity.resident_bytes, _natural(node.name)),
    "sent": lambda node: (-node.activity.sent_bytes, _natural(node.name)),
    "received": lambda node: (-node.activity.received_bytes, _natural(node.name)),
}


@dataclass(frozen=True)
class Look:
    """The state of the cluster at one update; `trouble` is the error if the coordinator did not answer."""

    address: str
    nodes: tuple[Node, ...] = ()
    jobs: tuple[Job, ...] = ()
    trouble: str = ""


@dataclass(frozen=True)
class Choices:
    """The person's choices. `job_id` None stands for the job under way, else the newest."""

    job_id: str | None = None
    sort: str = "name"
    decisions: bool = False

    def after(self, key: str, jobs: Sequence[Job]) -> Choices | None:
        """Return the choices after a key press; None to quit."""
        if key in ("q", "Q", "\x03", "\x04"):
            return None
        if key == "s":
            names = list(SORTS)
            return replace(self, sort=names[(names.index(self.sort) + 1) % len(names)])
        if key == "j" and jobs:
            shown = chosen_job(jobs, self.job_id)
            ids = [job.job_id for job in jobs]
            at = ids.index(shown.job_id) if shown is not None else -1
            return replace(self, job_id=ids[(at + 1) % len(ids)])
        if key == "d":
            return replace(self, decisions=not self.decisions)
        return self


def view(look: Look, choices: Choices, width: int, height: int | None, keys: bool = True) -> Any:
    """Make the screen for a terminal of `width` columns and at most `height` lines; the last line names the `keys`.

    Without a height all nodes and decisions are listed, and no keys are named.
    """
    from rich.console import Group

    job = chosen_job(look.jobs, choices.job_id)
    head = _job_lines(look, job, choices, None if height is None else 1)
    if height is None:
        return Group(*head, _line(), *_all_nodes(look, job, width), *map(_line, _decisions(job)))
    head = head[: max(1, height - 3)]
    # Two other lines: a blank one, and the keys.
    room = height - len(head) - 2
    if choices.decisions:
        whole = [_line(line) for text in _decisions(job) for line in textwrap.wrap(text, width, subsequent_indent="  ")]
        body: list[Any] = whole[: max(0, room)] or [_line("no job, no decisions", "dim")]
    else:
        body = [_title(look), *_fitting_nodes(look.nodes, job, choices, width, room - 1)]
    return Group(*head, _line(), *body, *([_keys(look, job, choices)] if keys else []))


# ---- The job ---------------------------------------------------------------------------------------------------------


def _title(look: Look) -> Text:
    alive = Counter(str(node.kind) for node in look.nodes if node.alive)
    dead = sum(not node.alive for node in look.nodes)
    counts = [
        f"{counted(alive['parameter-server'], 'parameter server')}, {counted(alive['worker'], 'worker')} alive",
        *([f"{dead} dead"] if dead else []),
    ]
    return _line(
        f"coordinator {look.address}: {', '.join(counts) if look.nodes else 'no nodes have registered'}", "bold"
    )


def _job_lines(look: Look, job: Job | None, choices: Choices, num_waits: int | None) -> list[Text]:
    from rich.text import Text

    lines = [_line(look.trouble, "red")] if look.trouble else []
    if job is None:
        missing = f"no job '{choices.job_id}'" if choices.job_id is not None else "no jobs yet"
        return lines if look.trouble else [_line(missing, "dim")]
    lines.append(
        _line(Text.assemble(f"{job.job_id} ", terminal.state_text(job.state), "  ", "  ".join(progress_place(job))))
    )
    lines += [_line("  ".join(facts))] if (facts := progress_facts(job)) else []
    if job.step_breakdown is not None and not job.state.ended:
        lines.append(_line(f"a {step_word(job.step_breakdown)} takes {step_line(job.step_breakdown)}"))
    if job.reason:
        lines.append(_line(job.reason, "dim" if job.state == "running" and not job.waits else "yellow"))
    waits = () if job.state.ended else job.waits
    for wait in waits[:num_waits]:
        lines.append(_line(f"waits for {wait.what}, from {wait.whom} {terminal.format_since(wait.since)}", "yellow"))
    more = len(waits[num_waits:]) if num_waits is not None else 0
    return [
        *lines,
        *([_line(f"and for {counted(more, 'more thing')}; `gradstream status` has all", "yellow")] * (more > 0)),
    ]


def _decisions(job: Job | None) -> list[str]:
    """The decisions with their reasons, then pipeline, memory and slots."""
    if job is None:
        return []
    texts = [*job.decisions, *([job.step_breakdown.advice] if job.step_breakdown is not None else [])]
    texts += [f"pipeline: {pipeline_text(job.pipeline)}"] if job.pipeline is not None else []
    texts += [f"memory of {memory_text(memory)}" for memory in job.server_memory]
    return [*texts, *(holders_text(job) if not job.state.ended else ())]


def _keys(look: Look, job: Job | None, choices: Choices) -> Text:
    ids = [each.job_id for each in look.jobs]
    at = f" ({ids.index(job.job_id) + 1} of {len(ids)})" if job is not None and job.job_id in ids else ""
    back = "nodes" if choices.decisions else "decisions"
    return _line(f"keys: s sort ({choices.sort})   j next job{at}   d {back}   q quit", "reverse")


# ---- Nodes -----------------------------------------------------------------------------------------------------------


def slow_nodes(nodes: Sequence[Node], job: Job | None) -> dict[str, str]:
    """The nodes for which others wait, by name, with the reason: behind, clearly slower, or itself waiting."""
    if job is None:
        return {}
    slow = {}
    slowest = job.step_breakdown.slowest_worker if job.step_breakdown is not None else ""
    for node in nodes:
        step = node.activity.step
        if not node.alive or node.activity.job_id != job.job_id:
            continue
        behind = job.version - step if job.state == "running" and step else 0
        wait = step_wait(node, job)
        reasons = [
            f"{counted(behind, 'round' if rounds_of(job).is_round(step) else 'step')} behind"
            if behind * (step_seconds(job) or 0.0) >= BEHIND_SECONDS
            else "",
            "the slowest" if node.name == slowest else "",
            f"waits for {wait}" if wait else "",
        ]
        if any(reasons):
            slow[node.name] = "; ".join(filter(None, reasons))
    return slow


def _rows(nodes: Sequence[Node], job: Job | None, slow: dict[str, str]) -> list[tuple[Any, ...]]:
    """The nodes of one role as rows, one for each."""
    held: dict[str, list[int]] = {}
    for slot, holder in enumerate(job.slot_holders if job is not None else ()):
        held.setdefault(holder, []).append(slot)
    rows = []
    for node in nodes:
        activity = node.activity
        parameters = f"{terminal.format_count(activity.num_parameters)} params" if activity.num_parameters else "-"
        mine = held.get(node.name, [])
        slots = f"slot{'s' * (len(mine) != 1)} {ranges(mine)}" if mine else "-"
        rows.append(
            (
                node.name,
                node_step(node, job) or "-",
                terminal.styled(activity.phase, PHASE_STYLES.get(activity.phase, BUSY_STYLE)),
                parameters if node.kind == "parameter-server" else slots,
                terminal.format_bytes(activity.resident_bytes),
                terminal.format_bytes(activity.sent_bytes),
                terminal.format_bytes(activity.received_bytes),
                terminal.styled(slow[node.name], "yellow") if node.name in slow else activity.detail,
            )
        )
    return rows


def _table(
    groups: Sequence[tuple[str, Sequence[Node]]], job: Job | None, slow: dict[str, str], width: int
) -> list[Any]:
    """All nodes in one table with common columns; the title of each later role is a row."""
    rows: list[tuple[Any, ...]] = []
    for index, (title, nodes) in enumerate(groups):
        rows += [(terminal.styled(title, "bold"), *([""] * len(COLUMNS)))] if index else []
        rows += _rows(nodes, job, slow)
    return [terminal.make_table([groups[0][0], *COLUMNS], rows, width=width)] if groups else []


def _by_role(nodes: Sequence[Node]) -> list[tuple[str, list[Node]]]:
    """Group live nodes by the title of their role."""
    alive = sorted((node for node in nodes if node.alive), key=lambda node: node.kind)
    return [
        (ROLE_TITLES.get(kind, kind.upper()), list(group)) for kind, group in groupby(alive, lambda node: node.kind)
    ]


def _all_nodes(look: Look, job: Job | None, width: int) -> list[Any]:
    groups = [(title, sorted(group, key=SORTS["name"])) for title, group in _by_role(look.nodes)]
    table = _table(groups, job, slow_nodes(look.nodes, job), width)
    return [_title(look), *table, *_dead_line(look.nodes), _line()]


def _fitting_nodes(nodes: Sequence[Node], job: Job | None, choices: Choices, width: int, room: int) -> list[Any]:
    """Show nodes in at most `room` lines: all of them if they fit.

    Otherwise each role gets a summary in one line, followed by the slow nodes and as many others as fit.
    """
    dead, slow, groups = _dead_line(nodes), slow_nodes(nodes, job), _by_role(nodes)
    room -= len(dead)
    groups = [(title, sorted(group, key=SORTS[choices.sort])) for title, group in groups]
    if sum(len(group) + 1 for _, group in groups) <= room:
        return [*_table(groups, job, slow, width), *dead]
    summary = [_summary_line(title, group, job) for title, group in groups]
    ranked = sorted((node for _, group in groups for node in group), key=lambda node: node.name not in slow)
    # Other lines: the summary, a title for each role, and the line with the number of hidden nodes.
    shown = ranked[: max(0, room - len(summary) - len(groups) - 1)]
    chosen = [(title, [node for node in group if node in shown]) for title, group in groups]
    rest = len(ranked) - len(shown)
    last = _line(f"and {counted(rest, 'more node')}" + ("; slow ones are always shown" if slow else ""), "dim")
    lines = [*summary, *_table([each for each in chosen if each[1]], job, slow, width), last, *dead]
    # Without nodes every element is one line.
    return lines if shown else lines[: max(0, room + len(dead))]


def _summary_line(title: str, nodes: Sequence[Node], job: Job | None) -> Text:
    numbers = Counter(node.activity.phase for node in nodes)
    phases = ", ".join(f"{numbers[phase]} {phase}" for phase in sorted(numbers, key=numbers.__getitem__, reverse=True))
    steps = [node_step(node, job) for node in nodes if node.activity.step]
    at = f"; at steps {min(steps)} to {max(steps)}" if steps and min(steps) < max(steps) else ""
    at = at or (f"; at step {steps[0]}" if steps else "")
    return _line(f"{len(nodes)} {title.lower()}{'s' * (len(nodes) != 1)}: {phases}{at}")


def _dead_line(nodes: Sequence[Node]) -> list[Text]:
    """The dead nodes in one line; empty when all are alive."""
    dead = sorted((node for node in nodes if not node.alive), key=SORTS["name"])
    if not dead:
        return []
    since = (f"{node.name} ({node.kind}, last heard {terminal.format_time(node.last_heartbeat)})" for node in dead)
    return [_line(f"{len(dead)} dead: {', '.join(since)}", "red")]


# ---- Words -----------------------------------------------------------------------------------------------------------


def counted(number: int, word: str) -> str:
    """Format a number of things, as "1 worker" or "2 workers"."""
    return f"{number} {word}{'s' * (number != 1)}"


def _natural(name: str) -> list[str | int]:
    """The sort key of a name, in natural order: worker-2 before worker-10."""
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]


def ranges(numbers: Sequence[int]) -> str:
    """Format rising numbers with runs joined, as "0-3, 7"."""
    counter = count()
    runs = [list(group) for _, group in groupby(numbers, lambda number: number - next(counter))]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _line(text: str | Text = "", style: str = "") -> Text:
    """Make a line that is cut with an ellipsis on a narrower terminal."""
    from rich.text import Text

    made = text if isinstance(text, Text) else Text(shown(text).replace("\n", " "), style=style)
    made.no_wrap, made.overflow = True, "ellipsis"
    return made
