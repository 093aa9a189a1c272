"""Making a plan for a job: reads the checkpoints, takes the model's inventory, cuts and places. Blocks nobody."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from gradstream.coordinator.jobs import checkpoints
from gradstream.coordinator.jobs.active import ActiveJob, nothing
from gradstream.coordinator.nodes.membership import NodeEntry
from gradstream.coordinator.nodes.storage_checks import StorageChecks
from gradstream.coordinator.planning import needs, planner
from gradstream.coordinator.planning.inventory import take_inventory, take_profile
from gradstream.coordinator.planning.planner import CheckpointAt
from gradstream.core.model.trial import ModelUse
from gradstream.core.plan.bundles import keeps_residuals
from gradstream.core.plan.plan import Plan
from gradstream.core.storage.pool import StorageThreads


@dataclass(frozen=True)
class MadePlan:
    """A plan that nobody has heard of yet."""

    plan: Plan
    reasons: dict[str, str]
    versions: list[int]  # that have a checkpoint

    @property
    def message(self) -> str:
        """The plan in one line for the job's history."""
        return f"epoch {self.plan.epoch}: {'; '.join(self.reasons.values())}"


@dataclass(frozen=True)
class Start:
    """Where a plan starts, pinned until `release` is called, and all versions that have a checkpoint."""

    checkpoint: CheckpointAt | None
    versions: list[int]
    release: Callable[[], None]


async def choose_start(root: str, pins: checkpoints.Pins, disk: StorageThreads) -> Start:
    """Choose and pin the newest checkpoint under `root`. Raises CheckpointError, OSError, and UnreachableError when its
    storage does not answer."""
    async with pins.choosing(root):
        start, versions = await disk.call(root, checkpoints.newest, root)
        return Start(start, versions, pins.pin(root, start.version) if start is not None else nothing)


async def hindrance(
    active: ActiveJob,
    start: Start,
    acknowledged: Collection[int],
    servers: Sequence[NodeEntry],
    workers: Sequence[NodeEntry],
    storage: StorageChecks,
) -> str:
    """What of the storage keeps a plan from being made: a checkpoint that was acknowledged and is not there, or a
    directory that the nodes do not share. Empty when nothing does."""
    root = checkpoints.root_of(active.record.run_directory)
    # Workers write there too where the codec keeps residuals.
    sharing = [*servers, *(workers if keeps_residuals(active.recipe.codec) else [])]
    gone = checkpoints.missing(root, start.versions, acknowledged, active.job_id)
    return gone or await storage.problem(root, sharing)


async def make_plan(
    active: ActiveJob, servers: Sequence[NodeEntry], workers: Sequence[NodeEntry], start: Start
) -> MadePlan:
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
        record.job_id,
        recipe,
        active.manifest,
        model.tensors,
        model.architecture,
        _offers(servers),
        _offers(workers),
        record.epoch + 1,
        start.checkpoint,
        root,
        profiles,
        num_frozen_parameters=model.num_frozen_parameters,
    )
    return MadePlan(plan, reasons, start.versions)


def recomputed(before: int, start: int) -> str:
    """The line on steps that a new plan computes again; "" where there are none. `before` is the version reached."""
    if before <= start:
        return ""
    steps = f"steps {start} to {before - 1}" if before - 1 > start else f"step {start}"
    return f"{steps} are recomputed, to the same bits"


def base_path(recipe_json: str) -> str:
    """Where the base of a fine-tuning's recipe lies; empty for any other job."""
    finetuning = json.loads(recipe_json).get("finetuning") or {}
    return str((finetuning.get("base") or {}).get("path", ""))


def _offers(nodes: Sequence[NodeEntry]) -> list[needs.NodeOffer]:
    return [
        needs.NodeOffer(node.node_id, node.name, node.address, node.memory_bytes, node.flops_per_second)
        for node in nodes
    ]
