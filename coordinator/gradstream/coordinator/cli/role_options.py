"""The options of `gradstream serve`, which its roles share."""

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
    """What a role computes on."""

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
        help="Threads for arithmetic of a process.",
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
        help="Run N servers NAME-0, NAME-1 and so on, each an event loop of its own, on ports from --listen's on; "
        "--memory is shared evenly.",
    ),
]
RootOption = Annotated[
    Path | None,
    typer.Option(
        "--root",
        metavar="DIR",
        help="Stands for the directory in which people submit: what a recipe has below it is here below DIR.",
        show_default="paths stay as they are",
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
        help="Directory of this role's credentials; without them all is in the clear.",
        show_default=False,
    ),
]
TimingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--timing",
        metavar="KEY=SECONDS",
        help="Another time than the default, as often as needed: lease_seconds=10 until a node without heartbeats is "
        "silent, reunion_seconds=30 for which the state of silent servers is waited for, unreachable_seconds=30 and "
        "stall_seconds=30 until a worker that reaches no server, or gets nothing done, gives up its slots.",
        show_default=False,
    ),
]
AdvertiseOption = Annotated[
    str | None,
    typer.Option(
        "--advertise",
        metavar="HOST:PORT",
        help="Where workers and other servers reach this one, if that is not where it listens: behind a published port "
        "or a proxy.",
        show_default="the address that it listens on",
    ),
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Serve in the clear, without credentials, also beyond this machine.")
]
ParentOption = Annotated[
    int | None, typer.Option("--die-with-parent", metavar="PID", hidden=True, help="End when process PID ends.")
]
