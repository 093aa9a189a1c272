"""Submissions: a recipe becomes a queued job, once for each request id."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.jobs.more_steps import as_submitted
from gradstream.coordinator.jobs.replay import check_replay
from gradstream.coordinator.planning.inventory import check_model, special_tokens
from gradstream.coordinator.servicers.kept_checkpoints import KeptCheckpoints
from gradstream.coordinator.servicers.lookup import JobLookup
from gradstream.coordinator.servicers.recipe_data import find_data
from gradstream.coordinator.state.state import JobRecord
from gradstream.coordinator.timing import unix_ms
from gradstream.core.data.manifest import parse_manifest
from gradstream.core.errors import ConfigError, GradstreamError
from gradstream.core.model import check as model_check
from gradstream.core.recipe.files import absolute_path
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.rpc.requests import Requests, checked_request_id
from gradstream.core.storage import files
from gradstream.core.storage.paths import AllowedPaths
from gradstream.core.storage.pool import StorageThreads


class Submissions:
    """Takes recipes whose paths are those of the coordinator."""

    def __init__(
        self,
        controller: Controller,
        kept: KeptCheckpoints,
        lookup: JobLookup,
        storage: StorageThreads,
        allowed: AllowedPaths,
    ):
        self._controller = controller
        self._state = controller.state
        self._kept = kept
        self._find = lookup.find
        self._storage = storage
        self._allowed = allowed
        self._requests = Requests()

    async def submit(self, recipe: Recipe, request_id: str) -> JobRecord:
        """Queue a job, unless the request with this id has done it before. Return the job. Raises GradstreamError."""
        checked_request_id(request_id)
        # The client may have sent the same request on another connection too.
        async with self._requests.one_at_a_time(request_id):
            record = self._repeated(request_id, recipe)
            if record is None:
                async with self._kept.start_of(recipe, self._find) as (resolved, note):
                    record = await self._submit(request_id, resolved, note)
            return record

    def _repeated(self, request_id: str, recipe: Recipe) -> JobRecord | None:
        """The job that this request id created before. Raises ConfigError if that job has another recipe."""
        record = self._state.job_of_request(request_id) if request_id else None
        if record is None:
            return None
        # The stored recipe has values from its data, and perhaps keys of an older release, or more steps since then.
        stored = as_submitted(parse_recipe(record.recipe_json)).model_dump_json()
        asked = as_submitted(model_check.with_ends(recipe, parse_manifest(record.manifest_json)))
        if asked.model_dump_json() != stored:
            raise ConfigError(
                f"request id {request_id} is that of job {record.job_id}, which has another recipe; take a new id for "
                f"each job"
            )
        return record

    async def _submit(self, request_id: str, recipe: Recipe, start_note: str) -> JobRecord:
        manifest = await self._storage.call(recipe.data.path, find_data, recipe, self._allowed)
        if recipe.local is not None and recipe.local.replay:
            check_replay(recipe, self._find(recipe.local.replay), manifest)
        recipe = model_check.with_ends(recipe, manifest)
        warnings = await check_model(
            recipe, manifest, lambda: self._storage.call(recipe.data.path, special_tokens, recipe, manifest)
        )
        taken = self._state.job_ids()
        job_id, directory = await self._storage.call(recipe.run_root, make_run_directory, recipe, taken)
        record = JobRecord(
            job_id=job_id,
            name=recipe.name,
            recipe_json=recipe.model_dump_json(),
            manifest_json=manifest.model_dump_json(),
            run_directory=str(directory),
            submitted_unix_ms=unix_ms(),
            reason="waits for its turn",
            rank=self._state.ranks()[1] + 1,
            request_id=request_id,
        )
        try:
            self._controller.submit(record, warnings, start_note)
        except GradstreamError:
            # The job was not created: a directory that stays would only take its name.
            with suppress(OSError, GradstreamError):
                await self._storage.call(recipe.run_root, directory.rmdir)
            raise
        return self._find(job_id)


def make_run_directory(recipe: Recipe, taken: list[str]) -> tuple[str, Path]:
    """Create a new job id and its directory. An id whose directory exists is skipped: another job has files there."""
    root = Path(absolute_path(recipe.run_root))
    try:
        # Before the loop: a file at `root` would look like a job directory that exists already.
        files.make_local_directory(root)
    except (OSError, ValueError) as error:
        raise ConfigError(f"run_root {recipe.run_root} cannot be written ({error}); choose another") from None
    number = 1
    while True:
        job_id = f"{recipe.name}-{number}"
        directory = root / job_id
        number += 1
        if job_id in taken:
            continue
        try:
            files.make_local_directory(directory, exist_ok=False)
        except FileExistsError:
            continue
        except (OSError, ValueError) as error:
            raise ConfigError(f"run_root {recipe.run_root} cannot be written ({error}); choose another") from None
        return job_id, directory
