"""The decisions in a job's life, as pure functions that return the decision and its reason."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from gradstream.coordinator.state.state import JobRecord, StepTotals
from gradstream.core.job_states import ENDED, PAUSED, PLANNING, QUEUED
from gradstream.core.plan.leases import MAX_SHOWN, assign_slots, numbers_text
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.recipe.rounds import Rounds
from gradstream.proto.v1 import jobs_pb2


def next_job(jobs: Iterable[JobRecord]) -> JobRecord | None:
    """Return the queued job with the lowest rank: a resumed job, else the oldest one."""
    queued = [job for job in jobs if job.state == QUEUED]
    return min(queued, key=lambda job: job.rank, default=None)


def missing_nodes(recipe: Recipe, num_servers: int, num_workers: int, need_workers: bool) -> list[tuple[str, str]]:
    """The nodes that a plan still needs, as (what is missing, whom the job waits for); empty when it can be made.

    A job that goes on after the loss of a server does not wait for workers: they may join at any time. A job with a
    pipeline begins once there are workers for one replica.
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
    """The outcome for a job at a step boundary."""

    GO_ON = "go on"
    PAUSE = "pause"
    STOP = "stop"
    SNAPSHOT = "snapshot"  # the servers write a checkpoint of the current version, because no step is about to end
    REPLAN = "replan"  # a new epoch starts from the checkpoint of the current version
    FINISH = "finish"
    FAIL = "fail"


@dataclass(frozen=True)
class JobSight:
    """The current situation of a job with a plan: the input of `judge_end`."""

    desired: str
    state: jobs_pb2.JobState.ValueType
    version: int
    rounds: Rounds
    # The version at which the leader answered a request to halt, if it did.
    halted_version: int | None
    checkpoints: Collection[int]
    # Whether the last validation pass is complete, or the recipe has none.
    validated: bool
    # Whether workers compute the step under way.
    any_worker: bool
    # Why a fine-tuning ends before its last step.
    early: str = ""
    # The version at which the plan began. Later steps are lost with a server until a checkpoint has them.
    start_version: int = 0
    # Whether all servers are present and every step that the leader has decided was reported.
    settled: bool = True
    # Why no worker can compute a step any more.
    failing: str = ""
    # Whether a person waits for a checkpoint.
    checkpoint_awaited: bool = False
    # Expected seconds until the round under way ends, if that is known.
    seconds_to_commit: float | None = None

    @property
    def done(self) -> bool:
        """Whether all steps are committed."""
        return self.version >= self.rounds.last_version

    @property
    def place(self) -> str:
        """The current version for people."""
        return self.rounds.version_text(self.version)

    @property
    def boundary(self) -> int | None:
        """The version at which the leader has a checkpoint written; None while there is none."""
        if self.halted_version is not None:
            return self.halted_version
        return self.version if self.done else None

    @property
    def saved(self) -> bool:
        """Whether the current version has a checkpoint, or is the one at which the plan began."""
        return self.version == self.start_version or self.version in self.checkpoints


def judge_end(job: JobSight) -> tuple[Ending, str]:
    """Decide whether a job with a plan rests, ends or goes on.

    A stop, a failure or a pause never loses the servers' state: where no worker can end the step, the servers first
    write a checkpoint of the current version.
    """
    if job.early:
        return Ending.FINISH, f"ended early at {job.place}: {job.early}"
    boundary, paused = job.boundary, job.state == PAUSED
    if job.done and job.version in job.checkpoints and job.validated:
        return Ending.FINISH, f"all {job.rounds.num_steps} steps are done"
    if job.desired == "stop":
        if boundary is not None and boundary in job.checkpoints:
            return Ending.STOP, f"stopped at {job.rounds.version_text(boundary)}, with a checkpoint"
        if boundary is None and job.saved and job.settled and (paused or not job.any_worker):
            kept = ", with a checkpoint" if job.version in job.checkpoints else ""
            step = "round" if job.rounds.is_round(job.version) else "step"
            why = "while paused" if paused else f"no worker was live to finish the {step}"
            return Ending.STOP, f"stopped at {job.place}{kept}; {why}"
    if job.desired == "pause" and not paused:
        if boundary is not None:
            return Ending.PAUSE, f"paused at {job.place}"
        if not job.any_worker:
            return Ending.PAUSE, f"paused at {job.place}; no worker was live"
    if job.desired == "run" and job.failing and job.saved and job.settled:
        return Ending.FAIL, job.failing
    replan = job.desired == "replan" and not job.done
    rests = paused or (replan and boundary is not None) or not job.any_worker
    if replan and rests and job.saved and job.settled:
        return Ending.REPLAN, f"a new plan starts from {job.place}"
    wanted = job.desired != "run" or job.failing or job.checkpoint_awaited
    if rests and wanted and not job.saved and boundary != job.version:
        return Ending.SNAPSHOT, f"the checkpoint of {job.place}"
    return Ending.GO_ON, ""


