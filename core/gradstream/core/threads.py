"""A thread for one call that may never end: neither the process nor an event loop waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from gradstream.core.foreign import panics_caught

T = TypeVar("T")


def start_call(name: str, function: Callable[[], T], ended: Callable[[], None] = lambda: None) -> asyncio.Future[T]:
    """Call `function` in a daemon thread of that name; the future of the running event loop gets its result or error.

    A parser's panic is a DataError. `ended` is called on the event loop when the call has returned, also when the
    future was cancelled. A call that was given up goes on, so only functions may be called that may end late, or never.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        ended()
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            with panics_caught():
                result = function()
        except BaseException as caught:
            error = caught
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            pass  # the loop is closed

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
