"""A connection to one of gradstream's services: made when it is first needed, with errors that say what to do."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from gradstream.core.credentials.store import find_credentials
from gradstream.core.errors import ConfigError, CredentialsError, GradstreamError, UnreachableError
from gradstream.core.rpc.channel import open_channel
from gradstream.core.rpc.errors import ERROR_CLASS_KEY, error_from_rpc
from gradstream.core.rpc.reach import why_unreachable
from gradstream.core.rpc.retry import Backoff
from gradstream.core.rpc.transport import Transport

Stub = TypeVar("Stub")

# A little more than the longest pause between two attempts of a channel (gradstream.core.rpc.channel).
RECONNECT_SECONDS = 3.5
AGAIN_SECONDS = 10.0
"""How long a request whose answer was lost is made again."""


@dataclass(frozen=True)
class Peer:
    """Whom a connection is to, in the words of error messages."""

    title: str
    """As in "coordinator"."""
    default_address: str
    command: str
    """What starts it."""
    variable: str
    """The environment's variable that holds its address."""
    option: str
    """The command line's option for its address."""
    role: str
    """The one that its certificate must be of."""


class Connection(Generic[Stub]):
    """A channel and its stub. Must be made, used and closed in one event loop.

    Raises ConfigError when `address` is not host:port, CredentialsError when the credentials cannot be used.
    """

    def __init__(
        self,
        peer: Peer,
        address: str,
        make_stub: Callable[[grpc.aio.Channel], Stub],
        connect_timeout_seconds: float,
        call_timeout_seconds: float,
        credentials: str | Path | None = None,
    ):
        if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):\d{1,5}", address):
            raise ConfigError(f"'{address}' is not an address of the form host:port, like {peer.default_address}")
        self.address = address
        self.transport = Transport(find_credentials(address, credentials))
        self.unreachable_since: datetime | None = None
        """Since when (local time) every attempt has failed; None when the last one succeeded."""
        self._peer = peer
        self._make_stub = make_stub
        self._connect_timeout_seconds = connect_timeout_seconds
        self._call_timeout_seconds = call_timeout_seconds
        self._channel: grpc.aio.Channel | None = None

    async def close(self) -> None:
        """End all calls and close the channel."""
        if self._channel is not None:
            channel, self._channel = self._channel, None
            await channel.close(None)

    async def connect(self) -> Stub:
        """The stub of a channel that is connected, or that has just failed to and will say why."""
        if self._channel is None:
            self._channel = open_channel(self.address, self._peer.role, self.transport)
        channel = self._channel
        state = channel.get_state(try_to_connect=True)
        # A channel that has failed before is waited for until its next attempt, so that the old answer does not count.
        failed_before = state is grpc.ChannelConnectivity.TRANSIENT_FAILURE
        try:
            async with asyncio.timeout(min(RECONNECT_SECONDS if failed_before else 60, self._connect_timeout_seconds)):
                while state is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE and not failed_before:
                        await self._check_credentials()
                        break
                    if state is grpc.ChannelConnectivity.SHUTDOWN:
                        raise GradstreamError("the client is closed; make a new one")
                    await channel.wait_for_state_change(state)
                    failed_before = False
                    state = channel.get_state(try_to_connect=True)
        except TimeoutError:
            if not failed_before:
                raise self._unreachable(f"no answer within {self._connect_timeout_seconds:g} s") from None
        return self._make_stub(channel)

    async def call_once(self, call: Callable[[Stub, float], Any], request_id: str) -> Any:
        """As `call`, for a request that carries an id and so is taken once: where its answer is lost it is made again.

        Raises UnreachableError, which says how to go on, when it is not known whether the request was taken.
        """
        backoff = Backoff()
        deadline = time.monotonic() + AGAIN_SECONDS
        was_sent = False
        while True:
            stub = await self.connect()
            was_sent = was_sent or self._is_ready()
            try:
                response = await call(stub, self._call_timeout_seconds)
            except grpc.aio.AioRpcError as rpc_error:
                error = self.error(rpc_error)
                if not was_sent or not _is_lost(rpc_error):
                    raise error from None
                if time.monotonic() >= deadline:
                    raise UnreachableError(
                        f"{error}; it may have been taken: make the request again with request id {request_id}, which "
                        f"makes no second one"
                    ) from None
            else:
                self.unreachable_since = None
                return response
            await asyncio.sleep(backoff.next())

    def _is_ready(self) -> bool:
        channel = self._channel
        return channel is not None and channel.get_state() is grpc.ChannelConnectivity.READY

    async def call(self, call: Callable[[Stub, float], Any]) -> Any:
        """The answer of a unary call, which `call` makes on a stub with a time-out. Raises the error it stands for."""
        stub = await self.connect()
        try:
            response = await call(stub, self._call_timeout_seconds)
        except grpc.aio.AioRpcError as rpc_error:
            raise self.error(rpc_error) from None
        self.unreachable_since = None
        return response

    async def _check_credentials(self) -> None:
        """Raise CredentialsError when they are why one cannot connect."""
        error = await why_unreachable(self.address, self._peer.role, self.transport)
        if error is not None:
            raise CredentialsError(f"{self._peer.title} {error}")

    def error(self, rpc_error: grpc.aio.AioRpcError) -> GradstreamError:
        """The error for people that a failed call stands for."""
        error = error_from_rpc(rpc_error, f"{self._peer.title} {self.address}")
        if isinstance(error, UnreachableError) and rpc_error.code() in (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.CANCELLED,
        ):
            metadata: Any = rpc_error.trailing_metadata() or ()
            if any(key == ERROR_CLASS_KEY for key, _ in metadata):
                # The peer's own word, about another that does not answer it.
                return error
            # gRPC's own text names every layer; the last one is the cause.
            details = " ".join((rpc_error.details() or "").split())
            return self._unreachable(details.rpartition(": ")[2].rstrip("]") or "connection lost")
        if not isinstance(error, UnreachableError):
            self.unreachable_since = None
        return error

    def _unreachable(self, cause: str) -> UnreachableError:
        since = ""
        if self.unreachable_since is None:
            self.unreachable_since = datetime.now().astimezone()
        else:
            since = f" since {self.unreachable_since:%H:%M:%S}"
        peer = self._peer
        return UnreachableError(
            f"{peer.title} {self.address} does not answer{since} ({cause}); start it with "
            f"`{peer.command}`, or name another address ({peer.variable}, {peer.option})"
        )


def _is_lost(rpc_error: grpc.aio.AioRpcError) -> bool:
    """Whether a call failed in a way that does not tell what the peer has done."""
    metadata: Any = rpc_error.trailing_metadata() or ()
    return not any(key == ERROR_CLASS_KEY for key, _ in metadata) and rpc_error.code() in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNKNOWN,
    )
