"""`gradstream top`: what is shown on terminals of any size, for few nodes and for many, and what the keys do."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from canned_jobs import CannedJobs, canned_cluster, canned_job, canned_node
from rich.cells import cell_len
from rich.console import Console

from gradstream.client import Job, JobState, Node
from gradstream.coordinator.cli.views import terminal
from gradstream.coordinator.cli.views.jobs import chosen_job, holders_text
from gradstream.coordinator.cli.views.top import SORTS, Choices, Look, ranges, slow_nodes, view
from gradstream.core.plan.leases import SLOTS
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2

SIZES = [(80, 24), (120, 40), (60, 15), (40, 10), (20, 6)]


def look_at(num_servers: int, num_workers: int, num_dead: int = 0) -> Look:
    job, nodes = canned_cluster(num_servers, num_workers, num_dead)
    return Look("10.0.0.1:7000", tuple(map(Node.from_proto, nodes)), (Job.from_proto(job),))


def screen(look: Look, width: int, height: int | None, choices: Choices | None = None) -> list[str]:
    """The lines that are shown."""
    console = Console(width=width, height=height or 1000, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(view(look, choices or Choices(), width, height))
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("nodes", [(1, 2, 0), (4, 26, 2), (8, 192, 6), (0, 0, 0)])
@pytest.mark.parametrize("decisions", [False, True])
def test_what_is_shown_fits_the_terminal(width: int, height: int, nodes: tuple[int, int, int], decisions: bool) -> None:
    look = look_at(*nodes) if any(nodes) else Look("10.0.0.1:7000")
    lines = screen(look, width, height, Choices(decisions=decisions))
    assert len(lines) <= height
    assert max(map(cell_len, lines)) <= width
    assert lines[-1].startswith("keys: s sort (name)"[: width - 1])
    if any(nodes):
        assert lines[0].startswith("stdlib-gpt-1 running  step 31/100"[: width - 1])
    if any(nodes) and height > 6:
        assert lines[2].startswith("a step takes 1.90 s: compute 63 %"[: width - 1])


def test_nodes_are_listed_by_role_with_whole_names() -> None:
    lines = screen(look_at(1, 2), 80, 24)
    at = lines.index("coordinator 10.0.0.1:7000: 1 parameter server, 2 workers alive")
    assert [line.split("  ")[0] for line in lines[at + 1 : -1]] == [
        "PARAMETER SERVER",
        "server-0",
        "WORKER",
        "gpu-machine-0",
        "gpu-machine-1",
    ]
    assert lines[at + 5].endswith("the slowest")


def test_of_many_nodes_each_role_has_a_line_and_the_slow_and_the_dead_are_named() -> None:
    text = "\n".join(screen(look_at(8, 192, 6), 80, 24))
    assert "8 parameter servers: 8 accumulating; at step 31" in text
    assert "186 workers: 94 computing, 46 waiting, 46 validating; at steps 30 to 31" in text
    assert re.search(r"gpu-machine-185 .* the slowest", text)
    assert "and 183 more nodes; slow ones are always shown" in text
    assert "6 dead: gpu-machine-186 (worker, last heard" in text


def test_a_pipe_gets_all_nodes_and_all_decisions() -> None:
    text = "\n".join(screen(look_at(8, 192, 6), terminal.PIPED_COLUMNS, None))
    assert all(f"gpu-machine-{number}" in text for number in range(192))
    assert "placement: 74 fragments on 8 servers" in text
    assert "keys:" not in text


def test_a_long_wait_is_cut_and_its_node_is_slow() -> None:
    look = look_at(1, 3)
    node = canned_node(
        "gpu-machine-2", activity=coordinator_pb2.Activity(job_id="stdlib-gpt-1", phase="waiting", step=31)
    )
    node.activity.waiting_for = "version 32 from " + ", ".join(f"server-{number}" for number in range(40))
    node.activity.waiting_since_unix_ms = int(1000 * (time.time() - 60))
    look = replace(look, nodes=(*look.nodes[:3], Node.from_proto(node)))
    line = next(line for line in screen(look, 80, 24) if line.startswith("gpu-machine-2 "))
    assert "the slowest; waits for" in line
    assert line.endswith("…")
    # On a step's normal way a wait is none that others suffer from.
    node.activity.waiting_since_unix_ms = int(1000 * time.time())
    assert slow_nodes([Node.from_proto(node)], look.jobs[0]) == {"gpu-machine-2": "the slowest"}
    job = replace(look.jobs[0], step_breakdown=None)
    assert slow_nodes([Node.from_proto(node)], job) == {}
    # A node is behind by time, not by steps alone.
    node.activity.step = 25
    assert slow_nodes([Node.from_proto(node)], job) == {"gpu-machine-2": "6 steps behind"}
    assert slow_nodes([Node.from_proto(node)], None) == {}
    # A worker without slots, or of a job that rests, holds up no step.
    node.activity.step, node.activity.waiting_since_unix_ms = 31, int(1000 * (time.time() - 60))
    assert list(slow_nodes([Node.from_proto(node)], job)) == ["gpu-machine-2"]
    assert slow_nodes([Node.from_proto(node)], replace(job, state=JobState.PAUSED)) == {}
    node.activity.waiting_for = SLOTS
    assert slow_nodes([Node.from_proto(node)], job) == {}


def test_keys_sort_choose_a_job_and_show_decisions() -> None:
    jobs = [
        Job.from_proto(canned_job(name, state=state))
        for name, state in (("b-1", jobs_pb2.JOB_STATE_QUEUED), ("a-1", jobs_pb2.JOB_STATE_FAILED))
    ]
    assert chosen_job(jobs, None) is jobs[0]
    assert chosen_job(jobs[1:], None) is jobs[1]
    running = Job.from_proto(canned_job("c-0"))
    assert chosen_job([*jobs, running]) is running
    assert chosen_job(jobs, "c-1") is None
    choices = Choices()
    for sort in [*list(SORTS)[1:], "name"]:
        after = choices.after("s", jobs)
        assert after is not None
        choices = after
        assert choices.sort == sort
    assert choices.after("j", jobs) == Choices(job_id="a-1")
    assert Choices(job_id="a-1").after("j", jobs) == Choices(job_id="b-1")
    assert Choices().after("j", []) == Choices()
    assert Choices().after("d", jobs) == Choices(decisions=True)
    assert Choices().after("x", jobs) == Choices()
    assert Choices().after("q", jobs) is None


def test_sorting_by_memory_shows_the_largest_first() -> None:
    names = [
        line.split()[0] for line in screen(look_at(4, 3), 80, 24, Choices(sort="memory")) if line.startswith("server-")
    ]
    assert names == ["server-3", "server-2", "server-1", "server-0"]


def test_trouble_is_shown_above_what_was_known() -> None:
    lines = screen(replace(look_at(1, 2), trouble="coordinator 10.0.0.1:7000 does not answer"), 80, 24)
    assert lines[0] == "coordinator 10.0.0.1:7000 does not answer"
    assert any(line.startswith("gpu-machine-1") for line in lines)


def test_the_slots_of_few_workers_have_a_line_each() -> None:
    few, many = (look_at(1, number).jobs[0] for number in (8, 9))
    assert holders_text(few)[:2] == ["slot 0: gpu-machine-0", "slot 1: gpu-machine-1"]
    assert len(holders_text(few)) == 8
    assert holders_text(many) == ["; ".join(f"slot {number}: gpu-machine-{number}" for number in range(9))]


def test_runs_of_slots_are_joined() -> None:
    assert [ranges(numbers) for numbers in ([], [3], [0, 1, 2], [0, 1, 3, 5, 6])] == ["", "3", "0-2", "0-1, 3, 5-6"]


def read_until(terminal_end: int, text: str) -> str:
    """What a terminal shows until `text` is in it."""
    found = ""
    deadline = time.monotonic() + 30
    while text not in found:
        assert time.monotonic() < deadline, found
        if select.select([terminal_end], [], [], 0.2)[0]:
            found += os.read(terminal_end, 65536).decode(errors="replace")
    return found


def test_keys_on_a_real_terminal(jobs: CannedJobs, address: str) -> None:
    """Each is taken at once, whatever the interval; the terminal is as it was afterwards."""
    job, jobs.nodes = canned_cluster(1, 2)
    jobs.jobs = [job]
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gradstream.coordinator.cli", "top", "-c", address, "--interval", "600"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    try:
        assert "gpu-machine-1" in read_until(ours, "keys: s sort (name)")
        os.write(ours, b"s")
        read_until(ours, "keys: s sort (step)")
        os.write(ours, b"d")
        assert "placement: 74 fragments" in read_until(ours, "d nodes")
        os.write(ours, b"q")
        assert "\x1b[?1049l" in read_until(ours, "\x1b[?1049l")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
