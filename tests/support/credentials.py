"""Credentials for clusters of tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gradstream.core.credentials.authority import Authority


def make_credentials(directory: Path, roles: Iterable[str]) -> None:
    """Make an authority in `directory / authority` and credentials of each role in `directory / role`.

    The table of tokens is where the coordinator looks for it.
    """
    with Authority.init(directory / "authority", directory / "coordinator" / "tokens.json") as authority:
        for role in roles:
            authority.issue(role, role, directory=directory / role)
