"""Making a plan for a job: which nodes, from which checkpoint, and what follows when it cannot be made.

An attempt reads the checkpoints, takes the model's inventory, cuts and places; all that takes time runs in threads. The
plan that comes of it is the controller's to store and to publish.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gradstream.coordinator.jobs import checkpoints, decisions
from gradstream.coordinator.jobs.active import ActiveJob, Hold, nothing
from gradstream.coordinator.jobs.journal import Event
from gradstream.coordinator.nodes.membership import SERVER, WORKER, Membership, NodeEntry
from gradstream.coordinator.nodes.storage_checks import StorageChecks
from gradstream.coordinator.planning import needs, planner
from gradstream.coordinator.planning.inventory import take_inventory, take_profile
from gradstream.coordinator.planning.planner import CheckpointAt, NextEpoch
from gradstream.coordinator.state.state import JobRecord, State
from gradstream.core.errors import GradstreamError, PlanError, UnreachableError, one_line
from gradstream.core.job_states import RUNNING
from gradstream.core.log import get_logger
from gradstream.core.model.trial import ModelUse
from gradstream.core.plan.bundles import keeps_residuals
from gradstream.core.plan.plan import Plan
from gradstream.core.storage.pool import StorageThreads

HOLD_SECONDS = 2.0
"""Between looks at a storage that does not show what it should."""
STORED = "the plan to be stored"

log = get_logger()


@dataclass(frozen=True)
class PlanNodes:
    """The nodes that a plan is made with."""

    servers: list[NodeEntry]
    workers: list[NodeEntry]

    @property
    def ids(self) -> frozenset[str]:
        """Their node ids."""
        return frozenset(node.node_id for node in (*self.servers, *self.workers))


@dataclass(frozen=True)
class Start:
    """Where a plan starts, pinned until `release` is called, and all versions that have a checkpoint."""

    checkpoint: CheckpointAt | None
    versions: list[int]
    release: Callable[[], None]


@dataclass(frozen=True)
class MadePlan:
    """A plan that nobody has heard of yet."""

    plan: Plan
    reasons: dict[str, str]
    versions: list[int]  # that have a checkpoint

    def events(self, record: JobRecord, version: int) -> list[Event]:
        """The lines for the job's history: the plan and, when `version` was reached, which steps it computes again."""
        events = [Event("plan", f"epoch {self.plan.epoch}: {'; '.join(self.reasons.values())}")]
        again = recomputed(version, self.plan.start_version) if record.epoch else ""
        return [*events, Event("plan", again)] if again else events

    def changes(self, record: JobRecord) -> dict[str, Any]:
        """What changes of the job's record when it takes the plan."""
        return {
            "state": RUNNING,
            "reason": f"epoch {self.plan.epoch} from version {self.plan.start_version}",
            "epoch": self.plan.epoch,
            "start_version": self.plan.start_version,
            "plan_held": True,
            "desired": "run",
            "decisions": {**record.decisions, **self.reasons},
        }


@dataclass(frozen=True)
class Setback:
    """What follows from an attempt that raised: one of the three is not empty."""

    failure: str = ""  # the job fails for this reason
    refusal: str = ""  # these nodes cannot hold the plan; another set of nodes may
    cause: str = ""  # what is waited for; tried again


@dataclass(frozen=True)
class PlanOutcome:
    """What came of making a plan: a plan, a hold or a setback. The checkpoint that the plan starts from stays pinned
    until `release` is called."""

    nodes: PlanNodes
    made: MadePlan | None = None
    is_held: bool = False  # something of the storage keeps the plan from being made
    line: str = ""  # about it, for the job's history, when it is new
    setback: Setback = Setback()
    release: Callable[[], None] = nothing


class PlanMaking:
    """Attempts to make plans for the active job."""

    def __init__(
        self,
        state: State,
        members: Membership,
        pins: checkpoints.Pins,
        disk: StorageThreads,
        storage: StorageChecks,
        clock: Callable[[], float],
    ):
        self._state = state
        self._members = members
        self._pins = pins
        self._disk = disk
        self._storage = storage
        self._clock = clock

    def servers(self, active: ActiveJob) -> list[NodeEntry]:
        """The servers that a plan can be made with now."""
        return self._servers(active, active.record.without_servers)

    def _servers(self, active: ActiveJob, without: Collection[str]) -> list[NodeEntry]:
        return [
            node
            for node in self._members.present(SERVER)
            if node.name not in without and not active.benches.failed(node.node_id)
        ]

    def nodes(self, active: ActiveJob, without: Collection[str] | None = None) -> PlanNodes:
        """The servers and the workers that a plan can be made with now; `without` names servers to leave out, where
        these are other ones than the job's."""
        servers = self.servers(active) if without is None else self._servers(active, without)
        workers = [node for node in self._members.present(WORKER) if not active.benches.failed(node.node_id)]
        return PlanNodes(servers, workers)

    def due(self, active: ActiveJob, now: float) -> PlanNodes | None:
        """The nodes for an attempt that is to be made now; None when one is under way or must wait."""
        planning = active.planning
        if planning.task is not None or now < planning.hold.until or not planning.retry.due(now):
            return None
        if waits_for_nodes(active, now):
            return None
        nodes = self.nodes(active)
        if nodes.ids == planning.refusal.nodes:
            return None
        num_servers, num_workers = len(nodes.servers), len(nodes.workers)
        missing = decisions.missing_nodes(active.recipe, num_servers, num_workers, active.need_workers)
        return None if missing else nodes

    async def make(self, active: ActiveJob, nodes: PlanNodes) -> PlanOutcome:
        """Try to make a plan. Raises nothing but CancelledError."""
        record = active.record
        root = checkpoints.root_of(record.run_directory)
        release, waits_for = nothing, f"{root} to be readable"
        try:
            start = await choose_start(root, self._pins, self._disk)
            release, waits_for = start.release, STORED
            known = self._state.checkpoint_versions(record.job_id)
            hold = await hindrance(active, start, known, nodes, self._storage)
            # At once: what is waited for from here on is not the storage.
            line = note_hold(active, hold, self._clock())
            made = await make_plan(active, nodes, start) if not hold else None
        except Exception as error:
            return PlanOutcome(nodes, setback=judge_error(error, record, waits_for), release=release)
        except BaseException:
            release()
            raise
        return PlanOutcome(nodes, made, bool(hold), line, release=release)


