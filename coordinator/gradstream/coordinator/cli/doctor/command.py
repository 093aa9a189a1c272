"""`gradstream doctor`: check this machine and a cluster.

A cluster is checked in two steps: `gather` collects facts, and `diagnosis` draws conclusions from them.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstream.coordinator.cli.doctor.checks import Check
from gradstream.coordinator.cli.options import CoordinatorOption, CredentialsOption, OutputFormat, OutputOption
from gradstream.coordinator.cli.views import terminal
from gradstream.core.extras import installed

if TYPE_CHECKING:
    from rich.console import Console

MIN_MEMORY_BYTES = 2 << 30
MIN_DISK_BYTES = 5 << 30
NAME_WIDTH = 22
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}

FineTuningOption = Annotated[
    str | None,
    typer.Option(
        "--fine-tuning",
        "--service",
        envvar="GRADSTREAM_FINE_TUNING",
        metavar="HOST:PORT",
        help="The fine-tuning service's address.",
        show_default="not checked",
    ),
]


def doctor(
    coordinator: CoordinatorOption = None,
    fine_tuning: FineTuningOption = None,
    run_root: Annotated[
        str | None,
        typer.Option(
            "--run-root",
            metavar="DIR",
            help="Directory that the coordinator and all parameter servers must share.",
            show_default="that of the newest job",
        ),
    ] = None,
    credentials: CredentialsOption = None,
    output: OutputOption = OutputFormat.table,
) -> int:
    """Check this machine and, if an address is given, the cluster: what is wrong, and how to fix it.

    Exit code 1 when a check fails.
    """
    checks: list[Check] = []
    tests: list[Callable[[], list[Check]]] = [
        check_python,
        check_packages,
        check_extras,
        check_torch,
        check_memory,
        lambda: check_disk(Path.cwd()),
        check_loopback,
        lambda: check_cluster(coordinator, fine_tuning, credentials, run_root),
    ]
    console = terminal.console()
    for test in tests:
        for check in _guarded(test):
            checks.append(check)
            if output is OutputFormat.table:
                _print(console, check)
    failed = any(check.result == "fail" for check in checks)
    if output is OutputFormat.json:
        terminal.print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    elif not failed and "node" in installed():
        terminal.hint("train something here: gradstream dev stdlib-gpt")
    return 1 if failed else 0


def _print(console: Console, check: Check) -> None:
    """Print a check as one line; on a narrow terminal the rest of the line is wrapped and indented."""
    from rich.table import Table
    from rich.text import Text

    message = Text(check.message)
    if check.cure:
        message.append("; ").append(check.cure, style="" if check.result == "ok" else "cyan")
    if not console.is_terminal:
        line = Text.assemble(f"{check.result:<5}", f"{check.name:<{NAME_WIDTH}}", " " * (len(check.name) >= NAME_WIDTH))
        console.print(line.append(message), soft_wrap=True)
        return
    row = Table.grid(expand=False)
    row.add_column(width=5)
    row.add_column(width=min(NAME_WIDTH, console.width // 4))
    row.add_column(overflow="fold")
    row.add_row(Text(check.result, _STYLES[check.result]), Text(check.name, "bold"), message)
    console.print(row)


def _guarded(test: Callable[[], list[Check]]) -> list[Check]:
    from gradstream.core.errors import one_line

    try:
        return test()
    except Exception as error:
        return [Check("check", "fail", one_line(error), "this is a defect of gradstream doctor; please report it")]


def check_python() -> list[Check]:
    """Check that the interpreter is new enough."""
    version = ".".join(map(str, sys.version_info[:3]))
    if tuple(sys.version_info) < (3, 11):
        return [Check("python", "fail", version, "install Python 3.11 or newer")]
    return [Check("python", "ok", f"{version} ({sys.executable})")]


def check_packages() -> list[Check]:
    """Check that gradstream's requirements are installed, in versions that fit."""
    try:
        required = importlib.metadata.requires("gradstream") or []
    except importlib.metadata.PackageNotFoundError:
        return [Check("packages", "warn", "gradstream is not installed as a package", "run `pip install -e .`")]
    from packaging.requirements import Requirement

    wrong: list[Check] = []
    fit = 0
    for text in required:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *installed())):
            continue
        cure = f"run `pip install '{requirement.name}{requirement.specifier}'`"
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(Check(requirement.name, "fail", "is missing", cure))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(Check(requirement.name, "fail", f"is {version}, not {requirement.specifier}", cure))
        else:
            fit += 1
    return [Check("packages", "ok", f"{fit} packages are there in versions that fit"), *wrong]


