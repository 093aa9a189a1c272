"""The HTTP endpoint of a role: over TCP and over TLS, by callers with and without rights, and by broken callers."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from support.credentials import make_credentials

from gradstream.core.credentials.authority import Authority
from gradstream.core.credentials.tokens import PEOPLE_ROLES, ROLES, TokenTable
from gradstream.core.errors import ConfigError
from gradstream.core.metrics.address import MetricsAddress
from gradstream.core.metrics.definition import Metric, Reading
from gradstream.core.metrics.endpoint import MAX_CONNECTIONS, MetricsEndpoint
from gradstream.core.rpc.guard import Guard
from gradstream.core.rpc.refusals import AuditEvent
from gradstream.core.rpc.token_sources import FollowedTokens
from gradstream.core.rpc.transport import PLAIN, Transport

LOSS = Metric("gradstream_loss", "gauge", "Loss.", ("worker",))
ANYWHERE = MetricsAddress("127.0.0.1", 0)
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


async def readings() -> list[Reading]:
    return [Reading(LOSS, 2.5)]


@contextlib.asynccontextmanager
async def serving(made: MetricsEndpoint) -> AsyncIterator[MetricsEndpoint]:
    await made.start()
    try:
        yield made
    finally:
        await made.close()


async def ask(address: str, request: bytes = GET, tls: ssl.SSLContext | None = None) -> tuple[int, str]:
    """Send bytes; return the status and the body of the answer, 0 and nothing when the connection ends without one."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=tls, server_hostname="" if tls else None)
    answer = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body.decode()


async def test_the_metrics_are_served() -> None:
    page = {"/targets": lambda: (b"[]", "application/json")}
    async with serving(MetricsEndpoint(ANYWHERE, PLAIN, None, readings, page)) as served:
        status, body = await ask(served.address)
        assert (status, "gradstream_loss 2.5\n" in body) == (200, True)
        assert await ask(served.address, b"HEAD /metrics HTTP/1.1\r\n\r\n") == (200, "")
        assert await ask(served.address, b"GET /targets?x=1 HTTP/1.0\r\n\r\n") == (200, "[]")
        assert await ask(served.address, b"GET / HTTP/1.1\r\n\r\n") == (
            404,
            "nothing is here; there is /metrics, /targets\n",
        )
        assert (await ask(served.address, b"POST /metrics HTTP/1.1\r\n\r\n"))[0] == 405


async def test_what_is_no_request_is_answered_and_ends() -> None:
    async with serving(MetricsEndpoint(ANYWHERE, PLAIN, None, readings)) as served:
        for request in (b"\r\n\r\n", b"GET /metrics\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n"):
            status, body = await ask(served.address, request)
            assert (status, body.startswith("this is no request of HTTP/1.1")) == (400, True)
        # A head without an end is not held: the connection closes.
        assert await ask(served.address, b"x" * (1 << 20)) == (0, "")
        assert (await ask(served.address))[0] == 200


async def test_readings_that_fail_are_an_error_of_this_scrape(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail() -> list[Reading]:
        raise KeyError("no such thing")

    async with serving(MetricsEndpoint(ANYWHERE, PLAIN, None, fail)) as served:
        assert (await ask(served.address))[0] == 500
    assert "the metrics cannot be read" in "".join(capsys.readouterr())


async def test_connections_are_bounded_in_number_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradstream.core.metrics.endpoint.CALL_SECONDS", 1.0)
    async with serving(MetricsEndpoint(ANYWHERE, PLAIN, None, readings)) as served:
        host, _, port = served.address.rpartition(":")
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_CONNECTIONS)]
        # The endpoint has accepted all of them before the next one, which is closed without an answer.
        assert await ask(served.address) == (0, "")
        for reader, writer in silent:
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()
        assert (await ask(served.address))[0] == 200


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"metrics on 127.0.0.1:{port}: the port is in use; .*--metrics off"):
            MetricsAddress("127.0.0.1", port).bind()
    with pytest.raises(ConfigError, match=r"cannot serve metrics on 192.0.2.1:0: "):
        MetricsAddress("192.0.2.1", 0).bind()


