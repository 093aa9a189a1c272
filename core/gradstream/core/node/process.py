"""The process of every role: logs, health, signals, a ready file, a graceful end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gradstream.core import log
from gradstream.core.node.ready import write_ready_file
from gradstream.core.node.session import NodeSession
from gradstream.core.rpc.token_sources import FollowingServer

HEALTH_CHECK_SECONDS = 5.0
STOP_GRACE_SECONDS = 1.0
"""Time for calls that are under way when a server stops."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def configure_log(buffer: log.LogBuffer | None = None) -> None:
    """Configure logging at the level of GRADSTREAM_LOG_LEVEL, to stderr and into `buffer`."""
    log.configure(os.environ.get("GRADSTREAM_LOG_LEVEL", "info"), buffer)


class Health:
    """The health service of a server, with one status for the process and for its services, by their full names."""

    def __init__(self, server: grpc.aio.Server, *services: str):
        self._servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._services = ("", *services)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set(self, healthy: bool) -> None:
        """Answer SERVING or NOT_SERVING from now on."""
        for service in self._services:
            await self._servicer.set(service, _SERVING if healthy else _NOT_SERVING)

    async def set_once(self, event: asyncio.Event) -> None:
        """Answer SERVING once `event` is set."""
        await event.wait()
        await self.set(True)

    async def watch(self, check: Callable[[], Awaitable[bool]], delay_seconds: float = 0.0) -> None:
        """Answer what `check` returns, every HEALTH_CHECK_SECONDS after a delay, until cancelled."""
        await asyncio.sleep(delay_seconds)
        while True:
            await self.set(await check())
            await asyncio.sleep(HEALTH_CHECK_SECONDS)

    async def shut_down(self) -> None:
        """Answer NOT_SERVING for good."""
        await self._servicer.enter_graceful_shutdown()


def on_signal(callback: Callable[[], object]) -> None:
    """Call `callback` at each SIGTERM or SIGINT from now on, instead of their usual effect."""
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, callback)


async def until_signal() -> None:
    """Wait for SIGTERM or SIGINT. A second one has its usual effect."""
    ended = asyncio.Event()
    on_signal(ended.set)
    try:
        await ended.wait()
    finally:
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)


class ReadyFile:
    """The ready file, if any: its one line tells the process's starter that the process is up, and its address."""

    def __init__(self, path: Path | None):
        self._path = path

    def write(self, line: str) -> None:
        """Write the file atomically."""
        if self._path is not None:
            write_ready_file(self._path, line)

    def remove(self) -> None:
        """Remove the file if it exists."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class Node(Protocol):
    """A parameter server or a worker."""

    @property
    def session(self) -> NodeSession:
        """The node's session with the coordinator."""

    async def run(self) -> None:
        """Work until the session ends. Raises the coordinator's error when the coordinator refuses this node."""


async def run_node(node: Node, door: FollowingServer, health: Health, ready_file: Path | None, line: str) -> None:
    """Run a node, whose server already listens, until SIGTERM, SIGINT or a refusal; then stop the server gracefully.

    Raises the coordinator's error for a refusal. `line` is written to `ready_file`.

    The node is healthy once the coordinator has accepted it, because it is of no use before. It stays healthy when it
    loses the coordinator later, because steps continue.
    """
    await health.set(False)
    accepted = asyncio.create_task(health.set_once(node.session.registered))
    on_signal(node.session.leave)
    ReadyFile(ready_file).write(line)
    try:
        async with door.following(node.session.channel, node.session.peer):
            await node.run()
    finally:
        accepted.cancel()
        await health.shut_down()
        await door.server.stop(STOP_GRACE_SECONDS)
