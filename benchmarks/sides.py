"""The sides of bench-pipeline, all alive at once and taking turns of a few steps. Not a benchmark by itself.

A machine's speed changes within a minute by more than the differences to be measured. So no side runs to its end before
the next one begins: each computes a few steps, is frozen (SIGSTOP), and continues at its next turn. A step during which
a side was frozen does not count.
"""

from __future__ import annotations

import json
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from step import Network, cluster, free_port, process

from gradstream.client import Client, Span, SpanKind, Step
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.telemetry.timeline import PASSES, union
from gradstream.proto.v1 import plan_pb2

STEP_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class Turn:
    """A few consecutive steps: seconds and bubble of each, the machines' bytes a step, and the losses by step."""

    seconds: Sequence[float]
    bubbles: Sequence[float]
    step_bytes: float
    losses: Mapping[int, float]

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)


class Side(Protocol):
    """One way to train, running or frozen."""

    def turn(self, num_steps: int) -> Turn:
        """Finish the step under way, compute `num_steps` steps without a pause, and freeze."""


def freeze(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Stop processes until they are thawed."""
    for running in processes:
        running.send_signal(signal.SIGSTOP)


@contextmanager
def thawed(processes: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """Let processes run during the block, and freeze them after it."""
    for running in processes:
        running.send_signal(signal.SIGCONT)
    try:
        yield
    finally:
        freeze(processes)


def bubble(workers: Sequence[Iterable[Span]]) -> float:
    """Compute the share of a step's time in which the workers compute no pass.

    The time is from the begin of the first pass to the end of the last one. `workers` are the spans of each worker;
    only spans of passes count.
    """
    passes = [
        [(span.begin_us, span.begin_us + span.duration_us) for span in spans if span.kind in PASSES]
        for spans in workers
    ]
    every = [interval for intervals in passes for interval in intervals]
    whole = max(end for _, end in every) - min(begin for begin, _ in every)
    busy = sum(end - begin for intervals in passes for begin, end in union(intervals))
    return 1 - busy / (len(passes) * whole)


# --- gradstream -------------------------------------------------------------------------------------------------------


class GradstreamSide:
    """A job on a cluster of its own. No client is connected while the cluster is frozen."""

    def __init__(
        self, network: Network, num_machines: int, address: str, job_id: str, processes: list[subprocess.Popen[str]]
    ):
        self._network = network
        self._num_machines = num_machines
        self._address = address
        self._job_id = job_id
        self._processes = processes
        self._seen = -1

    def turn(self, num_steps: int) -> Turn:
        steps: list[Step] = []
        begin = end = 0.0
        with thawed(self._processes), Client(self._address) as client:
            for item in client.watch(self._job_id):
                if isinstance(item, Step) and item.step > self._seen:
                    steps.append(item)
                    end = self._network.sent_bytes(self._num_machines)
                    if len(steps) == 1:
                        begin = end
                    if len(steps) > num_steps:
                        break
            if len(steps) <= num_steps:
                job = client.job(self._job_id)
                raise SystemExit(f"error: the job {job.state}: {job.reason}")
            timelines = client.timeline(self._job_id)
        self._seen = steps[-1].step
        counted = {step.step for step in steps[1:]}
        spans: dict[int, dict[str, list[Span]]] = defaultdict(dict)
        for timeline in timelines:
            if timeline.version in counted:
                spans[timeline.version][timeline.worker] = list(timeline.spans)
        times = [step.time.timestamp() for step in steps]
        return Turn(
            [after - before for before, after in pairwise(times)],
            # A timeline comes after its step; the last step's timelines may come only in the next turn.
            [bubble(list(found.values())) for found in spans.values() if len(found) == self._num_machines],
            (end - begin) / num_steps,
            {step.step: step.loss for step in steps},
        )


@contextmanager
def gradstream_side(
    recipe: Recipe, network: Network, num_machines: int, directory: Path
) -> Iterator[tuple[GradstreamSide, tuple[int, ...]]]:
    """Start a cluster and the job; yield the side and the ends of the job's stages."""
    with cluster(network, num_machines, directory) as running:
        with Client(running.address) as client:
            job = client.submit(recipe)
            for item in client.watch(job.job_id):
                if isinstance(item, Step):
                    break
            job = client.job(job.job_id)
        side = GradstreamSide(network, num_machines, running.address, job.job_id, running.processes)
        freeze(running.processes)
        yield side, planned_ends(directory, job.job_id, job.epoch)


def planned_ends(directory: Path, job_id: str, epoch: int) -> tuple[int, ...]:
    """The first forward unit after each stage in the plan of the frozen coordinator with its state in `directory`."""
    # The coordinator locks its state while it lives, so a copy is read.
    store = SqliteState(shutil.copytree(directory / "state", directory / "state-copy"))
    try:
        stored = store.load_plan(job_id, epoch)
    finally:
        store.close()
    if stored is None:
        raise SystemExit(f"error: the coordinator has no plan of {job_id}, epoch {epoch}")
    return Plan.from_proto(plan_pb2.Plan.FromString(stored)).stage_ends


# --- torch ------------------------------------------------------------------------------------------------------------


class TorchSide:
    """The ranks of torch.distributed.pipelining. Each prints a line of JSON a step."""

    def __init__(self, network: Network, ranks: list[subprocess.Popen[str]]):
        self._network = network
        self._ranks = ranks
        self._lines = [_lines_of(rank) for rank in ranks]

    def turn(self, num_steps: int) -> Turn:
        steps: list[list[dict[str, Any]]] = []
        begin = end = 0.0
        with thawed(self._ranks):
            while len(steps) <= num_steps:
                steps.append([self._next(lines) for lines in self._lines])
                end = self._network.sent_bytes(len(self._ranks))
                if len(steps) == 1:
                    begin = end
        return Turn(
            [ranks[-1]["seconds"] for ranks in steps[1:]],
            [bubble([_spans(rank["passes"]) for rank in ranks]) for ranks in steps[1:]],
            (end - begin) / num_steps,
            {ranks[-1]["step"]: ranks[-1]["loss"] for ranks in steps},
        )

    def _next(self, lines: queue.SimpleQueue[str]) -> dict[str, Any]:
        try:
            line = lines.get(timeout=STEP_TIMEOUT_SECONDS)
        except queue.Empty:
            raise SystemExit(f"error: torch has computed no step for {STEP_TIMEOUT_SECONDS:g} s") from None
        if not line:
            raise SystemExit("error: a rank of torch has ended; see above")
        found: dict[str, Any] = json.loads(line)
        return found


def _lines_of(running: subprocess.Popen[str]) -> queue.SimpleQueue[str]:
    """Queue the lines that a process prints as they come, and "" after the last one."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert running.stdout is not None
        for line in running.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    return lines


def _spans(passes: Iterable[Sequence[Any]]) -> list[Span]:
    return [
        Span(SpanKind(kind), begin_us, duration_us, stage=stage, microbatch=microbatch)
        for kind, begin_us, duration_us, stage, microbatch in passes
    ]


@contextmanager
def torch_side(
    recipe: Recipe, stage_ends: Sequence[int], network: Network, num_machines: int, directory: Path, use_table: bool
) -> Iterator[TorchSide]:
    """Start the ranks. With `use_table` they follow gradstream's table of the schedule."""
    path = directory / "recipe.json"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    port = free_port()
    with ExitStack() as stack:
        ranks = []
        for rank in range(num_machines):
            command = [
                *network.prefix(rank), sys.executable, str(Path(__file__).with_name("torch_pipeline.py")),
                "--recipe", str(path), "--rank", str(rank), "--address", network.address(0), "--port", str(port),
                "--stage-ends", *map(str, stage_ends), *(["--table"] if use_table else []),
            ]  # fmt: skip
            environment = {"GLOO_SOCKET_IFNAME": network.interface}
            ranks.append(stack.enter_context(process(command, environment, pipe=True)))
        yield TorchSide(network, ranks)
        for running in ranks:  # frozen, with steps left, so they do not end by themselves
            running.kill()
