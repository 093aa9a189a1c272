"""JobsService: the calls of clients."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio

from gradstream.coordinator.jobs import checkpoints
from gradstream.coordinator.jobs.active import nothing
from gradstream.coordinator.jobs.controller import Controller
from gradstream.coordinator.jobs.orders import Orders
from gradstream.coordinator.jobs.replay import replayed
from gradstream.coordinator.nodes.membership import SERVER
from gradstream.coordinator.nodes.open_files import shortages
from gradstream.coordinator.servicers.kept_checkpoints import KeptCheckpoints
from gradstream.coordinator.servicers.lists import Lists
from gradstream.coordinator.servicers.lookup import JobLookup
from gradstream.coordinator.servicers.plans import Plans
from gradstream.coordinator.servicers.removals import Removals
from gradstream.coordinator.servicers.submissions import Submissions
from gradstream.coordinator.servicers.views import Views, read_stored_job
from gradstream.coordinator.state.history import HistoryFilter
from gradstream.coordinator.state.state import JobRecord
from gradstream.coordinator.telemetry import metrics
from gradstream.core.checkpoint.manifest import directory_of, read_manifest
from gradstream.core.checkpoint.weights_files import sent_pieces
from gradstream.core.credentials.tokens import expiring
from gradstream.core.errors import (
    BusyError,
    CheckpointError,
    ConfigError,
    DataError,
)
from gradstream.core.job_states import FINISHED, STATE_WORDS
from gradstream.core.machine.open_files import max_open_files
from gradstream.core.pretrained.export import huggingface_weights, write_huggingface
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.roots import moved, moved_recipe
from gradstream.core.rpc.errors import answering
from gradstream.core.rpc.token_sources import FileTokens
from gradstream.core.storage import files
from gradstream.core.storage.paths import AllowedPaths
from gradstream.core.storage.pool import BULK_SECONDS, StorageThreads
from gradstream.proto.v1 import jobs_pb2, jobs_pb2_grpc

MAX_EXPORTS = 2
EXTEND_SECONDS = 30.0
"""Maximum wait for the checkpoint of a pause."""
MAX_HOLDS = 256
"""Maximum number of checkpoints that are kept for readers at the same time."""

CHECKPOINT_CHANGES = HistoryFilter(kinds=("event", "checkpoint"))
"""What changes whether a job has a checkpoint, or will have one."""

Context = grpc.aio.ServicerContext[Any, Any]


class JobsServicer(jobs_pb2_grpc.JobsServiceServicer):
    """Serves jobs, their history and the cluster's state."""

    def __init__(self, controller: Controller, views: Views, root: str = "", tokens: FileTokens | None = None):
        """Create the service. `tokens` is the table of tokens, which an admin may replace; None without credentials."""
        self._tokens = tokens
        self._controller = controller
        self._state = controller.state
        self._views = views
        self._root = root
        self._orders = Orders(controller)
        self._allowed = AllowedPaths.of_environment()
        # Threads that check paths in requests.
        self._storage = StorageThreads()
        # Threads that read exports.
        self._bulk = StorageThreads(BULK_SECONDS)
        self._plans = Plans(controller.members, self._allowed, self._storage)
        self._removals = Removals(controller, self._bulk)
        self._kept = KeptCheckpoints(controller.pins, self._storage, self._allowed)
        self._exports = asyncio.Semaphore(MAX_EXPORTS)
        self._lookup = JobLookup(self._state)
        self._find = self._lookup.find
        self._submissions = Submissions(controller, self._kept, self._lookup, self._storage, self._allowed)
        self._lists = Lists(controller, views, self._lookup, self._storage)
        self._num_holds = 0

    async def SubmitJob(self, request: jobs_pb2.SubmitJobRequest, context: Context) -> jobs_pb2.SubmitJobResponse:
        async with answering(context):
            recipe = moved_recipe(parse_recipe(request.recipe_json), request.directory, self._root)
            record = await self._submissions.submit(recipe, request.request_id)
            return jobs_pb2.SubmitJobResponse(job=self._views.job(record))

    async def ReplayJob(self, request: jobs_pb2.ReplayJobRequest, context: Context) -> jobs_pb2.ReplayJobResponse:
        async with answering(context):
            other = self._find(request.job_id)
            totals = self._state.step_totals(other.job_id, other.epoch, other.start_version)
            recipe = replayed(other.job_id, parse_recipe(other.recipe_json), totals.version)
            record = await self._submissions.submit(recipe, request.request_id)
            return jobs_pb2.ReplayJobResponse(job=self._views.job(record))

    async def PlanJob(self, request: jobs_pb2.PlanJobRequest, context: Context) -> jobs_pb2.PlanJobResponse:
        async with answering(context):
            recipe = moved_recipe(parse_recipe(request.recipe_json), request.directory, self._root)
            told = await self._plans.forecast(recipe, request)
            return jobs_pb2.PlanJobResponse(forecast=told.to_proto())

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: Context) -> jobs_pb2.ListJobsResponse:
        async with answering(context):
            return await self._lists.jobs(request)

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.GetJobResponse:
        async with answering(context):
            record = self._lookup.named(request.job_id)
            await self._controller.timelines.load(record)
            record = self._find(record.job_id)
            stored = await self._controller.reads.call(lambda reader: read_stored_job(reader, record, whole=True))
            return jobs_pb2.GetJobResponse(job=self._views.from_stored(stored, whole=True))

    async def WatchJob(
        self, request: jobs_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        async with answering(context):
            async for response in self._lists.watch(request):
                yield response

    async def PauseJob(self, request: jobs_pb2.PauseJobRequest, context: Context) -> jobs_pb2.PauseJobResponse:
        async with answering(context):
            self._orders.pause(self._find(request.job_id))
            return jobs_pb2.PauseJobResponse(job=self._views.job(self._find(request.job_id)))

    async def ResumeJob(self, request: jobs_pb2.ResumeJobRequest, context: Context) -> jobs_pb2.ResumeJobResponse:
        async with answering(context):
            record = self._find(request.job_id)
            num_steps = parse_recipe(record.recipe_json).training.num_steps
            if request.HasField("num_steps") and (request.num_steps != num_steps or record.state == FINISHED):
                await self._extend(record, request.num_steps)
                # The answer shows the queued job before it is planned: its reason still says what has changed.
                job = self._views.job(self._find(record.job_id))
                self._controller.reconcile()
                return jobs_pb2.ResumeJobResponse(job=job)
            on_disk = await self._versions_on_disk(record)
            self._orders.resume(self._find(record.job_id), on_disk)
            return jobs_pb2.ResumeJobResponse(job=self._views.job(self._find(request.job_id)))

    async def _extend(self, record: JobRecord, num_steps: int) -> None:
        """Extend a resting or ended job to more steps; after a recent pause, first wait for the job's checkpoint."""
        try:
            async with asyncio.timeout(EXTEND_SECONDS):
                with self._controller.notifier.watching(record.job_id, CHECKPOINT_CHANGES) as changes:
                    while True:
                        changes.begin()
                        # Before the look at the disk: a checkpoint that counts here is seen there.
                        is_ready = self._orders.may_extend(self._find(record.job_id), num_steps)
                        on_disk = await self._versions_on_disk(record)
                        if is_ready and self._orders.may_extend(self._find(record.job_id), num_steps):
                            break
                        if not is_ready:
                            await changes.wait()
        except TimeoutError:
            raise BusyError(
                f"the checkpoint of job {record.job_id} is not written yet, and it goes on from there; try again when "
                f"`gradstream status {record.job_id}` does not wait for it any more"
            ) from None
        self._orders.extend(self._find(record.job_id), on_disk, num_steps)

    async def _versions_on_disk(self, record: JobRecord) -> list[int]:
        root = checkpoints.root_of(record.run_directory)
        return await self._storage.call(root, checkpoints.versions_on_disk, root)

    async def StopJob(self, request: jobs_pb2.StopJobRequest, context: Context) -> jobs_pb2.StopJobResponse:
        async with answering(context):
            self._orders.stop(self._find(request.job_id), request.now)
            return jobs_pb2.StopJobResponse(job=self._views.job(self._find(request.job_id)))

    async def ReplanJob(self, request: jobs_pb2.ReplanJobRequest, context: Context) -> jobs_pb2.ReplanJobResponse:
        async with answering(context):
            record = self._find(request.job_id)
            await self._orders.replan(record, request.without)
            return jobs_pb2.ReplanJobResponse(job=self._views.job(self._find(record.job_id)))

    async def RemoveJob(self, request: jobs_pb2.RemoveJobRequest, context: Context) -> jobs_pb2.RemoveJobResponse:
        async with answering(context):
            if not request.job_id:
                raise ConfigError("name the job that is to be removed; `gradstream ls` lists them")
            record = self._find(request.job_id)
            files = await self._removals.remove(record, request.dry_run)
            return jobs_pb2.RemoveJobResponse(
                job_id=record.job_id,
                num_bytes=files.num_bytes,
                versions=files.versions,
                run_directory=record.run_directory,
                left=files.left,
            )

    async def CheckpointJob(
        self, request: jobs_pb2.CheckpointJobRequest, context: Context
    ) -> jobs_pb2.CheckpointJobResponse:
        async with answering(context):
            record = self._find(request.job_id)
            version = self._orders.checkpoint(record)
            root = checkpoints.root_of(record.run_directory)
            with self._controller.notifier.watching(record.job_id, CHECKPOINT_CHANGES) as changes:
                while True:
                    # Before the check: a change between the check and the wait is not missed.
                    changes.begin()
                    versions = await self._storage.call(root, checkpoints.versions_on_disk, root)
                    if versions and versions[-1] > version:
                        listing = await self._storage.call(root, checkpoints.listing, root, versions[-1] - 1)
                        return jobs_pb2.CheckpointJobResponse(checkpoint=listing[-1])
                    if not self._orders.checkpoint_comes(record, version):
                        state = self._find(record.job_id).state
                        raise CheckpointError(f"job {record.job_id} is {STATE_WORDS[state]} before its next step")
                    await changes.wait()

    async def ListCheckpoints(
        self, request: jobs_pb2.ListCheckpointsRequest, context: Context
    ) -> jobs_pb2.ListCheckpointsResponse:
        async with answering(context):
            record = self._find(request.job_id)
            return await self._lists.checkpoints(record, request)

    async def ExportCheckpoint(
        self, request: jobs_pb2.ExportCheckpointRequest, context: Context
    ) -> AsyncIterator[jobs_pb2.ExportCheckpointResponse]:
        async with answering(context):
            record = self._find(request.job_id)
            version, release = await self._kept.keep(record, _version_of(request))
            try:
                async with self._exports:
                    directory = directory_of(checkpoints.root_of(record.run_directory), version)
                    async for piece in _export(directory, self._bulk):
                        yield piece
            finally:
                release()

    async def HoldCheckpoint(
        self, request: jobs_pb2.HoldCheckpointRequest, context: Context
    ) -> AsyncIterator[jobs_pb2.HoldCheckpointResponse]:
        async with answering(context):
            if self._num_holds >= MAX_HOLDS:
                raise BusyError(f"{MAX_HOLDS} checkpoints are already kept for readers; try again later")
            self._num_holds += 1
            release = nothing
            try:
                record = self._find(request.job_id)
                version, release = await self._kept.keep(record, _version_of(request))
                root = checkpoints.root_of(record.run_directory)
                manifest = await self._storage.call(root, read_manifest, directory_of(root, version))
                yield jobs_pb2.HoldCheckpointResponse(checkpoint=checkpoints.as_message(root, manifest))
                # Until the caller cancels the call, after it has read the checkpoint, or is gone.
                await asyncio.Event().wait()
            finally:
                release()
                self._num_holds -= 1

    async def GetTimeline(
        self, request: jobs_pb2.GetTimelineRequest, context: Context
    ) -> AsyncIterator[jobs_pb2.GetTimelineResponse]:
        async with answering(context):
            record = self._find(request.job_id)
            found = False
            async for timeline in self._controller.timelines.stream(record):
                found = True
                yield timeline
            if not found:
                raise DataError(
                    f"there is no timeline of job {record.job_id} yet; workers send one at the end of each version"
                )

    async def GetMetrics(
        self, request: jobs_pb2.GetMetricsRequest, context: Context
    ) -> AsyncIterator[jobs_pb2.GetMetricsResponse]:
        async with answering(context):
            record, reads = self._lookup.named(request.job_id), self._controller.reads
            rounds, first, every = parse_recipe(record.recipe_json).rounds, request.first_step, request.every
            pages = await reads.call(lambda reader: metrics.pages(reader, record, rounds, first, every))
            while (rows := await reads.call(lambda _: next(pages, None))) is not None:
                if rows:
                    yield jobs_pb2.GetMetricsResponse(rows=rows)

    async def CheckStorage(
        self, request: jobs_pb2.CheckStorageRequest, context: Context
    ) -> jobs_pb2.CheckStorageResponse:
        async with answering(context):
            directory = moved(request.directory, request.caller_directory, self._root)
            if not directory.startswith("/"):
                raise ConfigError(f"run_root {directory[:200]} is not an absolute path")
            await self._storage.call(directory, self._allowed.check, "run_root", directory)
            servers = self._controller.members.present(SERVER)
            problem = await self._controller.storage.problem(directory, servers)
            return jobs_pb2.CheckStorageResponse(problem=problem, num_servers=len(servers), directory=directory)

    async def ListNodes(self, request: jobs_pb2.ListNodesRequest, context: Context) -> jobs_pb2.ListNodesResponse:
        async with answering(context):
            return self._lists.nodes(request, self._warnings())

    async def PublishTokens(
        self, request: jobs_pb2.PublishTokensRequest, context: Context
    ) -> jobs_pb2.PublishTokensResponse:
        async with answering(context):
            if self._tokens is None:
                raise ConfigError("this coordinator runs without credentials, so it has no table of tokens to replace")
            take = partial(self._tokens.replace, request.table_json, request.signature, request.certificate)
            table = await asyncio.to_thread(take)
            return jobs_pb2.PublishTokensResponse(serial=table.serial, num_tokens=len(table.tokens))

    def _warnings(self) -> list[str]:
        short = shortages(max_open_files(), self._controller.members.all())
        return short if self._tokens is None else [*short, *expiring(self._tokens.table, time.time())]


async def _export(directory: str, storage: StorageThreads) -> AsyncIterator[jobs_pb2.ExportCheckpointResponse]:
    """Send a checkpoint as the files of a Hugging Face directory.

    The small files come from a temporary directory. The weights are sent piece by piece as they are read, so that
    neither memory nor disk has to hold a model.
    """
    with tempfile.TemporaryDirectory(prefix="gradstream-export-") as temporary:
        target = Path(temporary)
        reader = await storage.call(directory, write_huggingface, directory, target, weights=False)
        async for file, file_bytes, payload in files.directory_pieces(target):
            yield jobs_pb2.ExportCheckpointResponse(file=file, file_bytes=file_bytes, payload=payload)
    async for file, file_bytes, payload in sent_pieces(huggingface_weights(reader), storage, directory):
        yield jobs_pb2.ExportCheckpointResponse(file=file, file_bytes=file_bytes, payload=payload)


def _version_of(request: jobs_pb2.ExportCheckpointRequest | jobs_pb2.HoldCheckpointRequest) -> int | None:
    """The version that a request names; None for the last one."""
    return request.version if request.HasField("version") else None
