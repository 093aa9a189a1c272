"""Make a plan for a job: choose nodes and checkpoint, and decide what follows when no plan can be made.

An attempt reads the checkpoints, takes the model's inventory, cuts the tensors into fragments and places them. Slow
work runs in threads. The controller stores and publishes the plan.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from gradstream.coordinator.jobs import checkpoints, decisions
from gradstream.coordinator.jobs.active import ActiveJob, Hold, nothing
from gradstream.coordinator.jobs.journal import Event
from gradstream.coordinator.jobs.replay import recorded_slots
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
from gradstream.core.plan.plan import Plan
from gradstream.core.plan.recorded import RecordedSlots
from gradstream.core.recipe.rounds import Rounds
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import plan_pb2

HOLD_SECONDS = 2.0
"""Between two checks of a storage on which something is missing."""
STORED = "the plan to be stored"
OTHER_SUMS = (
    "from version {} on servers add gradients in fixed point; an older release added them in fp32, so the weights will "
    "differ in their last bits from those that it would have reached"
)

log = get_logger()


@dataclass(frozen=True)
class PlanNodes:
    """The nodes of a new plan."""

    servers: list[NodeEntry]
    workers: list[NodeEntry]

    @property
    def ids(self) -> frozenset[str]:
        """Their node ids."""
        return frozenset(node.node_id for node in (*self.servers, *self.workers))


@dataclass(frozen=True)
class Start:
    """The checkpoint from which a plan starts, pinned until `release` is called, and all versions with a checkpoint."""

    checkpoint: CheckpointAt | None
    versions: list[int]
    release: Callable[[], None]


@dataclass(frozen=True)
class MadePlan:
    """A plan that is neither stored nor sent yet."""

    plan: Plan
    reasons: dict[str, str]
    versions: list[int]  # with a checkpoint
    has_other_sums: bool = False  # the job's last plan was of a release whose servers added in fp32

    def events(self, record: JobRecord, version: int) -> list[Event]:
        """The events of the plan and, if the job had reached `version`, of the steps to be recomputed."""
        events = [Event("plan", f"epoch {self.plan.epoch}: {'; '.join(self.reasons.values())}")]
        again = recomputed(version, self.plan.start_version, self.plan.rounds) if record.epoch else ""
        if again:
            events.append(Event("plan", again))
        if self.has_other_sums:
            events.append(Event("plan", OTHER_SUMS.format(self.plan.start_version)))
        return events

    def changes(self, record: JobRecord) -> dict[str, Any]:
        """The changes of the job's record when it takes the plan."""
        return {
            "state": RUNNING,
            "reason": f"epoch {self.plan.epoch} from {self.plan.rounds.version_text(self.plan.start_version)}",
            "epoch": self.plan.epoch,
            "start_version": self.plan.start_version,
            "plan_held": True,
            "desired": "run",
            "decisions": {**record.decisions, **self.reasons},
            **({"recipe_json": self.plan.recipe.model_dump_json()} if self.decides_slot_steps else {}),
        }

    @property
    def decides_slot_steps(self) -> bool:
        """Whether the plan decides how many inner steps each slot takes, for the whole job."""
        return "slot steps" in self.reasons


@dataclass(frozen=True)
class Setback:
    """The consequence of an attempt that raised: exactly one of the three is not empty."""

    failure: str = ""  # the job fails for this reason
    refusal: str = ""  # these nodes cannot hold the plan for this reason; another set of nodes may
    cause: str = ""  # the next attempt waits for this


@dataclass(frozen=True)
class PlanOutcome:
    """The outcome of an attempt: a plan, a hold or a setback.

    The checkpoint from which the plan starts stays pinned until `release` is called.
    """

    nodes: PlanNodes
    made: MadePlan | None = None
    is_held: bool = False  # planning waits for a problem of the storage
    line: str = ""  # for the job's history, if this problem is new
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
        """The servers that a plan can use now."""
        return self._servers(active, active.record.without_servers)

    def _servers(self, active: ActiveJob, without: Collection[str]) -> list[NodeEntry]:
        return [
            node
            for node in self._members.present(SERVER)
            if node.name not in without and not active.benches.failed(node.node_id)
        ]

    def nodes(self, active: ActiveJob, without: Collection[str] | None = None) -> PlanNodes:
        """The servers and workers that a plan can use now.

        `without` names the servers to leave out; by default the record's `without_servers`.
        """
        servers = self.servers(active) if without is None else self._servers(active, without)
        workers = [node for node in self._members.present(WORKER) if not active.benches.failed(node.node_id)]
        return PlanNodes(servers, workers)

    def due(self, active: ActiveJob, now: float) -> PlanNodes | None:
        """The nodes for an attempt that is due now; None while an attempt is under way or must wait."""
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
            # Noted before the plan is made: from here on the job does not wait for the storage.
            line = note_hold(active, hold, self._clock())
            made = None
            if not hold:
                recorded = await self._recorded(active, start)
                made = await make_plan(active, nodes, start, recorded)
            if made is not None:
                made = replace(made, has_other_sums=adds_otherwise(self._state.load_plan(record.job_id, record.epoch)))
        except Exception as error:
            return PlanOutcome(nodes, setback=judge_error(error, record, waits_for), release=release)
        except BaseException:
            release()
            raise
        return PlanOutcome(nodes, made, bool(hold), line, release=release)

    async def _recorded(self, active: ActiveJob, start: Start) -> tuple[RecordedSlots, ...]:
        """The slots that counted in the rounds that a plan from `start` computes again. Read in a thread of its own."""
        if active.recipe.local is None or active.recipe.local.quorum is None:
            return ()
        version = start.checkpoint.version if start.checkpoint is not None else 0

        def read() -> tuple[RecordedSlots, ...]:
            with closing(self._state.open_reader()) as reader:
                return recorded_slots(reader, active.record, active.recipe, version)

        return await asyncio.to_thread(read)


