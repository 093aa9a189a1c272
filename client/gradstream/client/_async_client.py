"""The asyncio client of a coordinator."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc.aio

from gradstream.client._async_fine_tuning_client import AsyncFineTuningClient
from gradstream.client._connection import Connection, Peer
from gradstream.client._errors import JobFailedError
from gradstream.client._export import ExportWriter
from gradstream.client._fine_tuning_types import GeneratedText
from gradstream.client._types import Checkpoint, ExportProgress, Job, Node, StepMetrics, WatchItem, watch_item
from gradstream.core.errors import BusyError, ConfigError, UnreachableError
from gradstream.core.plan.forecast import Forecast
from gradstream.core.recipe.loading import absolute_paths, load_recipe, parse_recipe
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.rpc import access
from gradstream.core.rpc.requests import new_request_id
from gradstream.core.rpc.retry import Backoff, cancelling
from gradstream.core.telemetry.timeline import Timeline
from gradstream.proto.v1 import jobs_pb2, jobs_pb2_grpc

COORDINATOR = Peer(
    "coordinator",
    "127.0.0.1:7000",
    "gradstream serve coordinator",
    "GRADSTREAM_COORDINATOR",
    "--coordinator",
    access.COORDINATOR,
)


def default_address() -> str:
    """The coordinator's address from the environment's GRADSTREAM_COORDINATOR, else 127.0.0.1:7000."""
    return os.environ.get(COORDINATOR.variable) or COORDINATOR.default_address


SUBMIT_SECONDS = 330.0
"""Longest wait for a submission or a plan: a coordinator gives the process that builds the model 300 s."""


class AsyncClient:
    """Talks to a coordinator.

        async with AsyncClient("10.0.0.1:7000") as client:
            job = await client.submit("recipes/stdlib-gpt.yaml")
            async for item in client.watch(job.job_id):
                print(item)

    `address` is host:port; None takes the environment's GRADSTREAM_COORDINATOR, else 127.0.0.1:7000. Nothing is sent
    before the first call, which raises UnreachableError after at most `connect_timeout_seconds` when nobody answers.
    `call_timeout_seconds` bounds each unary call after that. `credentials` is a directory; None takes the environment's
    GRADSTREAM_CREDENTIALS, else those of `gradstream login` for the address, else talks in the clear.
    A job_id of None (or "") means the newest job.

    Must be made, used and closed in one event loop.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        connect_timeout_seconds: float = 5.0,
        call_timeout_seconds: float = 60.0,
        credentials: str | Path | None = None,
    ):
        self._connection = Connection(
            COORDINATOR,
            address or default_address(),
            jobs_pb2_grpc.JobsServiceStub,
            connect_timeout_seconds,
            call_timeout_seconds,
            credentials,
        )
        self.address = self._connection.address
        self._fine_tuning_client = partial(
            AsyncFineTuningClient,
            connect_timeout_seconds=connect_timeout_seconds,
            call_timeout_seconds=call_timeout_seconds,
            credentials=credentials,
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls and close the connection."""
        await self._connection.close()

    @property
    def unreachable_since(self) -> datetime | None:
        """Since when (local time) every attempt to reach the coordinator has failed; None when the last one
        succeeded."""
        return self._connection.unreachable_since

    # ---- Jobs ------------------------------------------------------------------------------------------------------

    async def submit(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any],
        overrides: Iterable[str] = (),
        *,
        request_id: str | None = None,
    ) -> Job:
        """Queue a job, once: where no answer comes it is asked for again, under the same request id.

        `recipe` is a Recipe, the path of a recipe file, or a mapping; `overrides` are `key.sub=value` strings and go
        with a path only. Relative paths in it are made absolute against the current directory. `request_id` (1 to 64
        letters, digits, '.', '_', '-') is new for each job; a later call with the id of one that was taken gives that
        one's job, after a restart of the coordinator too. None: one that no other call has.

        Raises ConfigError when the recipe is wrong, UnreachableError, which names the request id, when it is not known
        whether the job was taken.
        """
        resolved = await _resolved(recipe, overrides)
        request = jobs_pb2.SubmitJobRequest(
            recipe_json=resolved.model_dump_json(), directory=os.getcwd(), request_id=request_id or new_request_id()
        )
        response = await self._connection.call_once(
            lambda stub, timeout: stub.SubmitJob(request, timeout=max(timeout, SUBMIT_SECONDS)), request.request_id
        )
        return Job.from_proto(response.job)

    async def plan(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any],
        overrides: Iterable[str] = (),
        *,
        num_servers: int = 0,
        num_workers: int = 0,
        memory_bytes: int = 0,
        link_bits_per_second: float = 10e9,
    ) -> Forecast:
        """What a recipe will take, without submitting it: stage cut, memory, bytes on each link, seconds a step.

        The coordinator plans, and measures the model's segments on its machine, as if every worker were like it; that
        may take a minute. It plans for the nodes that are live or, with `num_servers` or `num_workers` above 0, for
        nodes that need not exist; where only one of the two is given, the recipe says the other. `memory_bytes` is what
        each of these offers; 0: enough. `link_bits_per_second` is every node's link, both ways. `recipe` and
        `overrides` are those of `submit`. Data that is not there yet is a warning of the forecast.

        Raises ConfigError when the recipe, its model or a number is wrong, DataError when its data does not fit it,
        PlanError when the nodes cannot hold it.
        """
        for name, value in (("num_servers", num_servers), ("num_workers", num_workers), ("memory_bytes", memory_bytes)):
            if not 0 <= value < (2**32 if name.startswith("num_") else 2**63):
                raise ConfigError(f"{name} is {value}; 0 leaves it to the recipe and the cluster")
        request = jobs_pb2.PlanJobRequest(
            recipe_json=(await _resolved(recipe, overrides)).model_dump_json(),
            directory=os.getcwd(),
            num_servers=num_servers,
            num_workers=num_workers,
            memory_bytes=memory_bytes,
            link_bits_per_second=link_bits_per_second,
        )
        response = await self._connection.call(
            lambda stub, timeout: stub.PlanJob(request, timeout=max(timeout, SUBMIT_SECONDS))
        )
        return Forecast.from_proto(response.forecast)

    async def jobs(self) -> list[Job]:
        """All jobs, newest first."""
        found: list[Job] = []
        request = jobs_pb2.ListJobsRequest()
        while True:
            response = await self._connection.call(lambda stub, timeout: stub.ListJobs(request, timeout=timeout))
            found += map(Job.from_proto, response.jobs)
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    async def job(self, job_id: str | None = None) -> Job:
        """One job; the newest when no id is given. Raises ConfigError when there is none."""
        request = jobs_pb2.GetJobRequest(job_id=job_id or "")
        response = await self._connection.call(lambda stub, timeout: stub.GetJob(request, timeout=timeout))
        return Job.from_proto(response.job)

    async def watch(
        self,
        job_id: str | None = None,
        *,
        follow: bool = True,
        after_cursor: int = 0,
        kinds: Iterable[str] = (),
    ) -> AsyncIterator[WatchItem]:
        """A job's history: events, steps, validations, log lines and checkpoints, in order, each once. `kinds` asks for
        some of them alone, by what `to_dict` has as `type`: "event", "step", "validation", "log", "checkpoint".

        With `follow` it goes on until the job has ended, and survives a coordinator that goes away, or is too busy, for
        a while: it asks again from the last cursor, with endless backoff (`unreachable_since` tells). Without, it ends
        after what is recorded. The first call raises UnreachableError like any other.
        """
        job_id = (await self.job(job_id)).job_id
        kinds = tuple(kinds)
        cursor = after_cursor
        backoff = Backoff()
        while True:
            try:
                # 1. All that the coordinator has, and with follow all that it will have.
                request = jobs_pb2.WatchJobRequest(job_id=job_id, after_cursor=cursor, follow=follow, kinds=kinds)
                stub = await self._connection.connect()
                with cancelling(stub.WatchJob(request)) as messages:
                    async for message in messages:
                        self._connection.unreachable_since = None
                        backoff.reset()
                        if message.cursor <= cursor:
                            continue
                        cursor = message.cursor
                        item = watch_item(message)
                        if item is not None:
                            yield item
                # 2. The stream ended in good order. A coordinator that shuts down may do that too.
                if not follow or (await self.job(job_id)).state.ended:
                    return
            except grpc.aio.AioRpcError as rpc_error:
                error = self._connection.error(rpc_error)
                if not follow or not isinstance(error, UnreachableError | BusyError):
                    raise error from None
            except (UnreachableError, BusyError):
                if not follow:
                    raise
            await asyncio.sleep(backoff.next())

    async def wait(
        self,
        job_id: str | None = None,
        on_progress: Callable[[Job], None] | None = None,
        *,
        poll_seconds: float = 1.0,
    ) -> Job:
        """Wait until a job has ended; return it as it then is.

        How it ended is its `state`: JobState.FINISHED, or STOPPED when a person ended it before its last step, at
        `version` of `num_steps`. A job that failed raises JobFailedError, with the reason. A paused job has not ended:
        `wait` goes on until somebody resumes or stops it.

        `on_progress` is called with the job about every `poll_seconds`. Survives a coordinator that goes away for a
        while.
        """
        job = await self.job(job_id)
        job_id = job.job_id
        backoff = Backoff()
        while True:
            if on_progress is not None:
                on_progress(job)
            if job.state.ended:
                break
            await asyncio.sleep(poll_seconds)
            while True:
                try:
                    job = await self.job(job_id)
                    backoff.reset()
                    break
                except (UnreachableError, BusyError):
                    await asyncio.sleep(backoff.next())
        if job.state == "failed":
            raise JobFailedError(job)
        return job

    async def pause(self, job_id: str) -> Job:
        """Pause a job at its next step boundary, with a checkpoint. Returns before it rests."""
        request = jobs_pb2.PauseJobRequest(job_id=job_id)
        response = await self._connection.call(lambda stub, timeout: stub.PauseJob(request, timeout=timeout))
        return Job.from_proto(response.job)

    async def resume(self, job_id: str) -> Job:
        """Go on with a paused job; start a stopped or failed one again from its last checkpoint."""
        request = jobs_pb2.ResumeJobRequest(job_id=job_id)
        response = await self._connection.call(lambda stub, timeout: stub.ResumeJob(request, timeout=timeout))
        return Job.from_proto(response.job)

    async def replan(self, job_id: str, without: Iterable[str] = ()) -> Job:
        """Put a new plan in the place of a running job's at its next step boundary, by way of a checkpoint.

        Parameter servers that are live and idle come in; those whose names are in `without` go out, and stay out of the
        job's plans until the next call. No step is lost and no bit changes. Returns before the boundary; the job's
        `reason` says what changes, and at which step.

        Raises ConfigError when the job does not run or nothing would change, PlanError when the servers that are left
        cannot hold the model.
        """
        request = jobs_pb2.ReplanJobRequest(job_id=job_id, without=without)
        response = await self._connection.call(lambda stub, timeout: stub.ReplanJob(request, timeout=timeout))
        return Job.from_proto(response.job)

    async def stop(self, job_id: str, now: bool = False) -> Job:
        """End a job at its next step boundary with a checkpoint or, with `now`, at once and without one."""
        request = jobs_pb2.StopJobRequest(job_id=job_id, now=now)
        response = await self._connection.call(lambda stub, timeout: stub.StopJob(request, timeout=timeout))
        return Job.from_proto(response.job)

    async def metrics(
        self, job_id: str | None = None, *, first_step: int = 0, every: int = 1
    ) -> AsyncIterator[StepMetrics]:
        """What the ledger has of each step of a job's trajectory, by rising step, from `first_step` on.

        With `every` above 1: the steps that it divides, those whose version was validated, and the last one. `job_id`
        may also be a job's name, as fine-tunings have one: it stands for the newest job of that name.

        Raises ConfigError when there is no such job, UnreachableError when the connection broke.
        """
        async for rows in self._metrics_pages(job_id, first_step, every):
            for row in rows:
                yield row

    async def _metrics_pages(
        self, job_id: str | None, first_step: int, every: int
    ) -> AsyncIterator[Sequence[StepMetrics]]:
        request = jobs_pb2.GetMetricsRequest(job_id=job_id or "", first_step=first_step, every=every)
        stub = await self._connection.connect()
        try:
            with cancelling(stub.GetMetrics(request)) as pages:
                async for page in pages:
                    yield [StepMetrics.from_proto(row) for row in page.rows]
        except grpc.aio.AioRpcError as rpc_error:
            raise self._connection.error(rpc_error) from None

    async def timeline(self, job_id: str | None = None) -> list[Timeline]:
        """What the workers did and when, over the last versions of a job; `chrome_trace` makes a trace file of it.

        Raises DataError when no worker has sent a timeline yet, and UnreachableError when the connection broke.
        """
        stub = await self._connection.connect()
        try:
            with cancelling(stub.GetTimeline(jobs_pb2.GetTimelineRequest(job_id=job_id or ""))) as messages:
                return [Timeline.from_proto(message.worker, message.timeline) async for message in messages]
        except grpc.aio.AioRpcError as rpc_error:
            raise self._connection.error(rpc_error) from None

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    async def checkpoint(self, job_id: str | None = None) -> Checkpoint:
        """Have a running job write a checkpoint at its next step boundary, and wait until it is there, however long a
        step takes.

        Raises ConfigError when the job does not run, CheckpointError when it rests or ends before.
        """
        request = jobs_pb2.CheckpointJobRequest(job_id=job_id or "")
        response = await self._connection.call(lambda stub, timeout: stub.CheckpointJob(request))
        return Checkpoint.from_proto(response.checkpoint)

    async def checkpoints(self, job_id: str | None = None) -> list[Checkpoint]:
        """A job's checkpoints, oldest first."""
        request = jobs_pb2.ListCheckpointsRequest(job_id=job_id or "")
        response = await self._connection.call(lambda stub, timeout: stub.ListCheckpoints(request, timeout=timeout))
        return [Checkpoint.from_proto(checkpoint) for checkpoint in response.checkpoints]

    async def export(
        self,
        job_id: str | None,
        directory: str | Path,
        version: int | None = None,
        on_progress: Callable[[ExportProgress], None] | None = None,
    ) -> Path:
        """Write a checkpoint (the last one or that of `version`) as a Hugging Face directory; return its path.

        `directory` must not exist or be empty. The files arrive in a directory beside it that is renamed when all are
        complete, so `directory` never holds a part of an export. `on_progress` is called after each piece.

        Raises ConfigError when the directory is not empty, CheckpointError when there is no such checkpoint,
        ProtocolError when what came is not what was announced, and UnreachableError when the connection broke.
        """
        request = jobs_pb2.ExportCheckpointRequest(job_id=job_id or "", version=version)
        writer = await asyncio.to_thread(ExportWriter, directory)
        try:
            stub = await self._connection.connect()
            with cancelling(stub.ExportCheckpoint(request)) as pieces:
                async for piece in pieces:
                    progress = await asyncio.to_thread(writer.write, piece)
                    if on_progress is not None:
                        on_progress(progress)
            return await asyncio.to_thread(writer.finish)
        except grpc.aio.AioRpcError as rpc_error:
            raise self._connection.error(rpc_error) from None
        finally:
            await asyncio.to_thread(writer.discard)

    # ---- The model -------------------------------------------------------------------------------------------------

    async def generate(
        self,
        job_id: str | None = None,
        prompt: str | Sequence[Mapping[str, str]] = "",
        *,
        version: int | None = None,
        max_new_tokens: int | None = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Iterable[str] = (),
        service: str | None = None,
    ) -> AsyncIterator[GeneratedText]:
        """What a job's model continues `prompt` with, piece by piece as it is generated by a fine-tuning service.

        The model is the checkpoint of `version`; without one the last, or, of a running job, the current version, of
        which the job then writes a checkpoint. `service` is the fine-tuning service's host:port; None takes the
        environment's GRADSTREAM_FINE_TUNING, else 127.0.0.1:7001.

        `prompt` is a text, or a conversation of {"role": …, "content": …} for the tokenizer's chat template. At
        temperature 0 the likeliest token is taken each time, else one is drawn, with `seed`, among the likeliest that
        together have probability `top_p`. `max_new_tokens=None`: 128, or what there is room for. Ends before the first
        of the texts `stop`, which may be special tokens. Leaving the iterator ends the generation.

        Raises ConfigError for an unknown job or a prompt that is too long, CheckpointError when there is no such
        version, UnreachableError when the coordinator or the service does not answer.
        """
        base = f"job:{(await self.job(job_id)).job_id}" + (f"@{version}" if version is not None else "")
        async with self._fine_tuning_client(service) as client:
            generated: Any = client.generate(
                None,
                prompt,
                base=base,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop=stop,
            )
            async with aclosing(generated) as pieces:
                async for piece in pieces:
                    yield piece

    # ---- The cluster -----------------------------------------------------------------------------------------------

    async def warnings(self) -> list[str]:
        """What about the cluster needs somebody's hand soon, one line each: credentials that expire, for one."""
        request = jobs_pb2.ListNodesRequest()
        response = await self._connection.call(lambda stub, timeout: stub.ListNodes(request, timeout=timeout))
        return list(response.warnings)

    async def publish_tokens(self, table: bytes, signature: bytes, certificate: bytes) -> tuple[int, int]:
        """Give the coordinator a token table that an authority has signed (`Authority.signed`): (its serial, its number
        of tokens). Needs an admin's credentials. Raises ConfigError when it is not newer than the one in force, or not
        of the cluster's authority."""
        request = jobs_pb2.PublishTokensRequest(table_json=table, signature=signature, certificate=certificate)
        answer = await self._connection.call(lambda stub, timeout: stub.PublishTokens(request, timeout=timeout))
        return answer.serial, answer.num_tokens

    async def nodes(self) -> list[Node]:
        """The nodes of the cluster: live ones first, then by kind and name."""
        request = jobs_pb2.ListNodesRequest()
        response = await self._connection.call(lambda stub, timeout: stub.ListNodes(request, timeout=timeout))
        return [Node.from_proto(node) for node in response.nodes]


async def _resolved(recipe: Recipe | str | Path | Mapping[str, Any], overrides: Iterable[str]) -> Recipe:
    """The recipe, whole and with absolute paths. Raises ConfigError when it is wrong."""
    overrides = tuple(overrides)
    if isinstance(recipe, str | Path):
        return await asyncio.to_thread(load_recipe, recipe, overrides)
    if overrides:
        raise ConfigError("overrides go with the path of a recipe; change the mapping or the Recipe instead")
    return absolute_paths(recipe if isinstance(recipe, Recipe) else parse_recipe(recipe))
