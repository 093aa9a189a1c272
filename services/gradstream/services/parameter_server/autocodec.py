"""`codec: auto`: chooses the codec of the next step's contributions and weights, as pure functions of measurements.

The search begins with bf16. It tries a coarser codec only where the communication time that compute did not hide would
shrink, keeps that codec only if the steps then took less time, and starts again when the links have changed. It does
not consider the loss: all codecs that it chooses among give the loss of bf16 (see `make bench-parity`).

Step times depend on the machines, so a job with `auto` is outside "the same bits". The history records each step's
codec.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gradstream.core.plan.bundles import AUTO_FIRST

LADDER = (AUTO_FIRST, "int8", "int4")
"""The codecs to choose among, from finest to coarsest."""
TRIAL_STEPS = 6
"""Steps whose median time is a codec's time. The step before them is not counted: its weights have the old codec."""
WORTH = 0.95
"""A coarser codec is tried only if its predicted time is at most this share of a finer one's time."""
KEEP = 0.98
"""A codec that was tried is kept only if its time is at most this share of a finer one's time."""
CHANGED = 2.0
"""Factor by which the slowest link must have become faster or slower for a new search."""


@dataclass(frozen=True)
class Speeds:
    """The slowest measurements of any worker: seconds of compute a step, bytes a second up and down."""

    compute_seconds: float
    push_bytes_per_second: float
    pull_bytes_per_second: float

    @property
    def link(self) -> float:
        """The slower direction, in bytes a second."""
        return min(self.push_bytes_per_second, self.pull_bytes_per_second)


@dataclass(frozen=True)
class AutoState:
    """The state of the search. `seconds` are the step times since `codec` was begun, with the uncounted first one."""

    codec: str = AUTO_FIRST
    reason: str = f"{AUTO_FIRST} first, to be measured"
    seconds: tuple[float, ...] = ()
    settled: bool = False
    link: float = 0.0
    took: tuple[tuple[str, float], ...] = ()


def predict(seconds: float, compute_seconds: float, bytes_now: float, bytes_then: float) -> float:
    """Predict the seconds of a step with `bytes_then` bytes: only the time that compute did not hide changes."""
    shown = max(0.0, seconds - compute_seconds)
    return seconds - shown + shown * bytes_then / bytes_now


def choose(
    took: Mapping[str, float], compute_seconds: float, sizes: Mapping[str, float], ladder: Sequence[str] = LADDER
) -> tuple[str, str]:
    """Choose the next codec; return (codec, reason).

    `took` has the measured seconds of the codecs that were tried, bf16 among them. Other codecs count with their
    predicted time.
    """
    base = took[ladder[0]]
    promised = {
        codec: took.get(codec, predict(base, compute_seconds, sizes[ladder[0]], sizes[codec])) for codec in ladder
    }
    best = ladder[0]
    for codec in ladder[1:]:
        share = KEEP if codec in took else WORTH
        if promised[codec] <= share * promised[best]:
            best = codec
    times = ", ".join(f"{codec} {seconds:.2f} s" for codec, seconds in took.items())
    if best in took:
        return best, f"a step took: {times}; compute {compute_seconds:.2f} s of it"
    return best, f"a step took: {times}, compute {compute_seconds:.2f} s of it; {best} promises {promised[best]:.2f} s"


def after_step(
    state: AutoState, seconds: float, speeds: Speeds, sizes: Mapping[str, float], ladder: Sequence[str] = LADDER
) -> AutoState:
    """Return the state after a step that took `seconds`. The state's codec is the codec of the next step."""
    state = replace(state, seconds=(*state.seconds, seconds)[-1 - TRIAL_STEPS :])
    if len(state.seconds) <= TRIAL_STEPS:
        return state
    if state.settled:
        ratio = speeds.link / state.link if state.link else 1.0
        if 1 / CHANGED <= ratio <= CHANGED:
            return state
        faster = "faster" if ratio > 1 else "slower"
        reason = f"the slowest link is {max(ratio, 1 / ratio):.1f} times {faster} than when {state.codec} was chosen"
        return AutoState(ladder[0], f"{reason}; measuring again")
    took = {**dict(state.took), state.codec: statistics.median(state.seconds[1:])}
    codec, reason = choose(took, speeds.compute_seconds, sizes, ladder)
    reason += f"; slowest link {speeds.link / 1e6:.0f} MB/s"
    if codec in took:
        return AutoState(codec, reason, settled=True, link=speeds.link, took=tuple(took.items()))
    return AutoState(codec, reason, took=tuple(took.items()))
