"""The active job in memory: a view of its stored record, and facts that only this process knows."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from gradstream.coordinator.jobs.decisions import JobSight
from gradstream.coordinator.jobs.journal import Retry
from gradstream.coordinator.nodes.benches import Benches
from gradstream.coordinator.nodes.reunion import Reunion
from gradstream.coordinator.planning.needs import ServerBytes, server_bytes
from gradstream.coordinator.state.state import JobRecord, State, StepTotals
from gradstream.core.data.manifest import Manifest, parse_manifest
from gradstream.core.job_states import PAUSED
from gradstream.core.plan.leases import Replica
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.early_stopping import best_version, stops_early
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.recipe.rounds import Rounds
from gradstream.core.telemetry.sampling import Sampling
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, plan_pb2

NUM_RATE_STEPS = 20
RETRY_SECONDS = 30.0
"""Maximum between two attempts to make a plan."""


def nothing() -> None:
    """Do nothing: the release of a checkpoint that is not pinned."""


@dataclass
class Pace:
    """Rates over the last commits. The leader's clock times commits; the coordinator's clock times their absence."""

    steps: deque[tuple[coordinator_pb2.ReportStepRequest, float]] = field(
        default_factory=lambda: deque(maxlen=NUM_RATE_STEPS)
    )

    def add(self, report: coordinator_pb2.ReportStepRequest, now: float) -> None:
        """Add a step that was reported at `now`."""
        self.steps.append((report, now))

    def per_second(self, now: float, rounds: Rounds) -> tuple[float, float, float]:
        """Steps, tokens and pushed bytes per second; zeros before the second commit. Falls while no commits come.

        Each inner step of a round counts.
        """
        if len(self.steps) < 2:
            return 0.0, 0.0, 0.0
        counted = [report for report, _ in list(self.steps)[1:]]
        first, last = self.steps[0][0], self.steps[-1][0]
        seconds = max(1, last.unix_ms - first.unix_ms) / 1000
        overdue = now - self.steps[-1][1] - 2 * seconds / len(counted) - 2.0
        seconds += max(0.0, overdue)
        return (
            sum(len(rounds.steps_from(report.step)) for report in counted) / seconds,
            sum(report.num_tokens for report in counted) / seconds,
            sum(report.pushed_bytes for report in counted) / seconds,
        )


class WaitClock:
    """The time at which each wait began, in Unix milliseconds."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, str], int] = {}

    def stamp(self, waits: Sequence[tuple[str, str]], unix_ms: int) -> list[jobs_pb2.Wait]:
        """Return the current waits with the time at which each began; forget all others."""
        self._since = {wait: self._since.get(wait, unix_ms) for wait in waits}
        return [jobs_pb2.Wait(what=what, whom=whom, since_unix_ms=self._since[what, whom]) for what, whom in waits]


@dataclass(frozen=True)
class Refusal:
    """Why the nodes of the last attempt cannot hold the plan. The next attempt waits for another set of nodes."""

    reason: str = ""
    nodes: frozenset[str] | None = None


@dataclass(frozen=True)
class Hold:
    """A problem of the storage for which planning waits, and the time (our clock) of the next attempt.

    Both are empty when there is no such problem.
    """

    cause: str = ""
    until: float = 0.0


@dataclass
class Planning:
    """The attempts to make the job's plan: the current attempt, and the conditions for the next one."""

    task: asyncio.Task[None] | None = None
    # Why no plan could be made or stored, and the time of the next attempt.
    retry: Retry = field(default_factory=lambda: Retry(RETRY_SECONDS))
    # The reason that the last event gave for a wait for servers.
    server_wait: str = ""
    refusal: Refusal = Refusal()
    hold: Hold = Hold()


@dataclass(frozen=True)
class GivenWork:
    """The slots that a worker was told to compute in the round from `version`, and those that another computes too.

    `session` is the worker's session in which it was told.
    """

    session: int
    epoch: int
    version: int
    slots: tuple[int, ...]
    copies: tuple[int, ...]


