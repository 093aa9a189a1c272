"""The coordinator's timing settings, and their parser for the command line."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields

from gradstream.core.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Timing:
    """The coordinator's timing settings, in seconds unless the name says otherwise."""

    heartbeat_seconds: float = 1.0
    # A node without a heartbeat for this time is silent: other workers get its slots.
    lease_seconds: float = 10.0
    # After this time the coordinator tests whether the machine of a silent parameter server refuses connections.
    server_grace_seconds: float = 3.0
    # How long a job waits for the state of a silent parameter server, from the moment at which others are back.
    reunion_seconds: float = 30.0
    # Time for the workers of the lease table to come back after a restart of the coordinator.
    adopt_grace_seconds: float = 15.0
    # Between two checks of the clock. The coordinator acts on events at once.
    tick_seconds: float = 0.2
    # Maximum between two attempts of a failed operation, such as a write to a full disk.
    retry_seconds: float = 2.0
    # A worker that cannot reach a parameter server or a neighbour for this time loses its slots.
    unreachable_seconds: float = 30.0
    # A worker without progress for `stall_factor` times the time of a slot loses its slots, but not before
    # `stall_seconds`; before the first step, after `first_slot_seconds`.
    stall_seconds: float = 30.0
    stall_factor: float = 10.0
    first_slot_seconds: float = 600.0
    # How long a node is benched the first time. Each later time takes twice as long, up to 16 times this value.
    bench_seconds: float = 60.0


def parse_timing(settings: Iterable[str]) -> Timing:
    """Parse settings like "lease_seconds=5". Raises ConfigError."""
    known = [field.name for field in fields(Timing)]
    values: dict[str, float] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in known:
            names = ", ".join(known)
            raise ConfigError(f"--timing {setting}: there is no '{key}'{nearest(key, known)}; one of {names}")
        try:
            values[key] = float(text)
        except ValueError:
            values[key] = math.nan
        if not 0 < values[key] < 1e9:
            raise ConfigError(f"--timing {setting}: write a number above 0, like {key}=5")
    return Timing(**values)


# Short waits are normal in a step. A wait is shown once it lasts several times as long as a usual step, and not before
# `SHORTEST_WAIT_SECONDS`. While no step time is known, a wait is shown after `FIRST_WAIT_SECONDS`.
USUAL_STEPS = 3.0
SHORTEST_WAIT_SECONDS = 2.0
FIRST_WAIT_SECONDS = 10.0


def judge_wait(waited_seconds: float, step_seconds: float | None, step: str = "step") -> tuple[bool, str]:
    """Judge whether a running job's step is late after `waited_seconds` without progress, and why.

    `step_seconds` is the usual time of a step; None if it is not known. `step` is "round" in a round of local steps.
    """
    most = FIRST_WAIT_SECONDS if step_seconds is None else max(SHORTEST_WAIT_SECONDS, USUAL_STEPS * step_seconds)
    usual = f"no {step} time is known yet" if step_seconds is None else f"a {step} usually takes {step_seconds:.2g} s"
    if waited_seconds < most:
        return False, f"{waited_seconds:.0f} s of at most {most:.0f} s on the way of a {step}; {usual}"
    return True, f"no progress for {waited_seconds:.0f} s; {usual}"


def unix_ms() -> int:
    """Now."""
    return int(time.time() * 1000)
