"""gRPC channels and servers with gradstream's options.

A servicer method runs its body in `async with answering(context)` (`rpc.errors`): a GradstreamError becomes a status
whose trailing metadata names the error's class, and the caller's `error_from_rpc` makes the same error of the status.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any, TypeVar

import grpc
import grpc.aio

from gradstream.core import errors
from gradstream.core.rpc.transport import PLAIN, Transport

C = TypeVar("C", bound=grpc.aio.Call)

MAX_MESSAGE_BYTES = 4 << 20
UNARY_TIMEOUT_SECONDS = 20.0
MAX_STREAMS_A_CONNECTION = 128

_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    *_KEEPALIVE,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    # Machines of a cluster connect directly, never through a proxy that the environment names.
    ("grpc.enable_http_proxy", 0),
    # Each channel has its own connection: a stalled stream of one channel must not delay another's.
    ("grpc.use_local_subchannel_pool", 1),
]
SERVER_OPTIONS: list[tuple[str, Any]] = [
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Limit for one connection. Further calls wait at the caller. The guard's limits for a caller are lower anyway.
    ("grpc.max_concurrent_streams", MAX_STREAMS_A_CONNECTION),
    ("grpc.server_handshake_timeout_ms", 20_000),
    # With SO_REUSEPORT two servers on one port would each get half of the calls.
    ("grpc.so_reuseport", 0),
]


def open_channel(address: str, role: str = "", transport: Transport = PLAIN) -> grpc.aio.Channel:
    """Open a channel to the peer at `address` (host:port), whose certificate, if any, must have the role."""
    return transport.channel(address, role, CHANNEL_OPTIONS)


def new_server(
    *interceptors: grpc.aio.ServerInterceptor[Any, Any],
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    takes_bulk: bool = True,
) -> grpc.aio.Server:
    """Make a server in the running event loop, without services or a port yet. It refuses longer messages.

    With `takes_bulk` gRPC measures the server's links and enlarges a stream's window to what the fastest link needs:
    4 MiB or more may be sent and not yet read. Otherwise the window of a stream is 64 KiB.
    """
    asyncio.get_running_loop().set_exception_handler(_on_forgotten_error)
    options = [*SERVER_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)]
    if not takes_bulk:
        options.append(("grpc.http2.bdp_probe", 0))
    return grpc.aio.server(interceptors=interceptors, options=options)


def _on_forgotten_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Suppress a meaningless stack trace in the log.

    When a peer cancels a stream, gRPC closes the stream's iterator even while it runs, which Python refuses. The
    iterator ends by itself.
    """
    error = context.get("exception")
    if isinstance(error, RuntimeError) and "asynchronous generator is already running" in str(error):
        return
    loop.default_exception_handler(context)


def listen(server: grpc.aio.Server, address: str, transport: Transport = PLAIN) -> int:
    """Bind `server` to `address` (host:port, port 0 for a free one); return the port.

    Raises ConfigError when the port is in use or the address is not this machine's.
    """
    _check_free(address)
    try:
        port = transport.add_port(server, address)
    except RuntimeError:
        port = 0
    if not port:
        raise errors.ConfigError(f"cannot listen on {address}; choose another address (port 0 takes a free one)")
    return port


def advertised_host(listen_address: str) -> str:
    """The host by which others reach a server: the host it listens on, or this machine's name for a wildcard."""
    host = listen_address.rpartition(":")[0]
    return socket.gethostname() if host in ("", "0.0.0.0", "[::]", "*") else host


def _check_free(address: str) -> None:
    """Raise ConfigError with the reason if a server cannot listen there. gRPC gives the reason only in its own log."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError, UnicodeError):
        raise errors.ConfigError(f"cannot listen on {address}: '{host}' is not a known host; choose another") from None
    causes = []
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
                return
        except OSError as error:
            causes.append(error)
    if any(error.errno == errno.EADDRINUSE for error in causes):
        raise errors.ConfigError(
            f"cannot listen on {address}: the port is in use; stop the process that holds it or choose another "
            f"(port 0 takes a free one)"
        )
    cause = "the address is not this machine's" if causes[0].errno == errno.EADDRNOTAVAIL else causes[0].strerror
    raise errors.ConfigError(f"cannot listen on {address}: {cause}; choose another (127.0.0.1, or 0.0.0.0 for all)")
