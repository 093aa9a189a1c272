"""`gradstream login` and `gradstream logout`: store and remove credentials for the addresses of services."""

from __future__ import annotations

import os
import shutil
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from gradstream.coordinator.cli.views import terminal

AddressesArgument = Annotated[
    list[str], typer.Argument(metavar="ADDRESS", help="HOST:PORT of the coordinator or the fine-tuning service.")
]


def login(addresses: AddressesArgument) -> None:
    """Store the credential in the pack on stdin, for commands and clients that call these addresses.

    A pack comes from `gradstream certs issue` or `gradstream certs show`.
    """
    from gradstream.core.credentials import store
    from gradstream.core.credentials.tokens import SERVICE_ROLES
    from gradstream.core.errors import ConfigError

    places = [(address, store.store_for(address)) for address in addresses]
    pack = _read_pack(store.MAX_PACK_BYTES)
    if not pack.strip():
        raise ConfigError(
            "no pack came on stdin; pipe one: gradstream certs show DIR | gradstream login "
            f"{addresses[0]} (if you did, the command before the pipe has failed)"
        )
    found = store.from_pack(pack, time.time(), "the pack on stdin")
    if found.role in SERVICE_ROLES:
        raise ConfigError(
            f"the pack on stdin is a {found.role}'s, and login is for people; issue one to yourself: "
            f"`gradstream certs issue submitter --name NAME`"
        )
    for _, place in places:
        store.save(place, found)
    until = terminal.format_time(datetime.fromtimestamp(found.expires_at, UTC))
    for address, _ in places:
        terminal.print_line(
            f"logged in to {address} as {found.role} '{found.name}' of cluster {found.cluster}, until {until}"
        )


def logout(addresses: AddressesArgument) -> None:
    """Remove the credentials that are stored for these addresses.

    The token itself stays valid until `gradstream certs revoke`.
    """
    from gradstream.core.credentials import store
    from gradstream.core.errors import ConfigError

    places = [(address, store.store_for(address)) for address in addresses]
    for address, place in places:
        if not os.path.isdir(place):
            raise ConfigError(f"no credentials are stored for {address}{_stored(place.parent)}")
    for address, place in places:
        try:
            if place.is_symlink():  # to the credentials of a local cluster, which must stay
                place.unlink()
            else:
                shutil.rmtree(place)
        except FileNotFoundError:
            pass  # named twice
        except OSError as error:
            raise ConfigError(f"{place} cannot be removed ({error.strerror}); remove it yourself") from None
        terminal.print_line(f"logged out of {address}")


def _stored(directory: Path) -> str:
    """The addresses with stored credentials, as the end of a message."""
    try:
        names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    except OSError:
        names = []
    shown = ", ".join(":".join(name.rsplit("_", 1)) for name in names[:5])
    return f"; there are some for {shown}" if names else "; there are none at all"


def _read_pack(max_bytes: int) -> bytes:
    stdin = sys.stdin.buffer
    if not sys.stdin.isatty():
        return stdin.read(max_bytes + 1)
    terminal.say("paste the pack, or pipe one: gradstream certs show DIR | gradstream login ADDRESS")
    text = b""
    # A pack is one JSON object on one line, so its end is known without Ctrl-D.
    while len(text) <= max_bytes and (line := stdin.readline(max_bytes)):
        text += line
        if text.strip().endswith(b"}"):
            break
    return text
