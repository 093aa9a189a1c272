"""The options that the roles of `gradstream serve` share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

MAX_PROCESSES = 64


class LogLevel(StrEnum):
    """How much a role logs."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class Device(StrEnum):
    """The device on which a role computes."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


ListenOption = Annotated[
    str, typer.Option("--listen", metavar="HOST:PORT", help="Where to listen; port 0 is any free one.")
]
NodeCoordinatorOption = Annotated[
    str,
    typer.Option(
        "--coordinator", "-c", envvar="GRADSTREAM_COORDINATOR", metavar="HOST:PORT", help="The coordinator's address."
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="Name among the cluster's nodes.", show_default="the host's name and the process id"),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--memory", metavar="SIZE", help="Memory that jobs may use, like 4GiB.", show_default="80 % of the machine's"
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        help="Threads of a process for arithmetic.",
        show_default="its share of the cores, at most 8",
    ),
]
ProcessesOption = Annotated[
    int,
    typer.Option(
        "--processes",
        metavar="N",
        min=1,
        max=MAX_PROCESSES,
        help="Run N servers NAME-0, NAME-1 and so on, each with its own event loop, on consecutive ports from "
        "--listen's on; --memory is divided evenly.",
    ),
]
RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root",
        metavar="DIR",
        help="Replaces the directory in which people submit: a recipe's paths below that directory are here below DIR.",
        show_default="paths are not changed",
    ),
]
ReadyFileOption = Annotated[
    Path | None,
    typer.Option("--ready-file", metavar="PATH", help="Written when the role is up: its address, or a worker's name."),
]
GraceOption = Annotated[
    float,
    typer.Option(
        "--grace",
        metavar="SECONDS",
        min=0,
        help="On SIGTERM: time to finish a checkpoint that is being written and to send reports.",
    ),
]
LogLevelOption = Annotated[LogLevel, typer.Option("--log-level", help="How much to log.")]
CredentialsOption = Annotated[
    Path | None,
    typer.Option(
        "--credentials",
        envvar="GRADSTREAM_CREDENTIALS",
        metavar="DIR",
        help="Directory of this role's credentials; without them nothing is encrypted.",
        show_default=False,
    ),
]
TimingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--timing",
        metavar="KEY=SECONDS",
        help="Change a time; may be repeated. lease_seconds=10: until a node without heartbeats is silent. "
        "reunion_seconds=30: how long a job waits for the state of silent servers. unreachable_seconds=30 and "
        "stall_seconds=30: until a worker that reaches no server, or makes no progress, loses its slots.",
        show_default=False,
    ),
]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        envvar="GRADSTREAM_METRICS",
        metavar="HOST:PORT",
        help="Where to serve metrics for Prometheus; port 0 is any free one; off: nowhere.",
        show_default="the host of --listen, the first free port from 9464 on",
    ),
]
AdvertiseOption = Annotated[
    str | None,
    typer.Option(
        "--advertise",
        metavar="HOST:PORT",
        help="Address at which workers and other servers reach this one, if it differs from --listen: behind a "
        "published port or a proxy.",
        show_default="the address that it listens on",
    ),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Serve other machines too without credentials or encryption.")
]
ParentOption = Annotated[
    int | None, typer.Option("--die-with-parent", metavar="PID", hidden=True, help="End when process PID ends.")
]
