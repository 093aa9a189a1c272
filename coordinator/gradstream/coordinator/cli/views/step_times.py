"""Show a step's time by cause, on one line and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.client import StepBreakdown

MAX_WORKERS = 4
"""Maximum number of workers whose shares the line names."""
SMALL_SHARE = 0.005
"""Parts below this share of a step are left out of the line."""


def step_word(found: StepBreakdown) -> str:
    """What was measured: a step, or a round of local steps."""
    return "round" if found.round_steps else "step"


def step_line(found: StepBreakdown) -> str:
    """A step's duration and its parts in percent, with the worker that causes a part."""
    slots = f" (of {found.slowest_worker})" if found.slowest_worker else ""
    link = f"; slowest link {found.slowest_link}" if found.slowest_link else ""
    server = f"; slowest server {found.slowest_server}" if found.slowest_server else ""
    parts = [
        (f"compute{_by_worker(found)}", found.mean.compute_seconds),
        ("weights", found.mean.weights_seconds),
        ("send", found.mean.send_seconds),
        (f"others' slots{slots}", found.mean.slots_seconds),
        ("servers", found.mean.servers_seconds),
        ("other", found.mean.other_seconds),
    ]
    whole = found.mean.step_seconds or 1.0
    shown = [f"{name} {100 * seconds / whole:.0f} %" for name, seconds in parts if seconds / whole >= SMALL_SHARE]
    return f"{seconds_text(found.mean.step_seconds)}: {', '.join(shown)}{link}{server}"


def _by_worker(found: StepBreakdown) -> str:
    """The share of the time in which each of a few workers computes in rounds."""
    if not found.round_steps or not 2 <= len(found.workers) <= MAX_WORKERS:
        return ""
    shares = (
        f"{worker.worker} {100 * worker.parts.compute_seconds / (worker.parts.step_seconds or 1.0):.0f} %"
        for worker in found.workers
    )
    return f" ({', '.join(shares)})"


def print_step_table(found: StepBreakdown) -> None:
    """Print each worker's seconds per step by part, and the rates of its link."""
    terminal.print_table(
        ["WORKER", ">SLOTS", ">COMPUTE", ">WEIGHTS", ">SEND", ">OTHERS' SLOTS", ">SERVERS", ">OTHER", ">UP?", ">DOWN?"],
        [
            (
                worker.worker,
                f"{worker.num_slots:.3g}",
                *(
                    seconds_text(seconds)
                    for seconds in (
                        worker.parts.compute_seconds,
                        worker.parts.weights_seconds,
                        worker.parts.send_seconds,
                        worker.parts.slots_seconds,
                        worker.parts.servers_seconds,
                        worker.parts.other_seconds,
                    )
                ),
                terminal.format_bit_rate(worker.push_bytes_per_second),
                terminal.format_bit_rate(worker.pull_bytes_per_second),
            )
            for worker in found.workers
        ],
    )


def seconds_text(seconds: float) -> str:
    """Format seconds, as 1.23 s or 45 ms."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