def check_extras() -> list[Check]:
    """List the extras that are not installed, with their purposes."""
    purposes = {"node": "train or serve here", "plot": "draw pictures"}
    return [
        Check(f"extra {extra}", "ok", "not installed", f"to {purpose}: pip install 'gradstream[{extra}]'")
        for extra, purpose in purposes.items()
        if extra not in installed()
    ]


def check_torch() -> list[Check]:
    """Check that torch computes correctly, and on which device; nothing if its extra is not installed."""
    if "node" not in installed():
        return []
    try:
        import torch
    except ImportError as error:
        return [Check("torch", "fail", f"cannot be imported ({error})", "run `pip install torch`")]
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        total = float((torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")).sum())
        where = f"cuda: {names}"
    else:
        total = float((torch.ones(8, 8) @ torch.ones(8, 8)).sum())
        where = f"cpu, {os.cpu_count()} cores"
    if total != 512.0:
        return [Check("torch", "fail", f"{torch.__version__} on {where} multiplies incorrectly", "install torch again")]
    return [Check("torch", "ok", f"{torch.__version__} on {where}")]


def check_memory() -> list[Check]:
    """Check that enough memory is free."""
    import psutil

    memory = psutil.virtual_memory()
    message = f"{terminal.format_bytes(memory.available)} of {terminal.format_bytes(memory.total)} free"
    if memory.available < MIN_MEMORY_BYTES:
        return [Check("memory", "warn", message, "end other programs, or train a small model")]
    return [Check("memory", "ok", message)]


def check_disk(directory: Path) -> list[Check]:
    """Check that `directory`, where runs go, can be written and has enough free space."""
    free = shutil.disk_usage(directory).free
    message = f"{terminal.format_bytes(free)} free in {directory}"
    if not os.access(directory, os.W_OK):
        return [Check("disk", "warn", f"{directory} cannot be written", "use another directory")]
    if free < MIN_DISK_BYTES:
        return [Check("disk", "warn", message, "checkpoints need about 12 bytes a parameter each; free some space")]
    return [Check("disk", "ok", message)]


def check_loopback() -> list[Check]:
    """Check a gRPC call from this machine to itself, with a 1 MiB message each way."""
    import asyncio
    import time

    import grpc

    from gradstream.core.rpc.channel import listen, new_server, open_channel

    payload = bytes(1 << 20)

    async def echo(request: bytes, context: object) -> bytes:
        return request

    async def round_trips() -> float:
        server = new_server()
        handler = grpc.method_handlers_generic_handler(
            "gradstream.Doctor", {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
        )
        server.add_generic_rpc_handlers((handler,))
        port = listen(server, "127.0.0.1:0")
        await server.start()
        try:
            async with open_channel(f"127.0.0.1:{port}") as channel:
                call: Any = channel.unary_unary("/gradstream.Doctor/Echo", None, None)  # type: ignore[arg-type]
                await call(b"", timeout=5)
                started = time.perf_counter()
                for _ in range(8):
                    if await call(payload, timeout=5) != payload:
                        raise RuntimeError("a message came back altered")
                return (time.perf_counter() - started) / 8
        finally:
            await server.stop(None)

    try:
        seconds = asyncio.run(round_trips())
    except Exception as error:
        from gradstream.core.errors import one_line

        cure = "look for a firewall on the loopback interface or a broken grpcio"
        return [Check("grpc loopback", "fail", one_line(error), cure)]
    rate = 2 * len(payload) / seconds
    return [
        Check("grpc loopback", "ok", f"1 MiB there and back in {1000 * seconds:.1f} ms ({terminal.format_rate(rate)})")
    ]


def check_cluster(
    coordinator: str | None, fine_tuning: str | None, credentials: Path | None, run_root: str | None = None
) -> list[Check]:
    """Check the services at these addresses, the coordinator's nodes, and the links to all of them."""
    if coordinator is None and fine_tuning is None and credentials is None:
        return [Check("coordinator", "ok", "not asked; -c HOST:PORT checks a cluster")]
    import asyncio

    from gradstream.coordinator.cli.doctor.diagnosis import diagnose
    from gradstream.coordinator.cli.doctor.gather import Targets, gather
    from gradstream.core.credentials.store import find_credentials

    address = coordinator or fine_tuning
    directory = find_credentials(address, credentials) if address else credentials
    place = os.path.abspath(os.path.expanduser(run_root)) if run_root else None
    targets = Targets(coordinator, fine_tuning, directory, place)
    with terminal.console(stderr=True).status("looking at the cluster") as status:
        facts = asyncio.run(gather(targets, lambda what: status.update(f"looking at {what}")))
    return diagnose(facts)
