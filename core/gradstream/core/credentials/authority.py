"""The authority of a cluster: the directory from which its credentials are issued, renewed and revoked.

    ca.pem           the CA that signs; during a rotation, the old CA too
    ca-key.pem       its key
    ca-cross.pem     during a rotation: the new CA, signed by the old one
    authority.json   cluster id, where changes of the token table are published, which tokens a CA rotation waits for
    tokens.json      the token table
    lock             held by the process that changes these files

Only a holder of this directory can make credentials. A service needs only a copy of the token table and its own
credential. The table in the directory is the authority's own: a change takes effect once it is **published**, either to
the file that the coordinator reads, or, signed by the CA, to the coordinator itself.

A rotation of the CA has two steps. `rotate_ca` makes a new CA, which signs from then on. A credential issued during the
rotation trusts both CAs, and shows a certificate of the new CA signed by the old one: peers that trust only the old CA
accept it too. When every credential has been renewed, `finish_ca_rotation` drops the old CA.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

from gradstream.core.credentials import store
from gradstream.core.credentials.authority_files import (
    CA_DAYS,
    CROSS_NAME,
    DAY_SECONDS,
    RECORD_NAME,
    TOKENS_NAME,
    Record,
    check_reader,
    make_ca,
    read_cas,
    read_pem,
    read_record,
    read_table,
    write_table,
)
from gradstream.core.credentials.store import Credentials
from gradstream.core.credentials.tokens import (
    PEOPLE_ROLES,
    ROLES,
    Token,
    TokenTable,
    check,
    digest,
    is_cluster_id,
    is_name,
    new_token,
    token_ids,
    utc,
)
from gradstream.core.errors import ConfigError, nearest
from gradstream.core.storage.private_files import make_private_directory, write_private
from gradstream.core.storage.state_lock import lock_directory

PEOPLE_DAYS = 90
SERVICE_DAYS = 365
RENEW_BEFORE_SECONDS = 30 * DAY_SECONDS
"""`ensure` renews a credential that expires within this time."""
GRACE_SECONDS = 3600
"""Time for which the old token stays good after a renewal."""


class Authority:
    """The authority of a cluster, which holds its directory's lock. Made by `init` or `open`, in a `with` block.

    `clock` gives Unix seconds. All methods raise ConfigError, on one line, when they fail.
    """

    def __init__(self, directory: Path, record: Record, clock: Callable[[], float], lock: IO[str] | None):
        self.directory = directory
        self.cluster = record.cluster
        self.tokens_path = directory / TOKENS_NAME
        published = directory / record.tokens
        self.published_path = None if published == self.tokens_path else published
        """The file to which each change is published at once; None where changes are published by hand."""
        self._record = record
        self._clock = clock
        self._lock = lock
        self._cas = read_cas(directory, record.cluster)
        self._table = read_table(self.tokens_path, record.cluster, directory)

    @classmethod
    def init(cls, directory: Path, tokens: Path | None = None, clock: Callable[[], float] = time.time) -> Authority:
        """Make the authority in a directory, or open the existing one and make those of its files that are missing.

        `tokens` is the file to which each change of the token table is published at once. By default changes are
        published by hand (`publish`, `signed`).
        """
        directory = Path(os.path.abspath(directory))
        with contextlib.suppress(OSError):  # locking the directory gives a better message
            make_private_directory(directory)
        lock = lock_directory(directory, "`gradstream certs`")
        try:
            record = read_record(directory)
            if record is not None:
                if tokens is not None and directory / record.tokens != Path(os.path.abspath(tokens)):
                    raise ConfigError(
                        f"the authority in {directory} publishes its tokens to {directory / record.tokens} and not to "
                        f"{tokens}; leave --tokens out, or change the place in {RECORD_NAME}"
                    )
            else:
                cluster = make_ca(directory, clock())
                record = Record(cluster, TOKENS_NAME if tokens is None else os.path.abspath(tokens))
            own, published = directory / TOKENS_NAME, directory / record.tokens
            if not os.path.exists(own):
                # The published table is as good. Without either table, tokens that were issued before are refused.
                is_there = published != own and os.path.exists(published)
                table = read_table(published, record.cluster, directory) if is_there else TokenTable(record.cluster)
                write_table(own, table)
            authority = cls(directory, record, clock, lock)
            authority._publish()
            if not os.path.exists(directory / RECORD_NAME):
                authority._write_record(record)  # last: with it the authority is whole
            return authority
        except BaseException:
            lock.close()
            raise

    @classmethod
    def open(cls, directory: Path, clock: Callable[[], float] = time.time, read_only: bool = False) -> Authority:
        """Open the authority in a directory.

        With `read_only` it is opened without the lock, beside another process, and must not be changed.
        """
        directory = Path(os.path.abspath(directory))
        if not os.path.isdir(directory) or (record := read_record(directory)) is None:
            raise ConfigError(f"there is no authority in {directory}; `gradstream certs init {directory}` makes one")
        lock = None if read_only else lock_directory(directory, "`gradstream certs`")
        try:
            # Read the record again: another process may have changed it before the lock was taken.
            return cls(directory, read_record(directory) or record, clock, lock)
        except BaseException:
            if lock is not None:
                lock.close()
            raise

    def __enter__(self) -> Authority:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def ca_expires_at(self) -> int:
        """The Unix second at which the CA that signs expires."""
        return self._cas.expires_at

    @property
    def is_rotating(self) -> bool:
        """Whether a rotation of the CA is under way."""
        return bool(self._cas.others)

    def awaited(self) -> list[Token]:
        """The good tokens whose credentials must be renewed before a rotation of the CA can end."""
        found = (self._table.find(token_id) for token_id in self._record.awaited)
        return [token for token in found if token is not None and token.is_good(self._clock())]

    def tokens(self) -> tuple[Token, ...]:
        """All tokens in the table, oldest first."""
        return self._table.tokens

    def issue(self, role: str, name: str, days: int | None = None, directory: Path | None = None) -> Credentials:
        """Issue a new credential, and write it to `directory` if one is given, which must not hold a credential yet.

        The credential is good for `days`, by default 90 for people and 365 for services, at most until the CA expires.
        """
        if role not in ROLES:
            roles = nearest(role, ROLES) or f"; roles are {', '.join(ROLES)}"
            raise ConfigError(f"there is no role '{role}'{roles}")
        if not is_name(name) or is_cluster_id(name):
            raise ConfigError(
                f"'{name}' cannot be a name: it has 1 to 63 letters, digits, dots, dashes, underscores and @, begins "
                f"with a letter or digit, and does not look like a token's id"
            )
        _check_days(days)
        if directory is not None and (held := _held(directory)):
            raise ConfigError(
                f"{directory} already holds a credential ({held[0]}); renew it with `gradstream certs rotate`, or "
                f"remove its files first"
            )
        return self._issue(role, name, (days or default_days(role)) * DAY_SECONDS, directory)

    def renew(self, directory: Path, grace_seconds: float = GRACE_SECONDS, days: int | None = None) -> Credentials:
        """Replace the credential in a directory by a new one of the same role and name.

        The new credential is good for `days`, by default for as long as the old one was. The old token stays good for
        `grace_seconds`, because callers read new credentials only every `transport.LOOK_SECONDS` and are refused if
        their token ends before.
        """
        _check_days(days)
        found = store.read(directory)
        entry, problem = self._entry_of(found)
        if entry is None:
            raise ConfigError(problem)
        lifetime_seconds = found.lifetime_seconds if days is None else days * DAY_SECONDS
        made = self._issue(entry.role, entry.name, lifetime_seconds, directory)
        now = self._clock()
        shortened = dataclasses.replace(entry, expires_at=min(entry.expires_at, int(now + grace_seconds)))
        self._write_table(self._table.updated([shortened], now))
        if entry.id in self._record.awaited:
            rest = tuple(token_id for token_id in self._record.awaited if token_id != entry.id)
            self._write_record(dataclasses.replace(self._record, awaited=rest))
        return made

    def ensure(self, role: str, name: str, directory: Path) -> tuple[str, str]:
        """Make sure that a directory holds a credential of a role; return (action, reason).

        The action is "kept", "renewed" or "issued". A revoked credential is kept.
        """
        if not _held(directory):
            self.issue(role, name, directory=directory)
            return "issued", "there was none"
        try:
            found = store.read(directory)
            cluster, found_role = found.cluster, found.role
        except ConfigError as error:
            self._issue(role, name, default_days(role) * DAY_SECONDS, directory)
            return "issued", str(error)
        if cluster != self.cluster:
            raise ConfigError(
                f"{directory} holds a credential of cluster {cluster}, and this is the authority of cluster "
                f"{self.cluster}; remove its files, or choose another directory"
            )
        if found_role != role:
            raise ConfigError(f"{directory} holds a credential of role {found_role}, not {role}; choose another")
        entry, problem = self._entry_of(found)
        if entry is not None:
            action, reason = upkeep(entry, found.ca == self._cas.trusted, self._clock())
            if action == "renewed":
                self.renew(directory)
            return action, reason
        ids = token_ids(found.token)
        known = self._table.find(ids[1]) if ids else None
        if known is not None and known.revoked_at is not None:
            return "kept", f"it was revoked on {utc(known.revoked_at)}; remove its files to have a new one"
        self._issue(role, name, default_days(role) * DAY_SECONDS, directory)
        return "issued", problem

    def refresh_ca(self, directory: Path) -> Credentials:
        """Write the CA certificates that are trusted now into a credential directory; return the credential."""
        found = store.read(directory)
        entry, problem = self._entry_of(found)
        if entry is None:
            raise ConfigError(problem)
        made = dataclasses.replace(found, ca=self._cas.trusted)
        store.save(directory, made)
        return made

    def revoke(self, name_or_id: str) -> list[Token]:
        """Revoke the token with an id, or all tokens of a name; return those that were good until now."""
        named = [token for token in self._table.tokens if name_or_id in (token.id, token.name)]
        if not named:
            known = {token.name for token in self._table.tokens} | {token.id for token in self._table.tokens}
            raise ConfigError(
                f"no token has the name or id '{name_or_id}'"
                f"{nearest(name_or_id, sorted(known)) or '; `gradstream certs ls` lists them'}"
            )
        now = self._clock()
        revoked = [dataclasses.replace(token, revoked_at=int(now)) for token in named if token.is_good(now)]
        if revoked:
            self._write_table(self._table.updated(revoked, now))
        return revoked

    def publish(self, path: Path) -> Path:
        """Write the token table to a file, or as tokens.json into a directory, for a coordinator to read.

        Raises ConfigError for a directory that holds the credential of another role or cluster.
        """
        check_reader(path, self.cluster)
        file = path / TOKENS_NAME if path.is_dir() else path
        if file != self.tokens_path:
            write_table(file, self._table)
        return file

    def signed(self) -> tuple[bytes, bytes, bytes]:
        """The signed token table for a coordinator, as (the table, its signature by the CA, the CA's certificate)."""
        from gradstream.core.credentials import certificates

        data = self._table.serialize()
        return data, certificates.sign(self._cas.signing, data), self._cross() or self._cas.signing.certificate

    @property
    def serial(self) -> int:
        """The number of the token table. Each change raises it by one."""
        return self._table.serial

    def rotate_ca(self) -> None:
        """Make a new CA, which signs from now on. The old one stays trusted until `finish_ca_rotation`."""
        from gradstream.core.credentials import certificates

        if self.is_rotating:
            raise ConfigError(
                f"a rotation of the CA is under way in {self.directory}; when all credentials are renewed, end it with "
                f"`gradstream certs rotate --ca --finish`"
            )
        now = self._clock()
        made = certificates.new_ca(self.cluster, now, CA_DAYS * DAY_SECONDS)
        crossed = certificates.cross_sign(made.certificate, self._cas.signing, now)
        awaited = tuple(token.id for token in self._table.tokens if token.is_good(now))
        # The key is written last: until then the old CA signs, and both CAs are trusted.
        self._write_record(dataclasses.replace(self._record, awaited=awaited))
        write_private(self.directory, {CROSS_NAME: crossed})
        write_private(
            self.directory, {"ca.pem": made.certificate + self._cas.signing.certificate, "ca-key.pem": made.key}
        )
        self._cas = read_cas(self.directory, self.cluster)

    def finish_ca_rotation(self) -> None:
        """Drop the old CA. Processes that read the new ca.pem refuse certificates that the old CA signed.

        Raises ConfigError, with the holders' names, while some good credentials have not been renewed since
        `rotate_ca`.
        """
        if not self.is_rotating:
            raise ConfigError(f"no rotation of the CA is under way in {self.directory}; begin one with --ca alone")
        waiting = [f"{token.holder} ({token.id})" for token in self.awaited()]
        if waiting:
            more = f" and {len(waiting) - 5} more" if len(waiting) > 5 else ""
            raise ConfigError(
                f"not renewed since the CA was rotated: {', '.join(waiting[:5])}{more}; renew them with "
                f"`gradstream certs rotate DIR`, or issue new ones to people and revoke these"
            )
        write_private(self.directory, {"ca.pem": self._cas.signing.certificate})
        self._cas = read_cas(self.directory, self.cluster)
        self._write_record(dataclasses.replace(self._record, awaited=()))
        with contextlib.suppress(OSError):
            (self.directory / CROSS_NAME).unlink()

    def _issue(self, role: str, name: str, lifetime_seconds: float, directory: Path | None) -> Credentials:
        from gradstream.core.credentials import certificates

        now = self._clock()
        expires_at = min(int(now + lifetime_seconds), self.ca_expires_at)
        if expires_at <= now:
            raise ConfigError(
                f"the CA in {self.directory} expired on {utc(self.ca_expires_at)} (this machine's clock says "
                f"{utc(now)}); renew it: `gradstream certs rotate --ca`"
            )
        text, token_id = new_token(self.cluster)
        while self._table.find(token_id) is not None:
            text, token_id = new_token(self.cluster)
        cert, key = certificates.new_leaf(self._cas.signing, self.cluster, role, name, now, expires_at)
        made = Credentials(self._cas.trusted, cert + self._cross(), key, text, str(directory or "the pack"))
        der = ssl.PEM_cert_to_DER_cert(cert.decode("ascii"))
        entry = Token(
            id=token_id,
            sha256=digest(text),
            certificate_sha256=hashlib.sha256(der).hexdigest(),
            role=role,
            name=name,
            issued_at=int(now),
            expires_at=expires_at,
            # Callers know services by their certificates; nobody calls people.
            certificate="" if role in PEOPLE_ROLES else base64.b64encode(der).decode("ascii"),
        )
        # The table is written first: no holder may have a token that services do not know.
        try:
            self._write_table(self._table.updated([entry], now))
            if directory is not None:
                store.save(directory, made)
        except ConfigError:
            with contextlib.suppress(ConfigError):
                self._write_table(self._table.without(token_id))
            raise
        return made

    def _cross(self) -> bytes:
        """The certificate of the signing CA signed by the old CA, while both are trusted; else empty."""
        from gradstream.core.credentials import certificates

        if not self.is_rotating:
            return b""
        crossed = read_pem(self.directory, CROSS_NAME)
        # The file belongs to another CA if a rotation was interrupted before the new key was written.
        return crossed if certificates.ca_of_key(crossed, self._cas.signing.key) is not None else b""

    def _entry_of(self, found: Credentials) -> tuple[Token | None, str]:
        """Find the entry of a credential that was issued here and not revoked: (entry, "") or (None, the reason)."""
        from gradstream.core.credentials import certificates

        # now=0: entries of expired credentials are found too, because the authority may renew them.
        entry, reason = check(found.token, self._table, now=0)
        if entry is None:
            return None, f"{found.source}: {reason}"
        try:
            store.verify(dataclasses.replace(found, ca=self._cas.trusted), found.valid_from)
            if certificates.sha256(found.cert) == entry.certificate_sha256:
                return entry, ""
        except ConfigError as error:
            return None, str(error)
        return None, f"cert.pem and token in {found.source} are of two credentials; copy all files of one"

    def _write_table(self, table: TokenTable) -> None:
        assert self._lock is not None, "opened for reading"
        write_table(self.tokens_path, table)
        self._table = table
        self._publish()

    def _publish(self) -> None:
        if self.published_path is None or self._lock is None:
            return
        try:
            is_new = self.published_path.read_bytes() != self._table.serialize()
        except OSError:
            is_new = True
        if is_new:
            write_table(self.published_path, self._table)

    def _write_record(self, record: Record) -> None:
        assert self._lock is not None, "opened for reading"
        write_private(self.directory, {RECORD_NAME: record.serialize()})
        self._record = record


def upkeep(entry: Token, trusts_cas: bool, now: float) -> tuple[str, str]:
    """Decide if a credential is "kept" or "renewed"; return the decision and its reason.

    `trusts_cas` says that the credential's ca.pem has the CAs that the authority trusts now.
    """
    if entry.expires_at - now <= RENEW_BEFORE_SECONDS:
        return "renewed", f"{'expired' if entry.expires_at <= now else 'expires'} on {utc(entry.expires_at)}"
    if not trusts_cas:
        return "renewed", "the CA was rotated"
    return "kept", f"good until {utc(entry.expires_at)}"


def default_days(role: str) -> int:
    """Default lifetime of a role's credentials, in days."""
    return PEOPLE_DAYS if role in PEOPLE_ROLES else SERVICE_DAYS


def _check_days(days: int | None) -> None:
    if days is not None and not 1 <= days <= CA_DAYS:
        raise ConfigError(f"a credential can be good for 1 to {CA_DAYS} days, not for {days}")


def _held(directory: Path) -> list[str]:
    return [name for name in store.FILES if os.path.lexists(directory / name)]
