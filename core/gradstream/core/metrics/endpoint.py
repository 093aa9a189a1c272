"""A role's HTTP endpoint for Prometheus.

With credentials it speaks TLS with certificates of both sides and admits callers by the guard's rules, as the role's
gRPC server does. Values are read when a caller asks, on the event loop; the text is written in a thread. A connection
carries one request.
"""

from __future__ import annotations

import asyncio
import hashlib
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from gradstream.core.credentials.store import Credentials, dns_name
from gradstream.core.credentials.tokens import ROLES
from gradstream.core.errors import AccessError, BusyError, CredentialsError, GradstreamError, ProtocolError, one_line
from gradstream.core.log import get_logger
from gradstream.core.metrics.address import MetricsAddress
from gradstream.core.metrics.definition import Reading
from gradstream.core.metrics.http import MAX_HEAD_BYTES, Request, parse_head, response
from gradstream.core.rpc.access import METRICS
from gradstream.core.rpc.callers import Shown
from gradstream.core.rpc.channel import advertised_host
from gradstream.core.rpc.guard import Guard
from gradstream.core.rpc.transport import BEARER, Transport

log = get_logger()

PATH = "/metrics"
MAX_CONNECTIONS = 16
CALL_SECONDS = 10.0
"""Time for one connection, from its beginning to the last byte of the answer."""
TEXT = "text/plain; charset=utf-8"

Collect = Callable[[], Awaitable[Iterable[Reading]]]
Page = Callable[[], tuple[bytes, str]]
"""Makes a page: its body and content type."""


class MetricsEndpoint:
    """Serves `collect`'s readings at /metrics, and other pages at their paths."""

    def __init__(
        self,
        address: MetricsAddress,
        transport: Transport,
        guard: Guard | None,
        collect: Collect,
        pages: Mapping[str, Page] | None = None,
    ):
        """Bind the address. `guard` is that of the role's server; None without credentials.

        Raises ConfigError when the port is in use or the address is not this machine's.
        """
        self._socket = address.bind()
        port = self._socket.getsockname()[1]
        self.address = f"{advertised_host(f'{address.host}:{port}')}:{port}"
        """The address at which Prometheus reaches the endpoint."""
        self._transport = transport
        self._guard = guard
        self._collect = collect
        self._pages = dict(pages or {})
        self._tls = _ServerTls(transport)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to serve."""
        self._server = await asyncio.start_server(self._accept, sock=self._socket, limit=MAX_HEAD_BYTES)
        scheme = "https" if self._transport.is_secure else "http"
        log.info("metrics", url=f"{scheme}://{self.address}{PATH}")

    async def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()
        self._socket.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        task = asyncio.create_task(self._connected(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # What a peer does wrong, or a connection that breaks, concerns nobody else.
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            try:
                async with asyncio.timeout(CALL_SECONDS):
                    await self._serve(reader, writer)
                    writer.close()
                    await writer.wait_closed()
            finally:
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._transport.is_secure:
            await writer.start_tls(self._tls.context(), ssl_handshake_timeout=CALL_SECONDS)
        head = await reader.readuntil(b"\r\n\r\n")
        try:
            request = parse_head(head)
        except ProtocolError as error:
            writer.write(response(HTTPStatus.BAD_REQUEST, TEXT, f"{one_line(error)}\n".encode()))
        else:
            status, content_type, body = await self._answer(request, writer)
            writer.write(response(status, content_type, body, request.method != "HEAD"))
        await writer.drain()

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> tuple[HTTPStatus, str, bytes]:
        if self._guard is not None:
            shown = shown_by(writer.get_extra_info("ssl_object"), writer.get_extra_info("peername"))
            error = self._guard.judge(METRICS, _token_of(request), shown)
            if error is not None:
                return _status_of(error), TEXT, f"{one_line(error)}\n".encode()
        if request.method not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, TEXT, b"only GET and HEAD are answered here\n"
        if request.path in self._pages:
            body, content_type = self._pages[request.path]()
            return HTTPStatus.OK, content_type, body
        if request.path != PATH:
            paths = ", ".join([PATH, *self._pages])
            return HTTPStatus.NOT_FOUND, TEXT, f"nothing is here; there is {paths}\n".encode()
        try:
            readings = list(await self._collect())
            body, content_type = await asyncio.to_thread(_expose, readings, request.accept)
        except Exception as error:
            log.error("the metrics cannot be read", cause=one_line(error), exc_info=error)
            return HTTPStatus.INTERNAL_SERVER_ERROR, TEXT, b"the metrics cannot be read; the log says why\n"
        return HTTPStatus.OK, content_type, body


def _expose(readings: list[Reading], accept: str) -> tuple[bytes, str]:
    from gradstream.core.metrics.exposition import expose

    return expose(readings, accept)


class _ServerTls:
    """The TLS settings of a server, made again when the credentials have changed."""

    def __init__(self, transport: Transport):
        self._transport = transport
        self._made: tuple[Credentials, ssl.SSLContext] | None = None

    def context(self) -> ssl.SSLContext:
        """The settings for a handshake that begins now."""
        credentials = self._transport.credentials()
        if self._made is None or self._made[0] is not credentials:
            try:
                self._made = credentials, self._make(credentials)
            except (OSError, ssl.SSLError) as error:
                # The files are being replaced; the next handshake reads them again.
                if self._made is None:
                    raise
                log.debug("metrics keep the old certificate", cause=str(error))
        return self._made[1]

    def _make(self, credentials: Credentials) -> ssl.SSLContext:
        directory = self._transport.directory
        assert directory is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=credentials.ca.decode("ascii"))
        context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
        return context


def shown_by(tls: Any, peer: tuple[Any, ...] | None) -> Shown:
    """The caller's identity that a TLS connection proves. `peer` is the socket's address of the caller."""
    certificate: dict[str, Any] = tls.getpeercert() or {}
    names = {name for kind, name in certificate.get("subjectAltName", ()) if kind == "DNS"}
    subject = {key: value for entry in certificate.get("subject", ()) for key, value in entry}
    role = next((role for role in ROLES if dns_name(role) in names), "")
    digest = hashlib.sha256(tls.getpeercert(binary_form=True) or b"").hexdigest()
    host = str(peer[0]) if peer else ""
    return Shown(role, subject.get("commonName", ""), digest, f"ipv6:[{host}]" if ":" in host else f"ipv4:{host}")


def _token_of(request: Request) -> str:
    return request.authorization.removeprefix(BEARER) if request.authorization.startswith(BEARER) else ""


def _status_of(error: GradstreamError) -> HTTPStatus:
    if isinstance(error, CredentialsError):
        return HTTPStatus.UNAUTHORIZED
    if isinstance(error, AccessError):
        return HTTPStatus.FORBIDDEN
    return HTTPStatus.TOO_MANY_REQUESTS if isinstance(error, BusyError) else HTTPStatus.SERVICE_UNAVAILABLE