def waits_for_nodes(active: ActiveJob, now: float) -> bool:
    """Whether an order to replan waits for nodes that come back one by one after a restart of the coordinator: the
    servers that were to come in are not known any more."""
    return active.record.desired == "replan" and now < active.expect_holders_until


async def choose_start(root: str, pins: checkpoints.Pins, disk: StorageThreads) -> Start:
    """Choose and pin the newest checkpoint under `root`. Raises CheckpointError, OSError, and UnreachableError when its
    storage does not answer."""
    async with pins.choosing(root):
        start, versions = await disk.call(root, checkpoints.newest, root)
        return Start(start, versions, pins.pin(root, start.version) if start is not None else nothing)


async def hindrance(
    active: ActiveJob, start: Start, acknowledged: Collection[int], nodes: PlanNodes, storage: StorageChecks
) -> str:
    """What of the storage keeps a plan from being made: a checkpoint that was acknowledged and is not there, or a
    directory that the nodes do not share. Empty when nothing does."""
    root = checkpoints.root_of(active.record.run_directory)
    # Workers write there too where the codec keeps residuals.
    sharing = [*nodes.servers, *(nodes.workers if keeps_residuals(active.recipe.codec) else [])]
    gone = checkpoints.missing(root, start.versions, acknowledged, active.job_id)
    return gone or await storage.problem(root, sharing)


async def make_plan(active: ActiveJob, nodes: PlanNodes, start: Start) -> MadePlan:
    """A plan for the job's next epoch on these nodes, from a checkpoint. Raises GradstreamError, OSError."""
    record, recipe = active.record, active.recipe
    root = checkpoints.root_of(record.run_directory)
    profiles = None
    if recipe.pipeline.stages != 1:
        # Before the inventory, which comes with it.
        profiles = await take_profile(recipe.model.config, recipe.training, recipe.lora, ModelUse.of(recipe))
    model = await take_inventory(recipe.model.config, recipe.lora, ModelUse.of(recipe))
    plan, reasons = await asyncio.to_thread(
        planner.make_plan,
        NextEpoch(record.job_id, record.epoch + 1, start.checkpoint, root),
        recipe,
        active.manifest,
        model,
        _offers(nodes.servers),
        _offers(nodes.workers),
        profiles,
    )
    return MadePlan(plan, reasons, start.versions)


def judge_error(error: Exception, record: JobRecord, waits_for: str) -> Setback:
    """Decide what follows from an attempt that raised `error`, while `waits_for` was awaited."""
    line = one_line(error)
    if isinstance(error, PlanError):
        # A cluster that held this job before: the nodes that are missing may be on their way back.
        return Setback(refusal=line) if record.epoch else Setback(failure=line)
    if isinstance(error, UnreachableError):
        return Setback(cause=f"{waits_for}: {line}")
    if isinstance(error, GradstreamError):
        return Setback(failure=line)
    if isinstance(error, OSError):
        return Setback(cause=f"{checkpoints.root_of(record.run_directory)} to be readable: {line}")
    log.error("planning failed", exc_info=error)
    return Setback(failure=f"the plan could not be made: {line}")


def note_hold(active: ActiveJob, why: str, now: float) -> str:
    """Note what of the storage keeps the plan from being made, if anything, and when to look again; return the line for
    the job's history when it is a new one."""
    line = f"held: {why}" if why and why != active.planning.hold.cause else ""
    active.planning.hold = Hold(why, now + HOLD_SECONDS) if why else Hold()
    return line


def recomputed(before: int, start: int) -> str:
    """The line on steps that a new plan computes again; "" where there are none. `before` is the version reached."""
    if before <= start:
        return ""
    steps = f"steps {start} to {before - 1}" if before - 1 > start else f"step {start}"
    return f"{steps} are recomputed, to the same bits"


def _offers(nodes: Sequence[NodeEntry]) -> list[needs.NodeOffer]:
    return [
        needs.NodeOffer(node.node_id, node.name, node.address, node.memory_bytes, node.flops_per_second)
        for node in nodes
    ]
