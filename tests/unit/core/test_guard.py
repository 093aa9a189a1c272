"""Every call of every service, with credentials of every role over real TLS: let in or refused as its rule says."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from support.credentials import make_credentials

from gradstream.core import access
from gradstream.core.errors import AccessError, BusyError, CredentialsError, GradstreamError, UnreachableError
from gradstream.core.guard import SENDING_SECONDS, AuditEvent, Guard
from gradstream.core.limits import Limit, Meter
from gradstream.core.rpc import error_from_rpc, listen, new_server, open_channel
from gradstream.core.tokens import ROLES, TokenTable
from gradstream.core.transport import Transport

BOUND_SECONDS = 20.0
FOREVER = "/gradstream.proto.v1.CoordinatorService/WatchTokens"
MUCH = "/gradstream.proto.v1.ParameterServerService/Pull"


class Tokens:
    """A table that a test replaces."""

    def __init__(self, table: TokenTable | None):
        self.table = table

    def refresh(self) -> None:
        pass


class Door:
    """A server that answers every call of gradstream's services with the caller's name, behind a guard."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.tokens = Tokens(TokenTable.parse((directory / "coordinator" / "tokens.json").read_bytes()))
        self.events: list[AuditEvent] = []
        self.later = 0.0  # seconds by which the guard's clock is ahead
        self.guard = Guard(self.tokens, self.events.append, lambda: time.time() + self.later)
        self.server = new_server(self.guard)
        self.ended = asyncio.Event()
        for file in access.FILES:
            for service in file.services_by_name.values():
                handlers = {method.name: self._handler(method) for method in service.methods}
                self.server.add_generic_rpc_handlers(
                    (grpc.method_handlers_generic_handler(service.full_name, handlers),)
                )
        self.address = f"127.0.0.1:{listen(self.server, '127.0.0.1:0', Transport(directory / 'coordinator'))}"

    def _handler(self, method: Any) -> Any:
        async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
            yield str(access.caller.get()).encode()
            if method.name == FOREVER.rpartition("/")[2]:
                try:
                    await asyncio.Event().wait()
                finally:
                    self.ended.set()
            if method.name == MUCH.rpartition("/")[2]:
                try:
                    while True:
                        yield bytes(1 << 20)  # waits for nothing but gRPC's sending
                finally:
                    self.ended.set()

        async def answer(request: Any, context: Any) -> bytes:
            return str(access.caller.get()).encode()

        if method.server_streaming:
            make = (
                grpc.stream_stream_rpc_method_handler
                if method.client_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream)
        make = grpc.stream_unary_rpc_method_handler if method.client_streaming else grpc.unary_unary_rpc_method_handler
        return make(answer)

    def channel(self, role: str) -> grpc.aio.Channel:
        return open_channel(self.address, access.COORDINATOR, Transport(self.directory / role))


def kind_of(method: Any) -> str:
    return f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"


def kinds() -> dict[str, str]:
    """Of each call: who streams."""
    return {
        f"/{service.full_name}/{method.name}": kind_of(method)
        for file in access.FILES
        for service in file.services_by_name.values()
        for method in service.methods
    }


async def make_call(channel: grpc.aio.Channel, method: str) -> bytes:
    """The first answer of a call; raises the error that it stands for."""

    async def requests() -> AsyncIterator[bytes]:
        yield b""

    kind = kinds()[method]
    from_server = kind.endswith("_stream")
    call = getattr(channel, kind)(method)(requests() if kind.startswith("stream") else b"", timeout=BOUND_SECONDS)
    try:
        return bytes(await (call.read() if from_server else call))
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, "the server") from None
    finally:
        if from_server:
            call.cancel()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("credentials")
    make_credentials(made, ROLES)
    return made


@pytest.fixture
async def door(directory: Path) -> AsyncIterator[Door]:
    made = Door(directory)
    await made.server.start()
    yield made
    await made.server.stop(None)


def test_every_call_has_a_rule() -> None:
    without = [method for method in access.methods() if access.rule_of(method) is None]
    assert not without, f"say beside its proto who may call {without}"
    assert len(access.methods()) > 30


def test_a_call_without_a_rule_is_open_to_nobody() -> None:
    for role in ROLES:
        admitted, reason = access.may(role, "/gradstream.proto.v1.JobsService/ForgetEverything")
        assert not admitted
        assert "has no rule" in reason


def test_the_decisive_rules() -> None:
    """What the generated test below would not notice: that the rules themselves are the wanted ones."""

    def may(call: str) -> set[str]:
        method = next(method for method in access.methods() if method.endswith(f"/{call}"))
        return {role for role in ROLES if access.may(role, method)[0]}

    people = {"viewer", "submitter", "admin", "fine-tuning"}
    assert may("GetJob") == may("GetFineTuning") == people
    for call in ("SubmitJob", "StopJob", "ExportCheckpoint", "CreateFineTuning", "ExportFineTuning"):
        assert may(call) == people - {"viewer"}
        assert any(method.endswith(f"/{call}") and access.rules()[method].audited for method in access.methods())
    assert may("Push") == may("Pull") == may("Stream") == may("FetchDataShard") == {"worker"}
    assert may("CompleteStep") == may("ReportStep") == {"server"}
    assert may("Register") == {"worker", "server"}


@pytest.mark.parametrize("role", ROLES)
async def test_every_call_with_every_role(door: Door, role: str) -> None:
    async with door.channel(role) as channel:
        for method in access.methods():
            admitted, reason = access.may(role, method)
            if admitted:
                assert await make_call(channel, method) == f"{role} ({role})".encode()
            else:
                with pytest.raises(AccessError) as caught:
                    await make_call(channel, method)
                assert str(caught.value) == reason
    refused = sum(event.outcome.startswith("refused") for event in door.events)
    assert refused == sum(not access.may(role, method)[0] for method in access.methods())


