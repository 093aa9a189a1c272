"""Connections to peers: TLS with this process's credentials, or in the clear.

With credentials every connection is TLS with certificates of both sides, and every call carries the token. A peer is
verified by the role in its certificate, not by its host name, which changes with its container. Services that follow
the token table verify workers and servers by their exact certificates, so callers refuse a revoked one too. Credentials
that change on disk are used without a restart: by servers at the next handshake, by callers for the next call, on a new
connection.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from gradstream.core.credentials.store import Credentials, dns_name, fingerprint, load
from gradstream.core.errors import ConfigError, CredentialsError, GradstreamError, one_line

LOOK_SECONDS = 1.0
"""Longest time for which changed credentials go unnoticed."""
AUTHORIZATION = "authorization"
BEARER = "Bearer "

Options = Sequence[tuple[str, Any]]


class Transport:
    """Makes channels and servers' ports with the credential in `directory`; without a directory, in the clear.

    Raises CredentialsError when the directory has no usable credential.
    """

    def __init__(self, directory: Path | None, clock: Callable[[], float] = time.time):
        self.directory = directory
        self._clock = clock
        self._credentials: Credentials | None = None
        self._fingerprint: object = None
        self._looked_at = 0.0
        self._peers: Callable[[str], bytes | None] = lambda role: None
        if directory is not None:
            self._fingerprint = fingerprint(directory)
            try:
                self._credentials = load(directory, clock())
            except ConfigError as error:
                raise CredentialsError(str(error)) from None

    @property
    def is_secure(self) -> bool:
        """Whether connections use credentials."""
        return self._credentials is not None

    def credentials(self) -> Credentials:
        """The credential on disk; the last usable one, if the one on disk cannot be used."""
        assert self._credentials is not None
        assert self.directory is not None
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            found = fingerprint(self.directory)
            if found != self._fingerprint:
                from gradstream.core.log import get_logger  # slow to import, and clients rarely need it

                log = get_logger()
                try:
                    self._credentials = load(self.directory, self._clock())
                    self._fingerprint = found
                    log.info("took up new credentials", holder=self._credentials.name, source=str(self.directory))
                except GradstreamError as error:
                    # Perhaps only some of the files have been copied; the next look reads them again.
                    log.warning("the new credentials cannot be used, keeping the old ones", cause=one_line(error))
        return self._credentials

    def know_peers(self, certificates: Callable[[str], bytes | None]) -> None:
        """Trust only these certificates (PEM) as peers of a role from now on; None: all that the CA has signed."""
        self._peers = certificates

    def roots(self, role: str) -> bytes:
        """The certificates (PEM) against which a peer of a role is verified."""
        credentials, peers = self.credentials(), self._peers(role)
        # Without a good certificate no peer must be reached: only this process has this process's own certificate.
        return credentials.ca if peers is None else peers or credentials.cert

    def channel(self, address: str, role: str, options: Options) -> grpc.aio.Channel:
        """Open a channel to the peer of this role at `address` (host:port)."""
        if not self.is_secure:
            return grpc.aio.insecure_channel(address, options=options)
        return _SecureChannel(self, address, role, options)

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Make a server listen at `address`; return the port. Raises RuntimeError when it cannot listen there."""
        if not self.is_secure:
            return int(server.add_insecure_port(address))
        latest = self.credentials()

        def configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(credentials.key, credentials.cert)], credentials.ca)

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """The credentials for a handshake, called by a thread of gRPC; None keeps the ones given before."""
            nonlocal latest
            credentials = self.credentials()
            if credentials is latest:
                return None
            latest = credentials
            return configuration(credentials)

        secure = grpc.dynamic_ssl_server_credentials(
            configuration(latest),
            renewed,  # type: ignore[arg-type]
            require_client_authentication=True,
        )
        return int(server.add_secure_port(address, secure))


class _Connection:
    """A gRPC channel with one version of the credentials. The peer is verified against `roots`."""

    def __init__(self, address: str, credentials: Credentials, roots: bytes, options: Options):
        self.credentials = credentials
        self.roots = roots
        secure = grpc.ssl_channel_credentials(roots, credentials.key, credentials.cert)
        self.channel: grpc.aio.Channel = grpc.aio.secure_channel(address, secure, options=options)
        self._calls: set[Any] = set()
        self._is_replaced = False
        self._closing: asyncio.Future[None] | None = None

    def begin(self, call: Any) -> None:
        """Count a call that begins on this connection."""
        self._calls.add(call)
        call.add_done_callback(self._ended)

    def replace(self) -> None:
        """Close the connection once its last call has ended. No new call begins on it."""
        self._is_replaced = True
        self._close_if_idle()

    def _ended(self, call: Any) -> None:
        self._calls.discard(call)  # gRPC may report the same end twice
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        # If the channel were closed with calls under way, their tasks would be cancelled.
        if self._is_replaced and not self._calls and self._closing is None:
            self._closing = asyncio.ensure_future(self.channel.close(None))


class _SecureChannel(grpc.aio.Channel):
    """A channel that adds the token to each call, and opens a new connection when credentials have changed.

    These are its own credentials, or the certificates that its peer may have.

    A call that is under way stays on the connection that it began on.
    """

    def __init__(self, transport: Transport, address: str, role: str, options: Options):
        self._transport = transport
        self._address = address
        self._role = role
        self._options = [*options, ("grpc.ssl_target_name_override", dns_name(role))]
        self._closed = False
        self._replaced: weakref.WeakSet[_Connection] = weakref.WeakSet()
        self._connection = self._connect()

    def current(self) -> _Connection:
        """The connection for a call that begins now."""
        credentials, roots = self._transport.credentials(), self._transport.roots(self._role)
        is_new = credentials is not self._connection.credentials or roots != self._connection.roots
        if is_new and not self._closed:
            replaced, self._connection = self._connection, self._connect()
            self._replaced.add(replaced)
            replaced.replace()
        return self._connection

    def _connect(self) -> _Connection:
        transport = self._transport
        return _Connection(self._address, transport.credentials(), transport.roots(self._role), self._options)

    async def close(self, grace: float | None = None) -> None:
        self._closed = True
        for connection in (*self._replaced, self._connection):
            await connection.channel.close(grace)

    async def __aenter__(self) -> _SecureChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close(None)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.current().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._connection.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current().channel.channel_ready()

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "stream_stream", arguments, options)


class _Method:
    """A callable method of a channel, which uses the newest connection for each call."""

    def __init__(self, owner: _SecureChannel, kind: str, arguments: tuple[Any, ...], options: dict[str, Any]):
        self._owner = owner
        self._kind = kind
        self._arguments = arguments
        self._options = options
        self._connection: _Connection | None = None
        self._method: Callable[..., Any]

    def __call__(self, *arguments: Any, metadata: Sequence[tuple[str, str]] | None = None, **options: Any) -> Any:
        connection = self._owner.current()
        if connection is not self._connection:
            self._connection = connection
            self._method = getattr(connection.channel, self._kind)(*self._arguments, **self._options)
        token = (AUTHORIZATION, BEARER + connection.credentials.token)
        call = self._method(*arguments, metadata=(token, *(metadata or ())), **options)
        connection.begin(call)
        return call


PLAIN = Transport(None)
"""The transport without credentials."""
