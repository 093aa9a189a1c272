"""Errors over the wire: the status of a servicer's error, and the caller's error for a status."""

from __future__ import annotations

import asyncio
import traceback
from typing import Any, NoReturn

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
from gradstream.core.foreign import is_panic, panic_error

ERROR_CLASS_KEY = "gradstream-error"


class answering:  # noqa: N801 - used as `async with answering(context):`, and no exception ends inside it
    """Turn a GradstreamError or a parser's panic raised inside into the status of the call.

    Without it, gRPC would leave a call unanswered whose servicer panics.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]):
        self._context = context

    async def __aenter__(self) -> None:
        """Do nothing."""

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the call with the error's status. Other exceptions pass unchanged, and none is suppressed."""
        if error is not None and is_panic(error):
            error = panic_error(error)
        if isinstance(error, GradstreamError):
            # The traceback's frames hold the refused message. Free it now, not at some later garbage collection.
            traceback.clear_frames(error.__traceback__)
            await abort(self._context, error)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: GradstreamError) -> NoReturn:
    """End a call with a status from which `error_from_rpc` makes the same error."""
    # A service's own error class becomes, for the caller, the class of the error tree that it derives from.
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    context.set_trailing_metadata(((ERROR_CLASS_KEY, name),))
    await context.abort(error.status, errors.one_line(error))
    raise AssertionError("abort has raised")


def error_from_rpc(error: grpc.aio.AioRpcError, peer: str) -> GradstreamError:
    """The error for people of a failed call. `peer` names the called side ("coordinator 10.0.0.1:7000").

    Raises CancelledError when this task was cancelled. gRPC loses the cancellation if the call fails at the same
    moment, and a task that retries until it is cancelled would then never end.
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


def refusal_of(error: grpc.aio.AioRpcError) -> str:
    """The peer's reason in one line if the peer itself refused the call; empty if it did not answer."""
    metadata: Any = error.trailing_metadata() or ()
    if any(key == ERROR_CLASS_KEY for key, _ in metadata):
        return " ".join((error.details() or "").split())
    return ""


def refused_for_good(error: GradstreamError) -> bool:
    """Whether a peer refuses the same request at every retry.

    A stale epoch is not permanent: one of the two sides may be about to take up the new plan.
    """
    return isinstance(error, ProtocolError) and not isinstance(error, StaleEpochError)


def is_passing(error: GradstreamError) -> bool:
    """Whether the same request may succeed later.

    It may when the peer is away or busy, when credentials are about to be renewed, and after an unknown fault. It may
    not when the peer's answer is about the request itself.
    """
    return isinstance(error, UnreachableError | BusyError | AccessError) or type(error) is GradstreamError
