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
from gradstream.client._loop_thread import LoopThread
from gradstream.client._types import Checkpoint, ExportProgress, Job, Node, StepMetrics, WatchItem
from gradstream.core.plan.forecast import Forecast
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.telemetry.timeline import Timeline


class Client:
    """Talks to a coordinator.

        with Client("10.0.0.1:7000") as client:
            job = client.submit("recipes/stdlib-gpt.yaml")
            for item in client.watch(job.job_id):
                print(item)

    `address` is host:port; None takes the environment's GRADSTREAM_COORDINATOR, else 127.0.0.1:7000. Nothing is sent
    before the first call, which raises UnreachableError after at most `connect_timeout_seconds` when nobody answers.
    `call_timeout_seconds` bounds each unary call after that. `credentials` is a directory; None takes the environment's
    GRADSTREAM_CREDENTIALS, else those of `gradstream login` for the address, else talks in the clear.
    A job_id of None (or "") means the newest job.

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
        """Queue a job, once: where no answer comes it is asked for again, under the same request id.

        `recipe` is a Recipe, the path of a recipe file, or a mapping; `overrides` are `key.sub=value` strings and go
        with a path only. Relative paths in it are made absolute against the current directory. `request_id` (1 to 64
        letters, digits, '.', '_', '-') is new for each job; a later call with the id of one that was taken gives that
        one's job, after a restart of the coordinator too. None: one that no other call has.

        Raises ConfigError when the recipe is wrong, UnreachableError, which names the request id, when it is not known
        whether the job was taken.
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
        """What a recipe will take, without submitting it: stage cut, memory, bytes on each link, seconds a step.

        The coordinator plans, and measures the model's segments on its machine, as if every worker were like it; that
        may take a minute. It plans for the nodes that are live or, with `num_servers` or `num_workers` above 0, for
        nodes that need not exist; where only one of the two is given, the recipe says the other. `memory_bytes` is what
        each of these offers; 0: enough. `link_bits_per_second` is every node's link, both ways. `recipe` and
        `overrides` are those of `submit`. Data that is not there yet is a warning of the forecast.

        Raises ConfigError when the recipe, its model or a number is wrong, DataError when its data does not fit it,
        PlanError when the nodes cannot hold it.
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

    def jobs(self) -> list[Job]:
        """All jobs, newest first."""
        return self._thread.run(self._client.jobs())

    def job(self, job_id: str | None = None) -> Job:
        """One job; the newest when no id is given. Raises ConfigError when there is none."""
        return self._thread.run(self._client.job(job_id))

    def watch(
        self,
        job_id: str | None = None,
        *,
        follow: bool = True,
        after_cursor: int = 0,
        kinds: Iterable[str] = (),
    ) -> Iterator[WatchItem]:
        """A job's history: events, steps, validations, log lines and checkpoints, in order, each once. `kinds` asks for
        some of them alone, by what `to_dict` has as `type`: "event", "step", "validation", "log", "checkpoint".

        With `follow` it goes on until the job has ended, and survives a coordinator that goes away, or is too busy, for
        a while: it asks again from the last cursor, with endless backoff (`unreachable_since` tells). Without, it ends
        after what is recorded. The first call raises UnreachableError like any other.
        """
        return self._thread.iterate(self._client.watch(job_id, follow=follow, after_cursor=after_cursor, kinds=kinds))

    def wait(
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
        return self._thread.run(self._client.wait(job_id, on_progress, poll_seconds=poll_seconds))

    def pause(self, job_id: str) -> Job:
        """Pause a job at its next step boundary, with a checkpoint. Returns before it rests."""
        return self._thread.run(self._client.pause(job_id))

    def resume(self, job_id: str) -> Job:
        """Go on with a paused job; start a stopped or failed one again from its last checkpoint."""
        return self._thread.run(self._client.resume(job_id))

    def replan(self, job_id: str, without: Iterable[str] = ()) -> Job:
        """Put a new plan in the place of a running job's at its next step boundary, by way of a checkpoint.

        Parameter servers that are live and idle come in; those whose names are in `without` go out, and stay out of the
        job's plans until the next call. No step is lost and no bit changes. Returns before the boundary; the job's
        `reason` says what changes, and at which step.

        Raises ConfigError when the job does not run or nothing would change, PlanError when the servers that are left
        cannot hold the model.
        """
        return self._thread.run(self._client.replan(job_id, without))

    def stop(self, job_id: str, now: bool = False) -> Job:
        """End a job at its next step boundary with a checkpoint or, with `now`, at once and without one."""
        return self._thread.run(self._client.stop(job_id, now))

    def metrics(self, job_id: str | None = None, *, first_step: int = 0, every: int = 1) -> Iterator[StepMetrics]:
        """What the ledger has of each step of a job's trajectory, by rising step, from `first_step` on.

        With `every` above 1: the steps that it divides, those whose version was validated, and the last one. `job_id`
        may also be a job's name, as fine-tunings have one: it stands for the newest job of that name.

        Raises ConfigError when there is no such job, UnreachableError when the connection broke.
        """
        # A page at a time: to change threads for every item would take longer than all the rest.
        for page in self._thread.iterate(self._client._metrics_pages(job_id, first_step=first_step, every=every)):
            yield from page

    def timeline(self, job_id: str | None = None) -> list[Timeline]:
        """What the workers did and when, over the last versions of a job; `chrome_trace` makes a trace file of it.

        Raises DataError when no worker has sent a timeline yet, and UnreachableError when the connection broke.
        """
        return self._thread.run(self._client.timeline(job_id))

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint(self, job_id: str | None = None) -> Checkpoint:
        """Have a running job write a checkpoint at its next step boundary, and wait until it is there, however long a
        step takes.

        Raises ConfigError when the job does not run, CheckpointError when it rests or ends before.
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
        """Write a checkpoint (the last one or that of `version`) as a Hugging Face directory; return its path.

        `directory` must not exist or be empty. The files arrive in a directory beside it that is renamed when all are
        complete, so `directory` never holds a part of an export. `on_progress` is called after each piece.

        Raises ConfigError when the directory is not empty, CheckpointError when there is no such checkpoint,
        ProtocolError when what came is not what was announced, and UnreachableError when the connection broke.
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
        """What about the cluster needs somebody's hand soon, one line each: credentials that expire, for one."""
        return self._thread.run(self._client.warnings())

    def publish_tokens(self, table: bytes, signature: bytes, certificate: bytes) -> tuple[int, int]:
        """Give the coordinator a token table that an authority has signed (`Authority.signed`): (its serial, its number
        of tokens). Needs an admin's credentials. Raises ConfigError when it is not newer than the one in force, or not
        of the cluster's authority."""
        return self._thread.run(self._client.publish_tokens(table, signature, certificate))

    def nodes(self) -> list[Node]:
        """The nodes of the cluster: live ones first, then by kind and name."""
        return self._thread.run(self._client.nodes())