def waits_for_nodes(active: ActiveJob, now: float) -> bool:
    """Whether an order to replan waits for nodes to register again after a restart of the coordinator.

    The coordinator does not know any more which servers were to come in.
    """
    return active.record.desired == "replan" and now < active.expect_holders_until


async def choose_start(root: str, pins: checkpoints.Pins, disk: StorageThreads) -> Start:
    """Choose and pin the newest checkpoint under `root`.

    Raises CheckpointError, OSError, and UnreachableError when its storage does not answer.
    """
    async with pins.choosing(root):
        start, versions = await disk.call(root, checkpoints.newest, root)
        return Start(start, versions, pins.pin(root, start.version) if start is not None else nothing)


async def hindrance(
    active: ActiveJob, start: Start, acknowledged: Collection[int], nodes: PlanNodes, storage: StorageChecks
) -> str:
    """The problem of the storage for which a plan must wait; empty for none.

    It is a checkpoint that was acknowledged and is missing, or a directory that the nodes do not share.
    """
    root = checkpoints.root_of(active.record.run_directory)
    # Workers write to the directory too, if slots keep something of their own.
    sharing = [*nodes.servers, *(nodes.workers if active.recipe.keeps_slot_state() else [])]
    gone = checkpoints.missing(root, start.versions, acknowledged, active.job_id)
    return gone or await storage.problem(root, sharing)


async def make_plan(
    active: ActiveJob, nodes: PlanNodes, start: Start, recorded: tuple[RecordedSlots, ...] = ()
) -> MadePlan:
    """Make a plan for the job's next epoch on these nodes, from a checkpoint. Raises GradstreamError, OSError.

    `recorded` has the slots that counted in rounds that the plan computes again.
    """
    record, recipe = active.record, active.recipe
    root = checkpoints.root_of(record.run_directory)
    profiles = None
    if recipe.pipeline.stages != 1:
        # First, because the profile's measurement also gives the inventory.
        profiles = await take_profile(recipe.model.config, recipe.training, recipe.lora, ModelUse.of(recipe))
    model = await take_inventory(recipe.model.config, recipe.lora, ModelUse.of(recipe))
    plan, reasons = await asyncio.to_thread(
        planner.make_plan,
        NextEpoch(record.job_id, record.epoch + 1, start.checkpoint, root, recorded),
        recipe,
        active.manifest,
        model,
        offers(nodes.servers),
        offers(nodes.workers),
        profiles,
    )
    return MadePlan(plan, reasons, start.versions)


def judge_error(error: Exception, record: JobRecord, waits_for: str) -> Setback:
    """Decide what follows from an attempt that raised `error` while it waited for `waits_for`."""
    line = one_line(error)
    if isinstance(error, PlanError):
        # From the second epoch on the cluster has held this job before: missing nodes may come back.
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
    """Note the problem of the storage, "" for none, and when to check again; return an event's line if it is new."""
    line = f"held: {why}" if why and why != active.planning.hold.cause else ""
    active.planning.hold = Hold(why, now + HOLD_SECONDS) if why else Hold()
    return line


def adds_otherwise(stored: bytes | None) -> bool:
    """Whether a stored plan is of a release whose servers added contributions in another way than today's."""
    return stored is not None and plan_pb2.Plan.FromString(stored).sum_form != plan_pb2.SUM_FORM_FIXED_POINT


def recomputed(before: int, start: int, rounds: Rounds) -> str:
    """The event's line on the steps that a new plan recomputes; "" for none. `before` is the version reached."""
    if before <= start:
        return ""
    first, last = rounds.steps_at(start), rounds.steps_at(before) - 1
    steps = f"steps {first} to {last}" if last > first else f"step {first}"
    return f"{steps} are recomputed, to the same bits"


def offers(nodes: Sequence[NodeEntry]) -> list[needs.NodeOffer]:
    """The nodes as input of the planner."""
    return [
        needs.NodeOffer(node.node_id, node.name, node.address, node.memory_bytes, node.flops_per_second)
        for node in nodes
    ]
