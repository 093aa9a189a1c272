"""A gRPC coordinator that serves canned jobs, and the parts of the fine-tuning service that use it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.rpc import channel
from gradstream.core.rpc import errors as rpc_errors
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2, jobs_pb2_grpc
from gradstream.services.fine_tuning.coordinator_jobs import CoordinatorJobs
from gradstream.services.fine_tuning.fine_tunings import FineTunings
from gradstream.services.fine_tuning.generation.serving import Serving
from gradstream.services.fine_tuning.store import Store


class CannedCoordinator(jobs_pb2_grpc.JobsServiceServicer):
    """A coordinator whose jobs end when `end` is called."""

    def __init__(self) -> None:
        self.jobs: list[jobs_pb2.Job] = []
        self.submitted = 0
        self.request_ids: list[str] = []
        self.resumed = 0
        self.deadlines: list[float | None] = []
        """The callers' deadlines for a checkpoint, in seconds."""
        self.ended = asyncio.Event()
        self.lose_answers = 0
        self.held: list[int] = []
        """Versions of the checkpoints that callers are reading."""
        self.checkpoints = [jobs_pb2.Checkpoint(version=version, path=f"/runs/{version}") for version in (4, 8)]

    def add(self, recipe: Recipe, state: str = "RUNNING") -> jobs_pb2.Job:
        job = jobs_pb2.Job(
            job_id=f"{recipe.name}-{len(self.jobs) + 1}",
            name=recipe.name,
            state=f"JOB_STATE_{state}",  # type: ignore[arg-type]
            recipe_json=recipe.model_dump_json(),
        )
        self.jobs.append(job)
        return job

    def end(self, state: str = "FINISHED") -> None:
        for job in self.jobs:
            job.state = getattr(jobs_pb2, f"JOB_STATE_{state}")
        self.ended.set()

    def _find(self, job_id: str) -> jobs_pb2.Job:
        for job in self.jobs:
            if job.job_id == job_id:
                return job
        raise ConfigError(f"there is no job '{job_id}'")

    async def SubmitJob(self, request: Any, context: Any) -> jobs_pb2.SubmitJobResponse:
        self.submitted += 1
        self.request_ids.append(request.request_id)
        job = self.add(parse_recipe(request.recipe_json))
        if self.lose_answers:
            self.lose_answers -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        return jobs_pb2.SubmitJobResponse(job=job)

    async def ListJobs(self, request: Any, context: Any) -> jobs_pb2.ListJobsResponse:
        return jobs_pb2.ListJobsResponse(jobs=self.jobs)

    async def GetJob(self, request: Any, context: Any) -> jobs_pb2.GetJobResponse:
        async with rpc_errors.answering(context):
            return jobs_pb2.GetJobResponse(job=self._find(request.job_id))
        raise AssertionError

    async def CheckpointJob(self, request: Any, context: Any) -> jobs_pb2.CheckpointJobResponse:
        """Write a checkpoint of version 8, the current version of every running job."""
        self.deadlines.append(context.time_remaining())
        async with rpc_errors.answering(context):
            if not self.checkpoints:
                raise ConfigError(f"job {self._find(request.job_id).job_id} is queued")
            return jobs_pb2.CheckpointJobResponse(checkpoint=self.checkpoints[-1])
        raise AssertionError

    async def StopJob(self, request: Any, context: Any) -> jobs_pb2.StopJobResponse:
        async with rpc_errors.answering(context):
            job = self._find(request.job_id)
            job.state = jobs_pb2.JOB_STATE_STOPPED
            self.ended.set()
            return jobs_pb2.StopJobResponse(job=job)
        raise AssertionError

    async def ResumeJob(self, request: Any, context: Any) -> jobs_pb2.ResumeJobResponse:
        async with rpc_errors.answering(context):
            job = self._find(request.job_id)
            job.state = jobs_pb2.JOB_STATE_RUNNING
            self.resumed += 1
            self.ended.clear()
            return jobs_pb2.ResumeJobResponse(job=job)
        raise AssertionError

    async def ListCheckpoints(self, request: Any, context: Any) -> jobs_pb2.ListCheckpointsResponse:
        async with rpc_errors.answering(context):
            self._find(request.job_id)
            return jobs_pb2.ListCheckpointsResponse(checkpoints=self.checkpoints)
        raise AssertionError

    async def HoldCheckpoint(self, request: Any, context: Any) -> AsyncIterator[jobs_pb2.HoldCheckpointResponse]:
        async with rpc_errors.answering(context):
            job_id = self._find(request.job_id).job_id
            known = {checkpoint.version: checkpoint for checkpoint in self.checkpoints}
            if not known:
                raise CheckpointError(f"job {job_id} has no checkpoint yet")
            version = request.version if request.HasField("version") else max(known)
            if version not in known:
                raise CheckpointError(f"job {job_id} has no checkpoint of version {version}")
            self.held.append(version)
            try:
                yield jobs_pb2.HoldCheckpointResponse(checkpoint=known[version])
                await asyncio.Event().wait()
            finally:
                self.held.remove(version)

    async def WatchJob(self, request: Any, context: Any) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        history = [
            jobs_pb2.WatchJobResponse(validation=jobs_pb2.Validation(version=0, loss=3.0)),
            jobs_pb2.WatchJobResponse(step=coordinator_pb2.ReportStepRequest(step=3, pushed_bytes=640)),
            jobs_pb2.WatchJobResponse(validation=jobs_pb2.Validation(version=4, loss=1.5)),
            jobs_pb2.WatchJobResponse(checkpoint=jobs_pb2.Checkpoint(version=4, path="/runs/4")),
            jobs_pb2.WatchJobResponse(validation=jobs_pb2.Validation(version=8, loss=float("nan"))),
        ]
        for cursor, item in enumerate(history, 1):
            item.cursor = cursor
            if cursor > request.after_cursor:
                yield item
        await self.ended.wait()


@asynccontextmanager
async def jobs_of(coordinator: CannedCoordinator) -> AsyncIterator[CoordinatorJobs]:
    """Serve the coordinator; yield the fine-tuning service's client of it."""
    server = channel.new_server()
    jobs_pb2_grpc.add_JobsServiceServicer_to_server(coordinator, server)
    port = channel.listen(server, "127.0.0.1:0")
    await server.start()
    jobs = CoordinatorJobs(f"127.0.0.1:{port}")
    try:
        yield jobs
    finally:
        await jobs.close()
        await server.stop(None)


@asynccontextmanager
async def service(coordinator: CannedCoordinator, directory: Path) -> AsyncIterator[FineTunings]:
    """Start a service's fine-tunings on `directory`."""
    async with jobs_of(coordinator) as jobs:
        store, serving = Store(directory), Serving("cpu", 1 << 30)
        fine_tunings = FineTunings(store, jobs, serving)
        fine_tunings.start()
        try:
            yield fine_tunings
        finally:
            await fine_tunings.close()
            await serving.close()
            store.close()
