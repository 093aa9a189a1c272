"""Counts of what was stored since this process began, by job, for the metrics. The ledger itself is in the state.

A step that is recomputed after a walk back is stored under another epoch and counts again, so no count ever falls.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, plan_pb2

MAX_JOBS = 4
"""Number of jobs whose counts are kept: the last ones of which something was stored."""


@dataclass
class JobCounts:
    """What was stored of one job."""

    steps: int = 0
    commits: int = 0
    tokens: int = 0
    samples: int = 0
    skipped: int = 0
    payload_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By direction (push or pull) and codec."""
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    checkpoint_unix_ms: int = 0
    """When the last checkpoint was written; 0 before the first."""

    def add_step(self, report: coordinator_pb2.ReportStepRequest) -> None:
        """Count a commit."""
        self.steps += report.num_steps if report.HasField("num_steps") else 1
        self.commits += 1
        self.tokens += report.num_tokens
        self.samples += report.num_samples
        self.skipped += report.skipped
        self.payload_bytes["push", codec_name(report.push_codec)] += report.pushed_bytes
        self.payload_bytes["pull", codec_name(report.pull_codec)] += report.pulled_bytes

    def add_checkpoint(self, checkpoint: jobs_pb2.Checkpoint) -> None:
        """Count a checkpoint whose manifest was written."""
        self.checkpoints += 1
        self.checkpoint_bytes += checkpoint.num_bytes
        self.checkpoint_unix_ms = checkpoint.unix_ms


class Counts:
    """The counts of the last jobs."""

    def __init__(self) -> None:
        self.jobs: OrderedDict[str, JobCounts] = OrderedDict()

    def take(self, job_id: str, items: Sequence[jobs_pb2.WatchJobResponse]) -> None:
        """Count items of a job's history that were just stored."""
        for item in items:
            kind = item.WhichOneof("item")
            if kind == "step":
                self._job(job_id).add_step(item.step)
            elif kind == "checkpoint":
                self._job(job_id).add_checkpoint(item.checkpoint)

    def _job(self, job_id: str) -> JobCounts:
        counts = self.jobs.setdefault(job_id, JobCounts())
        self.jobs.move_to_end(job_id)
        while len(self.jobs) > MAX_JOBS:
            self.jobs.popitem(last=False)
        return counts


def codec_name(wire: plan_pb2.Codec.ValueType) -> str:
    """A codec's name in recipes; a number for one that this version does not know."""
    if wire not in plan_pb2.Codec.values():
        return str(int(wire))
    return plan_pb2.Codec.Name(wire).removeprefix("CODEC_").lower().replace("_", "-")
