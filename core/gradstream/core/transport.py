"""How a process meets its peers: with its credentials, or in the clear.

With credentials every connection is TLS with certificates of both sides, and every call carries the token. A peer is
known by the role in its certificate, not by its host name, which containers do not keep. Credentials that change on
disk are taken up without a restart: by servers at the next handshake, by callers at the next call, on a new connection.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from gradstream.core.credentials import Credentials, dns_name, fingerprint, load
from gradstream.core.errors import ConfigError, CredentialsError, GradstreamError, one_line

LOOK_SECONDS = 1.0
"""How long changed credentials may go unnoticed."""
AUTHORIZATION = "authorization"
BEARER = "Bearer "

Options = Sequence[tuple[str, Any]]


class Transport:
    """Makes channels and servers' ports. Raises CredentialsError when there is no usable credential in `directory`;
    without a directory all is in the clear."""

    def __init__(self, directory: Path | None, clock: Callable[[], float] = time.time):
        self.directory = directory
        self._clock = clock
        self._credentials: Credentials | None = None
        self._fingerprint: object = None
        self._looked_at = 0.0
        if directory is not None:
            self._fingerprint = fingerprint(directory)
            try:
                self._credentials = load(directory, clock())
            except ConfigError as error:
                raise CredentialsError(str(error)) from None

    @property
    def is_secure(self) -> bool:
        """Whether peers show each other credentials."""
        return self._credentials is not None

    def credentials(self) -> Credentials:
        """Those on disk now; the ones before, when what is there now cannot be used."""
        assert self._credentials is not None
        assert self.directory is not None
        now = time.monotonic()
        if now - self._looked_at >= LOOK_SECONDS:
            self._looked_at = now
            found = fingerprint(self.directory)
            if found != self._fingerprint:
                from gradstream.core.log import get_logger  # takes long to import; a client rarely needs it

                log = get_logger()
                try:
                    self._credentials = load(self.directory, self._clock())
                    self._fingerprint = found
                    log.info("took up new credentials", holder=self._credentials.name, source=str(self.directory))
                except GradstreamError as error:
                    # Perhaps half of the files are there; the next look will tell.
                    log.warning("the new credentials cannot be used, keeping the old ones", cause=one_line(error))
        return self._credentials

    def channel(self, address: str, role: str, options: Options) -> grpc.aio.Channel:
        """A channel to the peer of this role at `address` (host:port)."""
        if not self.is_secure:
            return grpc.aio.insecure_channel(address, options=options)
        return _SecureChannel(self, address, [*options, ("grpc.ssl_target_name_override", dns_name(role))])

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Have a server listen at `address`; return the port. Raises RuntimeError when it cannot."""
        if not self.is_secure:
            return int(server.add_insecure_port(address))
        latest = self.credentials()

        def configuration(credentials: Credentials) -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(credentials.key, credentials.cert)], credentials.ca)

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """Asked at each handshake, by a thread of gRPC's; None keeps what was given before."""
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


class _SecureChannel(grpc.aio.Channel):
    """A channel that adds the token to each call, and connects anew once the credentials have changed.

    A call that is under way stays on the connection that it began on; that one is closed at the next change.
    """

    def __init__(self, transport: Transport, address: str, options: Options):
        self._transport = transport
        self._address = address
        self._options = options
        self._closed = False
        self._previous: grpc.aio.Channel | None = None
        self._open(transport.credentials())

    def _open(self, credentials: Credentials) -> None:
        self._credentials = credentials
        secure = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.cert)
        self._channel: grpc.aio.Channel = grpc.aio.secure_channel(self._address, secure, options=self._options)

    def current(self) -> tuple[grpc.aio.Channel, str]:
        """The channel for a call that begins now, and the token."""
        credentials = self._transport.credentials()
        if credentials is not self._credentials and not self._closed:
            if self._previous is not None:
                self._closing = asyncio.ensure_future(self._previous.close(None))
            self._previous = self._channel
            self._open(credentials)
        return self._channel, credentials.token

    async def close(self, grace: float | None = None) -> None:
        self._closed = True
        for channel in (self._previous, self._channel):
            if channel is not None:
                await channel.close(grace)

    async def __aenter__(self) -> _SecureChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close(None)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.current()[0].get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current()[0].channel_ready()

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return _Method(self, "stream_stream", arguments, options)


class _Method:
    """A call that can be made, on whatever connection is the newest then."""

    def __init__(self, owner: _SecureChannel, kind: str, arguments: tuple[Any, ...], options: dict[str, Any]):
        self._owner = owner
        self._kind = kind
        self._arguments = arguments
        self._options = options
        self._channel: grpc.aio.Channel | None = None
        self._method: Callable[..., Any]

    def __call__(self, *arguments: Any, metadata: Sequence[tuple[str, str]] | None = None, **options: Any) -> Any:
        channel, token = self._owner.current()
        if channel is not self._channel:
            self._channel = channel
            self._method = getattr(channel, self._kind)(*self._arguments, **self._options)
        return self._method(*arguments, metadata=((AUTHORIZATION, BEARER + token), *(metadata or ())), **options)


PLAIN = Transport(None)
"""Without credentials."""
