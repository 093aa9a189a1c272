"""Work that takes long and whose result may be wanted no more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from gradstream.core.threads import start_call

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` in a thread of its own; a parser's panic there is a DataError here.

    When the caller is cancelled, or the process ends, nobody waits for the thread. So only for work that may be cut off
    anywhere.
    """
    return await start_call(function.__name__, partial(function, *args, **kwargs))
