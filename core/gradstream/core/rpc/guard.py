"""The guard of a server: admits or refuses each call by its certificate, its token and the call's rule.

A call is admitted, or refused with one line, before its request is read. To make this possible, every call is served as
a stream, and the guard reads a unary request itself once the caller is known. A refused caller therefore takes no
memory, and the memory of all requests together is bounded (`limits.Receiving`). A call that is under way ends when its
token expires or is revoked. Audited calls are recorded with their caller and outcome.
"""

from __future__ import annotations

import asyncio
import hmac
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import grpc
import grpc.aio

from gradstream.core.credentials.tokens import PEOPLE_ROLES, Token, TokenTable, check
from gradstream.core.errors import (
    AccessError,
    BusyError,
    CredentialsError,
    GradstreamError,
    ProtocolError,
    UnreachableError,
)
from gradstream.core.log import get_logger
from gradstream.core.rpc import access
from gradstream.core.rpc.access import Caller
from gradstream.core.rpc.callers import MAX_CERTIFICATES, Context, Shown, shown_by, token_of
from gradstream.core.rpc.channel import MAX_MESSAGE_BYTES
from gradstream.core.rpc.errors import abort, answering
from gradstream.core.rpc.limits import MIN_RATE, PERSON_LIMIT, SERVICE_LIMIT, Meter, Patience, Receiving
from gradstream.core.rpc.refusals import AuditEvent, Refusals

log = get_logger()

LOOK_SECONDS = 1.0
"""Time for which a call may continue after its token has expired or was revoked."""
SENDING_SECONDS = 30.0
"""Further time for a response that is being sent at that moment."""
REQUEST_SECONDS = 20.0
"""Time in which a caller must send the request of a call that it has begun."""
READING_SECONDS = 60.0
"""Time for which a caller may leave a response unread, or an upload without its next message. After it the call is
ended, because other callers may need the resources that it holds."""
MAX_IDLE_METERS = MAX_CERTIFICATES

_END = object()


class TokenSource(Protocol):
    """The source of a server's token table."""

    @property
    def table(self) -> TokenTable | None:
        """The newest table; None while there is none."""

    def refresh(self) -> None:
        """Look for a newer table now, if the source can: a token may be newer than the table."""


Note = Callable[[AuditEvent], None]
"""Takes an event for the audit log."""


@dataclass(eq=False)
class _Call:
    """A call that is under way."""

    token_text: str
    task: asyncio.Task[Any]
    subject: str = ""
    """The job or fine-tuning that the request names."""
    refusal: str = ""
    refused_at: float = 0.0
    is_sending: bool = False
    """Whether gRPC is sending a response of this call."""

    def end(self, refusal: str, now: float) -> None:
        """End the call with a refusal as its status: at once, or when the response being sent has been sent.

        If gRPC is cancelled while it sends, the caller may get no status and wait for ever. A caller that has not taken
        the response after `SENDING_SECONDS` is cancelled nevertheless.
        """
        is_new = not self.refusal
        if is_new:
            self.refusal, self.refused_at = refusal, now
        if now - self.refused_at >= SENDING_SECONDS if self.is_sending else is_new:
            self.task.cancel()


