"""The readings that every role has, and how a role opens its endpoint."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping

from gradstream.core import __version__
from gradstream.core.machine.facts import DiskDirectory, MachineReader
from gradstream.core.metrics import table
from gradstream.core.metrics.address import MetricsAddress
from gradstream.core.metrics.definition import Reading
from gradstream.core.metrics.endpoint import MetricsEndpoint, Page
from gradstream.core.rpc.guard import Guard
from gradstream.core.rpc.transport import Transport

Own = Callable[[], Iterable[Reading] | Awaitable[Iterable[Reading]]]
"""Reads a role's own metrics."""


def role_endpoint(
    address: MetricsAddress,
    role: str,
    transport: Transport,
    guard: Guard | None,
    own: Own,
    disk_directory: DiskDirectory,
    pages: Mapping[str, Page] | None = None,
) -> MetricsEndpoint:
    """Make the endpoint of a role, with `own` and the readings of every role. Raises ConfigError, as MetricsEndpoint.

    `disk_directory` returns the directory in which the role writes at the moment.
    """
    machine = MachineReader(disk_directory)

    async def collect() -> list[Reading]:
        readings = [Reading(table.BUILD, 1, (__version__, role))]
        free = (await machine.read()).free_disk_bytes
        if free is not None:
            readings.append(Reading(table.DISK_FREE, free))
        found = own()
        return [*readings, *(await found if inspect.isawaitable(found) else found)]

    return MetricsEndpoint(address, transport, guard, collect, pages)
