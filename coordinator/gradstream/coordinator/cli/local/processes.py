"""Run one `serve` command as several processes, which start and stop together and do not outlive the command."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstream.core.errors import GradstreamError
from gradstream.core.log import get_logger
from gradstream.core.node.ready import write_ready_file

STOP_SECONDS = 10.0
"""Added to the time that a child gets to finish its work."""
_POLL_SECONDS = 0.05
COMMAND = (sys.executable, "-m", "gradstream.coordinator.cli")

log = get_logger()


@dataclass(frozen=True)
class Child:
    """A process to run: its name, for messages, and the arguments of `serve`."""

    name: str
    arguments: Sequence[str]


async def run_children(
    children: Sequence[Child],
    ready_file: Path | None,
    command: Sequence[str] = COMMAND,
    stop_seconds: float = STOP_SECONDS,
) -> None:
    """Run the children until SIGTERM or SIGINT, which is passed on to all of them.

    A second signal kills them, as does the end of `stop_seconds` after the first. If a child ends by itself, the others
    are stopped and GradstreamError is raised: the child's shard is lost in any case, and the supervisor of this command
    restarts all of them. The kernel kills the children if this process is killed. `ready_file` gets the address of each
    child, one per line, once all are up.
    """
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    ready_files = [] if ready_file is None else [Path(f"{ready_file}.{index}") for index in range(len(children))]
    processes: list[asyncio.subprocess.Process] = []
    announcing: asyncio.Task[None] | None = None
    try:
        for index, child in enumerate(children):
            ready = ["--ready-file", str(ready_files[index])] if ready_files else []
            processes.append(await _spawn([*command, "serve", *child.arguments, *ready]))
        if ready_file is not None:
            announcing = asyncio.create_task(_announce(ready_files, ready_file))
        await _watch(children, processes, signals)
    finally:
        if announcing is not None:
            announcing.cancel()
            await asyncio.gather(announcing, return_exceptions=True)
        await _end(processes, signals, stop_seconds)
        for path in [*ready_files, *([ready_file] if ready_file is not None else [])]:
            path.unlink(missing_ok=True)


async def _spawn(command: Sequence[str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command,
        "--die-with-parent",
        str(os.getpid()),
        stdin=asyncio.subprocess.DEVNULL,
        # Only this process gets Ctrl-C on the terminal; it passes it on once.
        start_new_session=True,
    )


async def _watch(
    children: Sequence[Child], processes: Sequence[asyncio.subprocess.Process], signals: asyncio.Queue[int]
) -> None:
    """Return on a signal. Raises GradstreamError when a child ends before one."""
    asked = asyncio.create_task(signals.get())
    exits = [asyncio.create_task(process.wait()) for process in processes]
    try:
        await asyncio.wait({asked, *exits}, return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            log.info("stopping all processes", processes=len(processes))
            return
        for child, process, ended in zip(children, processes, exits, strict=True):
            if ended.done():
                raise GradstreamError(
                    f"{child.name} (process {process.pid}) ended with {ending(ended.result())}, so the other "
                    f"{len(children) - 1} of this command were stopped; its last lines above say why"
                )
    finally:
        for task in (asked, *exits):
            task.cancel()
        await asyncio.gather(asked, *exits, return_exceptions=True)


async def _end(
    processes: Sequence[asyncio.subprocess.Process], signals: asyncio.Queue[int], stop_seconds: float
) -> None:
    """Send SIGTERM to all; SIGKILL after `stop_seconds` or at another signal."""
    for process in processes:
        _send(process, signal.SIGTERM)
    waiting = asyncio.gather(*(process.wait() for process in processes))
    hurried = asyncio.create_task(signals.get())
    futures: set[asyncio.Future[Any]] = {waiting, hurried}
    await asyncio.wait(futures, timeout=stop_seconds, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    for process in processes:
        _send(process, signal.SIGKILL)
    await waiting


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    if process.returncode is None:
        try:
            process.send_signal(number)
        except ProcessLookupError:
            pass


async def _announce(ready_files: Sequence[Path], ready_file: Path) -> None:
    """Write the ready file once all children have written theirs."""
    lines: list[str] = []
    while len(lines) < len(ready_files):
        path = ready_files[len(lines)]
        if path.exists():
            lines.append(path.read_text(encoding="utf-8").strip())
        else:
            await asyncio.sleep(_POLL_SECONDS)
    write_ready_file(ready_file, "\n".join(lines))


def ending(code: int) -> str:
    """Describe a process's return code: "exit code 1", "signal SIGKILL"."""
    if code < 0:
        try:
            return f"signal {signal.Signals(-code).name}"
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"
