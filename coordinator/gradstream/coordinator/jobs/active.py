"""The running job in memory: a view of what the state holds, and what is known only while it runs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, plan_pb2

NUM_RATE_STEPS = 20
RETRY_SECONDS = 30.0
"""Most between two attempts to make a plan."""


def nothing() -> None:
    """Let go of nothing."""


@dataclass
class Pace:
    """Rates over the last steps. Commits are timed by the leader's clock, their absence by ours."""

    steps: deque[tuple[coordinator_pb2.ReportStepRequest, float]] = field(
        default_factory=lambda: deque(maxlen=NUM_RATE_STEPS)
    )

    def add(self, report: coordinator_pb2.ReportStepRequest, now: float) -> None:
        """Note a step that was reported at `now`."""
        self.steps.append((report, now))

    def per_second(self, now: float) -> tuple[float, float, float]:
        """(steps, tokens, pushed bytes) a second; zeros before the second step. Falls when no more steps come."""
        if len(self.steps) < 2:
            return 0.0, 0.0, 0.0
        counted = [report for report, _ in list(self.steps)[1:]]
        first, last = self.steps[0][0], self.steps[-1][0]
        seconds = max(1, last.unix_ms - first.unix_ms) / 1000
        overdue = now - self.steps[-1][1] - 2 * seconds / len(counted) - 2.0
        seconds += max(0.0, overdue)
        return (
            len(counted) / seconds,
            sum(report.num_tokens for report in counted) / seconds,
            sum(report.pushed_bytes for report in counted) / seconds,
        )


class WaitClock:
    """Remembers since when each thing is waited for, in Unix milliseconds."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, str], int] = {}

    def stamp(self, waits: Sequence[tuple[str, str]], unix_ms: int) -> list[jobs_pb2.Wait]:
        """The waits that stand now; those no longer among them are forgotten."""
        self._since = {wait: self._since.get(wait, unix_ms) for wait in waits}
        return [jobs_pb2.Wait(what=what, whom=whom, since_unix_ms=self._since[what, whom]) for what, whom in waits]


@dataclass(frozen=True)
class Refusal:
    """Why the nodes of the last attempt could not hold the plan, and which they were. Another set of nodes is tried."""

    reason: str = ""
    nodes: frozenset[str] | None = None


@dataclass(frozen=True)
class Hold:
    """What of the storage keeps the plan from being made, and until when (our clock) no attempt is made. Empty when
    nothing does."""

    cause: str = ""
    until: float = 0.0


@dataclass
class Planning:
    """The attempts to make the job's plan: the one under way, and what the next one waits for."""

    task: asyncio.Task[None] | None = None
    # Why no plan could be made or stored, and when the next attempt is.
    retry: Retry = field(default_factory=lambda: Retry(RETRY_SECONDS))
    # What the last event said of a wait for servers.
    server_wait: str = ""
    refusal: Refusal = Refusal()
    hold: Hold = Hold()


