# Written by `make clients` from _async_client.py: change that file, not this one.
"""The blocking client of a coordinator: AsyncClient, run on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from gradstream.client._async_client import AsyncClient
from gradstream.client._fine_tuning_types import GeneratedText
from gradstream.client._job_types import ExportProgress, Job, RemovedJob
from gradstream.client._loop_thread import LoopThread
from gradstream.client._node_types import Node
from gradstream.client._step_types import StepMetrics
from gradstream.client._watch_types import Checkpoint, WatchItem
from gradstream.core.plan.forecast import Forecast
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.telemetry.timeline import Timeline


class Client:
    """A client of a coordinator: submits, watches and steers jobs, and fetches what comes of them.

        with Client("10.0.0.1:7000") as client:
            job = client.submit("recipes/stdlib-gpt.yaml")
            for item in client.watch(job.job_id):
                print(item)

    `address` is host:port; None takes the environment's GRADSTREAM_COORDINATOR, else 127.0.0.1:7000. `credentials` is a
    directory; None takes the environment's GRADSTREAM_CREDENTIALS, else those of `gradstream login` for the address,
    else the connection is in the clear. The first call connects, for at most `connect_timeout_seconds`;
    `call_timeout_seconds` bounds each call after that unless the method says otherwise.

    A job_id of None (or "") means the newest job. A method that takes a job_id raises ConfigError when there is no such
    job. Every method may raise UnreachableError when the coordinator does not answer, CredentialsError and AccessError
    when the credentials are not accepted or do not allow the call, and BusyError when the caller asks for too much at
    once.

    Callbacks run on its own thread. Any thread may use it.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        connect_timeout_seconds: float = 5.0,
        call_timeout_seconds: float = 60.0,
        credentials: str | Path | None = None,
    ):
        # Raises on a bad address before there is a thread to stop.
        self._client = AsyncClient(
            address,
            connect_timeout_seconds=connect_timeout_seconds,
            call_timeout_seconds=call_timeout_seconds,
            credentials=credentials,
        )
        self._thread = LoopThread()

    @property
    def address(self) -> str:
        """The service's address, host:port."""
        return self._client.address

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all calls, close the connection and stop the thread."""
        self._thread.close(self._client.close)

    @property
    def unreachable_since(self) -> datetime | None:
        """Since when (local time) every attempt to reach the coordinator has failed; None when the last one
        succeeded."""
        return self._client.unreachable_since

    # ---- Jobs ------------------------------------------------------------------------------------------------------

    def submit(
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
        return self._thread.run(self._client.submit(recipe, overrides, request_id=request_id))

    def plan(
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
        return self._thread.run(
            self._client.plan(
                recipe,
                overrides,
                num_servers=num_servers,
                num_workers=num_workers,
                memory_bytes=memory_bytes,
                link_bits_per_second=link_bits_per_second,
            )
        )

    def jobs(self, *, states: Iterable[str] = (), limit: int | None = None) -> list[Job]:
        """The jobs, newest first: all of them or those in `states`, such as "running"; at most `limit`.

        Raises ConfigError for a state that no job can have.
        """
        return self._thread.run(self._client.jobs(states=states, limit=limit))

    def job(self, job_id: str | None = None) -> Job:
        """One job: its state, its progress and what it waits for. Raises ConfigError when there is none."""
        return self._thread.run(self._client.job(job_id))

    def watch(
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
    ) -> Iterator[WatchItem]:
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
        # A page at a time: to change threads for every item would take longer than all the rest.
        for page in self._thread.iterate(
            self._client._watch_pages(
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
        ):
            yield from page

    def wait(
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
        return self._thread.run(self._client.wait(job_id, on_progress, poll_seconds=poll_seconds))

    def pause(self, job_id: str) -> Job:
        """Pause a job at its next step boundary, with a checkpoint. Return it at once, before it rests.

        With local steps the boundary is the end of the round under way.

        Raises ConfigError when the job has ended.
        """
        return self._thread.run(self._client.pause(job_id))

    def resume(self, job_id: str, num_steps: int | None = None) -> Job:
        """Resume a paused job, or start a stopped or failed one again from its last checkpoint.

        With `num_steps`, a finished, stopped, failed or paused job goes on to that number of steps in all. Its steps so
        far stay as they are. From there on the learning rate follows the schedule of `num_steps` steps, so it may rise
        again; the job's `reason` names both rates.

        Raises ConfigError when the job has finished and no `num_steps` are given, or when with `num_steps` it runs or
        has done as many steps, or when the steps are no whole rounds of a job with local steps.
        """
        return self._thread.run(self._client.resume(job_id, num_steps))

    def replay(self, job_id: str, *, request_id: str | None = None) -> Job:
        """Queue a job that computes a job's rounds again, with the slots that counted there. Return it as queued.

        For jobs with `local.quorum`, in which the slots that count depend on time. The new job has the same recipe and
        ends with the same bits, on any workers and servers. Of a job that has not finished it computes the rounds so
        far. `request_id` is that of `submit`.

        Raises ConfigError when the job has no quorum or no round yet, DataError when its data set is another one now.
        """
        return self._thread.run(self._client.replay(job_id, request_id=request_id))

    def replan(self, job_id: str, without: Iterable[str] = ()) -> Job:
        """Put a new plan in the place of a running job's at its next step boundary, by way of a checkpoint.

        Parameter servers that are live and idle come in; those whose names are in `without` go out, and stay out of the
        job's plans until the next call. No step is lost and no bit changes. Returns before the boundary; the job's
        `reason` says what changes, and at which step.

        Raises ConfigError when the job does not run or nothing would change, PlanError when the servers that are left
        cannot hold the model.
        """
        return self._thread.run(self._client.replan(job_id, without))

    def remove(self, job_id: str, dry_run: bool = False) -> RemovedJob:
        """Remove a job that has ended: its record, its history and ledger, its checkpoints and timelines on the disk.

        Other files in the job's directory stay, such as exports. With `dry_run` nothing is removed. Return what went,
        or would go.

        Raises ConfigError when the job has not ended, is a fine-tuning's, or has a checkpoint that another job or a
        reader needs.
        """
        return self._thread.run(self._client.remove(job_id, dry_run))

    def stop(self, job_id: str, now: bool = False) -> Job:
        """Stop a job at its next step boundary with a checkpoint or, with `now`, at once and without one.

        Returns the job at once, before it has ended. Raises ConfigError when the job has ended already.
        """
        return self._thread.run(self._client.stop(job_id, now))

    def metrics(self, job_id: str | None = None, *, first_step: int = 0, every: int = 1) -> Iterator[StepMetrics]:
        """Iterate over the ledger's rows of a job's trajectory, one StepMetrics a step or round, from `first_step` on.

        With `every` above 1 there are rows for the steps that `every` divides, for steps whose version was validated,
        and for the last step. `job_id` may also be a job's name, such as a fine-tuning's, and then means the newest job
        of that name.

        Raises ConfigError when there is no such job, UnreachableError when the connection broke.
        """
        # A page at a time: to change threads for every item would take longer than all the rest.
        for page in self._thread.iterate(self._client._metrics_pages(job_id, first_step=first_step, every=every)):
            yield from page

    def timeline(self, job_id: str | None = None) -> list[Timeline]:
        """What the workers did and when, over a job's last versions. `chrome_trace` turns the timelines into a trace.

        Raises DataError when no worker has sent a timeline yet, and UnreachableError when the connection broke.
        """
        return self._thread.run(self._client.timeline(job_id))

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint(self, job_id: str | None = None) -> Checkpoint:
        """Have a running job write a checkpoint at its next step boundary. Return the checkpoint once it is complete.

        The call has no time-out, since a step may take long. Raises ConfigError when the job does not run,
        CheckpointError when it rests or ends before.
        """
        return self._thread.run(self._client.checkpoint(job_id))

    def checkpoints(self, job_id: str | None = None) -> list[Checkpoint]:
        """A job's checkpoints, oldest first."""
        return self._thread.run(self._client.checkpoints(job_id))

    def export(
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
        return self._thread.run(self._client.export(job_id, directory, version, on_progress))

    # ---- The model -------------------------------------------------------------------------------------------------

    def generate(
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
    ) -> Iterator[GeneratedText]:
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
        return self._thread.iterate(
            self._client.generate(
                job_id,
                prompt,
                version=version,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                stop=stop,
                service=service,
            )
        )

    # ---- The cluster -----------------------------------------------------------------------------------------------

    def warnings(self) -> list[str]:
        """What an administrator should do soon, one line each, such as renewing credentials that expire."""
        return self._thread.run(self._client.warnings())

    def publish_tokens(self, table: bytes, signature: bytes, certificate: bytes) -> tuple[int, int]:
        """Publish a token table that the cluster's authority has signed. Return (its serial, its number of tokens).

        `table`, `signature` and `certificate` are what `Authority.signed` returns. Needs an admin's credentials. Raises
        ConfigError when the table is not newer than the one in force, or not the cluster's authority's.
        """
        return self._thread.run(self._client.publish_tokens(table, signature, certificate))

    def nodes(self) -> list[Node]:
        """The nodes of the cluster: live ones first, then by kind and name."""
        return self._thread.run(self._client.nodes())
