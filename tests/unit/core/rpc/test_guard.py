"""Every call of every service, with credentials of every role over real TLS: admitted or refused by its rule."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from support.credentials import make_credentials

from gradstream.core.credentials.authority import Authority
from gradstream.core.credentials.tokens import ROLES, TokenTable
from gradstream.core.errors import AccessError, BusyError, CredentialsError, GradstreamError, UnreachableError
from gradstream.core.rpc import access
from gradstream.core.rpc.channel import MAX_STREAMS_A_CONNECTION, listen, new_server, open_channel
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.core.rpc.guard import READING_SECONDS, REQUEST_SECONDS, SENDING_SECONDS, Guard
from gradstream.core.rpc.limits import Limit, Meter, Patience, Receiving
from gradstream.core.rpc.refusals import AuditEvent
from gradstream.core.rpc.token_sources import FollowedTokens
from gradstream.core.rpc.transport import Transport

BOUND_SECONDS = 20.0
FOREVER = "/gradstream.proto.v1.CoordinatorService/WatchTokens"
UNARY = "/gradstream.proto.v1.JobsService/ListJobs"
MUCH = "/gradstream.proto.v1.ParameterServerService/Pull"


class Tokens:
    """A table that a test replaces."""

    def __init__(self, table: TokenTable | None):
        self.table = table

    def refresh(self) -> None:
        pass


class Door:
    """A server that answers every call of gradstream's services with the caller's name, behind a guard."""

    def __init__(
        self, directory: Path, request_seconds: float = REQUEST_SECONDS, reading_seconds: float = READING_SECONDS
    ):
        self.directory = directory
        self.tokens = Tokens(TokenTable.parse((directory / "coordinator" / "tokens.json").read_bytes()))
        self.events: list[AuditEvent] = []
        self.later = 0.0  # seconds by which the guard's clock is ahead
        self.guard = Guard(
            self.tokens, self.events.append, lambda: time.time() + self.later, request_seconds, reading_seconds
        )
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
            if method.client_streaming:
                async for _ in request:
                    pass
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


@pytest.fixture
def other_worker(directory: Path) -> Iterator[Path]:
    """Credentials of the same role as the worker's, and another name."""
    with Authority.open(directory / "authority") as authority:
        authority.issue("worker", "neighbour", directory=directory / "neighbour")
    yield directory / "neighbour"
    shutil.rmtree(directory / "neighbour")


@pytest.mark.parametrize("owner", ["admin", "neighbour"])
async def test_a_stolen_token_is_of_no_use_without_its_certificate(
    directory: Path, other_worker: Path, door: Door, tmp_path: Path, owner: str
) -> None:
    """Also where both are of one role: a neighbour hears the token with each call."""
    mixed = tmp_path / "mixed"
    mixed.mkdir(mode=0o700)
    for name in ("ca.pem", "cert.pem", "key.pem", "token"):
        (mixed / name).write_bytes((directory / (owner if name == "token" else "worker") / name).read_bytes())
    async with open_channel(door.address, access.COORDINATOR, Transport(mixed)) as channel:
        with pytest.raises(CredentialsError, match="was issued with another certificate than the connection shows"):
            await make_call(channel, FOREVER)
    # Who showed the certificate is named, not whose token it was.
    (event,) = door.events
    assert event.caller == "worker (worker)"


async def test_a_service_that_was_revoked_is_refused_by_its_callers(directory: Path, door: Door) -> None:
    """Those who follow the table know peers by their certificates, not by the CA alone."""
    tokens, transport = FollowedTokens(), Transport(directory / "worker")
    tokens.table = door.tokens.table
    transport.know_peers(tokens.certificates)
    server = new_server(door.guard)
    call = "/gradstream.proto.v1.ParameterServerService/GetServerStatus"

    async def answer(request: bytes, context: Any) -> bytes:
        return b"answered"

    handlers = {"GetServerStatus": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(call.split("/")[1], handlers),))
    address = f"127.0.0.1:{listen(server, '127.0.0.1:0', Transport(directory / 'server'))}"
    await server.start()
    async with open_channel(address, access.SERVER, transport) as channel:
        assert await make_call(channel, call) == b"answered"
        assert tokens.table is not None
        tokens.take(revoked(tokens.table, "server"))
        with pytest.raises(UnreachableError):
            await make_call(channel, call)
    await server.stop(None)


async def test_a_refused_request_is_not_read(door: Door, directory: Path) -> None:
    """The refusal comes before the first byte of the request: a caller that is not let in makes nothing be held."""
    revoke_the_worker(door)
    async with door.channel("worker") as channel:
        call = channel.stream_unary(UNARY)()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, BOUND_SECONDS)
        assert isinstance(error_from_rpc(caught.value, "it"), CredentialsError)


