"""Bearer tokens: their form, the table of issued tokens, and the decision if a token is good.

A token is `gst_<cluster id>_<token id>_<secret>`. The table has only the sha256 of the whole text. A reader of the
table cannot find the token from it, because the secret has 256 random bits. The authority (`authority.py`) writes the
table; every service decides by its copy.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from gradstream.core.errors import ConfigError
from gradstream.core.storage.strict_json import exact_keys, parse_object

PEOPLE_ROLES = ("viewer", "submitter", "admin")
"""The roles of people. Each may do everything that the roles before it may."""
SERVICE_ROLES = ("worker", "server", "coordinator", "fine-tuning")
ROLES = (*PEOPLE_ROLES, *SERVICE_ROLES)
DNS_SUFFIX = ".gradstream"
"""Suffix of the DNS name in a certificate, ROLE.gradstream."""

MAX_TOKENS = 8192
MAX_TABLE_BYTES = (4 << 20) - (64 << 10)
"""Size limit of a table, which must fit in a gRPC message: about 3,500 good service tokens, or MAX_TOKENS of people."""
FORM = 2
KEPT_AFTER_END_SECONDS = 30 * 86_400
"""Time for which an expired or revoked token stays in the table. A refusal can then name the reason."""

SOON_SECONDS = 14 * 86_400
"""Time before a credential's end at which warnings begin."""

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}"
_CLUSTER = re.compile(r"[0-9a-f]{8}")
_TOKEN = re.compile(r"gst_([0-9a-f]{8})_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(NAME_PATTERN)
_LAST_SECOND = 253_402_300_799  # the last second of the year 9999, the largest that `datetime` can show


@dataclass(frozen=True)
class Token:
    """The table's entry of an issued token. Times are Unix seconds; `sha256` is the hash of the token's whole text.

    `certificate_sha256` is the hash of the certificate (DER) that was issued with the token: the token is good only on
    a connection that shows this certificate. `certificate` is the certificate of a service (DER in base64), by which
    callers know the service. It is empty for people, and once the token has ended.
    """

    id: str
    sha256: str = dataclasses.field(repr=False)
    certificate_sha256: str = dataclasses.field(repr=False)
    role: str
    name: str
    issued_at: int
    expires_at: int
    revoked_at: int | None = None
    certificate: str = dataclasses.field(repr=False, default="")

    @property
    def holder(self) -> str:
        """The holder, for people, like: worker 'w'."""
        return f"{self.role} '{self.name}'"

    @property
    def ends_at(self) -> int:
        """The Unix second at which the token stops being good: its expiry, or its revocation if that is earlier."""
        return self.expires_at if self.revoked_at is None else min(self.expires_at, self.revoked_at)

    def is_good(self, now: float) -> bool:
        """Whether the token is neither expired nor revoked."""
        return self.revoked_at is None and now < self.expires_at


_ENTRY_KEYS: dict[str, tuple[type, ...]] = {
    "id": (str,),
    "sha256": (str,),
    "certificate_sha256": (str,),
    "role": (str,),
    "name": (str,),
    "issued_at": (int,),
    "expires_at": (int,),
    "revoked_at": (int, type(None)),
    "certificate": (str,),
}
_TABLE_KEYS: dict[str, tuple[type, ...]] = {
    "gradstream_tokens": (int,),
    "cluster": (str,),
    "serial": (int,),
    "tokens": (list,),
}


@dataclass(frozen=True)
class TokenTable:
    """The tokens of cluster `cluster` (its id: 8 hex digits), oldest first. Each change raises `serial` by one."""

    cluster: str
    tokens: tuple[Token, ...] = ()
    serial: int = 0

    @cached_property
    def _by_id(self) -> dict[str, Token]:
        return {token.id: token for token in self.tokens}

    def find(self, token_id: str) -> Token | None:
        """The entry with a token's id; None when there is none."""
        return self._by_id.get(token_id)

    def updated(self, tokens: Iterable[Token], now: float) -> TokenTable:
        """The table with these entries added, or replaced where the id exists.

        Entries that ended 30 days ago or earlier are dropped. Raises ConfigError when the table is full.
        """
        merged = {**self._by_id, **{token.id: token for token in tokens}}
        kept = tuple(
            token if token.is_good(now) else dataclasses.replace(token, certificate="")
            for token in merged.values()
            if now < token.ends_at + KEPT_AFTER_END_SECONDS
        )
        made = TokenTable(self.cluster, kept, self.serial + 1)
        if len(kept) > MAX_TOKENS or len(made.serialize()) > MAX_TABLE_BYTES:
            raise ConfigError(
                f"the token table is full ({len(kept)} tokens; at most {MAX_TOKENS}, and {MAX_TABLE_BYTES >> 10} KiB); "
                f"issue fewer, or revoke some: an entry is removed 30 days after its end"
            )
        return made

    def certificates(self, role: str, now: float) -> bytes:
        """The certificates of a service role whose tokens are good now, as one PEM text."""
        found = (token.certificate for token in self.tokens if token.role == role and token.is_good(now))
        return b"".join(_pem(certificate) for certificate in found if certificate)

    def without(self, token_id: str) -> TokenTable:
        """The table without the entry that has an id."""
        kept = tuple(token for token in self.tokens if token.id != token_id)
        return TokenTable(self.cluster, kept, self.serial + 1)

    def serialize(self) -> bytes:
        """The table as JSON, with a line for each token."""
        lines = ",\n".join(json.dumps(dataclasses.asdict(token)) for token in self.tokens)
        body = f"\n{lines}\n" if lines else ""
        head = f'"gradstream_tokens": {FORM}, "cluster": "{self.cluster}", "serial": {self.serial}'
        return f'{{{head}, "tokens": [{body}]}}\n'.encode()

    @classmethod
    def parse(cls, data: bytes, what: str = "the token table") -> TokenTable:
        """Parse a table from a file or from the wire. `what` names it in messages.

        Raises ConfigError, on one line, for anything that `serialize` does not make.
        """
        document = parse_object(data, MAX_TABLE_BYTES, what)
        if document.get("gradstream_tokens") == 1 and "serial" not in document:
            raise ConfigError(
                f"{what} is of an older gradstream, whose tokens counted with any certificate; remove it and run "
                f"`gradstream certs init` again: all credentials must then be issued again"
            )
        document = exact_keys(document, _TABLE_KEYS, what)
        if document["gradstream_tokens"] != FORM:
            raise ConfigError(f"{what} has a form that this version does not know; update gradstream")
        if not is_cluster_id(document["cluster"]):
            raise ConfigError(f"{what} is damaged: its cluster is not 8 hex digits")
        if not 0 <= document["serial"] < 2**63:
            raise ConfigError(f"{what} is damaged: its serial cannot be right")
        if len(document["tokens"]) > MAX_TOKENS:
            raise ConfigError(f"{what} is damaged: it has more than {MAX_TOKENS} tokens")
        tokens = tuple(_entry(entry, f"{what}, entry {index}") for index, entry in enumerate(document["tokens"]))
        table = cls(document["cluster"], tokens, document["serial"])
        if len(table._by_id) != len(tokens):
            raise ConfigError(f"{what} is damaged: it has a token twice")
        return table


def _entry(entry: object, what: str) -> Token:
    if not isinstance(entry, dict):
        raise ConfigError(f"{what} is damaged: not a JSON object")
    token = Token(**exact_keys(entry, _ENTRY_KEYS, what))
    sound = {
        "id": is_cluster_id(token.id),
        "sha256": _SHA256.fullmatch(token.sha256),
        "certificate_sha256": _SHA256.fullmatch(token.certificate_sha256),
        "role": token.role in ROLES,
        "name": is_name(token.name),
        "issued_at": 0 <= token.issued_at <= _LAST_SECOND,
        "expires_at": 0 <= token.expires_at <= _LAST_SECOND,
        "revoked_at": token.revoked_at is None or 0 <= token.revoked_at <= _LAST_SECOND,
        "certificate": _is_certificate(token),
    }
    for key, right in sound.items():
        if not right:
            raise ConfigError(f"{what} is damaged: its '{key}' cannot be right")
    return token


def _is_certificate(token: Token) -> bool:
    """Whether `certificate`, if there is one, has the hash `certificate_sha256`."""
    if not token.certificate:
        return True
    try:
        der = base64.b64decode(token.certificate, validate=True)
    except ValueError:
        return False
    return hashlib.sha256(der).hexdigest() == token.certificate_sha256


def _pem(certificate: str) -> bytes:
    lines = (certificate[at : at + 64] for at in range(0, len(certificate), 64))
    return "\n".join(("-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", "")).encode("ascii")


def is_name(text: str) -> bool:
    """Whether a credential may have this name: 1 to 63 letters, digits, dots, dashes, underscores and @."""
    return _NAME.fullmatch(text) is not None


def is_cluster_id(text: str) -> bool:
    """Whether it is 8 hex digits, as the ids of clusters and of tokens are."""
    return _CLUSTER.fullmatch(text) is not None


def new_token(cluster: str) -> tuple[str, str]:
    """Make a new token of a cluster, as (its text, which is secret, its id)."""
    token_id = secrets.token_hex(4)
    return f"gst_{cluster}_{token_id}_{secrets.token_urlsafe(32)}", token_id


def token_ids(text: str) -> tuple[str, str] | None:
    """(cluster id, token id) of a token's text; None when the text is not a token."""
    match = _TOKEN.fullmatch(text)
    return (match[1], match[2]) if match else None


def digest(text: str) -> str:
    """The hash of a token's text that the table keeps: its sha256 in hex."""
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def check(text: str, table: TokenTable, now: float) -> tuple[Token | None, str]:
    """Check that `text` is a good token of the table's cluster at `now` (Unix seconds).

    Returns (the token's entry, its id and holder for messages), or (None, the reason and the cure). A reason never
    quotes the token.
    """
    if not text:
        return None, (
            "no token was sent; log in with `gradstream login ADDRESS`, or name a directory of credentials in "
            "GRADSTREAM_CREDENTIALS"
        )
    ids = token_ids(text)
    if ids is None:
        return None, "the token is malformed or cut off; have a credential issued again: `gradstream certs issue`"
    cluster, token_id = ids
    if cluster != table.cluster:
        return None, (
            f"the token is of cluster {cluster} and this is cluster {table.cluster}; use credentials of this cluster"
        )
    token = table.find(token_id)
    if token is None:
        return None, (
            f"token {token_id} is unknown to cluster {cluster}: it ended more than 30 days ago, or the token table was "
            f"made again; have a credential issued: `gradstream certs issue`"
        )
    if not hmac.compare_digest(digest(text), token.sha256):
        return None, (
            f"token {token_id} does not have the secret that was issued; it was altered: copy the credential again"
        )
    if token.revoked_at is not None:
        return None, (
            f"token {token_id} of {token.holder} was revoked on {utc(token.revoked_at)}; "
            f"have a new credential issued: `gradstream certs issue {token.role} --name {token.name}`"
        )
    if now >= token.expires_at:
        return None, (
            f"token {token_id} of {token.holder} expired on {utc(token.expires_at)} (the clock here: {utc(now)}); "
            f"{renewal(token.role, token.name)}"
        )
    return token, f"token {token_id} of {token.holder}"


def succeeds(table: TokenTable, current: TokenTable) -> str:
    """The reason why a table must not replace the one in force; empty when it may.

    An older table would make tokens good again that have been revoked since.
    """
    if table.cluster != current.cluster:
        return f"the token table is of cluster {table.cluster} and this is cluster {current.cluster}"
    if table.serial < current.serial:
        return (
            f"the token table is number {table.serial} of its authority and the one in force here is number "
            f"{current.serial}; was the authority restored from an older copy? restore the newest one, or remove the "
            f"coordinator's table and place this one there by hand"
        )
    if table.serial == current.serial and table != current:
        return (
            f"the token table in force here has the same number {table.serial} and other contents; does the authority "
            f"exist twice? issue and revoke in only one of them"
        )
    return ""


def expiring(table: TokenTable, now: float, within_seconds: float = SOON_SECONDS) -> list[str]:
    """One line with a cure for each holder whose last token ends soon or ended recently, within `within_seconds`.

    Services come first, because a cluster stops without them.
    """
    last: dict[str, Token] = {}
    for token in table.tokens:
        if token.revoked_at is None and token.expires_at >= last.get(token.holder, token).expires_at:
            last[token.holder] = token
    soon = [token for token in last.values() if -within_seconds < token.expires_at - now <= within_seconds]
    soon.sort(key=lambda token: (token.role in PEOPLE_ROLES, token.expires_at))
    return [
        f"the credentials of {token.holder} {'expired' if token.expires_at <= now else 'expire'} on "
        f"{utc(token.expires_at)}; {renewal(token.role, token.name)}"
        for token in soon
    ]


def renewal(role: str, name: str, directory: str = "DIR") -> str:
    """The cure for a credential that has ended, as the second half of a message."""
    if role in PEOPLE_ROLES:
        return f"have a new one issued: `gradstream certs issue {role} --name {name}`, and log in with it"
    return f"renew it: `gradstream certs rotate {directory}`"


def utc(seconds: float) -> str:
    """A time as text in UTC, because readers may be in other time zones: 2026-11-22 17:51 UTC."""
    return f"{datetime.fromtimestamp(min(max(seconds, 0), _LAST_SECOND), UTC):%Y-%m-%d %H:%M} UTC"
