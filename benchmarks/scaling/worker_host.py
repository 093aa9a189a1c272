"""A process of simulated workers, for clusters with more connections than one process may have descriptors.

It writes its ready file when all of its workers have registered, and works until it is ended. When a worker ends with
an error, the process ends with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import uvloop

from gradstream.core import log
from gradstream.core.machine.open_files import raise_limit
from gradstream.core.node.ready import write_ready_file
from gradstream.core.rpc.transport import Transport
from scaling.workers import SimulatedWorkers


async def _run(arguments: argparse.Namespace) -> None:
    transport = Transport(arguments.credentials)
    async with SimulatedWorkers(arguments.coordinator, transport, first=arguments.first) as workers:
        await workers.start(arguments.count)
        write_ready_file(arguments.ready_file, "registered")
        await workers.failed.wait()
        raise workers.failures[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--first", type=int, required=True, help="number of the first worker")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--ready-file", type=Path, required=True)
    parser.add_argument("--credentials", type=Path)
    arguments = parser.parse_args()
    raise_limit()
    log.configure("error")
    uvloop.run(_run(arguments))


if __name__ == "__main__":
    main()
