"""The files of an authority's directory: validated when read, written atomically."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradstream.core.credentials.certificate_facts import read_certificates
from gradstream.core.credentials.tokens import MAX_TABLE_BYTES, MAX_TOKENS, TokenTable, is_cluster_id
from gradstream.core.errors import ConfigError
from gradstream.core.storage.private_files import read_private, write_private
from gradstream.core.storage.strict_json import exact_keys, parse_object

if TYPE_CHECKING:
    from gradstream.core.credentials.certificates import SigningCa

CA_DAYS = 3650
DAY_SECONDS = 86_400
RECORD_NAME = "authority.json"
TOKENS_NAME = "tokens.json"
CROSS_NAME = "ca-cross.pem"
_MAX_PEM_BYTES = 64 << 10
_MAX_RECORD_BYTES = 1 << 20
_RECORD_KEYS: dict[str, tuple[type, ...]] = {
    "gradstream_authority": (int,),
    "cluster": (str,),
    "tokens": (str,),
    "awaited": (list,),
}


@dataclass(frozen=True)
class Record:
    """The content of authority.json.

    `tokens` is the file to which each change of the token table is published, relative to the directory or absolute. It
    is the authority's own table where changes are published by hand. During a rotation of the CA, `awaited` has the ids
    of the tokens whose certificates the old CA signed.
    """

    cluster: str
    tokens: str
    awaited: tuple[str, ...] = ()

    def serialize(self) -> bytes:
        """The record as JSON."""
        return f"{json.dumps({'gradstream_authority': 1, **dataclasses.asdict(self)})}\n".encode()

    @classmethod
    def parse(cls, data: bytes, what: str) -> Record:
        """Parse the output of `serialize`. Raises ConfigError for anything else."""
        found = exact_keys(parse_object(data, _MAX_RECORD_BYTES, what), _RECORD_KEYS, what)
        awaited = found["awaited"]
        sound = (
            found["gradstream_authority"] == 1
            and is_cluster_id(found["cluster"])
            and found["tokens"].isprintable()
            and found["tokens"]
            and len(awaited) <= MAX_TOKENS
            and all(isinstance(token_id, str) and is_cluster_id(token_id) for token_id in awaited)
        )
        if not sound:
            raise ConfigError(f"{what} is damaged or of another version of gradstream; restore it from a backup")
        return cls(found["cluster"], found["tokens"], tuple(awaited))


@dataclass(frozen=True)
class Cas:
    """The CA that signs, the Unix second at which it expires, and the other CAs that are trusted."""

    signing: SigningCa
    expires_at: int
    others: tuple[bytes, ...]

    @property
    def trusted(self) -> bytes:
        """The ca.pem of a credential that is issued now."""
        return b"".join((self.signing.certificate, *self.others))


def read_record(directory: Path) -> Record | None:
    """Read the record of the authority in a directory; None when there is none. Raises ConfigError when damaged."""
    path = directory / RECORD_NAME
    try:
        return Record.parse(read_private(path, _MAX_RECORD_BYTES), str(path))
    except FileNotFoundError:
        return None


def read_cas(directory: Path, cluster: str) -> Cas:
    """Read the CAs of a cluster's authority. Raises ConfigError when they are missing, damaged or another cluster's."""
    from gradstream.core.credentials import certificates

    cas, key = read_pem(directory, "ca.pem"), read_pem(directory, "ca-key.pem")
    try:
        found = certificates.ca_of_key(cas, key)
        if found is None:
            raise ConfigError("key and certificate do not match")
        of_cluster, expires_at = certificates.cluster_of_ca(found[0])
    except ConfigError:
        raise ConfigError(
            f"ca.pem and ca-key.pem in {directory} are damaged or not of one CA; restore both from a backup"
        ) from None
    if of_cluster != cluster:
        raise ConfigError(
            f"{directory} has the CA of cluster {of_cluster} and the record of cluster {cluster}; restore both"
        )
    return Cas(certificates.SigningCa(found[0], key), expires_at, found[1])


def read_pem(directory: Path, name: str) -> bytes:
    """Read a PEM file of an authority. Raises ConfigError when it is missing or unreadable."""
    try:
        return read_private(directory / name, _MAX_PEM_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{name} of the authority in {directory} is missing; restore it from a backup") from None


def make_ca(directory: Path, now: float) -> str:
    """Make the CA of a new cluster in a directory; return the cluster's id.

    A CA that an interrupted `init` left there is used. Raises ConfigError.
    """
    from gradstream.core.credentials import certificates

    has_cert, has_key = (os.path.lexists(directory / name) for name in ("ca.pem", "ca-key.pem"))
    if has_cert and not has_key:
        raise ConfigError(
            f"{directory} has a ca.pem without its key, so it is not an authority; choose another directory"
        )
    if has_cert:
        return certificates.cluster_of_ca(read_pem(directory, "ca.pem"))[0]
    cluster = os.urandom(4).hex()
    made = certificates.new_ca(cluster, now, CA_DAYS * DAY_SECONDS)
    # A key without a certificate is left from an interrupted `init`: nothing was signed with it.
    write_private(directory, {"ca-key.pem": made.key, "ca.pem": made.certificate})
    return cluster


def read_table(path: Path, cluster: str, directory: Path) -> TokenTable:
    """Read the token table of a cluster whose authority is in `directory`.

    Raises ConfigError when the table is missing, damaged or another cluster's.
    """
    try:
        table = TokenTable.parse(read_private(path, MAX_TABLE_BYTES), str(path))
    except FileNotFoundError:
        raise ConfigError(
            f"the token table {path} is missing; restore it, or let `gradstream certs init {directory}` make an empty "
            f"one: all credentials must then be issued again"
        ) from None
    if table.cluster != cluster:
        raise ConfigError(
            f"{path} is the token table of cluster {table.cluster}, and the authority in {directory} is of cluster "
            f"{cluster}; remove it or choose another with --tokens"
        )
    return table


def write_table(path: Path, table: TokenTable) -> None:
    """Write the token table and keep the mode of an existing file. Raises ConfigError."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        mode = 0o600
    write_private(path.parent, {path.name: table.serialize()}, mode)


def check_reader(directory: Path, cluster: str) -> None:
    """Raise ConfigError for a directory that holds a credential other than that of the cluster's coordinator.

    Only a coordinator reads a token table. Paths without credentials are not refused.
    """
    try:
        facts = read_certificates((directory / "cert.pem").read_bytes())[0]
    except (OSError, ValueError):
        return
    if (facts.role, facts.cluster) != ("coordinator", cluster):
        raise ConfigError(
            f"{directory} holds the credentials of {facts.title}, and only the coordinator of cluster {cluster} reads "
            f"this token table; name its directory, or its HOST:PORT"
        )
