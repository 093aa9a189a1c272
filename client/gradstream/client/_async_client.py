"""The asyncio client of a coordinator."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
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
from gradstream.client._job_types import ExportProgress, Job, RemovedJob, job_state
from gradstream.client._node_types import Node
from gradstream.client._step_types import StepMetrics
from gradstream.client._values import unix_ms_of
from gradstream.client._watch_types import Checkpoint, WatchItem, check_selected, watch_item
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
    """A client of a coordinator: submits, watches and steers jobs, and fetches what comes of them.

        async with AsyncClient("10.0.0.1:7000") as client:
            job = await client.submit("recipes/stdlib-gpt.yaml")
            async for item in client.watch(job.job_id):
                print(item)

    `address` is host:port; None takes the environment's GRADSTREAM_COORDINATOR, else 127.0.0.1:7000. `credentials` is a
    directory; None takes the environment's GRADSTREAM_CREDENTIALS, else those of `gradstream login` for the address,
    else the connection is in the clear. The first call connects, for at most `connect_timeout_seconds`;
    `call_timeout_seconds` bounds each call after that unless the method says otherwise.

    A job_id of None (or "") means the newest job. A method that takes a job_id raises ConfigError when there is no such
    job. Every method may raise UnreachableError when the coordinator does not answer, CredentialsError and AccessError
    when the credentials are not accepted or do not allow the call, and BusyError when the caller asks for too much at
    once.

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
        """Queue a job. Return it as queued.

        `recipe` is a Recipe, the path of a recipe file, or a mapping; `overrides` are `key.sub=value` strings and go
        with a path only. Relative paths in the recipe are made absolute against the current directory.

        The request is idempotent: when its answer is lost, the client retries it with the same `request_id` for 10 s.
        `request_id` has 1 to 64 letters, digits, '.', '_' and '-'; None makes a new one. A later call with the id of an
        earlier one returns the earlier one's job, also after a restart of the coordinator.

        Raises ConfigError when the recipe is wrong, with all that is wrong; DataError when its data is missing or does
        not fit it; UnreachableError, which names the request id, when the client does not know whether the job was
        queued.
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
        """Forecast what a recipe will take, without submitting: stage cut, memory, bytes on each link, seconds a step.

        `recipe` and `overrides` are those of `submit`. The coordinator makes the plan. It measures the model's segments
        on its own machine, which may take a minute, and assumes that every worker computes as fast.

        The plan is for the live nodes or, with `num_servers` or `num_workers` above 0, for nodes that need not exist.
        If only one of the two is given, the recipe's minimum is the other. `memory_bytes` is what each such node
        offers; 0 means enough. `link_bits_per_second` is the speed of every node's link, in each direction. If the data
        set is not there yet, the forecast says so in its `warnings`.

        Raises ConfigError when the recipe, its model or a number is wrong, DataError when the data does not fit the
        recipe, PlanError when the nodes cannot hold the job.
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

    async def jobs(self, *, states: Iterable[str] = (), limit: int | None = None) -> list[Job]:
        """The jobs, newest first: all of them or those in `states`, such as "running"; at most `limit`.

        Raises ConfigError for a state that no job can have.
        """
        wanted = [job_state(state) for state in states]
        found: list[Job] = []
        request = jobs_pb2.ListJobsRequest(states=wanted, page_size=limit or 0)
        while True:
            response = await self._connection.call(lambda stub, timeout: stub.ListJobs(request, timeout=timeout))
            # A coordinator of an earlier release sends the jobs in all states, as many as fit in a message.
            found += [Job.from_proto(job) for job in response.jobs if not wanted or job.state in wanted]
            if not response.next_page_token or (limit is not None and len(found) >= limit):
                return found[:limit]
            request.page_token = response.next_page_token

    async def job(self, job_id: str | None = None) -> Job:
        """One job: its state, its progress and what it waits for. Raises ConfigError when there is none."""
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
        event_kinds: Iterable[str] = (),
        nodes: Iterable[str] = (),
        level: str = "",
        since: datetime | None = None,
        tail: int | None = None,
    ) -> AsyncIterator[WatchItem]:
        """Iterate over a job's history: Event, Step, Validation, LogLine and Checkpoint items, in order, each once.

        Items have rising cursors; `after_cursor` leaves out those up to a cursor. The coordinator selects the items:

        - `kinds`: by the `type` of their `to_dict`: "event", "step", "validation", "log" or "checkpoint".
        - `event_kinds`: of the events, those of these kinds, such as "failure". Other items are not affected.
        - `nodes`: log lines of these nodes and events whose message names one of them; no items of other kinds.
        - `level`: of the log lines, those of this level and above. Other items are not affected.
        - `since`: items of this time and later.
        - `tail`: of the recorded items that the others select, the last of this number.

        With `follow` the iteration ends when the job has ended. While the coordinator does not answer, or is too busy,
        the client retries from the last cursor without a limit; `unreachable_since` says since when. Without `follow`
        the iteration ends after what is recorded.

        Raises UnreachableError when the coordinator does not answer the first call or, without `follow`, any;
        ConfigError for an unknown kind or level.
        """
        pages = self._watch_pages(
            job_id,
            follow=follow,
            after_cursor=after_cursor,
            kinds=kinds,
            event_kinds=event_kinds,
            nodes=nodes,
            level=level,
            since=since,
            tail=tail,
        )
        async with aclosing(pages):
            async for page in pages:
                for item in page:
                    yield item

    async def _watch_pages(
        self,
        job_id: str | None,
        *,
        follow: bool,
        after_cursor: int,
        kinds: Iterable[str],
        event_kinds: Iterable[str],
        nodes: Iterable[str],
        level: str,
        since: datetime | None,
        tail: int | None,
    ) -> AsyncGenerator[Sequence[WatchItem], None]:
        request = jobs_pb2.WatchJobRequest(
            job_id=(await self.job(job_id)).job_id,
            after_cursor=after_cursor,
            follow=follow,
            kinds=kinds,
            event_kinds=event_kinds,
            nodes=nodes,
            level=level,
            since_unix_ms=unix_ms_of(since),
            tail=tail or 0,
            paged=True,
        )
        backoff = Backoff()
        while True:
            try:
                # 1. All that the coordinator has, and with follow all that it will have.
                stub = await self._connection.connect()
                with cancelling(stub.WatchJob(request)) as responses:
                    async for response in responses:
                        self._connection.unreachable_since = None
                        backoff.reset()
                        check_selected(request, response)
                        # A coordinator of an earlier release sends single items.
                        new = [each for each in response.items or [response] if each.cursor > request.after_cursor]
                        if new:
                            # The next request goes on from here: the last items have been selected.
                            request.after_cursor, request.tail = new[-1].cursor, 0
                            yield [item for each in new if (item := watch_item(each)) is not None]
                # 2. The stream ended in good order. A coordinator that shuts down may do that too.
                if not follow or (await self.job(request.job_id)).state.ended:
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
        """Wait until a job has ended. Return it in its last state.

        The returned job's `state` says how it ended: JobState.FINISHED after all steps, or JobState.STOPPED when a
        person stopped it, at step `step` of `num_steps`. A paused job has not ended: `wait` returns after it was
        resumed and has ended, or was stopped.

        `on_progress` is called with the job about every `poll_seconds`. While the coordinator does not answer, the
        client retries without a limit, except for the first call.

        Raises JobFailedError, with the reason and the job, when the job failed.
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
        """Pause a job at its next step boundary, with a checkpoint. Return it at once, before it rests.

        With local steps the boundary is the end of the round under way.

        Raises ConfigError when the job has ended.
        """
        request = jobs_pb2.PauseJobRequest(job_id=job_id)
        response = await self._connection.call(lambda stub, timeout: stub.PauseJob(request, timeout=timeout))
        return Job.from_proto(response.job)

    async def resume(self, job_id: str, num_steps: int | None = None) -> Job:
        """Resume a paused job, or start a stopped or failed one again from its last checkpoint.

        With `num_steps`, a finished, stopped, failed or paused job goes on to that number of steps in all. Its steps so
        far stay as they are. From there on the learning rate follows the schedule of `num_steps` steps, so it may rise
        again; the job's `reason` names both rates.

        Raises ConfigError when the job has finished and no `num_steps` are given, or when with `num_steps` it runs or
        has done as many steps, or when the steps are no whole rounds of a job with local steps.
        """
        request = jobs_pb2.ResumeJobRequest(job_id=job_id, num_steps=num_steps)
        response = await self._connection.call(lambda stub, timeout: stub.ResumeJob(request, timeout=timeout))
        return Job.from_proto(response.job)

    async def replay(self, job_id: str, *, request_id: str | None = None) -> Job:
        """Queue a job that computes a job's rounds again, with the slots that counted there. Return it as queued.

        For jobs with `local.quorum`, in which the slots that count depend on time. The new job has the same recipe and
        ends with the same bits, on any workers and servers. Of a job that has not finished it computes the rounds so
        far. `request_id` is that of `submit`.

        Raises ConfigError when the job has no quorum or no round yet, DataError when its data set is another one now.
        """
        request = jobs_pb2.ReplayJobRequest(job_id=job_id, request_id=request_id or new_request_id())
        response = await self._connection.call_once(
            lambda stub, timeout: stub.ReplayJob(request, timeout=max(timeout, SUBMIT_SECONDS)), request.request_id
        )
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

    async def remove(self, job_id: str, dry_run: bool = False) -> RemovedJob:
        """Remove a job that has ended: its record, its history and ledger, its checkpoints and timelines on the disk.

        Other files in the job's directory stay, such as exports. With `dry_run` nothing is removed. Return what went,
        or would go.

        Raises ConfigError when the job has not ended, is a fine-tuning's, or has a checkpoint that another job or a
        reader needs.
        """
        request = jobs_pb2.RemoveJobRequest(job_id=job_id, dry_run=dry_run)
        response = await self._connection.call(lambda stub, timeout: stub.RemoveJob(request, timeout=timeout))
        return RemovedJob.from_proto(response)

    async def stop(self, job_id: str, now: bool = False) -> Job:
        """Stop a job at its next step boundary with a checkpoint or, with `now`, at once and without one.

        Returns the job at once, before it has ended. Raises ConfigError when the job has ended already.
        """
        request = jobs_pb2.StopJobRequest(job_id=job_id, now=now)
        response = await self._connection.call(lambda stub, timeout: stub.StopJob(request, timeout=timeout))
        return Job.from_proto(response.job)

    async def metrics(
        self, job_id: str | None = None, *, first_step: int = 0, every: int = 1
    ) -> AsyncIterator[StepMetrics]:
        """Iterate over the ledger's rows of a job's trajectory, one StepMetrics a step or round, from `first_step` on.

        With `every` above 1 there are rows for the steps that `every` divides, for steps whose version was validated,
        and for the last step. `job_id` may also be a job's name, such as a fine-tuning's, and then means the newest job
        of that name.

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
        """What the workers did and when, over a job's last versions. `chrome_trace` turns the timelines into a trace.

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
        """Have a running job write a checkpoint at its next step boundary. Return the checkpoint once it is complete.

        The call has no time-out, since a step may take long. Raises ConfigError when the job does not run,
        CheckpointError when it rests or ends before.
        """
        request = jobs_pb2.CheckpointJobRequest(job_id=job_id or "")
        response = await self._connection.call(lambda stub, timeout: stub.CheckpointJob(request))
        return Checkpoint.from_proto(response.checkpoint)

    async def checkpoints(self, job_id: str | None = None) -> list[Checkpoint]:
        """A job's checkpoints, oldest first."""
        found: list[Checkpoint] = []
        request = jobs_pb2.ListCheckpointsRequest(job_id=job_id or "")
        while True:
            response = await self._connection.call(lambda stub, timeout: stub.ListCheckpoints(request, timeout=timeout))
            found += map(Checkpoint.from_proto, response.checkpoints)
            if not response.next_page_token:
                return found
            request.page_token = response.next_page_token

    async def export(
        self,
        job_id: str | None,
        directory: str | Path,
        version: int | None = None,
        on_progress: Callable[[ExportProgress], None] | None = None,
    ) -> Path:
        """Write the last checkpoint, or that of `version`, as a local Hugging Face directory. Return its path.

        `directory` must be empty or not exist. The files arrive in a directory beside it, which is renamed when all are
        complete, so `directory` never holds a part of an export. `on_progress` is called after each piece.

        Raises ConfigError when the directory is not empty, CheckpointError when there is no such checkpoint,
        ProtocolError when the files are not as announced, and UnreachableError when the connection broke.
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
        """Continue `prompt` with a job's model. Iterate over the text, piece by piece as it is generated.

        A fine-tuning service generates. `service` is its host:port; None takes the environment's
        GRADSTREAM_FINE_TUNING, else 127.0.0.1:7001. The model is the checkpoint of `version`. Without `version` the
        model is the last checkpoint; a running job writes one of its current version first.

        `prompt` is a text, or a conversation of {"role": …, "content": …} for the tokenizer's chat template. At
        temperature 0 each token is the likeliest; above 0 it is drawn, with `seed`, among the likeliest tokens that
        together have probability `top_p`. At most `max_new_tokens` tokens are generated; None means 128, or fewer where
        the model has no room for them. The text ends before the first of the texts in `stop`, which may be special
        tokens. Leaving the iterator ends the generation.

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
        """What an administrator should do soon, one line each, such as renewing credentials that expire."""
        request = jobs_pb2.ListNodesRequest(page_size=1)
        response = await self._connection.call(lambda stub, timeout: stub.ListNodes(request, timeout=timeout))
        return list(response.warnings)

    async def publish_tokens(self, table: bytes, signature: bytes, certificate: bytes) -> tuple[int, int]:
        """Publish a token table that the cluster's authority has signed. Return (its serial, its number of tokens).

        `table`, `signature` and `certificate` are what `Authority.signed` returns. Needs an admin's credentials. Raises
        ConfigError when the table is not newer than the one in force, or not the cluster's authority's.
        """
        request = jobs_pb2.PublishTokensRequest(table_json=table, signature=signature, certificate=certificate)
        answer = await self._connection.call(lambda stub, timeout: stub.PublishTokens(request, timeout=timeout))
        return answer.serial, answer.num_tokens

    async def nodes(self) -> list[Node]:
        """The nodes of the cluster: live ones first, then by kind and name."""
        # By id: a node that dies between two pages may be in both.
        found: dict[str, Node] = {}
        request = jobs_pb2.ListNodesRequest()
        while True:
            response = await self._connection.call(lambda stub, timeout: stub.ListNodes(request, timeout=timeout))
            found.update((node.node_id, Node.from_proto(node)) for node in response.nodes)
            if not response.next_page_token:
                return list(found.values())
            request.page_token = response.next_page_token


async def _resolved(recipe: Recipe | str | Path | Mapping[str, Any], overrides: Iterable[str]) -> Recipe:
    """The recipe, whole and with absolute paths. Raises ConfigError when it is wrong."""
    overrides = tuple(overrides)
    if isinstance(recipe, str | Path):
        return await asyncio.to_thread(load_recipe, recipe, overrides)
    if overrides:
        raise ConfigError("overrides go with the path of a recipe; change the mapping or the Recipe instead")
    return absolute_paths(recipe if isinstance(recipe, Recipe) else parse_recipe(recipe))
