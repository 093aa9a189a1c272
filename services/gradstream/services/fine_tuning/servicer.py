"""FineTuningService: decodes requests, calls the service's parts and encodes their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, TypeAlias

import grpc.aio

from gradstream.core.errors import ConfigError, GradstreamError, UnreachableError, one_line
from gradstream.core.recipe.fine_tuning_recipe import (
    ExamplesConfig,
    FineTuningRecipe,
    absolute_fine_tuning_paths,
    parse_fine_tuning_recipe,
)
from gradstream.core.recipe.roots import moved_fine_tuning_recipe
from gradstream.core.rpc.errors import answering
from gradstream.core.rpc.paging import MAX_PAGE_BYTES, start_of_page
from gradstream.core.rpc.requests import checked_request_id
from gradstream.core.storage.paths import AllowedPaths
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.proto.v1 import fine_tuning_pb2_grpc, jobs_pb2
from gradstream.services.fine_tuning import views
from gradstream.services.fine_tuning.bases import find_base, held_base, looked_at
from gradstream.services.fine_tuning.coordinator_jobs import CoordinatorJobs
from gradstream.services.fine_tuning.examples.dataset import preview
from gradstream.services.fine_tuning.examples.preparation import check_data, receive
from gradstream.services.fine_tuning.export.exports import Exports
from gradstream.services.fine_tuning.fine_tunings import FineTunings
from gradstream.services.fine_tuning.generation.serving import Serving
from gradstream.services.fine_tuning.recipe import check_recipe, fit_length
from gradstream.services.fine_tuning.store import Record
from gradstream.services.fine_tuning.threads import in_thread

MAX_PREVIEWED = 100
MAX_PREVIEWS = 2
MAX_UPLOADS = 4
WATCHED_ITEMS = 64

Context = grpc.aio.ServicerContext[Any, Any]
_Items: TypeAlias = asyncio.Queue[pb.WatchFineTuningResponse | Exception | None]


class FineTuningServicer(fine_tuning_pb2_grpc.FineTuningServiceServicer):
    """Serves the calls of clients."""

    def __init__(self, fine_tunings: FineTunings, jobs: CoordinatorJobs, serving: Serving, root: str = ""):
        self._fine_tunings = fine_tunings
        self._jobs = jobs
        self._serving = serving
        self._root = root
        self._exports = Exports(fine_tunings)
        # Bounded because each preview reads a whole file of examples.
        self._previews = asyncio.Semaphore(MAX_PREVIEWS)
        self._uploads = asyncio.Semaphore(MAX_UPLOADS)
        self._allowed = AllowedPaths.of_environment(str(fine_tunings.store.uploads))
        # Accesses paths that people name.
        self._storage = StorageThreads()

    # -- examples --------------------------------------------------------------------------------------------------

    async def UploadExamples(
        self, messages: AsyncIterator[pb.UploadExamplesRequest], context: Context
    ) -> pb.UploadExamplesResponse:
        async with answering(context), self._uploads:
            path, sha256 = await receive(self._fine_tunings.store, messages)
            return pb.UploadExamplesResponse(path=path, sha256=sha256)

    async def PreviewExamples(self, request: pb.PreviewExamplesRequest, context: Context) -> pb.PreviewExamplesResponse:
        async with answering(context), self._previews:
            asked = self._parsed(request)
            await self._check(asked)
            async with held_base(self._jobs, asked.base_model) as (path, title):
                base, config = await in_thread(find_base, path, title)
                asked = await in_thread(fit_length, asked, config)
                check_recipe(asked, base, config)
                tokenizer, _ = await self._serving.tokenizer(base)
            count = min(request.num_examples, MAX_PREVIEWED)
            training = asked.training
            return await in_thread(preview, asked.data, tokenizer, training.row_length(), count, training.num_slots)

    # -- fine-tunings ----------------------------------------------------------------------------------------------

    async def CreateFineTuning(
        self, request: pb.CreateFineTuningRequest, context: Context
    ) -> pb.CreateFineTuningResponse:
        async with answering(context):
            request_id = checked_request_id(request.request_id)
            asked = self._parsed(request)
            # Checked before any path is accessed: the files of the first request may be gone.
            record = self._fine_tunings.store.repeated(request_id, asked.model_dump_json())
            if record is None:
                await self._check(asked)
                record = await self._fine_tunings.create(asked, request_id)
            return pb.CreateFineTuningResponse(fine_tuning=await self._view(record))

    async def ListFineTunings(self, request: pb.ListFineTuningsRequest, context: Context) -> pb.ListFineTuningsResponse:
        async with answering(context):
            jobs: dict[str, jobs_pb2.Job] = {}
            with suppress(UnreachableError):
                jobs = {job.job_id: job for job in await self._jobs.all()}
            for job in jobs.values():
                # The person's own recipe is in the answer already. A list with both could exceed a message's limit.
                job.ClearField("recipe_json")
            records = self._fine_tunings.store.all()
            response = pb.ListFineTuningsResponse()
            num_bytes = 0
            for record in records[start_of_page([record.name for record in records], request.page_token) :]:
                shown = self._fine_tunings.shown(record)
                view = views.fine_tuning(shown, jobs.get(record.job_id), self._fine_tunings.pushed_bytes(record))
                num_bytes += view.ByteSize()
                if response.fine_tunings and num_bytes > MAX_PAGE_BYTES:
                    response.next_page_token = response.fine_tunings[-1].name
                    break
                response.fine_tunings.append(view)
            return response

    async def GetFineTuning(self, request: pb.GetFineTuningRequest, context: Context) -> pb.GetFineTuningResponse:
        async with answering(context):
            return pb.GetFineTuningResponse(fine_tuning=await self._view(self._fine_tunings.find(request.name)))

    async def WatchFineTuning(
        self, request: pb.WatchFineTuningRequest, context: Context
    ) -> AsyncIterator[pb.WatchFineTuningResponse]:
        async with answering(context):
            name = self._fine_tunings.find(request.name).name
            items: _Items = asyncio.Queue(WATCHED_ITEMS)
            watcher = asyncio.create_task(self._watch(name, items))
            try:
                while (item := await items.get()) is not None:
                    if isinstance(item, Exception):
                        raise item
                    yield item
            finally:
                watcher.cancel()

    async def _watch(self, name: str, items: _Items) -> None:
        """Put the fine-tuning after each change and its job's history into `items`, then None."""
        history: asyncio.Task[None] | None = None

        async def follow_job(job_id: str) -> None:
            async for item in self._jobs.watch(job_id):
                await items.put(pb.WatchFineTuningResponse(job=item))

        try:
            told = None
            async for record in self._fine_tunings.follow(name):
                news = self._fine_tunings.shown(record).model_dump(
                    include={"state", "reason", "job_id", "before", "after", "best_version"}
                )
                if news != told:
                    told = news
                    await items.put(pb.WatchFineTuningResponse(fine_tuning=await self._view(record)))
                if record.job_id and history is None:
                    history = asyncio.create_task(follow_job(record.job_id))
            if history is not None:
                # If a fine-tuning was cancelled while its job could not be reached, the job's history does not end.
                await asyncio.wait({history}, timeout=5)
            await items.put(None)
        except Exception as error:
            # The reader of `items` must not wait without end.
            await items.put(error)
        finally:
            if history is not None:
                history.cancel()

    async def PauseFineTuning(self, request: pb.PauseFineTuningRequest, context: Context) -> pb.PauseFineTuningResponse:
        async with answering(context):
            record = await self._fine_tunings.pause(request.name)
            return pb.PauseFineTuningResponse(fine_tuning=await self._view(record))

    async def ResumeFineTuning(
        self, request: pb.ResumeFineTuningRequest, context: Context
    ) -> pb.ResumeFineTuningResponse:
        async with answering(context):
            record = await self._fine_tunings.resume(request.name)
            return pb.ResumeFineTuningResponse(fine_tuning=await self._view(record))

    async def CancelFineTuning(
        self, request: pb.CancelFineTuningRequest, context: Context
    ) -> pb.CancelFineTuningResponse:
        async with answering(context):
            record = await self._fine_tunings.cancel(request.name)
            return pb.CancelFineTuningResponse(fine_tuning=await self._view(record))

    # -- results ---------------------------------------------------------------------------------------------------

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        async with answering(context):
            if request.name and request.base:
                raise ConfigError("give the name of a fine-tuning or a base, not both")
            # Base and checkpoint are kept until the text is complete: the model may be loaded at any time until then.
            async with AsyncExitStack() as held:
                checkpoint = None
                if request.base:
                    await self._storage.call(request.base, self._check_base, request.base)
                    path, title = await held.enter_async_context(held_base(self._jobs, request.base))
                    base, _ = await in_thread(find_base, path, title)
                else:
                    record = self._fine_tunings.find(request.name)
                    if record.base is None:
                        unknown = f"{record.name} is {record.state}: {record.reason}; its base is not known yet"
                        raise ConfigError(unknown)
                    base = record.base
                    if not request.use_base:
                        holding = self._fine_tunings.held_checkpoint(record.name)
                        _, checkpoint = await held.enter_async_context(holding)
                responses = await held.enter_async_context(aclosing(self._serving.generate(base, checkpoint, request)))
                async for response in responses:
                    yield response

    async def GetGeneration(self, request: pb.GetGenerationRequest, context: Context) -> pb.GetGenerationResponse:
        async with answering(context):
            status, cache = self._serving.engine.status(), self._serving.engine.cache()
            return pb.GetGenerationResponse(
                num_running=status.num_running,
                num_waiting=status.num_waiting,
                cache_bytes=cache.held_bytes,
                max_cache_bytes=cache.budget_bytes,
                reason=cache.reason,
            )

    async def ExportFineTuning(
        self, request: pb.ExportFineTuningRequest, context: Context
    ) -> AsyncIterator[pb.ExportFineTuningResponse]:
        async with answering(context):
            version = request.version if request.HasField("version") else None
            async for file, file_bytes, payload in self._exports.pieces(request.name, request.kind, version):
                yield pb.ExportFineTuningResponse(file=file, file_bytes=file_bytes, payload=payload)

    def _parsed(self, request: pb.CreateFineTuningRequest | pb.PreviewExamplesRequest) -> FineTuningRecipe:
        """Parse a recipe that was sent, with its paths translated for this machine. Raises ConfigError."""
        asked = parse_fine_tuning_recipe(request.recipe_json)
        if absolute_fine_tuning_paths(asked) != asked:
            raise ConfigError("the recipe holds relative paths; make them absolute, as the client does")
        return moved_fine_tuning_recipe(asked, request.directory, self._root)

    async def _check(self, asked: FineTuningRecipe) -> None:
        """Check a recipe's paths.

        Raises ConfigError, DataError when its data is not found, and UnreachableError when their storage does not
        answer.
        """
        await self._storage.call(asked.run_root, self._allowed.check, "run_root", asked.run_root)
        await self._storage.call(asked.data.path, self._check_data, asked.data)
        await self._storage.call(asked.base_model, self._check_base, asked.base_model)

    def _check_data(self, data: ExamplesConfig) -> None:
        self._allowed.check("data.path", data.path)
        self._allowed.check("data.validation_path", data.validation_path)
        check_data(data)

    def _check_base(self, base: str) -> None:
        """Raise ConfigError for a base that must not be opened.

        The base is accessed here, so that a hanging storage delays only this call.
        """
        if not base.startswith("job:"):
            self._allowed.check("base_model", base)
            looked_at(base)

    async def _view(self, record: Record) -> pb.FineTuning:
        record, job = self._fine_tunings.shown(record), None
        if record.job_id:
            try:
                job = await self._jobs.get(record.job_id)
            except UnreachableError:
                # The record is still shown when the coordinator does not answer.
                record = record.changed(reason=f"{record.reason}; coordinator {self._jobs.address} does not answer")
            except GradstreamError as error:
                record = record.changed(reason=f"{record.reason}; {one_line(error)}")
        return views.fine_tuning(record, job, self._fine_tunings.pushed_bytes(record))
