"""Runs long work in threads that the caller may abandon."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from gradstream.core.threads import start_call

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a thread of its own. A parser's panic in it is raised as DataError.

    When the caller is cancelled or the process ends, the thread is not waited for. Use this only for work that may be
    interrupted at any point.
    """
    return await start_call(function.__name__, partial(function, *args, **kwargs))
