"""Checkpoints that stay while somebody reads them, and the one that a new job starts from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gradstream.coordinator.jobs import checkpoints, decisions
from gradstream.coordinator.jobs.active import nothing
from gradstream.coordinator.jobs.starting import check_fit, started_from, state_note
from gradstream.coordinator.planning.inventory import take_inventory
from gradstream.coordinator.state.state import JobRecord
from gradstream.core.checkpoint.manifest import directory_of, read_manifest
from gradstream.core.errors import CheckpointError
from gradstream.core.model.trial import ModelUse
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.storage.paths import AllowedPaths
from gradstream.core.storage.pool import StorageThreads


class KeptCheckpoints:
    """Chooses checkpoints and keeps them from retention."""

    def __init__(self, pins: checkpoints.Pins, storage: StorageThreads, allowed: AllowedPaths):
        self._pins = pins
        self._storage = storage
        self._allowed = allowed

    async def keep(self, record: JobRecord, version: int | None) -> tuple[int, Callable[[], None]]:
        """Keep a job's checkpoint, the last one for None; return its version and what lets go of it. Raises
        CheckpointError when there is none."""
        root = checkpoints.root_of(record.run_directory)
        async with self._pins.choosing(root):
            versions = await self._storage.call(root, checkpoints.versions_on_disk, root)
            if not versions:
                raise CheckpointError(f"job {record.job_id} has no checkpoint yet; wait for its first one")
            version = versions[-1] if version is None else version
            if version not in versions:
                known = f"it has versions {decisions.joined(versions)}"
                raise CheckpointError(f"job {record.job_id} has no checkpoint of version {version}; {known}")
            return version, self._pins.pin(root, version)

    @asynccontextmanager
    async def start_of(self, recipe: Recipe, find: Callable[[str], JobRecord]) -> AsyncIterator[tuple[Recipe, str]]:
        """Resolve the checkpoint that a job starts from, and keep it inside the block. Once the job is stored, its
        record keeps the checkpoint. `find` gives the job of an id. The text says what becomes of the optimizer's state
        if only one of the two jobs has local steps.

        Raises ConfigError when the model does not fit or there is no such job, CheckpointError when there is no such
        checkpoint.
        """
        start, release = recipe.start_from, nothing
        if start is None:
            yield recipe, ""
            return
        try:
            if start.job is None or start.checkpoint is not None:
                directory = start.checkpoint or start.weights
                await self._storage.call(directory, self._allowed.check, "start_from", directory)
                place = checkpoints.place_of(directory)
                if place is not None:
                    async with self._pins.choosing(place[0]):
                        release = self._pins.pin(*place)
            else:
                record = find(start.job[0])
                version, release = await self.keep(record, start.job[1])
                directory = directory_of(checkpoints.root_of(record.run_directory), version)
            manifest = await self._storage.call(directory, read_manifest, directory)
            resolved = started_from(recipe, start, directory, manifest)
            model = await take_inventory(recipe.model.config, recipe.lora, ModelUse.of(recipe))
            check_fit(start, model.tensors, manifest)
            yield resolved, state_note(recipe, start, manifest)
        finally:
            release()
