"""An event loop on a thread of its own, for the clients of programs without one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Generic, TypeVar

from gradstream.core.errors import GradstreamError

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for threads that block until they are done. May be used from several threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gradstream-client", daemon=True)
        self._thread.start()
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine. Raises GradstreamError when this is closed."""
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

    def iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        """The items of an asynchronous iterator, which is closed when its reader stops."""
        iteration = _Iteration(items)
        try:
            while (item := self.run(iteration.next())) is not None:
                yield item
        finally:
            if not self._closed:
                self.run(iteration.close())

    def close(self, close_client: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run `close_client`, end all calls and stop the thread."""
        if self._closed:
            return
        self.run(self._wind_up(close_client))
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _wind_up(self, close_client: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await close_client()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()
        await asyncio.get_running_loop().shutdown_default_executor()


class _Iteration(Generic[T]):
    """The steps of an asynchronous iterator, one at a time."""

    def __init__(self, items: AsyncIterator[T]):
        self._items: Any = items
        self._step: asyncio.Task[Any] | None = None

    async def next(self) -> T | None:
        """The next item; None at the end."""
        self._step = asyncio.current_task()
        item: T | None = await anext(self._items, None)
        return item

    async def close(self) -> None:
        """Close the iterator. A step that Ctrl-C has left behind is ended first."""
        if self._step is not None and not self._step.done():
            self._step.cancel()
            await asyncio.wait({self._step})
        await self._items.aclose()
