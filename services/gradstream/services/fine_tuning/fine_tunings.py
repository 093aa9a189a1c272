"""The life of each fine-tuning: prepare its data, submit its job, follow it, evaluate its result.

What is to be done next follows from the record alone (`lifecycle.next_phase`), and each phase notes what it has brought
about before the next begins. So a service that is killed at any moment goes on where it was.
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
MAX_RETRY_SECONDS = 5.0  # between two attempts to write a record to a full disk

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
        # Both take a core and the memory of a model or a data set.
        self._preparing = asyncio.Semaphore(1)
        self._evaluating = asyncio.Semaphore(1)

    def start(self) -> None:
        """Go on with all that have not ended."""
        for record in self.store.all():
            if not record.has_ended:
                log.info("goes on", fine_tuning=record.name, state=record.state, next=next_phase(record).value)
                self._drive(record.name)

    async def close(self) -> None:
        """Stop what is under way; the next service goes on with it."""
        tasks = [*self._drivers.values(), *self._before.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def shown(self, record: Record) -> Record:
        """A record as people see it: with why it is no longer written, if that is so."""
        trouble = self._troubles.get(record.name)
        return record.changed(reason=f"{trouble} (before that: {record.reason})") if trouble else record

    # -- what people ask -------------------------------------------------------------------------------------------

    def find(self, name: str) -> Record:
        """The record, the newest for an empty name. Raises ConfigError that suggests the nearest."""
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
        """Note a new one, whose data was found, and begin; the one that the same request has made before as it is.

        Raises ConfigError when the name is taken or the recipe wrong.
        """
        check_recipe(asked, None, {})
        async with self._requests.one_at_a_time(request_id), self._lock(asked.name):
            made = self.store.repeated(request_id, asked.model_dump_json())
            if made is not None:
                return made
            old = self.store.get(asked.name)
            # One that ended before it had a job has made nothing that could be lost.
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
        """Go on with a paused, failed or cancelled one. Raises ConfigError when there is nothing to resume."""
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
        """End it at once. Raises ConfigError when it has ended."""
        async with self._lock(self._named(name)):
            record = self.find(name)
            if record.has_ended:
                raise ConfigError(f"{name} is already {record.state}")
            job_id = record.job_id
            if not job_id and record.job_recipe_json:
                # A service that was killed may have submitted it and not noted so.
                job = await self._jobs.find(parse_recipe(record.job_recipe_json))
                job_id = job.job_id if job is not None else ""
            if job_id:
                # It may just have ended.
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
        """The record now and after each change, until it has ended."""
        while True:
            # Taken before reading, so that what changes in between is not slept through.
            change = self._changes.setdefault(self._named(name), asyncio.Event())
            record = self.find(name)
            yield record
            if record.has_ended:
                return
            await change.wait()

    def checkpoint(self, name: str, version: int | None = None) -> tuple[int, str]:
        """Version and directory of a result: the best, or the one of `version`. Raises CheckpointError when it is not
        there."""
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
        """As `checkpoint`; what is chosen is not removed while it is read inside."""
        async with AsyncExitStack() as stack:
            for attempts_left in reversed(range(MAX_CHOICES)):
                chosen, path = self.checkpoint(name, version)
                try:
                    await stack.enter_async_context(self._jobs.held(self.find(name).job_id, chosen))
                    break
                except CheckpointError:
                    # It was removed since it was the best: of the better one the job's history tells in a moment.
                    if version is not None or not attempts_left:
                        raise
                    await asyncio.sleep(CHOICE_SECONDS)
                except GradstreamError as error:
                    # A coordinator that is away, or does not know the job, removes nothing of it.
                    log.info("a checkpoint is read without being held", fine_tuning=name, cause=one_line(error))
                    break
            yield chosen, path

    def pushed_bytes(self, record: Record) -> int:
        """Payload bytes of the last step known of."""
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
                # Then the phase begins again, as it does in a service that was killed here.
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
            self._troubles[name] = f"{cause}; tried again since {datetime.now().astimezone():%H:%M:%S}"
            log.error("a record cannot be written; trying again", fine_tuning=name, cause=cause)
            self._notify(name)

    async def _prepare(self, name: str) -> None:
        asked = parse_fine_tuning_recipe(self.find(name).recipe_json)
        # 1. The base. One that was found before is the one to go on with.
        noted = self.find(name).base
        if noted is not None:
            path, title = noted.path, noted.title
        else:
            kept = self.store.directory(name) / "base"
            path, title = await self._patiently(name, lambda: keep_base(self._jobs, asked.base_model, kept))
        # Others wait while this one reads: not for storage that hangs.
        await answered(self._storage, path, asked.data, lambda why: self._note(name, reason=why))
        if self._preparing.locked():
            self._note(name, reason="waits for the examples of another one to be prepared")
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
            # The lock keeps a request to cancel from coming between submission and note.
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
        # Checkpoints may have been removed by hand; the list is the truth.
        listed = await self._patiently(name, lambda: self._jobs.checkpoints(record.job_id))
        checkpoints = {checkpoint.version: checkpoint.path for checkpoint in listed}
        best = result_version(self.find(name).losses, checkpoints, record.patience)
        outcome = after_job(job, best)
        changes = {"state": outcome[0], "reason": outcome[1]} if outcome is not None else {}
        self._note(name, checkpoints=checkpoints, best_version=best, **changes)

    def _take(self, name: str, item: jobs_pb2.WatchJobResponse) -> None:
        """Enter an item of the job's history."""
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
            # Read when the result is evaluated; until then a failure waits without a complaint.
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
        """What the base, or a checkpoint, makes of the held-out prompts."""
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
        """The result of `call`; while the coordinator is away, the record says so."""
        return await self._jobs.patiently(call, lambda reason: self._note(name, reason=reason))

    # -- records ---------------------------------------------------------------------------------------------------

    def _note(self, name: str, **changes: Any) -> Record:
        """Store a change, if it is one, and wake who follows. Raises UnwrittenError."""
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
        """`name` if it is one. Raises ConfigError when not."""
        if not name:
            raise ConfigError("the fine-tuning's name is missing")
        return self.find(name).name

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())