@dataclass
class ActiveJob:
    """The one job that is planning, running, or paused with its plan held."""

    record: JobRecord
    recipe: Recipe
    manifest: Manifest
    # Whether the plan also waits for workers: at the start and when a person resumed it.
    need_workers: bool = True
    plan: Plan | None = None
    plan_message: plan_pb2.Plan | None = None
    totals: StepTotals = field(default_factory=StepTotals)
    pace: Pace = field(default_factory=Pace)
    # The version at which the leader answered a request to halt. A step that was under way may still come after it.
    halted_version: int | None = None
    checkpoints: set[int] = field(default_factory=set)
    # Reports of files whose manifest is still to be written: version → server → report.
    files: dict[int, dict[int, coordinator_pb2.ReportCheckpointRequest]] = field(default_factory=dict)
    # Files of slots' residuals, likewise: version → slot → report.
    residuals: dict[int, dict[int, coordinator_pb2.ReportResidualRequest]] = field(default_factory=dict)
    # The last version at which a worker took a slot over without a residual.
    fresh_from: dict[int, int] = field(default_factory=dict)
    # Loss of each complete validation pass, by version.
    validations: dict[int, float] = field(default_factory=dict)
    holders: list[str] = field(default_factory=list)
    # Who held each slot last under this plan; a resting job's slots have no holders.
    last_holders: list[str] = field(default_factory=list)
    # The chains of a job with a pipeline.
    replicas: list[Replica] = field(default_factory=list)
    # Where the workers of a stored lease table listen, by node id: they may not have come back yet.
    addresses: dict[str, str] = field(default_factory=dict)
    lease_number: int = 0
    lease_reason: str = ""
    # Whether a table is to be published although nobody's slots change.
    leases_due: bool = False
    # When (our clock) each worker of the table was given slots.
    given_at: dict[str, float] = field(default_factory=dict)
    # Which servers of the plan are silent, and for how long their state is waited for.
    reunion: Reunion = field(default_factory=Reunion)
    # Nodes that are kept from the job for a time.
    benches: Benches = field(default_factory=Benches)
    # Why no worker can go on; the job fails of it once the servers' state is in a checkpoint.
    failing: str = ""
    # The stream of the leader that was asked for a checkpoint at the next commit; 0 when none was.
    boundary_session: int = 0
    # The version of which the servers were asked for a checkpoint without a commit, and when (our clock).
    snapshot: int = -1
    snapshot_at: float = 0.0
    # A person waits for a checkpoint of a later version than this one.
    checkpoint_after: int | None = None
    # Until then (our clock) workers of the stored lease table count as live: after a restart they come one by one.
    expect_holders_until: float = 0.0
    # When the job last got on (Unix ms and our clock).
    progress_at: float = 0.0
    waits: WaitClock = field(default_factory=WaitClock)
    # What each server of the plan was predicted to need.
    predicted_bytes: list[ServerBytes] = field(default_factory=list)
    planning: Planning = field(default_factory=Planning)
    # Lets go of the checkpoint that the plan starts from, once a newer one of this plan exists.
    release_start: Callable[[], None] = nothing
    # Manifests that could not be written: version → when to try again (our clock), and why.
    unwritten: dict[int, tuple[float, str]] = field(default_factory=dict)
    writing: asyncio.Task[None] | None = None

    @classmethod
    def load(cls, record: JobRecord, state: State) -> ActiveJob:
        """The view of a job as the state has it, with its plan if that may still be held."""
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
        """Make a plan the current one."""
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
        """A checkpoint of this plan exists: what was reported of it, and of older ones that it replaces, is done with,
        and so is the one that the plan started from: every server has loaded it."""
        for done in [known for known in self.files if known <= version]:
            if done == version or done in self.unwritten:
                self.files.pop(done)
                self.residuals.pop(done, None)
                self.unwritten.pop(done, None)
        self.release_start()

    def take_validations(self, state: State) -> None:
        """Note which validation passes are complete."""
        self.validations = {done.version: done.loss for done in state.validations(self.job_id)}

    def take_leases(self, number: int, holders: list[str], replicas: list[Replica], reason: str, now: float) -> None:
        """Make a lease table that was stored the one in force."""
        before = set(self.members)
        self.take_holders(holders)
        self.replicas, self.lease_number, self.lease_reason = replicas, number, reason
        self.given_at = {worker: self.given_at.get(worker, now) if worker in before else now for worker in self.members}
        self.leases_due, self.progress_at = False, now

    def take_holders(self, holders: list[str]) -> None:
        """Make these the slots' holders."""
        self.holders = holders
        self.last_holders = [holder or last for holder, last in zip(holders, self.last_holders, strict=True)]

    def take_residual(self, report: coordinator_pb2.ReportResidualRequest) -> None:
        """Note a slot's file, or that it was taken over without one."""
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
        """Steps committed on the current trajectory."""
        return self.totals.version

    @property
    def num_steps(self) -> int:
        return self.recipe.training.num_steps

    @property
    def fully_validated(self) -> bool:
        """Whether no validation pass is missing at the end."""
        return not self.recipe.validation.interval_steps or self.num_steps in self.validations

    @property
    def early_ending(self) -> str:
        """Why the job ends although steps are left; "" to go on. It waits for the checkpoint of its result."""
        tuning = self.recipe.fine_tuning
        best, reason = stops_early(self.validations, tuning.patience if tuning is not None else 0)
        return reason if best in self.checkpoints else ""

    @property
    def candidates(self) -> set[int]:
        """The checkpoints that may be a fine-tuning's result: the best one so far, and those yet to be validated.

        A checkpoint that a pause has made is mostly not among them: its version never gets a loss.
        """
        if self.recipe.fine_tuning is None:
            return set()
        best = best_version(self.validations, self.checkpoints)
        awaited = {version for version in self.checkpoints - self.validations.keys() if self.recipe.validates(version)}
        return awaited | ({best} if best is not None else set())

    @property
    def resting(self) -> bool:
        """Whether no slot shall be computed: paused, or halted and about to be."""
        return self.record.state == PAUSED or (self.halted_version is not None and self.record.desired != "run")

    @property
    def snapshot_due(self) -> int | None:
        """The version that the servers were asked to write as it is, while it stands; None when there is none."""
        return self.snapshot if self.snapshot == self.version and self.snapshot not in self.checkpoints else None

    @property
    def checkpoint_awaited(self) -> bool:
        """Whether a person waits for a checkpoint."""
        return self.checkpoint_after is not None and all(
            version <= self.checkpoint_after for version in self.checkpoints
        )

    @property
    def checkpoint_wanted(self) -> bool:
        """Whether a person waits for a checkpoint that no server has begun to report."""
        after = self.checkpoint_after
        return after is not None and self.checkpoint_awaited and all(version <= after for version in self.files)

    def sight(self, any_worker: bool, settled: bool) -> JobSight:
        """How the job looks to the decision where it goes. The job must have a plan."""
        return JobSight(
            desired=self.record.desired,
            state=self.state,
            version=self.version,
            num_steps=self.num_steps,
            halted_version=self.halted_version,
            checkpoints=self.checkpoints,
            validated=self.fully_validated,
            any_worker=any_worker,
            early=self.early_ending,
            start_version=self.record.start_version,
            settled=settled,
            failing=self.failing,
            checkpoint_awaited=self.checkpoint_awaited,
        )

    @property
    def members(self) -> list[str]:
        """The workers that the lease table names."""
        chained = [worker for replica in self.replicas for worker in replica.workers]
        return list(dict.fromkeys([*chained, *filter(None, self.holders)]))
