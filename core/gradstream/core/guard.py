"""At a server's door: who calls, by certificate and token, and whether the call's rule lets them.

A call is admitted, or refused with one line, before the servicer sees it. One that is under way ends when its token
expires or is revoked. What is audited is noted with its caller and its end.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio

from gradstream.core import access
from gradstream.core.access import Caller
from gradstream.core.credentials import dns_name
from gradstream.core.errors import AccessError, BusyError, CredentialsError, GradstreamError, UnreachableError
from gradstream.core.limits import PERSON_LIMIT, SERVICE_LIMIT, Meter
from gradstream.core.log import get_logger
from gradstream.core.rpc import abort
from gradstream.core.tokens import PEOPLE_ROLES, ROLES, Token, TokenTable, check
from gradstream.core.transport import AUTHORIZATION, BEARER

log = get_logger()

LOOK_SECONDS = 1.0
"""How long a call may go on after its token has expired or was revoked."""
SENDING_SECONDS = 30.0
"""How long the response that is being sent then may take."""
MAX_IDLE_METERS = 1024

Context = grpc.aio.ServicerContext[Any, Any]


class TokenSource(Protocol):
    """Where a server has its table of tokens from."""

    @property
    def table(self) -> TokenTable | None:
        """The newest; None as long as there is none."""

    def refresh(self) -> None:
        """Look at once whether there is a newer one, where that can be told: a token may be newer than the table."""


@dataclass(frozen=True)
class AuditEvent:
    """That somebody made a call that is noted, or was refused one."""

    unix_ms: int
    call: str
    caller: str
    """Name and role; empty when the credentials told neither."""
    peer: str
    subject: str
    """The job or fine-tuning that it was about, where the request names one."""
    outcome: str
    """"ok", or why it was refused or failed, in one line."""


Note = Callable[[AuditEvent], None]
"""Takes an event for the audit log."""


@dataclass(eq=False)
class _Call:
    """A call that is under way."""

    token_text: str
    task: asyncio.Task[Any]
    refusal: str = ""
    refused_at: float = 0.0
    is_sending: bool = False
    """Whether gRPC has a response of it in hand."""

    def end(self, refusal: str, now: float) -> None:
        """End it with a refusal that the caller gets to hear: at once, or when the response in hand has been sent.

        Where gRPC's sending is cancelled the caller may get no status, and wait for ever. One that has not taken the
        response after `SENDING_SECONDS` does not listen anyway.
        """
        is_new = not self.refusal
        if is_new:
            self.refusal, self.refused_at = refusal, now
        if now - self.refused_at >= SENDING_SECONDS if self.is_sending else is_new:
            self.task.cancel()


def decide(
    method: str, token_text: str, certificate_role: str, table: TokenTable | None, now: float
) -> tuple[Token | None, GradstreamError | None]:
    """Whose token it is, and why its call is refused (None: it is not). `now` is in Unix seconds."""
    if table is None:
        return None, UnreachableError("no table of tokens has come from the coordinator yet; try again later")
    token, reason = check(token_text, table, now)
    if token is None:
        return None, CredentialsError(reason)
    if token.role != certificate_role:
        return token, CredentialsError(
            f"the token is of a {token.role} and the certificate of a {certificate_role or 'stranger'}; use both as "
            f"they were issued"
        )
    admitted, reason = access.may(token.role, method)
    return token, None if admitted else AccessError(reason)


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # its stub is generic, the class is not
    """Admits calls to one server. `run` must run beside it."""

    def __init__(
        self,
        tokens: TokenSource,
        note: Note | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self._tokens = tokens
        self._note = note
        self._clock = clock
        self._calls: set[_Call] = set()
        self._meters: dict[tuple[str, str], Meter] = {}
        self._guarded: dict[str, tuple[Any, Any]] = {}

    async def run(self) -> None:
        """End calls whose token has expired or was revoked, for as long as this runs."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.end_revoked()

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
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(details)
        if handler is None:
            return None
        kept = self._guarded.get(details.method)
        if kept is None or kept[0] is not handler:
            self._guarded[details.method] = kept = (handler, self._guard(handler, details.method))
        return kept[1]

    def _guard(self, handler: Any, method: str) -> Any:
        """The same handler behind the door."""
        rule = access.rule_of(method)
        audited = rule is not None and rule.audited
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def answer(request: Any, context: Context) -> Any:
            async with self._admitted(method, audited, request, context):
                return await behaviour(request, context)

        async def stream(request: Any, context: Context) -> None:
            async with (
                self._admitted(method, audited, request, context) as call,
                aclosing(behaviour(request, context)) as responses,
            ):
                async for response in responses:
                    call.is_sending = True
                    try:
                        # Not yielded: while gRPC sends what was, a task that is cancelled ends outside of this code.
                        await context.write(response)
                    finally:
                        call.is_sending = False
                    if call.refusal:
                        raise asyncio.CancelledError

        requests = "stream" if handler.request_streaming else "unary"
        responses = "stream" if handler.response_streaming else "unary"
        make = getattr(grpc, f"{requests}_{responses}_rpc_method_handler")
        return make(
            stream if inspect.isasyncgenfunction(behaviour) else answer,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    @asynccontextmanager
    async def _admitted(self, method: str, audited: bool, request: Any, context: Context) -> AsyncIterator[_Call]:
        text = token_of(context)
        token, error = decide(method, text, role_of(context), self._tokens.table, self._clock())
        if token is None:
            self._tokens.refresh()
            token, error = decide(method, text, role_of(context), self._tokens.table, self._clock())
        host = context.peer().rpartition(":")[0]
        caller = Caller(token.name, token.role, host) if token is not None else None
        if token is not None and error is None:
            meter = self._meter(token, host)
            busy = meter.enter(time.monotonic())
            error = BusyError(busy) if busy else None
        if error is not None:
            # That there is no table yet is nobody's fault, and health checks ask every few seconds.
            if not isinstance(error, UnreachableError):
                self._tell(method, caller, host, request, f"refused: {error}")
            await abort(context, error)
        task = asyncio.current_task()
        assert task is not None
        call = _Call(text, task)
        self._calls.add(call)
        access.caller.set(caller)
        try:
            yield call
        except asyncio.CancelledError:
            if audited:
                self._tell(method, caller, host, request, call.refusal or "broken off")
            if not call.refusal:
                raise
            task.uncancel()
            await abort(context, CredentialsError(call.refusal))
        except BaseException as failure:
            if audited:
                self._tell(method, caller, host, request, f"failed: {context.details() or failure}")
            raise
        else:
            if audited:
                self._tell(method, caller, host, request, "ok")
        finally:
            self._calls.discard(call)
            meter.leave()

    def _meter(self, token: Token, host: str) -> Meter:
        key = (token.id, host)
        meter = self._meters.get(key)
        if meter is None:
            if len(self._meters) >= MAX_IDLE_METERS:
                self._meters = {key: meter for key, meter in self._meters.items() if meter.under_way}
            limit = PERSON_LIMIT if token.role in PEOPLE_ROLES else SERVICE_LIMIT
            meter = self._meters[key] = Meter(limit)
        return meter

    def _tell(self, method: str, caller: Caller | None, peer: str, request: Any, outcome: str) -> None:
        call = method.rpartition("/")[2]
        who = str(caller) if caller is not None else ""
        subject = next((str(value) for name in ("job_id", "name") if (value := getattr(request, name, ""))), "")
        if outcome != "ok":
            log.warning("a call was not answered", call=call, caller=who or "unknown", peer=peer, cause=outcome)
        if self._note is not None:
            self._note(AuditEvent(int(self._clock() * 1000), call, who, peer, subject[:200], " ".join(outcome.split())))


def token_of(context: Context) -> str:
    """The bearer token of a call; empty when it has none."""
    for key, value in context.invocation_metadata() or ():
        if key == AUTHORIZATION and isinstance(value, str) and value.startswith(BEARER):
            return value[len(BEARER) :]
    return ""


def role_of(context: Context) -> str:
    """The role in the caller's certificate; empty when it has none."""
    names = context.auth_context().get("x509_subject_alternative_name", ())
    shown = {name.decode(errors="replace") for name in names}
    return next((role for role in ROLES if dns_name(role) in shown), "")
