"""The cases of bench-server that measure memory: late slots, and a checkpoint under way.

Memory is resident memory above that of the same process before it loaded a plan, and so is a peak.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import psutil
from report import Result, at_most, fail, result
from standalone import Child, Usage, make_plan, payloads_of, run_sender, run_server

from gradstream.core.wire.frames import PIECE_BYTES

MAX_PROCESSES = 4
CODEC, PULL_CODEC = "int8", "delta-int8"
TARGET_PEAK_BYTES = 24.0
"""Target of the peak for each parameter: weights, moments, copy, sum, and messages on their way."""
TARGET_LATER = 1.1
"""Target of the memory 3 s after a step over the shard's state."""
LATER_SECONDS = 3.0
TARGET_IDLE_MIB = 250.0
TARGET_LATE_SECONDS = 1.0
TARGET_EXTRA_MIB = 256.0
TARGET_COMMIT = 1.05


@dataclass(frozen=True)
class Size:
    """The size of a measurement; a layer has 4.2 M parameters, the embedding too."""

    num_layers: int
    num_slots: int
    num_steps: int
    """Number of steps to measure; with checkpoints, from one to the next."""
    gap_seconds: float = 0.0
    """Time between two steps, in which workers of a real job compute."""


LATE_SLOT, SMOKE_LATE_SLOT = Size(15, 64, 3), Size(1, 4, 1)
CHECKPOINT, SMOKE_CHECKPOINT = Size(62, 1, 4, 6.0), Size(1, 1, 3)
NUM_CHECKPOINTS = 3


