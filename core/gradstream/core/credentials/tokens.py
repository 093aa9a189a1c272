"""Bearer tokens: how they look, the table of those that were issued, and the decision whether one is good.

A token is `gst_<cluster id>_<token id>_<secret>`. The table keeps the sha256 of the whole text, so it lets nobody in:
the secret has 256 random bits, which no dictionary has. The authority (`authority.py`) writes the table; every service
decides by its copy of it.
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
"""What people may be, each with all that those before it may do."""
SERVICE_ROLES = ("worker", "server", "coordinator", "fine-tuning")
ROLES = (*PEOPLE_ROLES, *SERVICE_ROLES)
DNS_SUFFIX = ".gradstream"
"""Of the one DNS name in a certificate, ROLE.gradstream."""

MAX_TOKENS = 8192
MAX_TABLE_BYTES = (4 << 20) - (64 << 10)
"""A gRPC message can hold a table: about 3,500 services' credentials that are good, or MAX_TOKENS of people."""
FORM = 2
KEPT_AFTER_END_SECONDS = 30 * 86_400
"""How long a token's entry stays in the table after it expired or was revoked, so that a refusal can say so."""

SOON_SECONDS = 14 * 86_400
"""So long before its end is a credential warned of."""

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}"
_CLUSTER = re.compile(r"[0-9a-f]{8}")
_TOKEN = re.compile(r"gst_([0-9a-f]{8})_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(NAME_PATTERN)
_LAST_SECOND = 253_402_300_799  # of the year 9999, the last that a date can be made of


@dataclass(frozen=True)
class Token:
    """What is known of a token that was issued. Times are unix seconds; `sha256` is of the token's whole text.

    `certificate_sha256` is of the certificate (DER) that it was issued with and counts with alone. `certificate` is a
    service's itself (DER in base64), by which callers know it; empty for people and for what has ended.
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
        """Whose it is, for people: worker 'w'."""
        return f"{self.role} '{self.name}'"

    @property
    def ends_at(self) -> int:
        """When it stops being good: the end of its time, or its revocation before that."""
        return self.expires_at if self.revoked_at is None else min(self.expires_at, self.revoked_at)

    def is_good(self, now: float) -> bool:
        """Whether it is neither expired nor revoked."""
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
        """The entry of a token's id."""
        return self._by_id.get(token_id)

    def updated(self, tokens: Iterable[Token], now: float) -> TokenTable:
        """The table with these entries new or in the place of those of their ids, and without those that ended 30 days
        ago. Raises ConfigError when it is full."""
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
                f"issue fewer, or revoke some: an entry goes 30 days after its end"
            )
        return made

    def certificates(self, role: str, now: float) -> bytes:
        """The certificates of a service role that are good now, PEM one after the other."""
        found = (token.certificate for token in self.tokens if token.role == role and token.is_good(now))
        return b"".join(_pem(certificate) for certificate in found if certificate)

    def without(self, token_id: str) -> TokenTable:
        """The table without the entry of an id."""
        kept = tuple(token for token in self.tokens if token.id != token_id)
        return TokenTable(self.cluster, kept, self.serial + 1)

    def serialize(self) -> bytes:
        """JSON, a line for each token."""
        lines = ",\n".join(json.dumps(dataclasses.asdict(token)) for token in self.tokens)
        body = f"\n{lines}\n" if lines else ""
        head = f'"gradstream_tokens": {FORM}, "cluster": "{self.cluster}", "serial": {self.serial}'
        return f'{{{head}, "tokens": [{body}]}}\n'.encode()

    @classmethod
    def parse(cls, data: bytes, what: str = "the token table") -> TokenTable:
        """The table that `data`, from a file or from the wire, is. `what` names it in messages.

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
    """Whether `certificate` is what `certificate_sha256` is of."""
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
    """A new token of a cluster, as (its text, which is secret, and its id)."""
    token_id = secrets.token_hex(4)
    return f"gst_{cluster}_{token_id}_{secrets.token_urlsafe(32)}", token_id


def token_ids(text: str) -> tuple[str, str] | None:
    """(cluster id, token id) of a token's text; None when it is not a token's."""
    match = _TOKEN.fullmatch(text)
    return (match[1], match[2]) if match else None


def digest(text: str) -> str:
    """What the table keeps of a token's text: its sha256 in hex."""
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def check(text: str, table: TokenTable, now: float) -> tuple[Token | None, str]:
    """(the token's entry, whose it is) when `text` is a good token of the table's cluster; else (None, why not and what
    to do about it). `now` is in unix seconds. No reason quotes the token."""
    if not text:
        return None, "no token was sent; log in with `gradstream login ADDRESS`, or name credentials with --credentials"
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
            f"made anew; have a credential issued: `gradstream certs issue`"
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
    """Why a table may not take the place of the one in force; empty when it may.

    An older one would make tokens good again that were revoked since.
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
            f"the token table in force here is another one of the same number {table.serial}; does the authority exist "
            f"twice? issue and revoke in one of them alone"
        )
    return ""


def expiring(table: TokenTable, now: float, within_seconds: float = SOON_SECONDS) -> list[str]:
    """One line for each holder whose last good token ends soon or has ended in the last days, and what to do about it;
    services first, as a cluster stops without them."""
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
    """What to do about a credential that ended, as the second half of a message."""
    if role in PEOPLE_ROLES:
        return f"have a new one issued: `gradstream certs issue {role} --name {name}`, and log in with it"
    return f"renew it: `gradstream certs rotate {directory}`"


def utc(seconds: float) -> str:
    """A time for people who may be elsewhere: 2026-11-22 17:51 UTC."""
    return f"{datetime.fromtimestamp(min(max(seconds, 0), _LAST_SECOND), UTC):%Y-%m-%d %H:%M} UTC"
