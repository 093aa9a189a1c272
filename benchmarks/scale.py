"""bench-scale: real coordinator and server processes with up to 1,000 simulated workers on real gRPC.

    make bench-scale                                          # all cases
    python benchmarks/scale.py --only steps_1000 --servers 8
    python benchmarks/scale.py --only steps_0200 --servers 64 --hosts 4 --memory 1GiB

A simulated worker (`scaling.workers`) is a coroutine with the worker's own session, pulls, pushes and reports, and no
model. All workers have one address, as behind a NAT. Each case is a module of the package `scaling`, named in `CASES`.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from argparse import Namespace
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import uvloop
from report import Result, arguments_parser, chosen, report
from scaling import history, membership, processes, steps
from scaling.cluster import prepare_data

from gradstream.core import log
from gradstream.core.machine.open_files import raise_limit

Case = Callable[[Path, Path, Namespace], Awaitable[list[Result]]]
"""Takes the data set, an own directory that does not exist yet, and the command line."""

SMOKE_WORKERS = 12


async def _steps(num_workers: int, data: Path, directory: Path, arguments: Namespace) -> list[Result]:
    servers, memory, timing = arguments.servers, arguments.memory, arguments.timing
    return await steps.measure(data, directory, num_workers, servers, memory, arguments.secure, arguments.hosts, timing)


async def _deaths(num_workers: int, data: Path, directory: Path, arguments: Namespace) -> list[Result]:
    return await membership.deaths(data, directory, num_workers, arguments.servers, arguments.memory, arguments.secure)


async def _joins(num_workers: int, data: Path, directory: Path, arguments: Namespace) -> list[Result]:
    return await membership.joins(data, directory, num_workers, arguments.servers, arguments.memory, arguments.secure)


async def _restart(num_workers: int, data: Path, directory: Path, arguments: Namespace) -> list[Result]:
    return await membership.restart(data, directory, num_workers, arguments.servers, arguments.memory)


async def _processes(worker_counts: tuple[int, ...], data: Path, directory: Path, arguments: Namespace) -> list[Result]:
    return await processes.measure(data, directory, worker_counts, arguments.smoke)


async def _history(num_steps: int, num_jobs: int, data: Path, directory: Path, arguments: Namespace) -> list[Result]:
    return await history.measure(data, directory, num_steps, num_jobs)


CASES: dict[str, Case] = {f"steps_{number:04d}": partial(_steps, number) for number in (100, 200, 500, 1000)}
CASES |= {"deaths": partial(_deaths, 1000), "joins": partial(_joins, 1000), "restart": partial(_restart, 1000)}
CASES["processes"] = partial(_processes, (8, 64))
CASES["history"] = partial(_history, 100_000, 500)
SMOKE_CASES: dict[str, Case] = {f"steps_{SMOKE_WORKERS:04d}": partial(_steps, SMOKE_WORKERS)}
SMOKE_CASES |= {"joins": partial(_joins, SMOKE_WORKERS), "processes": partial(_processes, (2,))}
SMOKE_CASES["history"] = partial(_history, 600, 5)


def main() -> None:
    parser = arguments_parser(__doc__)
    parser.add_argument("--servers", type=int, default=2, help="parameter servers (up to 64)")
    parser.add_argument("--memory", default="2GiB", help="memory that each server offers")
    parser.add_argument("--hosts", type=int, default=0, help="of `steps`: processes that share the servers")
    parser.add_argument(
        "--timing", action="append", default=[], help="of `steps`: the coordinator's, such as lease_seconds=120"
    )
    parser.add_argument("--secure", action="store_true", help="with credentials: TLS, tokens, the guard")
    arguments = parser.parse_args()
    cases = chosen("scale", SMOKE_CASES if arguments.smoke else CASES, arguments.only)
    # Makes `timeout` and `kill` end the cluster too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    raise_limit()
    log.configure("error")  # 1,000 workers log a line each
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="gradstream-scale-") as temporary:
        data = prepare_data(Path(temporary))
        for name, case in cases.items():
            results += uvloop.run(case(data, Path(temporary) / name, arguments))
    report("scale", results)


if __name__ == "__main__":
    main()