def judge_replan(planned: Sequence[str], offered: Sequence[str], step: int) -> tuple[bool, str]:
    """Decide whether a new plan on the servers `offered` differs from the current one on `planned`, and say how.

    Both are names of servers. The new plan would begin at the boundary at which `step` steps are done.
    """
    joining = [name for name in offered if name not in planned]
    leaving = [name for name in planned if name not in offered]
    if not joining and not leaving:
        return False, (
            f"nothing would change: the plan has every server that it can use ({', '.join(planned)}); start another "
            f"one with `gradstream serve parameter-server`, or take one out with --without SERVER"
        )
    moves = [f"{', '.join(names)} {way}" for names, way in ((joining, "in"), (leaving, "out")) if names]
    change = f"{len(planned)} → {_count(len(offered), 'server')} ({'; '.join(moves)})"
    return True, f"replanning at step {step}: {change}"


def order_text(job: JobSight) -> str:
    """Describe for people how a pause or a stop will end; "" when none is under way."""
    doing = {"pause": "pausing", "stop": "stopping"}.get(job.desired)
    if doing is None or job.state in ENDED or (job.state == PAUSED and job.desired == "pause"):
        return ""
    if job.state == PLANNING:
        return f"{doing} once its servers are back or given up"
    boundary = job.version if job.state == PAUSED else job.boundary
    if boundary is not None:
        written = "" if boundary in job.checkpoints else "; its checkpoint is written"
        return f"{doing} at {job.rounds.version_text(boundary)}{written}"
    step = "round" if job.rounds.is_round(job.version) else "step"
    if not job.any_worker:
        return f"{doing} at {job.place}; no worker is live to finish the {step}, a checkpoint follows"
    left = ""
    if step == "round" and job.seconds_to_commit is not None:
        left = f", in about {job.seconds_to_commit:.0f} s"
    return f"{doing} at the end of {job.rounds.commit_text(job.version)}{left}; a checkpoint follows"


def judge_skips(totals: StepTotals, epoch: int, recipe: Recipe) -> str:
    """Why a job fails after too many consecutive skips, the last one in `epoch`; "" to go on."""
    last, most = totals.last, recipe.training.max_consecutive_skips
    if last is None or last.epoch != epoch or not last.skipped or last.consecutive_skips < most:
        return ""
    steps = "rounds" if recipe.rounds.is_round(last.step) else "steps"
    end = recipe.rounds.commit_text(last.step)
    return (
        f"{last.consecutive_skips} {steps} in a row up to {end} had a loss or gradient that was not finite; lower "
        f"optimizer.learning_rate (now {recipe.optimizer.learning_rate:g}), lengthen schedule.warmup_steps or check "
        f"the data, then submit again"
    )


def lease_slots(
    holders: Sequence[str],
    workers: Sequence[str],
    resting: bool,
    names: Mapping[str, str],
    formed: str = "",
    slot_seconds: Mapping[str, float] | None = None,
    slot_costs: Sequence[float] = (),
) -> tuple[list[str], str]:
    """Assign the slots to workers; return the holders and the reason. While a job rests, no slot has a holder.

    `workers` are node ids, oldest first; in a job with a pipeline only the first worker of each replica. `names` has
    the names of all members. `formed` says how the replicas of a pipeline were formed. `slot_seconds` has each
    worker's time for a slot, if it was measured. `slot_costs` are the costs of slots that differ: `slot_seconds` is
    then for a cost of 1.
    """
    if resting:
        return [""] * len(holders), "leases: none, the job rests"
    assigned, reason = assign_slots(holders, workers, slot_seconds, slot_costs)
    if not workers:
        return assigned, f"leases: none, {formed or reason}"
    if formed:
        reason = f"{formed}; {reason}"
    shares: dict[str, list[int]] = {}
    for slot, holder in enumerate(assigned):
        shares.setdefault(holder, []).append(slot)
    shown = [f"{names[holder]}: {numbers_text(slots)}" for holder, slots in sorted(shares.items())[:MAX_SHOWN]]
    rest = [f"and {len(shares) - MAX_SHOWN} more workers"] if len(shares) > MAX_SHOWN else []
    return assigned, f"leases: {reason} → {'; '.join([*shown, *rest])}"


def joined(numbers: Iterable[int]) -> str:
    """Numbers separated by commas, for people."""
    return ", ".join(map(str, numbers))


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _are(number: int) -> str:
    return "none is live" if not number else "1 is live" if number == 1 else f"{number} are live"