async def test_a_request_that_does_not_come_is_not_waited_for(directory: Path) -> None:
    door = Door(directory, request_seconds=0.1)
    await door.server.start()
    async with door.channel("viewer") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(channel.stream_unary(UNARY)(), BOUND_SECONDS)
        assert "did not come within 0.1 s" in str(caught.value.details())
        assert await make_call(channel, UNARY) == b"viewer (viewer)"
        assert door.guard.receiving.held_bytes == 0
    await door.server.stop(None)


async def test_an_upload_that_stops_is_not_waited_for(directory: Path) -> None:
    door = Door(directory, request_seconds=0.1, reading_seconds=0.2)
    await door.server.start()
    async with door.channel("submitter") as channel:
        for messages, seconds in (([], 0.1), ([b"one"], 0.2)):
            call = channel.stream_unary("/gradstream.proto.v1.FineTuningService/UploadExamples")()
            for message in messages:
                await call.write(message)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(call, BOUND_SECONDS)
            assert f"nothing came on this stream for {seconds} s" in str(caught.value.details())
    await door.server.stop(None)


async def test_a_call_without_a_request_is_refused(door: Door) -> None:
    async def nothing() -> AsyncIterator[bytes]:
        for message in ():
            yield message

    async with door.channel("viewer") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(channel.stream_unary(UNARY)(nothing()), BOUND_SECONDS)
        assert "the call has no request" in str(caught.value.details())


async def test_requests_are_read_in_turn_within_the_bound() -> None:
    receiving = Receiving(max_bytes=30, max_bytes_a_caller=20)
    meters = [Meter(Limit(9, 9.0, 9)) for _ in range(3)]
    for _ in range(2):
        await receiving.reserve(meters[0], 10)
    # One caller cannot take it all, and who waits for himself keeps nobody else waiting.
    third = asyncio.create_task(receiving.reserve(meters[0], 10))
    await asyncio.sleep(0)
    await receiving.reserve(meters[1], 10)
    assert receiving.held_bytes == 30
    fourth = asyncio.create_task(receiving.reserve(meters[2], 10))
    await asyncio.sleep(0)
    assert not third.done()
    assert not fourth.done()
    receiving.release(meters[1], 4)
    assert not fourth.done()
    receiving.release(meters[1], 6)
    await fourth
    third.cancel()
    receiving.release(meters[0], 20)
    with pytest.raises(asyncio.CancelledError):
        await third
    receiving.release(meters[2], 10)
    assert receiving.held_bytes == 0


async def test_requests_that_wait_for_others_keep_none_out() -> None:
    """The pulls of a plan's workers are served until the version that they wait for, which others may have to pull."""
    num_waiting = 0
    receiving = Receiving(max_bytes=30, max_bytes_a_caller=20, waiting_bytes=lambda: 10 * num_waiting)
    meter = Meter(Limit(9, 9.0, 9))
    num_waiting = 100
    for _ in range(num_waiting):
        await asyncio.wait_for(receiving.reserve(meter, 20), BOUND_SECONDS)
        receiving.release(meter, 10)
    assert receiving.held_bytes == 1000
    receiving.release(meter, 1000)


