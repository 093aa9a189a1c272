"""Several parameter servers in one process, for clusters with more servers than the machine has memory for processes.

Each is the server of `gradstream serve parameter-server`, with its own port, session and thread. They share imports,
one event loop and one interpreter lock. They draw initial weights themselves, because transformers is imported here.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import transformers  # noqa: F401
import uvloop

from gradstream.coordinator.cli.role_checks import memory_bytes
from gradstream.core import log
from gradstream.core.machine.open_files import raise_limit
from gradstream.services.parameter_server.server import serve


async def _run(arguments: argparse.Namespace) -> None:
    offered = memory_bytes(arguments.memory)
    async with asyncio.TaskGroup() as group:
        for name in arguments.names:
            ready = arguments.directory / f"{name}.ready"
            address = "127.0.0.1:0"
            running = serve(arguments.coordinator, name, address, offered, ready, 1, arguments.credentials)
            group.create_task(running)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--memory", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--credentials", type=Path)
    arguments = parser.parse_args()
    raise_limit()
    log.configure("info")
    uvloop.run(_run(arguments))


if __name__ == "__main__":
    main()
