"""Run a role and end the process once the role is done."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Coroutine
from typing import Any

LEFT_SECONDS = 5.0
"""Maximum time for the threads of a role that is done."""


def run_until_done(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a role, with uvloop if it is installed.

    After the role is done, the process ends within LEFT_SECONDS. Python itself would wait for every thread, and a
    thread that writes to a storage that does not answer never ends.
    """
    if sys.platform == "win32":
        import asyncio

        asyncio.run(_bounded(coroutine))
        return
    import uvloop

    uvloop.run(_bounded(coroutine))


async def _bounded(coroutine: Coroutine[Any, Any, None]) -> None:
    await coroutine
    watchdog = threading.Timer(LEFT_SECONDS, _end)
    watchdog.daemon = True
    watchdog.start()


def _end() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass
    os._exit(0)