async def test_refusals_are_bounded_and_told_once(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revoked person neither calls more often than others may, nor pushes older events out of the audit log."""
    monkeypatch.setattr("gradstream.core.rpc.guard.PERSON_LIMIT", Limit(calls=64, calls_per_second=0.1, burst=50))
    table = door.tokens.table
    assert table is not None
    door.tokens.table = revoked(table, "submitter")
    outcomes = Counter[str]()

    async def one(channel: grpc.aio.Channel) -> None:
        try:
            await make_call(channel, UNARY)
        except GradstreamError as error:
            outcomes[type(error).__name__] += 1

    async with door.channel("submitter") as channel:
        for _ in range(10):
            await asyncio.gather(*(one(channel) for _ in range(20)))
    assert outcomes["CredentialsError"] + outcomes["BusyError"] == 200
    assert 50 <= outcomes["CredentialsError"] < 60
    told = [event.outcome for event in door.events]
    assert any("was revoked on" in outcome for outcome in told)
    assert any("more than 0.1 calls a second" in outcome for outcome in told)
    assert len(door.events) == 2
    guard = asyncio.create_task(door.guard.run())
    await asyncio.sleep(0)
    guard.cancel()
    with pytest.raises(asyncio.CancelledError):
        await guard
    assert sum(event.times for event in door.events) == 200


async def test_a_server_without_a_table_asks_to_try_again(door: Door) -> None:
    door.tokens.table = None
    async with door.channel("viewer") as channel:
        with pytest.raises(UnreachableError, match="no table of tokens has come"):
            await make_call(channel, "/gradstream.proto.v1.JobsService/ListJobs")


def revoked(table: TokenTable, role: str) -> TokenTable:
    tokens = [dataclasses.replace(token, revoked_at=1) if token.role == role else token for token in table.tokens]
    return dataclasses.replace(table, tokens=tuple(tokens))


def revoke_the_worker(door: Door) -> None:
    table = door.tokens.table
    assert table is not None
    door.tokens.table = revoked(table, "worker")
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


async def test_a_caller_that_stops_reading_is_cut_off(directory: Path) -> None:
    """What a download holds, like one of the few places for exports, is free again after a bounded time."""
    door = Door(directory, reading_seconds=0.2)
    await door.server.start()
    async with door.channel("worker") as channel:
        stream = channel.unary_stream(MUCH)(b"")
        await stream.read()
        await asyncio.wait_for(door.ended.wait(), BOUND_SECONDS)

        async def read_on() -> None:
            while True:
                await stream.read()

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(read_on(), BOUND_SECONDS)
        assert "has not read for 0.2 s" in str(caught.value.details())
    await door.server.stop(None)


async def test_a_caller_that_reads_a_piece_now_and_then_is_cut_off(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstream.core.rpc.limits.MIN_BYTES_PER_SECOND", 1 << 30)
    door = Door(directory, reading_seconds=1.5)
    await door.server.start()
    async with door.channel("worker") as channel:
        stream = channel.unary_stream(MUCH)(b"")

        async def read_slowly() -> None:
            async for _ in stream:
                await asyncio.sleep(0.1)  # less than what one piece, or all that gRPC has at once, may take

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(read_slowly(), BOUND_SECONDS)
        assert "has read less than 128 KiB a second for long" in str(caught.value.details())
    await door.server.stop(None)


async def test_an_upload_of_a_byte_now_and_then_is_cut_off(directory: Path) -> None:
    door = Door(directory, request_seconds=0.5, reading_seconds=0.5)
    await door.server.start()

    async def bytes_now_and_then() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.3)  # less than what one message may take

    async with door.channel("submitter") as channel:
        call = channel.stream_unary("/gradstream.proto.v1.FineTuningService/UploadExamples")(bytes_now_and_then())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, BOUND_SECONDS)
        assert "less than 128 KiB a second comes on this stream for" in str(caught.value.details())
    await door.server.stop(None)


def test_patience_is_used_up_by_waiting_and_comes_back_with_bytes_and_time() -> None:
    patience, now, num_seen = Patience(60.0), 0.0, 0

    def wait(seconds: float, num_bytes: int, between: float = 0.0) -> bool:
        """Whether a wait of so long is borne."""
        nonlocal now
        now += between
        if seconds > patience.begin(now):
            return False
        now += seconds
        patience.end(now, lambda: num_bytes)
        return True

    assert all(wait(7.9, 1 << 20) for _ in range(1000)), "132 KiB/s"
    while wait(9.0, 1 << 20):  # 113 KiB/s
        num_seen += 1
    assert 30 < num_seen < 60
    assert patience.is_worn
    assert all(wait(0.9, 0) for _ in range(1000)), "short waits are nobody's fault"
    assert wait(50.0, 0, between=60.0), "who lets nobody wait for a minute has all of it again"
    assert not wait(50.0, 0)


async def test_what_is_audited_is_noted_with_its_end(door: Door) -> None:
    async with door.channel("submitter") as channel:
        await make_call(channel, "/gradstream.proto.v1.JobsService/StopJob")
        await make_call(channel, "/gradstream.proto.v1.JobsService/ListJobs")
    (event,) = door.events
    assert (event.call, event.caller, event.outcome) == ("StopJob", "submitter (submitter)", "ok")
    assert event.peer == "ipv4:127.0.0.1"


async def test_calls_on_one_connection_are_bounded(door: Door) -> None:
    async with door.channel("worker") as channel:
        streams = [channel.unary_stream(FOREVER)(b"") for _ in range(MAX_STREAMS_A_CONNECTION + 1)]
        answers = [asyncio.create_task(stream.read()) for stream in streams]
        async with asyncio.timeout(BOUND_SECONDS):
            while sum(answer.done() for answer in answers) < MAX_STREAMS_A_CONNECTION:
                await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED, timeout=0.1)
            (last,) = (answer for answer in answers if not answer.done())
            assert not (await asyncio.wait({last}, timeout=0.3))[0], "it waits at its caller"
            streams[0 if last is not answers[0] else 1].cancel()
            assert await last


async def test_one_caller_cannot_take_all(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradstream.core.rpc.guard.SERVICE_LIMIT", Limit(calls=2, calls_per_second=1000, burst=1000))
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
