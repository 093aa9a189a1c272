"""gRPC as gradstream uses it: one set of options for both sides, and errors that survive the wire.

A servicer method runs its body in `async with answering(context)`: a GradstreamError becomes a status whose trailing
metadata names the error's class, and `error_from_rpc` on the other side makes the same error of it again.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio

from gradstream.core import errors
from gradstream.core.errors import (
    AccessError,
    BusyError,
    GradstreamError,
    ProtocolError,
    StaleEpochError,
    UnreachableError,
)
from gradstream.core.foreign import panics_caught
from gradstream.core.transport import PLAIN, Transport

C = TypeVar("C", bound=grpc.aio.Call)

ERROR_CLASS_KEY = "gradstream-error"
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
    # A proxy from the environment must not come between the machines of a cluster.
    ("grpc.enable_http_proxy", 0),
    # Each channel its own connection: a stalled stream of one peer must not hold up another's.
    ("grpc.use_local_subchannel_pool", 1),
]
SERVER_OPTIONS: list[tuple[str, Any]] = [
    *_KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Of one connection. Further calls wait at their caller, for whom the guard's limits are lower anyway.
    ("grpc.max_concurrent_streams", MAX_STREAMS_A_CONNECTION),
    ("grpc.server_handshake_timeout_ms", 20_000),
    # Two servers on one port would each get half of the calls.
    ("grpc.so_reuseport", 0),
]


def open_channel(address: str, role: str = "", transport: Transport = PLAIN) -> grpc.aio.Channel:
    """A channel to the peer at `address` (host:port). With credentials it must have the role in its certificate."""
    return transport.channel(address, role, CHANNEL_OPTIONS)


def new_server(
    *interceptors: grpc.aio.ServerInterceptor[Any, Any],
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    takes_bulk: bool = True,
) -> grpc.aio.Server:
    """A server without services or port yet, in the running event loop; it refuses longer messages.

    One that `takes_bulk` lets gRPC measure its links: a sender may then be as far ahead of the reader as the fastest
    link needs, 4 MiB a stream or more. Others hold 64 KiB of a stream that nobody reads.
    """
    asyncio.get_running_loop().set_exception_handler(_on_forgotten_error)
    options = [*SERVER_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)]
    if not takes_bulk:
        options.append(("grpc.http2.bdp_probe", 0))
    return grpc.aio.server(interceptors=interceptors, options=options)


def _on_forgotten_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Keep a trace off the log that means nothing: when a peer cancels a stream, gRPC closes its iterator even while it
    runs, which Python refuses. The iterator ends by itself."""
    error = context.get("exception")
    if isinstance(error, RuntimeError) and "asynchronous generator is already running" in str(error):
        return
    loop.default_exception_handler(context)


def listen(server: grpc.aio.Server, address: str, transport: Transport = PLAIN) -> int:
    """Bind `server` to `address` (host:port, port 0 for a free one); return the port. Raises ConfigError when it is
    taken or not this machine's."""
    _check_free(address)
    try:
        port = transport.add_port(server, address)
    except RuntimeError:
        port = 0
    if not port:
        raise errors.ConfigError(f"cannot listen on {address}; choose another address (port 0 takes a free one)")
    return port


def advertised_host(listen_address: str) -> str:
    """The host that others can reach a server by: the one it listens on, or this machine's name for a wildcard."""
    host = listen_address.rpartition(":")[0]
    return socket.gethostname() if host in ("", "0.0.0.0", "[::]", "*") else host


def _check_free(address: str) -> None:
    """Raise ConfigError that says why one cannot listen there: gRPC says it only in a log line of its own."""
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


@asynccontextmanager
async def answering(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """Turn a GradstreamError raised inside, or a parser's panic, which gRPC would leave unanswered, into the status of
    the call."""
    try:
        with panics_caught():
            yield
    except GradstreamError as error:
        # What was refused must not stay, in frames that the traceback holds, until a garbage collection finds it.
        traceback.clear_frames(error.__traceback__)
        await abort(context, error)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: GradstreamError) -> NoReturn:
    """End a call with the status that `error_from_rpc` makes the same error of."""
    # A service's own kind of error is, for a caller, the kind of the tree that it derives from.
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    context.set_trailing_metadata(((ERROR_CLASS_KEY, name),))
    await context.abort(error.status, errors.one_line(error))
    raise AssertionError("abort has raised")


def error_from_rpc(error: grpc.aio.AioRpcError, peer: str) -> GradstreamError:
    """The error for people that a failed call stands for. `peer` says whom was called ("coordinator 10.0.0.1:7000").

    Raises CancelledError when this task was cancelled: gRPC drops that where a call fails at the same moment, and a
    task that tries again until it is cancelled would never end.
    """
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop here
        task = None
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
    details = " ".join((error.details() or "").split())
    metadata: Any = error.trailing_metadata() or ()
    name = next((value for key, value in metadata if key == ERROR_CLASS_KEY), None)
    known = getattr(errors, name, None) if isinstance(name, str) else None
    if isinstance(known, type) and issubclass(known, GradstreamError):
        return known(details)
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return UnreachableError(
            f"{peer} does not answer ({details or 'connection lost'}); is it running and the port open?"
        )
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnreachableError(f"{peer} took too long to answer; is it overloaded or the network down?")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"{peer} does not offer this call; do both sides run the same gradstream version?")
    return GradstreamError(f"{peer}: {error.code().name.lower().replace('_', ' ')}: {details}")


@contextmanager
def ending(call: C) -> Iterator[C]:
    """A call whose responses are read inside, ended when they are left: one that nobody reads any more and nobody has
    cancelled stays open, and its connection with it."""
    try:
        yield call
    finally:
        call.cancel()


def refused_for_good(error: GradstreamError) -> bool:
    """Whether a peer's refusal stands however often it is asked.

    A stale epoch is not of the kind: either side may be about to take up the new plan.
    """
    return isinstance(error, ProtocolError) and not isinstance(error, StaleEpochError)


def is_passing(error: GradstreamError) -> bool:
    """Whether the same request may be taken later although it was refused now: a peer that is away or busy, credentials
    that are about to be renewed, a fault that has no name. Not a peer's answer about the request itself."""
    return isinstance(error, UnreachableError | BusyError | AccessError) or type(error) is GradstreamError


class Backoff:
    """Endless jittered exponential backoff, in seconds."""

    def __init__(
        self,
        first_seconds: float = 0.1,
        last_seconds: float = 3.0,
        uniform: Callable[[float, float], float] = random.uniform,
    ):
        self._first = first_seconds
        self._last = last_seconds
        self._uniform = uniform
        self._attempt = 0

    def reset(self) -> None:
        """Start again from the first delay."""
        self._attempt = 0

    def next(self) -> float:
        """Seconds to wait before the next try."""
        ceiling = min(self._last, self._first * 2 ** min(self._attempt, 20))
        self._attempt += 1
        return self._uniform(ceiling / 2, ceiling)
