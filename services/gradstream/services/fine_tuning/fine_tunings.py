"""Runs the phases of each fine-tuning: prepare its data, submit its job, follow the job, evaluate its result.

The next phase follows from the record alone (`lifecycle.next_phase`), and each phase records its result before the next
begins. So a service that was killed at any moment continues where it stopped.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from typing import Any, TypeVar

from google.protobuf.json_format import MessageToDict

from gradstream.core.errors import CheckpointError, ConfigError, GradstreamError, nearest, one_line
from gradstream.core.job_states import FINISHED
from gradstream.core.log import get_logger
from gradstream.core.recipe.fine_tuning_recipe import FEW_STEPS, MORE_STEPS, FineTuningRecipe, parse_fine_tuning_recipe
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.rpc.requests import Requests
from gradstream.core.rpc.retry import Backoff
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import jobs_pb2
from gradstream.services.fine_tuning.bases import find_base, keep_base
from gradstream.services.fine_tuning.coordinator_jobs import CoordinatorJobs
from gradstream.services.fine_tuning.examples.dataset import load_prepared
from gradstream.services.fine_tuning.examples.preparation import answered, prepare
from gradstream.services.fine_tuning.generation.serving import Serving
from gradstream.services.fine_tuning.lifecycle import Phase, after_job, next_phase, result_version
from gradstream.services.fine_tuning.recipe import check_recipe, fit_length, make_recipe
from gradstream.services.fine_tuning.store import Completions, Record, Store, UnwrittenError, submission_id
from gradstream.services.fine_tuning.threads import in_thread

T = TypeVar("T")

MAX_CHOICES = 5
CHOICE_SECONDS = 0.5
MAX_RETRY_SECONDS = 5.0  # longest pause between two attempts to write a record to a full disk

log = get_logger()


class FineTunings:
    """The fine-tunings of a service."""

    def __init__(self, store: Store, jobs: CoordinatorJobs, serving: Serving):
        self.store = store
        self._jobs = jobs
        self._serving = serving
        self._drivers: dict[str, asyncio.Task[None]] = {}
        self._before: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._requests = Requests()
        self._changes: dict[str, asyncio.Event] = {}
        self._pushed_bytes: dict[str, int] = {}
        self._troubles: dict[str, str] = {}
        self._storage = StorageThreads()
        # One at a time: each takes a core, and memory for a data set or a model.
        self._preparing = asyncio.Semaphore(1)
        self._evaluating = asyncio.Semaphore(1)

    def start(self) -> None:
        """Resume all fine-tunings that have not ended."""
        for record in self.store.all():
            if not record.has_ended:
                log.info("resuming", fine_tuning=record.name, state=record.state, next=next_phase(record).value)
                self._drive(record.name)

    async def close(self) -> None:
        """Stop all work; the next service resumes it."""
        tasks = [*self._drivers.values(), *self._before.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def shown(self, record: Record) -> Record:
        """Return a record for people. If its changes cannot be written, its reason says why."""
        trouble = self._troubles.get(record.name)
        return record.changed(reason=f"{trouble} (before that: {record.reason})") if trouble else record

    # -- people's requests -----------------------------------------------------------------------------------------

    def find(self, name: str) -> Record:
        """Find a record by its name; an empty name means the newest. Raises ConfigError that suggests the nearest."""
        record = self.store.get(name)
        if record is not None:
            return record
        records = self.store.all()
        if not records:
            raise ConfigError("there is no fine-tuning yet; create one with `gradstream finetune create RECIPE`")
        if not name:
            return records[0]
        near = nearest(name, [record.name for record in records])
        raise ConfigError(f"there is no fine-tuning '{name[:100]}'{near or '; `gradstream finetune ls` lists them'}")

    async def create(self, asked: FineTuningRecipe, request_id: str = "") -> Record:
        """Record a new fine-tuning, whose data was found, and begin it. A repeated request returns the existing one.

        Raises ConfigError when the name is taken or the recipe is wrong.
        """
        check_recipe(asked, None, {})
        async with self._requests.one_at_a_time(request_id), self._lock(asked.name):
            made = self.store.repeated(request_id, asked.model_dump_json())
            if made is not None:
                return made
            old = self.store.get(asked.name)
            # A fine-tuning that ended before it had a job may be replaced: it has no result.
            if old is not None and not (old.has_ended and not old.job_id):
                again = ", or go on with it: gradstream finetune resume" if old.state in ("failed", "cancelled") else ""
                raise ConfigError(
                    f"there is a fine-tuning '{asked.name}' already, which is {old.state}; choose another name{again}"
                )
            record = Record(
                name=asked.name,
                patience=asked.validation.patience,
                created_unix_ms=int(time.time() * 1000),
                recipe_json=asked.model_dump_json(),
                request_id=request_id,
                reason="its base is being checked",
            )
            self.store.create(record)
            self._pushed_bytes.pop(asked.name, None)
            self._notify(asked.name)
            self._drive(asked.name)
        return record

    async def pause(self, name: str) -> Record:
        """Pause the job at its next step. Raises ConfigError when there is nothing to pause."""
        async with self._lock(self._named(name)):
            record = self.find(name)
            if next_phase(record) is not Phase.FOLLOW:
                raise ConfigError(f"{name} is {record.state}; it can be paused only while its job trains")
            await self._jobs.pause(record.job_id)
        return record

    async def resume(self, name: str) -> Record:
        """Resume a paused, failed or cancelled fine-tuning. Raises ConfigError when there is nothing to resume."""
        async with self._lock(self._named(name)):
            record = self.find(name)
            if record.state == "finished" or (not record.has_ended and next_phase(record) is not Phase.FOLLOW):
                raise ConfigError(f"{name} is {record.state}; there is nothing to resume")
            if not record.job_id:
                return self._restart(name, state="preparing", reason="resumed")
            job = await self._jobs.get(record.job_id)
            if job.state != FINISHED:
                await self._jobs.resume(record.job_id)
                return record if not record.has_ended else self._restart(name, state="training", reason="resumed")
            outcome = after_job(job, record.best_version)
            if not record.has_ended or outcome is None or outcome[0] == "failed":
                raise ConfigError(f"job {job.job_id} is finished; there is nothing to resume")
            return self._restart(name, state="evaluating", reason="resumed")

    async def cancel(self, name: str) -> Record:
        """Cancel a fine-tuning at once. Raises ConfigError when it has ended."""
        async with self._lock(self._named(name)):
            record = self.find(name)
            if record.has_ended:
                raise ConfigError(f"{name} is already {record.state}")
            job_id = record.job_id
            if not job_id and record.job_recipe_json:
                # A service that was killed may have submitted the job without recording it.
                job = await self._jobs.find(parse_recipe(record.job_recipe_json))
                job_id = job.job_id if job is not None else ""
            if job_id:
                # The job may just have ended.
                with suppress(ConfigError):
                    await self._jobs.stop(job_id)
            if self.find(name).has_ended:
                return self.find(name)
            cancelled = self._note(name, state="cancelled", job_id=job_id, reason=f"cancelled while {record.state}")
            for tasks in (self._drivers, self._before):
                if name in tasks:
                    tasks.pop(name).cancel()
            return cancelled

    async def follow(self, name: str) -> AsyncIterator[Record]:
        """Yield the record now and after each change, until the fine-tuning has ended."""
        while True:
            # Taken before the record is read, so that no change in between is missed.
            change = self._changes.setdefault(self._named(name), asyncio.Event())
            record = self.find(name)
            yield record
            if record.has_ended:
                return
            await change.wait()

    def checkpoint(self, name: str, version: int | None = None) -> tuple[int, str]:
        """Return version and directory of the best result, or of the result at `version`.

        Raises CheckpointError when there is no such result.
        """
        record = self.find(name)
        wanted = version if version is not None else record.best_version
        if wanted is None:
            cure = "go on with it: gradstream finetune resume" if record.has_ended else "wait for the first"
            raise CheckpointError(
                f"{record.name} is {record.state} and has no checkpoint with a validation loss yet; {cure}"
            )
        if wanted not in record.checkpoints:
            known = ", ".join(map(str, record.checkpoints)) or "none yet"
            raise CheckpointError(f"{record.name} has no checkpoint of version {wanted}; there are: {known}")
        return wanted, record.checkpoints[wanted]

    @asynccontextmanager
    async def held_checkpoint(self, name: str, version: int | None = None) -> AsyncIterator[tuple[int, str]]:
        """Choose a result as `checkpoint` does, and keep it from being removed inside the `with` block."""
        async with AsyncExitStack() as stack:
            for attempts_left in reversed(range(MAX_CHOICES)):
                chosen, path = self.checkpoint(name, version)
                try:
                    await stack.enter_async_context(self._jobs.held(self.find(name).job_id, chosen))
                    break
                except CheckpointError:
                    # The checkpoint was removed because a better one exists; the job's history will show that one soon.
                    if version is not None or not attempts_left:
                        raise
                    await asyncio.sleep(CHOICE_SECONDS)
                except GradstreamError as error:
                    # A coordinator that is away, or does not know the job, does not remove its checkpoints.
                    log.info("a checkpoint is read without being held", fine_tuning=name, cause=one_line(error))
                    break
            yield chosen, path

    def pushed_bytes(self, record: Record) -> int:
        """Payload bytes pushed in the last step that is known."""
        return self._pushed_bytes.get(record.name, record.pushed_bytes_per_step)

    # -- phases ----------------------------------------------------------------------------------------------------

    def _drive(self, name: str) -> None:
        task = self._drivers[name] = asyncio.create_task(self._run(name))
        task.add_done_callback(lambda done: self._drivers.get(name) is done and self._drivers.pop(name))

    async def _run(self, name: str) -> None:
        phases: dict[Phase, Callable[[str], Coroutine[Any, Any, None]]] = {
            Phase.PREPARE: self._prepare,
            Phase.SUBMIT: self._submit,
            Phase.FOLLOW: self._follow,
            Phase.EVALUATE: self._evaluate,
        }
        backoff, failure = Backoff(last_seconds=MAX_RETRY_SECONDS), ""
        while (phase := next_phase(self.find(name))) is not Phase.NOTHING:
            try:
                if failure:
                    self._note(name, state="failed", reason=failure)
                else:
                    await phases[phase](name)
                    backoff.reset()
            except UnwrittenError as error:
                self._note_trouble(name, one_line(error))
                # The phase begins again, as it would after a restart of the service.
                await asyncio.sleep(backoff.next())
            except (GradstreamError, OSError) as error:
                failure = one_line(error)
            except Exception as error:
                log.exception("failed", fine_tuning=name)
                failure = f"{phase.value}: {one_line(error)}"
        record = self.find(name)
        log.info(record.state, fine_tuning=name, reason=record.reason)

    def _note_trouble(self, name: str, cause: str) -> None:
        if name not in self._troubles:
            self._troubles[name] = f"{cause}; retrying since {datetime.now().astimezone():%H:%M:%S}"
            log.error("a record cannot be written; trying again", fine_tuning=name, cause=cause)
            self._notify(name)

    async def _prepare(self, name: str) -> None:
        asked = parse_fine_tuning_recipe(self.find(name).recipe_json)
        # 1. The base. If a base was recorded before, the files must still be the same.
        noted = self.find(name).base
        if noted is not None:
            path, title = noted.path, noted.title
        else:
            kept = self.store.directory(name) / "base"
            path, title = await self._patiently(name, lambda: keep_base(self._jobs, asked.base_model, kept))
        # Others wait while this fine-tuning reads. Make sure first that its storage answers.
        await answered(self._storage, path, asked.data, lambda why: self._note(name, reason=why))
        if self._preparing.locked():
            self._note(name, reason="waits until another fine-tuning's examples are prepared")
        async with self._preparing:
            self._note(name, reason="its base is being checked")
            base, config = await in_thread(find_base, path, title)
            if noted is not None and (base.sha256, base.tokenizer) != (noted.sha256, noted.tokenizer):
                raise CheckpointError(f"the base {title} has changed since; create it under another name")
            asked = await in_thread(fit_length, asked, config)
            check_recipe(asked, base, config)
            self._note(name, base=base, reason="its examples are being prepared")
            # 2. The rows.
            directory = self.store.next_data_directory(name)
            prepared, num_trained = await in_thread(prepare, asked, base, config, str(directory))
            recipe = make_recipe(asked, base, config, prepared.manifest, str(directory))
            self._note(
                name,
                num_trained_parameters=num_trained,
                examples=MessageToDict(prepared.report, preserving_proto_field_name=True),
                job_recipe_json=recipe.model_dump_json(),
                reason="its job is being submitted",
            )

    async def _submit(self, name: str) -> None:
        record = self.find(name)
        recipe = parse_recipe(record.job_recipe_json)

        async def submit() -> None:
            # The lock keeps a request to cancel from coming between the submission and its record.
            async with self._lock(name):
                job = await self._jobs.find(recipe) or await self._jobs.submit(recipe, submission_id(record))
                steps = recipe.training.num_steps
                few = f"; {steps} steps are few: {MORE_STEPS}" if steps < FEW_STEPS else ""
                self._note(name, job_id=job.job_id, state="training", reason=f"as job {job.job_id}{few}")

        await self._patiently(name, submit)

    async def _follow(self, name: str) -> None:
        record = self.find(name)
        self._begin_before(record)
        async for item in self._jobs.watch(record.job_id):
            self._take(name, item)
        job = await self._patiently(name, lambda: self._jobs.get(record.job_id))
        # Checkpoints may have been removed by hand; the coordinator's list is authoritative.
        listed = await self._patiently(name, lambda: self._jobs.checkpoints(record.job_id))
        checkpoints = {checkpoint.version: checkpoint.path for checkpoint in listed}
        best = result_version(self.find(name).losses, checkpoints, record.patience)
        outcome = after_job(job, best)
        changes = {"state": outcome[0], "reason": outcome[1]} if outcome is not None else {}
        self._note(name, checkpoints=checkpoints, best_version=best, **changes)

    def _take(self, name: str, item: jobs_pb2.WatchJobResponse) -> None:
        """Record an item of the job's history."""
        record = self.find(name)
        losses, checkpoints = record.losses, record.checkpoints
        kind = item.WhichOneof("item")
        if kind == "step":
            self._pushed_bytes[name] = item.step.pushed_bytes
        elif kind == "validation" and math.isfinite(item.validation.loss):
            losses = {**losses, item.validation.version: item.validation.loss}
        elif kind == "checkpoint":
            checkpoints = {**checkpoints, item.checkpoint.version: item.checkpoint.path}
        if losses is not record.losses or checkpoints is not record.checkpoints:
            self._note(
                name,
                losses=losses,
                checkpoints=checkpoints,
                best_version=result_version(losses, checkpoints, record.patience),
                pushed_bytes_per_step=self.pushed_bytes(record),
            )

    def _begin_before(self, record: Record) -> None:
        """Have the base complete the held-out prompts while the job trains."""
        if record.before is None and record.name not in self._before:
            task = self._before[record.name] = asyncio.create_task(self._evaluate_before(record.name))
            # The task's result is read when the fine-tuning is evaluated. Mark an error as seen until then.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _evaluate_before(self, name: str) -> None:
        before = await self._complete(self.find(name), None)
        self._note(name, before=before)

    async def _evaluate(self, name: str) -> None:
        record = self.find(name)
        self._begin_before(record)
        _, checkpoint = self.checkpoint(name)
        if name in self._before:
            await self._before.pop(name)
        after = await self._complete(record, checkpoint)
        self._note(name, after=after, state="finished", reason=f"version {record.best_version} is the best")

    async def _complete(self, record: Record, checkpoint: str | None) -> Completions:
        """Have the base, or a checkpoint, complete the held-out prompts."""
        assert record.base is not None
        count = parse_fine_tuning_recipe(record.recipe_json).validation.num_exact_match
        if not count:
            return Completions()
        data = parse_recipe(record.job_recipe_json).data.path
        prompts = (await in_thread(load_prepared, data)).prompts[:count]
        if not prompts:
            return Completions()
        async with self._evaluating:
            return await self._serving.complete(record.base, checkpoint, prompts)

    async def _patiently(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `call`. While the coordinator is away, the record's reason says so."""
        return await self._jobs.patiently(call, lambda reason: self._note(name, reason=reason))

    # -- records ---------------------------------------------------------------------------------------------------

    def _note(self, name: str, **changes: Any) -> Record:
        """Store changes of a record, if it differs, and wake its followers. Raises UnwrittenError."""
        old = self.find(name)
        record = old.changed(**changes)
        if record != old:
            self.store.save(record)
            self._troubles.pop(name, None)
            self._notify(name)
        return record

    def _restart(self, name: str, **changes: Any) -> Record:
        record = self._note(name, **changes)
        if name in self._before:
            self._before.pop(name).cancel()
        self._drive(name)
        return record

    def _notify(self, name: str) -> None:
        event = self._changes.pop(name, None)
        if event is not None:
            event.set()

    def _named(self, name: str) -> str:
        """Check that a name is given and known; return it. Raises ConfigError."""
        if not name:
            raise ConfigError("the fine-tuning's name is missing")
        return self.find(name).name

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())