class Bench:
    """A server's process and its senders."""

    def __init__(self, stack: ExitStack, num_senders: int):
        self.num_senders = num_senders
        self.server = Child(run_server, "server")
        stack.callback(self.server.close)
        self._senders = [Child(run_sender, f"sender-{number}") for number in range(min(MAX_PROCESSES, num_senders))]
        for sender in self._senders:
            stack.callback(sender.close)
        self.server.ask("prepare")
        self.empty_bytes = self.usage().resident_bytes

    def usage(self) -> Usage:
        """The server's usage; begins a new peak."""
        usage: Usage = self.server.ask("usage")
        return usage

    def load(self, size: Size, checkpoint_root: str = "", checkpoint_steps: int = 0) -> None:
        """Load a plan of this size and connect the senders."""
        self._plan = make_plan(CODEC, size.num_slots, size.num_layers, PULL_CODEC, checkpoint_root, checkpoint_steps)
        self.num_parameters = self._plan.num_parameters
        self.step_bytes = size.num_slots * sum(payload.nbytes for payload in payloads_of(self._plan))
        self._bundles = list(range(len(self._plan.bundles)))
        address = self.server.ask("load", self._plan)
        for sender in self._senders:
            sender.ask("connect", address, self._plan, self.num_senders // len(self._senders))

    def push(self, slots: range, step: int) -> float:
        """Push these slots' contributions, sender i every `num_senders`-th; return the begin once all are taken."""
        for process, sender in enumerate(self._senders):
            jobs = [
                [(slot, self._bundles) for slot in slots[number :: self.num_senders]]
                for number in range(process, self.num_senders, len(self._senders))
            ]
            sender.tell("push", jobs, PIECE_BYTES, step)
        return float(min(sender.answer() for sender in self._senders))

    def wait_version(self, version: int) -> float:
        """Wait until a version is published; return the time."""
        return float(self.server.ask("wait_version", version))


def late_slot(num_senders: int, size: Size) -> list[Result]:
    """Push every slot but the first, then the first one: the worst order for a server that would add in slot order."""
    with ExitStack() as stack:
        bench = Bench(stack, num_senders)
        bench.load(size)
        speeds, peaks = [], []
        for step in range(size.num_steps + 1):
            bench.usage()
            began = bench.push(range(1, size.num_slots), step)
            bench.push(range(1), step)
            ended = bench.wait_version(step + 1)
            if step:  # the first step is the warm-up: it makes the copies that workers hold
                speeds.append(bench.step_bytes / (ended - began) / 1e9)
                peaks.append(bench.usage().peak_resident_bytes)
            time.sleep(LATER_SECONDS)
        later_bytes = bench.usage().resident_bytes
        state_bytes: int = bench.server.ask("state_bytes")
    empty = bench.empty_bytes
    peak = (max(peaks) - empty) / bench.num_parameters
    later = (later_bytes - empty) / state_bytes
    detail = (
        f"{bench.num_parameters / 1e6:.0f} M parameters, {size.num_slots} slots; empty {empty >> 20} MiB, state "
        f"{state_bytes >> 20}, peak {max(peaks) >> 20}, {LATER_SECONDS:.0f} s later {later_bytes >> 20}"
    )
    print(f"late slot, {num_senders} senders: {statistics.median(speeds):.2f} GB/s; {detail}", flush=True)
    return [
        at_most(f"late_slot_peak_bytes_a_parameter_{num_senders}", peak, TARGET_PEAK_BYTES, detail),
        at_most(f"late_slot_memory_later_{num_senders}", later, TARGET_LATER, detail),
        result(f"late_slot_gb_per_second_{num_senders}", statistics.median(speeds), 0.0),
    ]


def checkpoint(size: Size) -> list[Result]:
    """Commit steps, every few of them with a checkpoint, and the next one while the file is written."""
    with ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-server-"))
        bench = Bench(stack, 1)
        interval = size.num_steps
        bench.load(size, root, interval)
        seconds: dict[str, list[float]] = {"usual": [], "checkpoint": [], "next": []}
        late, peaks = {kind: [0.0] for kind in seconds}, {kind: [0] for kind in seconds}
        file_seconds = []
        for step in range(1 + NUM_CHECKPOINTS * interval + 1):
            kind = "checkpoint" if (step + 1) % interval == 0 else "next" if step and step % interval == 0 else "usual"
            began = bench.push(range(size.num_slots), step)
            ended = bench.wait_version(step + 1)
            if kind == "checkpoint":
                decided = ended
            time.sleep(size.gap_seconds)
            if kind == "next":
                file_seconds.append(float(bench.server.ask("wait_checkpoints", step // interval)) - decided)
            usage, lateness = bench.usage(), float(bench.server.ask("lateness"))
            if step:  # the first step is the warm-up
                seconds[kind].append(ended - began)
                late[kind].append(lateness)
                peaks[kind].append(usage.peak_resident_bytes)
    usual = statistics.median(seconds["usual"])
    deciding, after = statistics.median(seconds["checkpoint"]), statistics.median(seconds["next"])
    extra_mib = (max(peaks["checkpoint"] + peaks["next"]) - max(peaks["usual"])) / (1 << 20)
    late_seconds = max(late["checkpoint"] + late["next"])
    detail = (
        f"{bench.num_parameters / 1e6:.0f} M parameters; a step takes {usual:.2f} s, one with a checkpoint "
        f"{deciding:.2f}, the next {after:.2f}, {size.gap_seconds:g} s between steps; the file "
        f"{max(file_seconds):.1f} s; the event loop was at most {max(late['usual']):.2f} s late, with a checkpoint "
        f"{late_seconds:.2f}"
    )
    print(f"checkpoint: {extra_mib:.0f} MiB more; {detail}", flush=True)
    return [
        at_most("checkpoint_late_seconds", late_seconds, TARGET_LATE_SECONDS, detail),
        at_most("checkpoint_commit_over_usual", deciding / usual, TARGET_COMMIT),
        at_most("checkpoint_next_commit_over_usual", after / usual, TARGET_COMMIT),
        at_most("checkpoint_extra_mib", extra_mib, TARGET_EXTRA_MIB),
    ]


def idle() -> list[Result]:
    """Start a parameter server whose coordinator is away, as the command starts it, and look at its memory."""
    command = [sys.executable, "-c", "from gradstream.coordinator.cli import main; main()", "serve"]
    options = ["--coordinator", "127.0.0.1:9", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [*command, "parameter-server", *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        try:
            if not any("parameter server listens" in line for line in server.stdout):
                fail("server", "the parameter server did not start")
            time.sleep(1)
            resident_bytes = psutil.Process(server.pid).memory_info().rss
        finally:
            server.kill()
    return [at_most("idle_mib", resident_bytes / (1 << 20), TARGET_IDLE_MIB, "resident, without a plan")]


CASES: dict[str, Callable[[bool], list[Result]]] = {
    "idle": lambda _: idle(),
    "late_slot_1": lambda smoke: late_slot(1, SMOKE_LATE_SLOT if smoke else LATE_SLOT),
    "late_slot_64": lambda smoke: late_slot(2 if smoke else 64, SMOKE_LATE_SLOT if smoke else LATE_SLOT),
    "checkpoint": lambda smoke: checkpoint(SMOKE_CHECKPOINT if smoke else CHECKPOINT),
}
"""By name; each takes whether the run is a smoke run."""
