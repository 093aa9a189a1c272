"""Credentials, with which a person or a service proves its identity and verifies its peers.

A *credential directory* holds `ca.pem`, `cert.pem`, `key.pem` and `token`. A *pack* holds the same as one line of JSON,
for pipes. The authority (`authority.py`) issues both.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from gradstream.core.credentials.tokens import DNS_SUFFIX, token_ids
from gradstream.core.errors import ConfigError
from gradstream.core.storage.private_files import read_together, readable_by_others, write_private
from gradstream.core.storage.strict_json import exact_keys, parse_object

if TYPE_CHECKING:
    from gradstream.core.credentials.certificates import Certificate

FILES = ("ca.pem", "cert.pem", "key.pem", "token")
# The order in which files are replaced: the CA before the certificate that it signed, and the certificate right after
# its key.
_WRITE_ORDER = ("ca.pem", "token", "key.pem", "cert.pem")
_SECRET_FILES = ("key.pem", "token")
MAX_FILE_BYTES = 64 << 10
MAX_PACK_BYTES = 4 * MAX_FILE_BYTES

_PACK_KEYS: dict[str, tuple[type, ...]] = {
    "gradstream_credentials": (int,),
    "ca": (str,),
    "cert": (str,),
    "key": (str,),
    "token": (str,),
}


@dataclass(frozen=True)
class Credentials:
    """One credential. `ca`, `cert` and `key` are PEM; `source` says in messages where it was read from.

    The properties raise ConfigError when `cert` was not made by gradstream.
    """

    ca: bytes = dataclasses.field(repr=False)
    cert: bytes = dataclasses.field(repr=False)
    key: bytes = dataclasses.field(repr=False)
    token: str = dataclasses.field(repr=False)
    source: str
    warnings: tuple[str, ...] = ()
    """Warnings about the files that the credential was read from, one line each."""

    @cached_property
    def _certificate(self) -> Certificate:
        from gradstream.core.credentials import certificates

        return certificates.describe(self.cert, f"in {self.source}")

    @property
    def role(self) -> str:
        """The holder's role: one of tokens.ROLES."""
        return self._certificate.role

    @property
    def name(self) -> str:
        """The holder's name."""
        return self._certificate.name

    @property
    def cluster(self) -> str:
        """The id of the cluster: 8 hex digits."""
        return self._certificate.cluster

    @property
    def expires_at(self) -> int:
        """The Unix second at which the certificate expires."""
        return self._certificate.expires_at

    @property
    def valid_from(self) -> int:
        """The Unix second from which the certificate is valid: some time before it was made."""
        return self._certificate.valid_from

    @property
    def lifetime_seconds(self) -> int:
        """The time for which the credential was issued."""
        return self._certificate.lifetime_seconds


def dns_name(role: str) -> str:
    """The DNS name in the certificates of a role, which callers verify instead of the host's name."""
    return role + DNS_SUFFIX


def load(directory: Path | str, now: float) -> Credentials:
    """Read the credential in a directory and check that it is valid at `now` (Unix seconds).

    Raises ConfigError, on one line, when the directory or one of its files is missing, unreadable or damaged, when the
    files do not belong together, and when the certificate is not valid now.
    """
    found = read(directory)
    verify(found, now)
    return found


