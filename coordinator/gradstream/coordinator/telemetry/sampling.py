"""Decide which timelines workers report, so that hundreds of workers cost the coordinator a bounded part of a core."""

from __future__ import annotations

from gradstream.core.telemetry.sampling import Sampling

MAX_REPORTS_PER_SECOND = 128.0
"""Maximum number of reports per second of all workers together; a report without spans takes a fraction of a ms."""
MAX_SPAN_WORKERS = 32
"""About how many workers report the spans of a version; up to this number of workers all do."""
ASSUMED_STEP_SECONDS = 1.0
"""The duration of a step that is not measured yet."""
LOWERED_AT = 4
"""The interval is lowered once an interval this many times shorter is enough, so that it does not go up and down."""


def decide_sampling(
    current: Sampling, num_workers: int, num_slots: int, step_seconds: float | None
) -> tuple[Sampling, str]:
    """Decide on the sampling of a job's timelines; return (sampling, reason).

    `num_workers` is the number of workers that hold slots, `step_seconds` the median duration of a step, None while it
    is not known.
    """
    seconds = ASSUMED_STEP_SECONDS if step_seconds is None else step_seconds
    interval = 1
    while num_workers > MAX_REPORTS_PER_SECOND * max(seconds, 1e-3) * interval:
        interval *= 2
    if interval < current.interval_versions < LOWERED_AT * interval:
        interval = current.interval_versions
    num_groups = 1 if num_workers <= MAX_SPAN_WORKERS else -(-num_slots // MAX_SPAN_WORKERS)
    share = f"one in {interval} versions, with spans of one in {num_groups} slots"
    return Sampling(interval, num_groups), f"{num_workers} workers, {seconds:.3g} s a step: {share}"
