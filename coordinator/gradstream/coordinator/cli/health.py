"""`gradstream health`: ask a service whether it serves.

This command is for scripts. Containers use `python -m gradstream.core.node.health`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from gradstream.coordinator.cli.options import CredentialsOption, OutputFormat, OutputOption
from gradstream.coordinator.cli.views import terminal


class Role(StrEnum):
    """The role of the service at an address."""

    coordinator = "coordinator"
    server = "server"
    worker = "worker"
    fine_tuning = "fine-tuning"


def health(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="HOST:PORT of any service.")] = "127.0.0.1:7000",
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, metavar="SECONDS", help="How long to wait.")] = 4.0,
    role: Annotated[
        Role, typer.Option("--role", help="Role that its certificate must have; ignored without credentials.")
    ] = Role.coordinator,
    credentials: CredentialsOption = None,
    output: OutputOption = OutputFormat.table,
) -> int:
    """Ask a service whether it serves. Exit code 0 when it does, 1 when it says no, 7 when it does not answer."""
    from gradstream.coordinator.cli.role_checks import check_address
    from gradstream.core.credentials.store import find_credentials
    from gradstream.core.node.health import ask

    directory = find_credentials(check_address(address, "ADDRESS"), credentials)
    answer = ask(address, role, directory, timeout)
    if output is OutputFormat.json:
        terminal.print_json({"address": address, "status": answer})
    else:
        terminal.print_line(answer)
    return 0 if answer == "SERVING" else 1
