"""`gradstream serve`: one role of a cluster in the foreground, until SIGTERM or Ctrl-C.

The roles live in packages that must not import each other; the CLI reaches them by name, when one is wanted.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstream.coordinator.cli._running import run_until_done
from gradstream.coordinator.cli.app import group
from gradstream.coordinator.cli.options import parse_size
from gradstream.core.storage.paths import restrict_process

if TYPE_CHECKING:
    from gradstream.coordinator.cli.local.processes import Child

app = group("Run one role of a cluster: coordinator, parameter-server, worker or fine-tuning.")

DEFAULT_MEMORY_SHARE = 0.8
# It is mostly on a machine that others work on too.
FINE_TUNING_MEMORY_SHARE = 0.4
MAX_PROCESSES = 64
# Less than the time after which deploy/compose.yaml kills the container.
GRACE_SECONDS = 20.0
SERVER_GRACE_SECONDS = 50.0


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


@app.command()
def coordinator(
    listen: ListenOption = "127.0.0.1:7000",
    state: Annotated[Path, typer.Option("--state", metavar="DIR", help="Directory of the durable state.")] = Path(
        "~/.local/state/gradstream"
    ),
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
    state_dir = state.expanduser().absolute()
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
    """Run a parameter server: holds fragments, adds contributions, applies the optimizer.

    Workers and the other servers must reach the address that it listens on.
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
    """The servers that `--processes` stands for: `memory` bytes and, without `threads`, the cores shared evenly.

    Raises ConfigError when there are not enough ports from the one to listen on.
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
    """Run a worker: computes the gradients of the slots that it holds.

    In a job with a pipeline other workers must reach the address that it listens on.
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
        Path,
        typer.Option("--state", metavar="DIR", help="Directory of the durable state and of the prepared examples."),
    ] = Path("~/.local/state/gradstream-fine-tuning"),
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
    """Run the fine-tuning service: prepares examples, submits jobs, evaluates, generates, exports.

    Coordinator, servers and workers must see its state directory and the bases under the same paths.
    """
    _prepare(log_level, die_with_parent)
    restrict_process()
    check_address(listen, "--listen")
    check_exposure(listen, credentials, insecure)
    check_address(coordinator, "--coordinator")
    _run(
        "gradstream.services.fine_tuning.server",
        coordinator,
        listen,
        state.expanduser().absolute(),
        str(device),
        memory_bytes(memory, FINE_TUNING_MEMORY_SHARE),
        ready_file,
        root_directory(root),
        credentials,
    )


def root_directory(root: Path | None) -> str:
    """The --root option as an absolute path; empty without one."""
    return str(root.expanduser().absolute()) if root is not None else ""


def default_name() -> str:
    """host-pid, which no two live nodes of a cluster share."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"{socket.gethostname().split('.')[0] or 'node'}-{os.getpid()}")


def check_name(name: str) -> str:
    """`name` if it can be a node's name. Raises ConfigError when not."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        from gradstream.core.errors import ConfigError

        raise ConfigError(f"--name '{name}': a name has 1 to 63 letters, digits, dots, dashes and underscores")
    return name


def check_address(address: str, option: str) -> str:
    """`address` if it is host:port. Raises ConfigError when not."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit() or int(port) > 65535:
        from gradstream.core.errors import ConfigError

        raise ConfigError(f"{option} '{address}' is not of the form host:port, like 127.0.0.1:7000")
    return address


def writable_directory(directory: Path, option: str) -> Path:
    """`directory` as an absolute path, made if it is not there. Raises ConfigError when it cannot be written."""
    import tempfile

    from gradstream.core.errors import ConfigError

    found = directory.expanduser().absolute()
    try:
        found.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=found):
            return found
    except OSError as error:
        raise ConfigError(
            f"{option} {found} cannot be written ({error.strerror}); make it writable for this user or choose another"
        ) from None


def check_exposure(listen: str, credentials: Path | None, insecure: bool) -> None:
    """Raises ConfigError when a role would serve whoever can reach this machine, and nobody has said that it may."""
    import ipaddress

    from gradstream.core.errors import ConfigError

    if credentials is not None and insecure:
        raise ConfigError("--credentials and --insecure contradict each other; leave one out")
    host = listen.rpartition(":")[0].strip("[]")
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if credentials is None and not insecure and not is_loopback:
        raise ConfigError(
            f"--listen {listen} is open to other machines, and there are no credentials; name some with --credentials "
            f"(`gradstream certs init` makes them), or say --insecure on a network where you trust everybody"
        )


def memory_bytes(memory: str | None, share: float = DEFAULT_MEMORY_SHARE) -> int:
    """Bytes that the --memory option gives to jobs: a share of the machine's, or container's, when it is left out."""
    if memory is not None:
        return parse_size(memory)
    from gradstream.core.machine.memory import available_bytes

    return int(available_bytes() * share)


def _prepare(log_level: LogLevel, parent: int | None) -> None:
    if parent is not None:
        die_with_parent(parent)
    from gradstream.core import log

    # The role configures the log again with a buffer of its own; it finds the level here.
    os.environ["GRADSTREAM_LOG_LEVEL"] = str(log_level)
    log.configure(str(log_level))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, process `parent`, ends, however that ends."""
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
    from gradstream.core.machine.memory import use_huge_pages

    use_huge_pages()
    serve = importlib.import_module(module).serve
    run_until_done(serve(*arguments))