def read(directory: Path | str) -> Credentials:
    """Read the credential in a directory without `verify`: it may be expired, and its files of different credentials.

    Raises ConfigError when a file is missing, unreadable or too large, or the token is malformed.
    """
    place = _path(directory)
    try:
        contents = read_together(place, FILES, MAX_FILE_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(_missing(place, error.filename)) from None
    exposed = [name for name in _SECRET_FILES if readable_by_others(place / name)]
    secret = " and ".join(exposed)
    warnings = (f"others than its owner may read {secret} in {place}; chmod 600 it",) if exposed else ()
    token = contents["token"].decode("ascii", errors="replace").strip()
    return _made(contents["ca.pem"], contents["cert.pem"], contents["key.pem"], token, str(place), warnings)


def verify(credentials: Credentials, now: float) -> None:
    """Check that the parts of a credential match and are valid at `now` (Unix seconds). Raises ConfigError."""
    from gradstream.core.credentials import certificates

    where, directory = f"in {credentials.source}", credentials.source if os.sep in credentials.source else "DIR"
    certificates.check(credentials.ca, credentials.cert, credentials.key, now, where, directory)
    ids = token_ids(credentials.token)
    if ids is not None and ids[0] != credentials.cluster:
        raise ConfigError(
            f"the token {where} is of cluster {ids[0]} and its certificate of cluster {credentials.cluster}; "
            f"copy all files of one credential"
        )


def save(directory: Path | str, credentials: Credentials) -> None:
    """Write a credential directory that only its owner may read, or replace the credential in one.

    A concurrent `load` reads either the old credential or the new one. Raises ConfigError when it cannot be written.
    """
    contents = {
        "ca.pem": credentials.ca,
        "cert.pem": credentials.cert,
        "key.pem": credentials.key,
        "token": f"{credentials.token}\n".encode("ascii"),
    }
    write_private(_path(directory), {name: contents[name] for name in _WRITE_ORDER})


def to_pack(credentials: Credentials) -> str:
    """The credential as a pack: one line of JSON."""
    return json.dumps(
        {
            "gradstream_credentials": 1,
            "ca": credentials.ca.decode("utf-8", errors="replace"),
            "cert": credentials.cert.decode("utf-8", errors="replace"),
            "key": credentials.key.decode("utf-8", errors="replace"),
            "token": credentials.token,
        }
    )


def from_pack(pack: bytes | str, now: float, source: str = "the pack") -> Credentials:
    """Read a pack and check that its credential is valid at `now` (Unix seconds). Raises ConfigError, on one line."""
    document = parse_object(pack, MAX_PACK_BYTES, source)
    if document.get("gradstream_credentials") != 1 and "gradstream_credentials" in document:
        raise ConfigError(f"{source} has a form that this version does not know; update gradstream")
    parts = exact_keys(document, _PACK_KEYS, source)
    ca, cert, key = (parts[name].encode("utf-8", errors="replace") for name in ("ca", "cert", "key"))
    made = _made(ca, cert, key, parts["token"], source, ())
    verify(made, now)
    return made


def fingerprint(directory: Path | str) -> tuple[tuple[int, int], ...]:
    """(mtime_ns, size) of each file of a credential directory: cheap to read, and different after a replacement."""
    place = _path(directory)
    return tuple(_stamp(place / name) for name in FILES)


def store_for(address: str, environment: Mapping[str, str] = os.environ) -> Path:
    """The directory in which `gradstream login` keeps the credential for an address (host:port).

    Raises ConfigError when the address is not of the form host:port.
    """
    match = re.fullmatch(r"\[([0-9a-f:.%]{2,60})\]:(\d{1,5})|([a-z0-9][a-z0-9._-]{0,252}):(\d{1,5})", address.lower())
    port = int(match[2] or match[4]) if match else 0
    if match is None or not 0 < port < 65536:
        raise ConfigError(f"'{address}' is not an address of the form host:port, like 127.0.0.1:7000")
    host = match[1] or match[3]
    # People write both names for the same host.
    host = "127.0.0.1" if host == "localhost" else host
    return store_directory(environment) / f"{host}_{port}"


def stored_for(address: str, environment: Mapping[str, str] = os.environ) -> Path | None:
    """The directory with the credential that `gradstream login` stored for an address; None when there is none.

    Raises ConfigError when the address is not of the form host:port.
    """
    directory = store_for(address, environment)
    return directory if os.path.isdir(directory) else None


def find_credentials(address: str, given: str | Path | None = None) -> Path | None:
    """The directory of the credential for an address; None to connect in the clear.

    It is `given`, else the environment's GRADSTREAM_CREDENTIALS, else the one that `gradstream login` stored.
    """
    named = given or os.environ.get("GRADSTREAM_CREDENTIALS")
    return Path(named).expanduser() if named else stored_for(address)


def store_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """The directory in which `gradstream login` keeps credentials: below $XDG_CONFIG_HOME, else below ~/.config."""
    configured = environment.get("XDG_CONFIG_HOME", "")
    # The XDG standard says to ignore a relative path.
    if not os.path.isabs(configured):
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            raise ConfigError("this user has no home directory; set XDG_CONFIG_HOME, or name credentials instead")
        configured = os.path.join(home, ".config")
    return Path(configured) / "gradstream" / "credentials"


def _made(ca: bytes, cert: bytes, key: bytes, token: str, source: str, warnings: tuple[str, ...]) -> Credentials:
    if token_ids(token) is None:
        raise ConfigError(f"the token in {source} is malformed or cut off; copy the credentials again")
    return Credentials(ca, cert, key, token, source, warnings)


def _path(directory: Path | str) -> Path:
    return Path(os.path.expanduser(directory))


def _missing(directory: Path, name: str) -> str:
    if not directory.exists():
        what = f"there is no directory {directory}"
    elif not directory.is_dir():
        what = f"{directory} is not a directory"
    else:
        what = f"{directory} has no {name}"
    return f"{what}; a credential directory is made by `gradstream certs issue ROLE --name NAME --to DIR`"


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, -1)
    return (found.st_mtime_ns, found.st_size)
