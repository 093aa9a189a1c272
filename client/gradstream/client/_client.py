"""The client for programs without an event loop: AsyncClient, run on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from gradstream.client._async_client import AsyncClient
from gradstream.client._loop_thread import LoopThread
from gradstream.client._types import Checkpoint, ExportProgress, Job, Node, StepMetrics, WatchItem
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.telemetry.timeline import Timeline


class Client:
    """Talks to a coordinator: the methods of AsyncClient, each of which blocks until it is done.

        with Client("10.0.0.1:7000") as client:
            job = client.submit("recipes/stdlib-gpt.yaml")
            client.wait(job.job_id, on_progress=lambda job: print(job.version, job.loss))

    Callbacks run on the client's own thread. May be used from several threads.
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
    def address(self) -> str:
        """The coordinator's address."""
        return self._client.address

    @property
    def unreachable_since(self) -> datetime | None:
        """Since when every attempt to reach the coordinator has failed; None when the last one succeeded."""
        return self._client.unreachable_since

    def submit(
        self,
        recipe: Recipe | str | Path | Mapping[str, Any],
        overrides: Iterable[str] = (),
        *,
        request_id: str | None = None,
    ) -> Job:
        """Queue a job, once. See AsyncClient.submit."""
        return self._thread.run(self._client.submit(recipe, overrides, request_id=request_id))

    def jobs(self) -> list[Job]:
        """All jobs, newest first."""
        return self._thread.run(self._client.jobs())

    def job(self, job_id: str | None = None) -> Job:
        """One job; the newest when no id is given."""
        return self._thread.run(self._client.job(job_id))

    def watch(
        self,
        job_id: str | None = None,
        *,
        follow: bool = True,
        after_cursor: int = 0,
        kinds: Iterable[str] = (),
    ) -> Iterator[WatchItem]:
        """A job's history, in order, each item once. See AsyncClient.watch."""
        return self._thread.iterate(self._client.watch(job_id, follow=follow, after_cursor=after_cursor, kinds=kinds))

    def wait(
        self,
        job_id: str | None = None,
        on_progress: Callable[[Job], None] | None = None,
        *,
        poll_seconds: float = 1.0,
    ) -> Job:
        """Wait until a job has ended. See AsyncClient.wait."""
        return self._thread.run(self._client.wait(job_id, on_progress, poll_seconds=poll_seconds))

    def pause(self, job_id: str) -> Job:
        """Pause a job at its next step boundary."""
        return self._thread.run(self._client.pause(job_id))

    def resume(self, job_id: str) -> Job:
        """Go on with a paused job; start a stopped or failed one again."""
        return self._thread.run(self._client.resume(job_id))

    def stop(self, job_id: str, now: bool = False) -> Job:
        """End a job at its next step boundary or, with `now`, at once."""
        return self._thread.run(self._client.stop(job_id, now))

    def metrics(self, job_id: str | None = None, *, first_step: int = 0, every: int = 1) -> Iterator[StepMetrics]:
        """What the ledger has of each step of a job's trajectory, by rising step, from `first_step` on.

        With `every` above 1: the steps that it divides, those whose version was validated, and the last one. `job_id`
        may also be a job's name, as fine-tunings have one: it stands for the newest job of that name.

        Raises ConfigError when there is no such job, UnreachableError when the connection broke.
        """
        # A page at a time: to go to the other thread and back for every row would take longer than all the rest.
        for rows in self._thread.iterate(self._client._metrics_pages(job_id, first_step, every)):
            yield from rows

    def timeline(self, job_id: str | None = None) -> list[Timeline]:
        """What the workers did and when, over the last versions of a job. See AsyncClient.timeline."""
        return self._thread.run(self._client.timeline(job_id))

    def checkpoint(self, job_id: str | None = None) -> Checkpoint:
        """Have a running job write a checkpoint now. See AsyncClient.checkpoint."""
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
        """Write a checkpoint as a Hugging Face directory. See AsyncClient.export."""
        return self._thread.run(self._client.export(job_id, directory, version, on_progress))

    def warnings(self) -> list[str]:
        """What about the cluster needs somebody's hand soon. See AsyncClient.warnings."""
        return self._thread.run(self._client.warnings())

    def publish_tokens(self, table: bytes, signature: bytes, certificate: bytes) -> tuple[int, int]:
        """Give the coordinator a token table that an authority has signed. See AsyncClient.publish_tokens."""
        return self._thread.run(self._client.publish_tokens(table, signature, certificate))

    def nodes(self) -> list[Node]:
        """The nodes of the cluster."""
        return self._thread.run(self._client.nodes())
