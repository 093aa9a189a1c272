"""The decisions in a job's life, as pure functions that return the decision and its reason."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from gradstream.coordinator.state.state import JobRecord, StepTotals
from gradstream.core.job_states import PAUSED, QUEUED
from gradstream.core.plan.leases import assign_slots
from gradstream.core.recipe.recipe import Recipe
from gradstream.proto.v1 import jobs_pb2


def next_job(jobs: Iterable[JobRecord]) -> JobRecord | None:
    """The queued job whose turn it is: the one of the lowest rank, which is the oldest or one resumed since."""
    queued = [job for job in jobs if job.state == QUEUED]
    return min(queued, key=lambda job: job.rank, default=None)


def missing_nodes(recipe: Recipe, num_servers: int, num_workers: int, need_workers: bool) -> list[tuple[str, str]]:
    """What a plan still lacks, as (what, whom); empty when it can be made.

    A job that goes on after the loss of a server does not wait for workers: they come and go. One with a pipeline
    begins when there are workers for a replica.
    """
    missing = []
    wanted = recipe.cluster.min_servers
    if num_servers < wanted:
        missing.append((f"{_count(wanted, 'parameter server')}, {_are(num_servers)}", "a parameter server to register"))
    wanted = max(recipe.cluster.min_workers, recipe.pipeline.min_workers)
    if need_workers and num_workers < wanted:
        missing.append((f"{_count(wanted, 'worker')}, {_are(num_workers)}", "a worker to register"))
    return missing


class Ending(Enum):
    """Where a job goes at a step boundary."""

    GO_ON = "go on"
    PAUSE = "pause"
    STOP = "stop"
    SNAPSHOT = "snapshot"  # the servers write what they hold, where no step is about to end
    REPLAN = "replan"  # a new epoch starts from the checkpoint of the version at hand
    FINISH = "finish"
    FAIL = "fail"


@dataclass(frozen=True)
class JobSight:
    """How a job with a plan looks at the moment."""

    desired: str
    state: jobs_pb2.JobState.ValueType
    version: int
    num_steps: int
    # Where the leader answered a request to halt, if it did.
    halted_version: int | None
    checkpoints: Collection[int]
    # The last validation pass is complete, or none is wanted.
    validated: bool
    # Somebody computes the step under way.
    any_worker: bool
    # Why a fine-tuning is to end before its last step.
    early: str = ""
    # Where the plan began: what was computed since is at the servers alone until there is a checkpoint of it.
    start_version: int = 0
    # The servers are all there, and every step that they have decided was reported.
    settled: bool = True
    # Why nobody can compute a step any more.
    failing: str = ""
    # A person waits for a checkpoint.
    checkpoint_awaited: bool = False

    @property
    def boundary(self) -> int | None:
        """The version at which the leader has a checkpoint written, if it has."""
        if self.halted_version is not None:
            return self.halted_version
        return self.version if self.version >= self.num_steps else None

    @property
    def saved(self) -> bool:
        """Whether the version that is known here is on the disk, or follows from the seed."""
        return self.version == self.start_version or self.version in self.checkpoints


def judge_end(job: JobSight) -> tuple[Ending, str]:
    """Decide whether a job with a plan rests, ends or goes on.

    What the servers hold is not given up by a stop, or a failure, that no worker is there for, nor left without a
    checkpoint by a pause.
    """
    if job.early:
        return Ending.FINISH, f"ended early at version {job.version}: {job.early}"
    boundary, paused = job.boundary, job.state == PAUSED
    if job.version >= job.num_steps and job.version in job.checkpoints and job.validated:
        return Ending.FINISH, f"all {job.num_steps} steps are done"
    if job.desired == "stop":
        if boundary is not None and boundary in job.checkpoints:
            return Ending.STOP, f"stopped at version {boundary}, with a checkpoint"
        if boundary is None and job.saved and job.settled and (paused or not job.any_worker):
            kept = ", with a checkpoint" if job.version in job.checkpoints else ""
            why = "while paused" if paused else "no worker was live to finish the step"
            return Ending.STOP, f"stopped at version {job.version}{kept}; {why}"
    if job.desired == "pause" and not paused:
        if boundary is not None:
            return Ending.PAUSE, f"paused at version {job.version}"
        if not job.any_worker:
            return Ending.PAUSE, f"paused at version {job.version}; no worker was live"
    if job.desired == "run" and job.failing and job.saved and job.settled:
        return Ending.FAIL, job.failing
    replan = job.desired == "replan" and job.version < job.num_steps
    rests = paused or (replan and boundary is not None) or not job.any_worker
    if replan and rests and job.saved and job.settled:
        return Ending.REPLAN, f"a new plan starts from version {job.version}"
    wanted = job.desired != "run" or job.failing or job.checkpoint_awaited
    if rests and wanted and not job.saved and boundary != job.version:
        return Ending.SNAPSHOT, f"the checkpoint of version {job.version}"
    return Ending.GO_ON, ""


def judge_replan(planned: Sequence[str], offered: Sequence[str], version: int) -> tuple[bool, str]:
    """Decide whether a new plan on the servers `offered` differs from the one on those `planned`, and say how. Both are
    names; `version` is that of the boundary at which the new plan would begin."""
    joining = [name for name in offered if name not in planned]
    leaving = [name for name in planned if name not in offered]
    if not joining and not leaving:
        return False, (
            f"nothing would change: the plan has every server that it can use ({', '.join(planned)}); start another "
            f"one with `gradstream serve parameter-server`, or take one out with --without SERVER"
        )
    moves = [f"{', '.join(names)} {way}" for names, way in ((joining, "in"), (leaving, "out")) if names]
    change = f"{len(planned)} → {_count(len(offered), 'server')} ({'; '.join(moves)})"
    return True, f"replanning at step {version}: {change}"


def judge_skips(totals: StepTotals, epoch: int, recipe: Recipe) -> str:
    """Why a job fails whose last steps, the last one of this epoch, were skipped in a row; "" to go on."""
    last, most = totals.last, recipe.training.max_consecutive_skips
    if last is None or last.epoch != epoch or not last.skipped or last.consecutive_skips < most:
        return ""
    return (
        f"{last.consecutive_skips} steps in a row up to step {last.step} had a loss or gradient that was not finite; "
        f"lower optimizer.learning_rate (now {recipe.optimizer.learning_rate:g}), lengthen schedule.warmup_steps or "
        f"check the data, then submit again"
    )


def lease_slots(
    holders: Sequence[str], workers: Sequence[str], resting: bool, names: Mapping[str, str], formed: str = ""
) -> tuple[list[str], str]:
    """Who computes which slot. `workers` are node ids, oldest first; a resting job's slots are all free.

    In a job with a pipeline they are the replicas' first workers, `names` those of all members, and `formed` says how
    the replicas came about.
    """
    if resting:
        return [""] * len(holders), "leases: none, the job rests"
    assigned, reason = assign_slots(holders, workers)
    if not workers:
        return assigned, f"leases: none, {formed or reason}"
    if formed:
        reason = f"{formed}; {reason}"
    shares: dict[str, list[str]] = {}
    for slot, holder in enumerate(assigned):
        shares.setdefault(holder, []).append(str(slot))
    who = "; ".join(f"{names[holder]}: {', '.join(slots)}" for holder, slots in sorted(shares.items()))
    return assigned, f"leases: {reason} → {who}"


def joined(numbers: Iterable[int]) -> str:
    """Numbers for people."""
    return ", ".join(map(str, numbers))


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _are(number: int) -> str:
    return "none is live" if not number else "1 is live" if number == 1 else f"{number} are live"
