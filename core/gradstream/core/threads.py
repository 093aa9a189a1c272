"""Threads for calls that may never end. Neither the process nor an event loop waits for such a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from gradstream.core.foreign import panics_caught

T = TypeVar("T")


def start_call(name: str, function: Callable[[], T], ended: Callable[[], None] = lambda: None) -> asyncio.Future[T]:
    """Call `function` in a daemon thread with this name; the future, of the running event loop, gets the outcome.

    A parser's panic becomes a DataError. `ended` is called on the event loop when the call has returned, also if the
    future was cancelled. Cancelling does not stop the call: use functions that may safely end late or never.
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
