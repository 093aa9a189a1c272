"""`gradstream serve`: run one role of a cluster in the foreground, until SIGTERM or Ctrl-C.

The roles are in packages that must not import each other. This module imports a role's package by name when needed.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstream.coordinator.cli._running import run_until_done
from gradstream.coordinator.cli.app import group
from gradstream.coordinator.cli.role_checks import (
    check_address,
    check_exposure,
    check_name,
    default_name,
    memory_bytes,
    metrics_address,
    root_directory,
    state_directory,
    writable_directory,
)
from gradstream.coordinator.cli.role_options import (
    AdvertiseOption,
    CredentialsOption,
    Device,
    GraceOption,
    InsecureOption,
    ListenOption,
    LogLevel,
    LogLevelOption,
    MemoryOption,
    MetricsOption,
    NameOption,
    NodeCoordinatorOption,
    ParentOption,
    ProcessesOption,
    ReadyFileOption,
    RootOption,
    ThreadsOption,
    TimingOption,
)
from gradstream.core.storage.paths import restrict_process

if TYPE_CHECKING:
    from gradstream.coordinator.cli.local.processes import Child

app = group("Run one role of a cluster: coordinator, parameter-server, worker or fine-tuning.")

# The service usually shares its machine with other processes.
FINE_TUNING_MEMORY_SHARE = 0.4
# Shorter than the time after which deploy/compose.yaml kills the container.
GRACE_SECONDS = 20.0
SERVER_GRACE_SECONDS = 50.0


@app.command()
def coordinator(
    listen: ListenOption = "127.0.0.1:7000",
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="DIR",
            help="Directory of the durable state.",
            show_default="$XDG_STATE_HOME/gradstream, else ~/.local/state/gradstream",
        ),
    ] = None,
    root: RootOption = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            "--tokens",
            metavar="PATH",
            help="The table of tokens that the authority keeps.",
            show_default="tokens.json beside the credentials",
        ),
    ] = None,
    credentials: CredentialsOption = None,
    insecure: InsecureOption = False,
    ready_file: ReadyFileOption = None,
    grace: GraceOption = GRACE_SECONDS,
    timing: TimingOption = None,
    metrics: MetricsOption = None,
    log_level: LogLevelOption = LogLevel.info,
    die_with_parent: ParentOption = None,
) -> None:
    """Run the coordinator: membership, plans, leases, jobs."""
    _prepare(log_level, die_with_parent)
    restrict_process()
    check_address(listen, "--listen")
    check_exposure(listen, credentials, insecure)
    from gradstream.coordinator.timing import parse_timing

    times = parse_timing(timing or ())
    state_dir = state_directory(state, "gradstream")
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        from gradstream.core.errors import ConfigError

        raise ConfigError(f"--state {state_dir} cannot be made ({error.strerror}); choose another directory") from None
    _run(
        "gradstream.coordinator.server",
        listen,
        state_dir,
        ready_file,
        times,
        root_directory(root),
        credentials,
        tokens,
        grace,
        metrics_address(metrics, listen, credentials, insecure),
    )


@app.command("parameter-server")
def parameter_server(
    coordinator: NodeCoordinatorOption = "127.0.0.1:7000",
    name: NameOption = None,
    listen: ListenOption = "127.0.0.1:0",
    advertise: AdvertiseOption = None,
    memory: MemoryOption = None,
    threads: ThreadsOption = None,
    processes: ProcessesOption = 1,
    credentials: CredentialsOption = None,
    insecure: InsecureOption = False,
    ready_file: ReadyFileOption = None,
    grace: GraceOption = SERVER_GRACE_SECONDS,
    log_level: LogLevelOption = LogLevel.info,
    die_with_parent: ParentOption = None,
) -> None:
    """Run a parameter server, which holds fragments, adds contributions and applies the optimizer.

    Workers and the other servers must be able to reach its address.
    """
    _prepare(log_level, die_with_parent)
    check_address(listen, "--listen")
    check_exposure(listen, credentials, insecure)
    check_address(coordinator, "--coordinator")
    name = check_name(name or default_name())
    if advertise is not None:
        check_address(advertise, "--advertise")
    if processes > 1:
        if advertise is not None:
            from gradstream.core.errors import ConfigError

            raise ConfigError("--advertise names one address, and --processes makes several servers; start them singly")
        options = ["--log-level", str(log_level), "--grace", str(grace)]
        options += ["--credentials", str(credentials)] if credentials is not None else []
        options += ["--insecure"] if insecure else []
        children = server_processes(coordinator, name, listen, memory_bytes(memory), threads, processes, options)
        from gradstream.coordinator.cli.local.processes import STOP_SECONDS, run_children

        run_until_done(run_children(children, ready_file, stop_seconds=grace + STOP_SECONDS))
        return
    _run(
        "gradstream.services.parameter_server.server",
        coordinator,
        name,
        listen,
        memory_bytes(memory),
        ready_file,
        threads,
        credentials,
        grace,
        advertise,
    )


def server_processes(
    coordinator: str, name: str, listen: str, memory: int, threads: int | None, count: int, options: Sequence[str]
) -> list[Child]:
    """The servers of `--processes`. They divide `memory` bytes and, without `threads`, the cores evenly.

    Raises ConfigError when there are too few ports from that of `listen` on.
    """
    from gradstream.coordinator.cli.local.processes import Child
    from gradstream.core.errors import ConfigError
    from gradstream.core.machine.facts import arithmetic_threads

    host, _, first_port = listen.rpartition(":")
    if int(first_port) + count - 1 > 65535:
        raise ConfigError(f"--listen {listen}: {count} processes need ports up to {int(first_port) + count - 1}")
    threads = threads if threads is not None else arithmetic_threads(count)
    children = []
    for index in range(count):
        port = int(first_port) + index if int(first_port) else 0
        arguments = [
            "--coordinator",
            coordinator,
            "--name",
            check_name(f"{name}-{index}"),
            "--listen",
            f"{host}:{port}",
        ]
        share = ["--memory", str(max(1, memory // count)), "--threads", str(threads)]
        children.append(Child(f"{name}-{index}", ["parameter-server", *arguments, *share, *options]))
    return children


@app.command()
def worker(
    coordinator: NodeCoordinatorOption = "127.0.0.1:7000",
    name: NameOption = None,
    listen: ListenOption = "127.0.0.1:0",
    cache: Annotated[Path, typer.Option("--cache", metavar="DIR", help="Directory for copies of data shards.")] = Path(
        "~/.cache/gradstream"
    ),
    memory: MemoryOption = None,
    device: Annotated[Device, typer.Option("--device", help="auto takes a GPU if there is one.")] = Device.auto,
    credentials: CredentialsOption = None,
    insecure: InsecureOption = False,
    ready_file: ReadyFileOption = None,
    grace: GraceOption = GRACE_SECONDS,
    log_level: LogLevelOption = LogLevel.info,
    die_with_parent: ParentOption = None,
) -> None:
    """Run a worker, which computes the gradients of its slots.

    In a job with a pipeline other workers must be able to reach its address.
    """
    _prepare(log_level, die_with_parent)
    check_address(listen, "--listen")
    check_exposure(listen, credentials, insecure)
    check_address(coordinator, "--coordinator")
    _run(
        "gradstream.worker.process",
        coordinator,
        check_name(name or default_name()),
        listen,
        writable_directory(cache, "--cache"),
        memory_bytes(memory),
        str(device),
        ready_file,
        credentials,
        grace,
    )


@app.command("fine-tuning")
def fine_tuning(
    coordinator: NodeCoordinatorOption = "127.0.0.1:7000",
    listen: ListenOption = "127.0.0.1:7001",
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="DIR",
            help="Directory of the durable state and of the prepared examples.",
            show_default="$XDG_STATE_HOME/gradstream-fine-tuning, else ~/.local/state/gradstream-fine-tuning",
        ),
    ] = None,
    root: RootOption = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Memory for the models that generate, like 4GiB.",
            show_default="40 % of the machine's",
        ),
    ] = None,
    device: Annotated[Device, typer.Option("--device", help="auto takes a GPU if there is one.")] = Device.auto,
    credentials: CredentialsOption = None,
    insecure: InsecureOption = False,
    ready_file: ReadyFileOption = None,
    log_level: LogLevelOption = LogLevel.info,
    die_with_parent: ParentOption = None,
) -> None:
    """Run the fine-tuning service, which prepares examples, submits jobs, evaluates, generates and exports.

    Coordinator, servers and workers must see its state directory and the bases under the same paths.
    """
    _prepare(log_level, die_with_parent)
    restrict_process()
    check_address(listen, "--listen")
    check_exposure(listen, credentials, insecure)
    check_address(coordinator, "--coordinator")
    from gradstream.core.machine.openmp import sleep_while_waiting

    sleep_while_waiting()
    _run(
        "gradstream.services.fine_tuning.server",
        coordinator,
        listen,
        state_directory(state, "gradstream-fine-tuning"),
        str(device),
        memory_bytes(memory, FINE_TUNING_MEMORY_SHARE),
        ready_file,
        root_directory(root),
        credentials,
    )


def _prepare(log_level: LogLevel, parent: int | None) -> None:
    if parent is not None:
        die_with_parent(parent)
    from gradstream.core import log
    from gradstream.core.extras import require

    require("`gradstream serve`", "node")
    # The role configures the log again with its own buffer, and reads the level from here.
    os.environ["GRADSTREAM_LOG_LEVEL"] = str(log_level)
    log.configure(str(log_level))


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent, process `parent`, ends in any way."""
    if sys.platform != "linux":
        return
    import ctypes
    import signal

    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)
    # The parent may have ended before the request.
    if os.getppid() != parent:
        raise SystemExit(1)


def _run(module: str, *arguments: Any) -> None:
    from gradstream.core.log import get_logger
    from gradstream.core.machine import open_files
    from gradstream.core.machine.memory import use_huge_pages

    limit = open_files.raise_limit()
    if 0 < limit < open_files.FEW_FILES:
        get_logger().warning(
            "few files may be open at the same time",
            limit=limit,
            peers=f"at most about {max(0, limit - open_files.RESERVED_FILES)} connect",
            cure=open_files.CURE,
        )
    use_huge_pages()
    serve = importlib.import_module(module).serve
    run_until_done(serve(*arguments))