def test_without_a_port_the_first_free_one_is_taken() -> None:
    with MetricsAddress("127.0.0.1").bind() as first, MetricsAddress("127.0.0.1").bind() as second:
        ports = [bound.getsockname()[1] for bound in (first, second)]
    assert ports[0] != ports[1]
    assert all(port >= 9464 for port in ports)


# ---- With credentials ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("credentials")
    make_credentials(made, ROLES)
    return made


Secure = Callable[[], MetricsEndpoint]


@pytest.fixture
def events() -> list[AuditEvent]:
    return []


@pytest.fixture
def directory(issued: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(issued, tmp_path / "credentials"))


@pytest.fixture
def tokens(directory: Path) -> FollowedTokens:
    followed = FollowedTokens()
    followed.take(TokenTable.parse((directory / "coordinator" / "tokens.json").read_bytes()))
    return followed


@pytest.fixture
def secure(directory: Path, tokens: FollowedTokens, events: list[AuditEvent]) -> Secure:
    def make() -> MetricsEndpoint:
        return MetricsEndpoint(ANYWHERE, Transport(directory / "worker"), Guard(tokens, events.append), readings)

    return make


def client_tls(directory: Path, role: str = "") -> ssl.SSLContext:
    """The TLS settings of a caller with a role's certificate, or with none."""
    context = ssl.create_default_context(cafile=str(directory / "viewer" / "ca.pem"))
    context.check_hostname = False
    if role:
        context.load_cert_chain(directory / role / "cert.pem", directory / role / "key.pem")
    return context


def get_with(directory: Path, role: str) -> bytes:
    token = (directory / role / "token").read_text().strip()
    return f"GET /metrics HTTP/1.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()


@pytest.mark.parametrize("role", ROLES)
async def test_people_may_read_the_metrics(secure: Secure, directory: Path, role: str) -> None:
    async with serving(secure()) as served:
        status, body = await ask(served.address, get_with(directory, role), client_tls(directory, role))
        if role in PEOPLE_ROLES or role == "fine-tuning":
            assert (status, "gradstream_loss 2.5\n" in body) == (200, True)
        else:
            assert (status, body) == (
                403,
                f"metrics is for viewers and above, and these credentials are of a {role}; ask an admin for others\n",
            )


async def test_a_token_counts_only_with_its_certificate(
    secure: Secure, directory: Path, events: list[AuditEvent]
) -> None:
    async with serving(secure()) as served:
        viewer = client_tls(directory, "viewer")
        status, body = await ask(served.address, get_with(directory, "admin"), viewer)
        assert (status, "was issued with another certificate" in body) == (401, True)
        status, body = await ask(served.address, GET, viewer)
        assert (status, "no token" in body) == (401, True)
        assert await ask(served.address, get_with(directory, "viewer"), client_tls(directory)) == (0, "")
        assert await ask(served.address) == (0, "")  # in the clear
    assert {(event.call, event.caller, event.peer) for event in events} == {
        ("metrics", "viewer (viewer)", "ipv4:127.0.0.1")
    }


async def test_a_renewed_certificate_is_shown_from_the_next_scrape_on(
    secure: Secure, directory: Path, tokens: FollowedTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstream.core.rpc.transport.LOOK_SECONDS", 0.0)

    async def shown() -> bytes:
        _, writer = await asyncio.open_connection(host, port, ssl=client_tls(directory, "viewer"))
        found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return bytes(found)

    async with serving(secure()) as served:
        host, port = served.address.split(":")[0], int(served.address.split(":")[1])
        before = await shown()
        with Authority.open(directory / "authority") as authority:
            authority.renew(directory / "worker")
        after = await shown()
        assert before != after == await shown()