async def test_without_a_token_nothing_is_answered(door: Door) -> None:
    credentials = Transport(door.directory / "worker").credentials()
    secure = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.cert)
    options = [("grpc.ssl_target_name_override", "coordinator.gradstream")]
    async with grpc.aio.secure_channel(door.address, secure, options=options) as channel:
        for method in access.methods():
            with pytest.raises(CredentialsError, match="no token was sent"):
                await make_call(channel, method)


async def test_a_stolen_token_is_of_no_use_without_its_certificate(door: Door, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    mixed.mkdir(mode=0o700)
    for name in ("ca.pem", "cert.pem", "key.pem", "token"):
        source = "admin" if name == "token" else "worker"
        (mixed / name).write_bytes((door.directory / source / name).read_bytes())
    async with open_channel(door.address, access.COORDINATOR, Transport(mixed)) as channel:
        with pytest.raises(CredentialsError, match="the token is of a admin and the certificate of a worker"):
            await make_call(channel, "/gradstream.proto.v1.JobsService/ListJobs")


async def test_a_server_without_a_table_asks_to_try_again(door: Door) -> None:
    door.tokens.table = None
    async with door.channel("viewer") as channel:
        with pytest.raises(UnreachableError, match="no table of tokens has come"):
            await make_call(channel, "/gradstream.proto.v1.JobsService/ListJobs")


def revoke_the_worker(door: Door) -> None:
    table = door.tokens.table
    assert table is not None
    tokens = [dataclasses.replace(token, revoked_at=1) if token.role == "worker" else token for token in table.tokens]
    door.tokens.table = dataclasses.replace(table, tokens=tuple(tokens))
    door.guard.end_revoked()


async def test_a_stream_ends_when_its_token_is_revoked(door: Door) -> None:
    async with door.channel("worker") as channel, door.channel("server") as other:
        streams = [each.unary_stream(FOREVER)(b"") for each in (channel, other)]
        for stream in streams:
            assert b"(" in await stream.read()
        revoke_the_worker(door)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with asyncio.timeout(BOUND_SECONDS):
                await streams[0].read()
        assert isinstance(error_from_rpc(caught.value, "it"), CredentialsError)
        assert "of worker 'worker' was revoked on" in str(caught.value.details())
        await asyncio.wait_for(door.ended.wait(), BOUND_SECONDS)
        assert not streams[1].done()
        with pytest.raises(CredentialsError, match="was revoked on"):
            await make_call(channel, FOREVER)
        streams[1].cancel()


async def test_a_stream_in_the_middle_of_a_response_ends_with_the_reason(door: Door) -> None:
    async with door.channel("worker") as channel:
        stream = channel.unary_stream(MUCH)(b"")
        await stream.read()

        async def read_on() -> None:
            while True:
                await stream.read()

        revoke_the_worker(door)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(read_on(), BOUND_SECONDS)
        assert "of worker 'worker' was revoked on" in str(caught.value.details())


async def test_a_caller_that_does_not_read_is_not_waited_for(door: Door) -> None:
    async with door.channel("worker") as channel:
        stream = channel.unary_stream(MUCH)(b"")
        for _ in range(2):
            await stream.read()
        revoke_the_worker(door)
        door.later = SENDING_SECONDS
        door.guard.end_revoked()
        await asyncio.wait_for(door.ended.wait(), BOUND_SECONDS)
        stream.cancel()


async def test_what_is_audited_is_noted_with_its_end(door: Door) -> None:
    async with door.channel("submitter") as channel:
        await make_call(channel, "/gradstream.proto.v1.JobsService/StopJob")
        await make_call(channel, "/gradstream.proto.v1.JobsService/ListJobs")
    (event,) = door.events
    assert (event.call, event.caller, event.outcome) == ("StopJob", "submitter (submitter)", "ok")
    assert event.peer == "ipv4:127.0.0.1"


async def test_one_caller_cannot_take_all(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradstream.core.guard.SERVICE_LIMIT", Limit(calls=2, calls_per_second=1000, burst=1000))
    async with door.channel("worker") as channel:
        streams = [channel.unary_stream(FOREVER)(b"") for _ in range(2)]
        for stream in streams:
            await stream.read()
        with pytest.raises(BusyError, match="2 calls of these credentials are under way from this host already"):
            await make_call(channel, FOREVER)
        async with door.channel("server") as other:
            await make_call(other, FOREVER)
        streams[0].cancel()
        async with asyncio.timeout(BOUND_SECONDS):
            while True:  # as soon as the server has seen the end of the first one
                try:
                    await make_call(channel, FOREVER)
                    break
                except BusyError:
                    await asyncio.sleep(0.01)
        streams[1].cancel()


def test_the_rate_of_calls_is_bounded() -> None:
    meter = Meter(Limit(calls=100, calls_per_second=2.0, burst=3))

    def one_call(now: float) -> str:
        refusal = meter.enter(now)
        if not refusal:
            meter.leave()
        return refusal

    assert [bool(one_call(0.0)) for _ in range(4)] == [False, False, False, True]
    assert "more than 2 calls a second" in one_call(0.4)
    assert one_call(0.6) == ""
    assert [bool(one_call(100.0)) for _ in range(4)] == [False, False, False, True]


def test_errors_keep_their_class_over_the_wire() -> None:
    for kind in (AccessError, CredentialsError, BusyError):
        assert issubclass(kind, GradstreamError)
        assert kind.status not in (grpc.StatusCode.INTERNAL, GradstreamError.status)
