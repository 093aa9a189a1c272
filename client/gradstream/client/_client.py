"""The client for programs without an event loop: AsyncClient, run on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from gradstream.client._async_client import AsyncClient
from gradstream.client._types import Checkpoint, ExportProgress, Job, Node, WatchItem
from gradstream.core.config import Recipe
from gradstream.core.errors import GradstreamError
from gradstream.core.timeline import Timeline

T = TypeVar("T")


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
    ):
        # Raises on a bad address before there is a thread to stop.
        self._client = AsyncClient(
            address, connect_timeout_seconds=connect_timeout_seconds, call_timeout_seconds=call_timeout_seconds
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gradstream-client", daemon=True)
        self._thread.start()
        self._closed = False

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all calls, close the connection and stop the thread."""
        if self._closed:
            return
        self._run(self._close())
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def address(self) -> str:
        """The coordinator's address."""
        return self._client.address

    @property
    def unreachable_since(self) -> datetime | None:
        """Since when every try to reach the coordinator has failed; None when the last one succeeded."""
        return self._client.unreachable_since

    def submit(self, recipe: Recipe | str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Job:
        """Queue a job. See AsyncClient.submit."""
        return self._run(self._client.submit(recipe, overrides))

    def jobs(self) -> list[Job]:
        """All jobs, newest first."""
        return self._run(self._client.jobs())

    def job(self, job_id: str | None = None) -> Job:
        """One job; the newest when no id is given."""
        return self._run(self._client.job(job_id))

    def watch(self, job_id: str | None = None, *, follow: bool = True, after_cursor: int = 0) -> Iterator[WatchItem]:
        """A job's history, in order, each item once. See AsyncClient.watch."""
        items = self._client.watch(job_id, follow=follow, after_cursor=after_cursor)
        try:
            while (item := self._run(_next(items))) is not None:
                yield item
        finally:
            if not self._closed:
                self._run(_close_iterator(items))

    def wait(
        self,
        job_id: str | None = None,
        on_progress: Callable[[Job], None] | None = None,
        *,
        poll_seconds: float = 1.0,
    ) -> Job:
        """Wait until a job has ended. See AsyncClient.wait."""
        return self._run(self._client.wait(job_id, on_progress, poll_seconds=poll_seconds))

    def pause(self, job_id: str) -> Job:
        """Pause a job at its next step boundary."""
        return self._run(self._client.pause(job_id))

    def resume(self, job_id: str) -> Job:
        """Go on with a paused job; start a stopped or failed one again."""
        return self._run(self._client.resume(job_id))

    def stop(self, job_id: str, now: bool = False) -> Job:
        """End a job at its next step boundary or, with `now`, at once."""
        return self._run(self._client.stop(job_id, now))

    def timeline(self, job_id: str | None = None) -> list[Timeline]:
        """What the workers did and when, over the last versions of a job. See AsyncClient.timeline."""
        return self._run(self._client.timeline(job_id))

    def checkpoints(self, job_id: str | None = None) -> list[Checkpoint]:
        """A job's checkpoints, oldest first."""
        return self._run(self._client.checkpoints(job_id))

    def export(
        self,
        job_id: str | None,
        directory: str | Path,
        version: int | None = None,
        on_progress: Callable[[ExportProgress], None] | None = None,
    ) -> Path:
        """Write a checkpoint as a Hugging Face directory. See AsyncClient.export."""
        return self._run(self._client.export(job_id, directory, version, on_progress))

    def nodes(self) -> list[Node]:
        """The nodes of the cluster."""
        return self._run(self._client.nodes())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            coroutine.close()
            raise GradstreamError("the client is closed; make a new one")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C in the caller's thread must also end the call.
            future.cancel()
            raise

    async def _close(self) -> None:
        await self._client.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()
        await asyncio.get_running_loop().shutdown_default_executor()


async def _next(items: AsyncIterator[WatchItem]) -> WatchItem | None:
    return await anext(items, None)


async def _close_iterator(items: Any) -> None:
    await items.aclose()