def decide(
    method: str, token_text: str, certificate_sha256: str, table: TokenTable | None, now: float
) -> tuple[Token | None, GradstreamError | None]:
    """Decide if a call is admitted; return its token's entry, and the error that refuses the call (None: admitted).

    A token is good only on a connection that shows the certificate that was issued with it. `now` is in Unix seconds.
    """
    if table is None:
        return None, UnreachableError("no table of tokens has come from the coordinator yet; try again later")
    token, reason = check(token_text, table, now)
    if token is None:
        return None, CredentialsError(reason)
    if not hmac.compare_digest(token.certificate_sha256, certificate_sha256):
        return token, CredentialsError(
            f"token {token.id} was issued with another certificate than the connection shows; use all files of one "
            f"credential as they were issued"
        )
    admitted, reason = access.may(token.role, method)
    return token, None if admitted else AccessError(reason)


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # its stub is generic, the class is not
    """The interceptor that admits or refuses the calls to one server. `run` must run beside it."""

    def __init__(
        self,
        tokens: TokenSource,
        note: Note | None = None,
        clock: Callable[[], float] = time.time,
        request_seconds: float = REQUEST_SECONDS,
        reading_seconds: float = READING_SECONDS,
        waiting_bytes: Callable[[], int] = lambda: 0,
    ):
        """`waiting_bytes` returns the bytes of requests that may be served for long (`limits.Receiving`)."""
        self._tokens = tokens
        self._note = note
        self._clock = clock
        self._request_seconds = request_seconds
        self._reading_seconds = reading_seconds
        self._calls: set[_Call] = set()
        self._meters: dict[tuple[str, str], Meter] = {}
        self.receiving = Receiving(waiting_bytes=waiting_bytes)
        self._refusals = Refusals()
        self._guarded: dict[str, tuple[Any, Any]] = {}

    async def run(self) -> None:
        """Regularly end calls whose token has expired or was revoked, until cancelled."""
        try:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                self.end_revoked()
                self._write(self._refusals.due(self._clock()))
        finally:
            self._write(self._refusals.rest())

    def end_revoked(self) -> None:
        """End calls whose token has expired or was revoked."""
        table, now = self._tokens.table, self._clock()
        verdicts: dict[str, str] = {}
        for call in self._calls:
            if call.token_text not in verdicts:
                token, reason = check(call.token_text, table, now) if table is not None else (None, "")
                verdicts[call.token_text] = "" if token is not None else reason
            if verdicts[call.token_text]:
                call.end(verdicts[call.token_text], now)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the call's handler behind the guard. See grpc.aio.ServerInterceptor."""
        handler = await continuation(details)
        if handler is None:
            return None
        kept = self._guarded.get(details.method)
        if kept is None or kept[0] is not handler:
            self._guarded[details.method] = kept = (handler, self._guard(handler, details.method))
        return kept[1]

    def _guard(self, handler: Any, method: str) -> Any:
        """The same handler behind the guard."""
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def respond(request: Any, call: _Call, context: Context) -> None:
            if not inspect.isasyncgenfunction(behaviour):
                response = await behaviour(request, context)
                if not handler.response_streaming:
                    await context.write(response)
                return
            patience = Patience(self._reading_seconds)
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    call.is_sending = True
                    try:
                        # `write`, not `yield`: a task cancelled while gRPC sends a yielded response ends outside this
                        # code.
                        async with asyncio.timeout(patience.begin(time.monotonic())):
                            await context.write(response)
                    except TimeoutError:
                        raise UnreachableError(_unread(patience)) from None
                    finally:
                        call.is_sending = False
                    patience.end(time.monotonic(), partial(_size, response))
                    if call.refusal:
                        raise asyncio.CancelledError

        async def serve(requests: Any, context: Context) -> None:
            async with self._admitted(method, context) as (call, meter), answering(context):
                if handler.request_streaming:
                    # In a call that streams both ways, either side may be silent for long.
                    await respond(requests if handler.response_streaming else self._timely(requests), call, context)
                    return
                async with self._received(requests, handler.request_deserializer, meter) as request:
                    call.subject = _subject(request)
                    await respond(request, call, context)

        return grpc.stream_stream_rpc_method_handler(
            serve,
            request_deserializer=handler.request_deserializer if handler.request_streaming else None,
            response_serializer=handler.response_serializer,
        )

    async def _timely(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The messages of a client stream. Raises UnreachableError when the caller keeps the server waiting."""
        patience, is_first = Patience(self._request_seconds), True
        while True:
            seconds = patience.begin(time.monotonic())
            try:
                async with asyncio.timeout(seconds):
                    message = await anext(requests, _END)
            except TimeoutError:
                cause = f"less than {MIN_RATE} comes" if patience.is_worn else "nothing came"
                raise UnreachableError(f"{cause} on this stream for {seconds:.3g} s; send it again") from None
            if message is _END:
                return
            if is_first:
                patience, is_first = Patience(self._reading_seconds), False
            else:
                patience.end(time.monotonic(), partial(_size, message))
            yield message

    @asynccontextmanager
    async def _received(self, requests: AsyncIterator[bytes], deserialize: Any, meter: Meter) -> AsyncIterator[Any]:
        """Read the request of an admitted call. Its bytes count against the server's bound while the call is served."""
        held = MAX_MESSAGE_BYTES
        await self.receiving.reserve(meter, held)
        try:
            try:
                async with asyncio.timeout(self._request_seconds):
                    message = await anext(requests, None)
            except TimeoutError:
                raise UnreachableError(
                    f"the request of this call did not come within {self._request_seconds:g} s; send it again"
                ) from None
            if message is None:
                raise ProtocolError("the call has no request; do both sides run the same gradstream version?")
            self.receiving.release(meter, held - len(message))
            held = len(message)
            try:
                request = deserialize(message) if deserialize is not None else message
            except Exception:  # the parser raises errors of many types for malformed bytes
                raise ProtocolError("the request of this call is not a valid message") from None
            del message
            yield request
        finally:
            self.receiving.release(meter, held)

    @asynccontextmanager
    async def _admitted(self, method: str, context: Context) -> AsyncIterator[tuple[_Call, Meter]]:
        rule = access.rule_of(method)
        audited = rule is not None and rule.audited
        shown, text = shown_by(context), token_of(context)
        caller = Caller(shown.name, shown.role, shown.host)
        meter, error = self._enter(method, caller, text, shown)
        if error is not None:
            await abort(context, error)
        task = asyncio.current_task()
        assert task is not None
        call = _Call(text, task)
        self._calls.add(call)
        access.caller.set(caller)
        outcome = "ok"
        try:
            yield call, meter
        except asyncio.CancelledError:
            outcome = call.refusal or "broken off"
            if not call.refusal:
                raise
            task.uncancel()
            await abort(context, CredentialsError(call.refusal))
        except BaseException as failure:
            outcome = f"failed: {context.details() or failure}"
            raise
        finally:
            self._calls.discard(call)
            meter.leave()
            if audited:
                self._write([self._event(method, caller, call.subject, outcome)])

    def judge(self, method: str, token_text: str, shown: Shown) -> GradstreamError | None:
        """Decide on a request outside of gRPC that is answered at once; return the error that refuses it, if any.

        It counts against the caller's limits, and a refusal is recorded, as for a call.
        """
        meter, error = self._enter(method, Caller(shown.name, shown.role, shown.host), token_text, shown)
        if error is None:
            meter.leave()
        return error

    def _enter(self, method: str, caller: Caller, text: str, shown: Shown) -> tuple[Meter, GradstreamError | None]:
        """Count a call that begins. Return the error that refuses it, which is recorded; it is not under way then."""
        # Refused calls count as well: the rate limit of a certificate holds for all of its calls.
        meter = self._meter(shown)
        busy = meter.enter(time.monotonic())
        error = BusyError(busy) if busy else self._refusal(method, text, shown)
        if error is not None:
            if not busy:
                meter.leave()
            self._refused(method, caller, error)
        return meter, error

    def _refusal(self, method: str, text: str, shown: Shown) -> GradstreamError | None:
        """The error with which a call is refused; None when it is admitted."""
        token, error = decide(method, text, shown.certificate_sha256, self._tokens.table, self._clock())
        if token is None:
            self._tokens.refresh()
            token, error = decide(method, text, shown.certificate_sha256, self._tokens.table, self._clock())
        return error

    def _meter(self, shown: Shown) -> Meter:
        key = (shown.certificate_sha256, shown.host)
        meter = self._meters.get(key)
        if meter is None:
            if len(self._meters) >= MAX_IDLE_METERS:
                self._meters = {key: meter for key, meter in self._meters.items() if meter.under_way}
            limit = PERSON_LIMIT if shown.role in PEOPLE_ROLES else SERVICE_LIMIT
            meter = self._meters[key] = Meter(limit)
        return meter

    def _refused(self, method: str, caller: Caller, error: GradstreamError) -> None:
        # A missing table is not recorded: it is not the caller's fault, and health checks call every few seconds.
        if not isinstance(error, UnreachableError):
            event = self._event(method, caller, "", f"refused: {error}")
            self._write(self._refusals.add(event, type(error).__name__))

    def _event(self, method: str, caller: Caller, subject: str, outcome: str) -> AuditEvent:
        call, unix_ms = method.rpartition("/")[2], int(self._clock() * 1000)
        return AuditEvent(unix_ms, call, str(caller), caller.peer, subject, " ".join(outcome.split()))

    def _write(self, events: list[AuditEvent]) -> None:
        for event in events:
            if event.outcome != "ok":
                log.warning(
                    "a call was not answered",
                    call=event.call,
                    caller=event.caller,
                    peer=event.peer,
                    cause=event.outcome,
                    times=event.times,
                )
            if self._note is not None:
                self._note(event)


def _unread(patience: Patience) -> str:
    if patience.is_worn:
        return f"the caller has read less than {MIN_RATE} for long; call again where the network is faster"
    return f"the caller has not read for {patience.left_seconds:.3g} s; call again"


def _size(message: Any) -> int:
    return len(message) if isinstance(message, bytes) else int(message.ByteSize())


def _subject(request: Any) -> str:
    found = next((str(value) for name in ("job_id", "name") if (value := getattr(request, name, ""))), "")
    return found[:200]
