"""Errors that survive the wire: a servicer's error is an answer, and a caller's error is that of the answer."""

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
    """Turns a GradstreamError raised inside, or a parser's panic, which gRPC would leave unanswered, into the status of
    the call."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]):
        self._context = context

    async def __aenter__(self) -> None:
        """Nothing is needed."""

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """End the call with the error's status; other exceptions pass. Nothing is suppressed."""
        if error is not None and is_panic(error):
            error = panic_error(error)
        if isinstance(error, GradstreamError):
            # What was refused must not stay, in frames that the traceback holds, until a garbage collection finds it.
            traceback.clear_frames(error.__traceback__)
            await abort(self._context, error)


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


def refused_for_good(error: GradstreamError) -> bool:
    """Whether a peer's refusal stands however often it is asked.

    A stale epoch is not of the kind: either side may be about to take up the new plan.
    """
    return isinstance(error, ProtocolError) and not isinstance(error, StaleEpochError)


def is_passing(error: GradstreamError) -> bool:
    """Whether the same request may be taken later although it was refused now: a peer that is away or busy, credentials
    that are about to be renewed, a fault that has no name. Not a peer's answer about the request itself."""
    return isinstance(error, UnreachableError | BusyError | AccessError) or type(error) is GradstreamError