@dataclass
class ActiveJob:
    """The active job: the only one that is planning, running, or paused with its plan held."""

    record: JobRecord
    recipe: Recipe
    manifest: Manifest
    # Whether the plan also waits for workers: when the job begins, and after a person has resumed it.
    need_workers: bool = True
    plan: Plan | None = None
    plan_message: plan_pb2.Plan | None = None
    totals: StepTotals = field(default_factory=StepTotals)
    pace: Pace = field(default_factory=Pace)
    # The version at which the leader answered a request to halt. The report of a step under way may come later.
    halted_version: int | None = None
    checkpoints: set[int] = field(default_factory=set)
    # Reports of checkpoint files whose manifest is not written yet: version → server → report.
    files: dict[int, dict[int, coordinator_pb2.ReportCheckpointRequest]] = field(default_factory=dict)
    # Reports of residual files whose manifest is not written yet: version → slot → report.
    residuals: dict[int, dict[int, coordinator_pb2.ReportResidualRequest]] = field(default_factory=dict)
    # For each slot, the last version at which a worker took it over without a residual.
    fresh_from: dict[int, int] = field(default_factory=dict)
    # The loss of each complete validation pass, by version.
    validations: dict[int, float] = field(default_factory=dict)
    holders: list[str] = field(default_factory=list)
    # The last holder of each slot under this plan. While a job rests, its slots have no holders.
    last_holders: list[str] = field(default_factory=list)
    # The replicas of a job with a pipeline.
    replicas: list[Replica] = field(default_factory=list)
    # The addresses of the workers of a stored lease table, by node id, for workers that have not registered again yet.
    addresses: dict[str, str] = field(default_factory=dict)
    lease_number: int = 0
    lease_reason: str = ""
    # Whether to publish a lease table although no slot changes its holder.
    leases_due: bool = False
    # The time (our clock) at which each worker of the table got slots.
    given_at: dict[str, float] = field(default_factory=dict)
    # What each worker was told to compute in a round, last. It is not stored.
    work: dict[str, GivenWork] = field(default_factory=dict)
    # The last moves and copies of slots in the round under way, for people; empty if there were none.
    round_line: str = ""
    # The silent servers of the plan, and how long the job waits for their state.
    reunion: Reunion = field(default_factory=Reunion)
    # Nodes that get no work of the job for a time.
    benches: Benches = field(default_factory=Benches)
    # Why no worker can go on. The job fails for this reason once the servers' state is in a checkpoint.
    failing: str = ""
    # The leader's session in which a checkpoint at the next commit was requested; 0 without a request.
    boundary_session: int = 0
    # The version of which the servers were requested to write a checkpoint without a commit, and when (our clock).
    snapshot: int = -1
    snapshot_at: float = 0.0
    # A person waits for a checkpoint of a later version than this one.
    checkpoint_after: int | None = None
    # Until this time (our clock) the workers of the stored lease table count as live: after a restart of the
    # coordinator they register one by one.
    expect_holders_until: float = 0.0
    # Which timelines the workers report.
    sampling: Sampling = field(default_factory=Sampling)
    # The time (our clock) of the job's last progress.
    progress_at: float = 0.0
    waits: WaitClock = field(default_factory=WaitClock)
    # The predicted memory of each server of the plan.
    predicted_bytes: list[ServerBytes] = field(default_factory=list)
    planning: Planning = field(default_factory=Planning)
    # Unpins the checkpoint from which the plan starts. Called once this plan has a newer one.
    release_start: Callable[[], None] = nothing
    # Manifests that could not be written: version → (time of the next attempt (our clock), cause).
    unwritten: dict[int, tuple[float, str]] = field(default_factory=dict)
    writing: asyncio.Task[None] | None = None

    @classmethod
    def load(cls, record: JobRecord, state: State) -> ActiveJob:
        """Load the view of a job from the state, with its plan if nodes may still hold the plan."""
        active = cls(record, parse_recipe(record.recipe_json), parse_manifest(record.manifest_json))
        active.holders = [""] * active.recipe.training.num_slots
        active.last_holders = list(active.holders)
        active.totals = state.step_totals(record.job_id, record.epoch, record.start_version)
        active.take_validations(state)
        stored = state.load_plan(record.job_id, record.epoch) if record.plan_held else None
        if stored is not None:
            active.take_plan(plan_pb2.Plan.FromString(stored))
            for report in state.checkpoint_files(record.job_id, record.epoch):
                active.files.setdefault(report.version, {})[report.server] = report
            for residual in state.residuals(record.job_id, record.epoch):
                active.take_residual(residual)
        if record.leases:
            table = plan_pb2.LeaseTable.FromString(record.leases)
            active.lease_number = table.number
            active.addresses = {w.node_id: w.address for replica in table.replicas for w in replica.workers}
            if active.plan is not None and table.epoch == record.epoch and len(table.holders) == len(active.holders):
                active.take_holders(list(table.holders))
                active.replicas = [
                    Replica(replica.number, tuple(worker.node_id for worker in replica.workers))
                    for replica in table.replicas
                ]
                active.lease_reason = table.reason
        return active

    def take_plan(self, message: plan_pb2.Plan, plan: Plan | None = None) -> None:
        """Make `message` the current plan."""
        self.plan_message = message
        self.plan = plan if plan is not None else Plan.from_proto(message)
        self.predicted_bytes = [
            server_bytes(self.recipe, self.plan.fragments_of(index), self.plan.tensors)
            for index in range(len(self.plan.servers))
        ]
        self.reunion = Reunion(self.reunion.reunion_seconds)
        self.pace.steps.clear()
        self.halted_version, self.need_workers = None, False
        self.planning.refusal, self.planning.server_wait = Refusal(), ""
        self.expect_holders_until, self.boundary_session = 0.0, 0
        self.files.clear()
        self.unwritten.clear()
        self.residuals.clear()
        self.fresh_from.clear()
        self.last_holders = [""] * len(self.holders)
        self.replicas = []

    def written(self, version: int) -> None:
        """Note that the checkpoint of a version is complete.

        Drops the reports of this checkpoint, and of older ones that could not be written. Unpins the checkpoint from
        which the plan started: every server has loaded it.
        """
        for done in [known for known in self.files if known <= version]:
            if done == version or done in self.unwritten:
                self.files.pop(done)
                self.residuals.pop(done, None)
                self.unwritten.pop(done, None)
        self.release_start()

    def take_validations(self, state: State) -> None:
        """Load the losses of the complete validation passes."""
        self.validations = {done.version: done.loss for done in state.validations(self.job_id)}

    def take_leases(self, number: int, holders: list[str], replicas: list[Replica], reason: str, now: float) -> None:
        """Put a stored lease table in force."""
        before = set(self.members)
        self.take_holders(holders)
        self.replicas, self.lease_number, self.lease_reason = replicas, number, reason
        self.given_at = {worker: self.given_at.get(worker, now) if worker in before else now for worker in self.members}
        self.leases_due, self.progress_at = False, now

    def take_holders(self, holders: list[str]) -> None:
        """Set the slots' holders."""
        self.holders = holders
        self.last_holders = [holder or last for holder, last in zip(holders, self.last_holders, strict=True)]

    def work_of(self, worker: str) -> GivenWork | None:
        """What a worker was told to compute in the round under way; None if it computes the slots that it holds."""
        given = self.work.get(worker)
        return (
            given if given is not None and (given.epoch, given.version) == (self.record.epoch, self.version) else None
        )

    def take_residual(self, report: coordinator_pb2.ReportResidualRequest) -> None:
        """Note the report of a slot's residual file, or that a worker took the slot over without a residual."""
        if report.file:
            self.residuals.setdefault(report.version, {})[report.slot] = report
        else:
            self.fresh_from[report.slot] = max(report.version, self.fresh_from.get(report.slot, 0))

    @property
    def job_id(self) -> str:
        return self.record.job_id

    @property
    def state(self) -> jobs_pb2.JobState.ValueType:
        return self.record.state

    @property
    def version(self) -> int:
        """The version that the current trajectory has reached: the number of its commits."""
        return self.totals.version

    @cached_property
    def rounds(self) -> Rounds:
        """The steps for which each version stands."""
        return self.recipe.rounds

    def take_recipe(self, recipe: Recipe) -> None:
        """Take the recipe of a plan, which may have decided what was left to it."""
        self.recipe = recipe
        self.__dict__.pop("rounds", None)

    @property
    def place(self) -> str:
        """The current version for people."""
        return self.rounds.version_text(self.version)

    @property
    def done(self) -> bool:
        """Whether all steps are committed."""
        return self.version >= self.rounds.last_version

    @property
    def fully_validated(self) -> bool:
        """Whether no validation pass is missing at the end."""
        return not self.recipe.validation.interval_steps or self.rounds.last_version in self.validations

    @property
    def early_ending(self) -> str:
        """Why the job ends before its last step; "" to go on. Stays "" until the result has a checkpoint."""
        tuning = self.recipe.fine_tuning
        best, reason = stops_early(self.validations, tuning.patience if tuning is not None else 0)
        return reason if best in self.checkpoints else ""

    @property
    def candidates(self) -> set[int]:
        """The checkpoints that may become a fine-tuning's result: the best one so far, and those yet to be validated.

        The checkpoint of a pause is usually not one of them: its version never gets a validation loss.
        """
        if self.recipe.fine_tuning is None:
            return set()
        best = best_version(self.validations, self.checkpoints)
        awaited = {version for version in self.checkpoints - self.validations.keys() if self.recipe.validates(version)}
        return awaited | ({best} if best is not None else set())

    @property
    def resting(self) -> bool:
        """Whether no slot may be computed: the job is paused, or has halted for an order."""
        return self.record.state == PAUSED or (self.halted_version is not None and self.record.desired != "run")

    @property
    def snapshot_due(self) -> int | None:
        """The current version, if the servers were requested to write it without a commit and have not; else None."""
        return self.snapshot if self.snapshot == self.version and self.snapshot not in self.checkpoints else None

    @property
    def checkpoint_awaited(self) -> bool:
        """Whether a person waits for a checkpoint."""
        return self.checkpoint_after is not None and all(
            version <= self.checkpoint_after for version in self.checkpoints
        )

    @property
    def checkpoint_wanted(self) -> bool:
        """Whether a person waits for a checkpoint of which no server has reported a file."""
        after = self.checkpoint_after
        return after is not None and self.checkpoint_awaited and all(version <= after for version in self.files)

    def sight(self, any_worker: bool, settled: bool, seconds_to_commit: float | None = None) -> JobSight:
        """The current situation of the job, for `judge_end` and `order_text`. The job must have a plan."""
        return JobSight(
            desired=self.record.desired,
            state=self.state,
            version=self.version,
            rounds=self.rounds,
            halted_version=self.halted_version,
            checkpoints=self.checkpoints,
            validated=self.fully_validated,
            any_worker=any_worker,
            early=self.early_ending,
            start_version=self.record.start_version,
            settled=settled,
            failing=self.failing,
            checkpoint_awaited=self.checkpoint_awaited,
            seconds_to_commit=seconds_to_commit,
        )

    @property
    def members(self) -> list[str]:
        """The workers of the lease table."""
        chained = [worker for replica in self.replicas for worker in replica.workers]
        return list(dict.fromkeys([*chained, *filter(None, self.holders)]))
