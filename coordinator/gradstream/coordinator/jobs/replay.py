"""Rounds with a quorum that are computed again: in the same job after it went back, and in a replay of another job.

Which slots counted in a round is in the ledger. A plan takes it from there for the rounds that it computes again, so
that these have the same bits. `gradstream replay` makes a job of another job's recipe whose rounds are all such rounds.
"""

from __future__ import annotations

import json

from gradstream.coordinator.state.state import JobRecord, StateReader
from gradstream.core.data.manifest import Manifest, parse_manifest
from gradstream.core.errors import ConfigError, DataError
from gradstream.core.plan.recorded import RecordedSlots, rounds_of, runs_of
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import EarlierSteps, Recipe
from gradstream.proto.v1 import plan_pb2

PAGE_ROUNDS = 1000
"""Number of rounds that are read at a time."""


def replayed(job_id: str, recipe: Recipe, version: int) -> Recipe:
    """The recipe of a job that computes the rounds again that a job has done at `version`.

    It differs from the job's recipe in what shapes no bit: it waits for no number of nodes, and ends at `version`.
    Raises ConfigError when there is nothing to replay.
    """
    if recipe.local is None or recipe.local.quorum is None:
        raise ConfigError(
            f"job {job_id} has no local.quorum: all slots count in each of its commits, so its ledger has nothing to "
            f"replay; submit its recipe again"
        )
    if version <= recipe.local.after:
        raise ConfigError(f"job {job_id} has committed no round yet; replay it once it has")
    changes: dict[str, object] = {
        "local": recipe.local.model_copy(update={"replay": job_id}),
        "cluster": recipe.cluster.model_copy(update={"min_workers": 1, "min_servers": 1}),
    }
    training, step = recipe.training, recipe.rounds.steps_at(version)
    if step < training.num_steps:
        # The steps keep the learning-rate schedule of the whole job.
        parts = [part for part in training.earlier if part.until_version < step]
        parts.append(EarlierSteps(until_version=step, num_steps=training.schedule_steps(step - 1)))
        changes["training"] = training.model_copy(update={"num_steps": step, "earlier": tuple(parts)})
    return recipe.model_copy(update=changes)


def replayed_job(record: JobRecord) -> str:
    """The job whose ledger a job needs for its first plan; "" for none. Later plans have what they need of it."""
    local = json.loads(record.recipe_json).get("local") or {}
    return str(local.get("replay", "")) if not record.epoch else ""


def check_replay(recipe: Recipe, other: JobRecord, manifest: Manifest) -> None:
    """Check that a recipe can take the slots that counted in another job. Raises ConfigError, DataError."""
    num_slots = parse_recipe(other.recipe_json).training.num_slots
    if num_slots != recipe.training.num_slots:
        raise ConfigError(
            f"local.replay: job {other.job_id} has {num_slots} slots, and training.num_slots is "
            f"{recipe.training.num_slots}; use `gradstream replay {other.job_id}`"
        )
    if parse_manifest(other.manifest_json) != manifest:
        raise DataError(
            f"the data set {recipe.data.path} is another one than that of job {other.job_id}, so its rounds cannot be "
            f"computed again; put the former data set there"
        )


def recorded_slots(
    state: StateReader, record: JobRecord, recipe: Recipe, start_version: int
) -> tuple[RecordedSlots, ...]:
    """The slots that counted in the rounds from `start_version` on, as far as they are recorded.

    They are in the job's ledger, in its last plan if the job went back before, and for a replay's first plan in the
    ledger of the job that is replayed. Raises ConfigError when that one is gone.
    """
    if recipe.local is None or recipe.local.quorum is None:
        return ()
    found: dict[int, tuple[int, ...]] = {}
    stored = state.load_plan(record.job_id, record.epoch)
    if stored is not None:
        runs = plan_pb2.Plan.FromString(stored).recorded
        found |= rounds_of(RecordedSlots(run.begin_version, run.end_version, tuple(run.slots)) for run in runs)
    elif recipe.local.replay:
        other = state.get_job(recipe.local.replay)
        if other is None:
            raise ConfigError(
                f"job {recipe.local.replay}, which this job replays, was removed; its ledger went with it"
            )
        found |= _ledger_of(state, other, 0)
    found |= _ledger_of(state, record, start_version)
    return runs_of(sorted((version, slots) for version, slots in found.items() if version >= start_version))


def _ledger_of(state: StateReader, record: JobRecord, first: int) -> dict[int, tuple[int, ...]]:
    """The slots that counted in the rounds of a job's current trajectory, by version."""
    found = {}
    while True:
        reports = state.read_steps(record.job_id, record.epoch, record.start_version, first, PAGE_ROUNDS)
        found.update({report.step: tuple(report.slots) for report in reports if report.slots})
        if len(reports) < PAGE_ROUNDS:
            return found
        first = reports[-1].step + 1
