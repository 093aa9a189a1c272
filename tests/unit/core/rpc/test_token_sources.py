"""The coordinator's table of tokens: when it is read again."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
from pathlib import Path

import pytest

from gradstream.core.credentials.authority import Authority
from gradstream.core.errors import ConfigError
from gradstream.core.rpc import token_sources
from gradstream.core.rpc.token_sources import FileTokens


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_sources, "LOOK_SECONDS", 0.0)


def good(tokens: FileTokens) -> list[str]:
    return [token.name for token in tokens.table.tokens if token.revoked_at is None]


def test_a_table_that_could_not_be_read_is_read_again(tmp_path: Path) -> None:
    """Without a descriptor to spare, at the very moment of a revocation."""
    path = tmp_path / "tokens.json"
    with Authority.init(tmp_path / "authority", path) as authority:
        for name in ("ann", "bob"):
            authority.issue("viewer", name)
        tokens = FileTokens(path)
        authority.revoke("bob")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            os.open("/", os.O_RDONLY)
        assert good(tokens) == ["ann", "bob"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert good(tokens) == ["ann"]


def test_a_damaged_table_leaves_the_one_before_in_force(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    with Authority.init(tmp_path / "authority", path) as authority:
        authority.issue("viewer", "ann")
    tokens = FileTokens(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert good(tokens) == ["ann"]
    table = dataclasses.replace(tokens.table, tokens=())
    path.write_bytes(table.serialize())
    assert good(tokens) == []


def test_a_pushed_table_must_be_signed_by_a_ca_that_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    with Authority.init(tmp_path / "authority") as authority, Authority.init(tmp_path / "other") as other:
        made = authority.issue("coordinator", "c")
        authority.publish(path)
        tokens = FileTokens(path, lambda: made.ca)
        authority.issue("viewer", "ann")
        assert good(tokens) == ["c"]
        table, signature, certificate = authority.signed()
        for wrong in (
            (table, signature, other.signed()[2]),
            (table, other.signed()[1], other.signed()[2]),
            (table.replace(b"viewer", b"admin"), signature, certificate),
            # A credential's certificate is of the CA, and no CA.
            (table, signature, made.cert),
            (table, b"", b""),
        ):
            with pytest.raises(ConfigError, match="is not of this cluster's authority"):
                tokens.replace(*wrong)
        tokens.replace(table, signature, certificate)
        assert good(tokens) == ["c", "ann"]
        # While the CA rotates, the new one is known by what the old one has signed.
        authority.rotate_ca()
        authority.revoke("ann")
        tokens.replace(*authority.signed())
        assert good(tokens) == ["c"]
        with pytest.raises(ConfigError, match="is number 2 of its authority and the one in force here is number 3"):
            tokens.replace(table, signature, certificate)
    assert path.read_bytes() == (tmp_path / "authority" / "tokens.json").read_bytes()
