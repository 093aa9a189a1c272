"""The fine-tuning service's client of the coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeVar

import grpc.aio

from gradstream.core import job_states
from gradstream.core.errors import ConfigError, GradstreamError, UnreachableError, one_line
from gradstream.core.log import get_logger
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.rpc.access import COORDINATOR
from gradstream.core.rpc.channel import UNARY_TIMEOUT_SECONDS, open_channel
from gradstream.core.rpc.errors import error_from_rpc, is_passing
from gradstream.core.rpc.reach import why_unreachable
from gradstream.core.rpc.retry import Backoff, cancelling
from gradstream.core.rpc.transport import PLAIN, Transport
from gradstream.proto.v1 import jobs_pb2, jobs_pb2_grpc

T = TypeVar("T")

log = get_logger()


class CoordinatorJobs:
    """Calls a coordinator about jobs. Methods raise its errors, and UnreachableError when it does not answer."""

    def __init__(self, address: str, transport: Transport = PLAIN):
        self.address = address
        self._transport = transport
        self.channel = open_channel(address, COORDINATOR, transport)
        self._stub: jobs_pb2_grpc.JobsServiceAsyncStub = jobs_pb2_grpc.JobsServiceStub(self.channel)

    async def close(self) -> None:
        """End all calls."""
        await self.channel.close(None)

    async def check(self) -> None:
        """Raise UnreachableError when the coordinator does not answer, CredentialsError if credentials cause that."""
        try:
            await self._call(self._stub.ListNodes, jobs_pb2.ListNodesRequest(page_size=1))
        except UnreachableError as error:
            raise await why_unreachable(self.address, COORDINATOR, self._transport) or error from None

    async def submit(self, recipe: Recipe, request_id: str) -> jobs_pb2.Job:
        """Queue a job. Idempotent: for a known request id the same job is returned."""
        request = jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json(), request_id=request_id)
        return (await self._call(self._stub.SubmitJob, request)).job

    async def all(self) -> list[jobs_pb2.Job]:
        """List all jobs, newest first."""
        found: list[jobs_pb2.Job] = []
        request = jobs_pb2.ListJobsRequest()
        while True:
            page = await self._call(self._stub.ListJobs, request)
            found += page.jobs
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def find(self, recipe: Recipe) -> jobs_pb2.Job | None:
        """Find the job with exactly this recipe; None if there is none."""
        for job in await self.all():
            try:
                if job.name == recipe.name and parse_recipe(job.recipe_json) == recipe:
                    return job
            except ConfigError:
                continue
        return None

    async def get(self, job_id: str) -> jobs_pb2.Job:
        """Get a job by its id."""
        return (await self._call(self._stub.GetJob, jobs_pb2.GetJobRequest(job_id=job_id))).job

    async def pause(self, job_id: str) -> jobs_pb2.Job:
        """Pause a job at the next step boundary."""
        return (await self._call(self._stub.PauseJob, jobs_pb2.PauseJobRequest(job_id=job_id))).job

    async def resume(self, job_id: str) -> jobs_pb2.Job:
        """Resume a job."""
        return (await self._call(self._stub.ResumeJob, jobs_pb2.ResumeJobRequest(job_id=job_id))).job

    async def stop(self, job_id: str) -> jobs_pb2.Job:
        """Stop a job at once."""
        return (await self._call(self._stub.StopJob, jobs_pb2.StopJobRequest(job_id=job_id, now=True))).job

    async def checkpoint(self, job_id: str) -> None:
        """Have a running job write a checkpoint at its next step, and wait for it without a deadline.

        Raises ConfigError when the job is not running, CheckpointError when it rests or ends before that step.
        """
        # No deadline: a step may take minutes. Keepalive detects a lost coordinator.
        await self._call(self._stub.CheckpointJob, jobs_pb2.CheckpointJobRequest(job_id=job_id), None)

    async def checkpoints(self, job_id: str) -> list[jobs_pb2.Checkpoint]:
        """List a job's checkpoints, oldest first."""
        found: list[jobs_pb2.Checkpoint] = []
        request = jobs_pb2.ListCheckpointsRequest(job_id=job_id)
        while True:
            page = await self._call(self._stub.ListCheckpoints, request)
            found += page.checkpoints
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    @asynccontextmanager
    async def held(self, job_id: str, version: int | None = None) -> AsyncIterator[jobs_pb2.Checkpoint]:
        """Yield a job's checkpoint, by default the last one, and keep it from being removed inside the `with` block.

        The request is repeated when the coordinator has restarted in the meantime.
        """
        kept: asyncio.Future[jobs_pb2.Checkpoint] = asyncio.get_running_loop().create_future()
        holding = asyncio.create_task(self._hold(job_id, version, kept))
        try:
            try:
                async with asyncio.timeout(UNARY_TIMEOUT_SECONDS):
                    checkpoint = await kept
            except TimeoutError:
                raise UnreachableError(f"coordinator {self.address} does not answer") from None
            yield checkpoint
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)

    async def _hold(self, job_id: str, version: int | None, kept: asyncio.Future[jobs_pb2.Checkpoint]) -> None:
        backoff = Backoff()
        while True:
            request = jobs_pb2.HoldCheckpointRequest(job_id=job_id, version=version)
            try:
                with cancelling(self._stub.HoldCheckpoint(request)) as responses:
                    async for response in responses:
                        version = response.checkpoint.version
                        if not kept.done():
                            kept.set_result(response.checkpoint)
            except grpc.aio.AioRpcError as rpc_error:
                if not kept.done():
                    kept.set_exception(self._error(rpc_error))
                    return
            await asyncio.sleep(backoff.next())

    async def watch(self, job_id: str) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        """Stream a job's history from its beginning until the job has ended, each item once.

        Waits while the coordinator is away.
        """
        cursor = 0
        backoff = Backoff()
        while True:
            try:
                request = jobs_pb2.WatchJobRequest(job_id=job_id, after_cursor=cursor, follow=True)
                with cancelling(self._stub.WatchJob(request)) as items:
                    async for item in items:
                        backoff.reset()
                        if item.cursor > cursor:
                            cursor = item.cursor
                            yield item
                # A coordinator that shuts down may also end a stream without an error.
                if (await self.get(job_id)).state in job_states.ENDED:
                    return
            except grpc.aio.AioRpcError as rpc_error:
                error = self._error(rpc_error)
                if not is_passing(error):
                    raise error from None
            except GradstreamError as error:
                if not is_passing(error):
                    raise
            await asyncio.sleep(backoff.next())

    async def patiently(self, call: Callable[[], Awaitable[T]], on_wait: Callable[[str], object]) -> T:
        """Return the result of `call`; retry while the coordinator is away, or refuses for a reason that passes.

        `on_wait` is called with a text that names the coordinator and the time since which the call waits.
        """
        backoff = Backoff()
        since = ""
        while True:
            try:
                return await call()
            except GradstreamError as error:
                if not is_passing(error):
                    raise
                if not since:
                    since = f"{datetime.now().astimezone():%H:%M:%S}"
                    log.warning("a call to the coordinator failed, trying again", cause=one_line(error))
                away = isinstance(error, UnreachableError)
                which = "does not answer" if away else f"refuses ({one_line(error)})"
                on_wait(f"waits for coordinator {self.address}, which {which}, since {since}")
            await asyncio.sleep(backoff.next())

    async def _call(
        self, method: Callable[..., Awaitable[T]], request: Any, timeout: float | None = UNARY_TIMEOUT_SECONDS
    ) -> T:
        try:
            return await method(request, timeout=timeout)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._error(rpc_error) from None

    def _error(self, rpc_error: grpc.aio.AioRpcError) -> GradstreamError:
        return error_from_rpc(rpc_error, f"coordinator {self.address}")
