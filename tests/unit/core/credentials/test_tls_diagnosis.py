"""Failing connections, each provoked for real: every kind is recognized, with cause and remedy in one line."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest
from support.certificates import Authority

from gradstream.core.credentials import tls_diagnosis
from gradstream.core.credentials.tls_diagnosis import Cause, Diagnosis, Identity, diagnose_connection
from gradstream.core.node import probe
from gradstream.core.rpc import access, channel

DAY_SECONDS = 86_400


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def person(authority: Authority) -> Identity:
    return authority.issue("viewer", "ann")


@asynccontextmanager
async def grpc_server(identity: Identity | None, trusted: bytes = b"") -> AsyncIterator[int]:
    """A gRPC server's port: in the clear without an identity, else one that wants certificates of the CA `trusted`."""
    server = channel.new_server()
    probe.add_probe(server, access.COORDINATOR)
    if identity is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        secure = grpc.ssl_server_credentials([(identity.key, identity.cert)], trusted or identity.ca, True)
        port = server.add_secure_port("127.0.0.1:0", secure)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of a server that does `answer` to each connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    ended = threading.Event()

    def serve() -> None:
        open_ones = []
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            open_ones.append(connection)
            try:
                answer(connection)
            except OSError:
                pass
        for connection in open_ones:
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        ended.set()
        thread.join()
        listener.close()


async def look(port: int, identity: Identity | None = None, **options: object) -> Diagnosis:
    found = await asyncio.to_thread(
        lambda: diagnose_connection("127.0.0.1", port, identity, "coordinator", **options)  # type: ignore[arg-type]
    )
    assert "\n" not in found.one_line
    assert found.ok or found.cure
    return found


# ---- The way there ---------------------------------------------------------------------------------------------------


async def test_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        found = await look(port)
    assert found.cause is Cause.REFUSED
    assert found.text == f"nothing listens on port {port} of 127.0.0.1"


def test_unknown_host() -> None:
    found = diagnose_connection("no-such-host.invalid", 7000)
    assert found.cause is Cause.HOST_UNKNOWN
    assert "'no-such-host.invalid' is unknown here" in found.text


def test_a_name_server_that_is_silent_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1) or [])
    began = time.monotonic()
    assert diagnose_connection("somewhere", 7000, timeout_seconds=0.2).cause is Cause.HOST_UNKNOWN
    assert time.monotonic() - began < 1


def test_a_dropped_connection_times_out() -> None:
    """A listener whose queue is full drops what comes, as a firewall does."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        where = listener.getsockname()
        waiting = []
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(where)
            waiting.append(one)
        began = time.monotonic()
        found = diagnose_connection(where[0], where[1], timeout_seconds=0.3)
        for one in waiting:
            one.close()
    assert found.cause is Cause.TIMED_OUT
    assert "no firewall drops port" in found.cure
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("host", "port"), [("", 7000), ("x", 0), ("x", 65536)])
def test_bad_address(host: str, port: int) -> None:
    assert diagnose_connection(host, port).cause is Cause.BAD_ADDRESS


# ---- Something else --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(
    ("answer", "cause", "says"),
    [
        (lambda c: c.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), Cause.FOREIGN, "it speaks HTTP/1"),
        (lambda c: c.sendall(b"<!DOCTYPE HTML>\n<html>"), Cause.FOREIGN, "it speaks HTTP/1"),
        (lambda c: c.sendall(b"SSH-2.0-OpenSSH_9.6\r\n"), Cause.FOREIGN, "it speaks SSH"),
        (lambda c: c.sendall(b"\xff" * 40), Cause.FOREIGN, "in a protocol that is not gRPC"),
        (lambda c: c.close(), Cause.SILENT, "it closes connections at once"),
        (lambda c: None, Cause.SILENT, "it accepts connections and says nothing"),
    ],
)
async def test_something_else_listens(
    answer: Callable[[socket.socket], None],
    cause: Cause,
    says: str,
    secure: bool,
    person: Identity,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tls_diagnosis, "ANSWER_SECONDS", 0.2)
    with raw_server(answer) as port:
        found = await look(port, person if secure else None, timeout_seconds=0.3)
    assert (found.cause, says in found.text) == (cause, True), found


async def test_tls_that_is_not_grpc(authority: Authority, person: Identity, tmp_path: Path) -> None:
    """An HTTPS server with a good certificate of ours."""
    identity = authority.issue("coordinator", "c")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path = tmp_path / "both.pem"
    path.write_bytes(identity.key + identity.cert)
    context.load_cert_chain(path)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        found = await look(server.sockets[0].getsockname()[1], person)
    assert found.cause is Cause.FOREIGN
    assert "HTTP/1" in found.text


# ---- gradstream ------------------------------------------------------------------------------------------------------


async def test_good_in_the_clear() -> None:
    async with grpc_server(None) as port:
        assert (await look(port)).ok


async def test_good_with_credentials(authority: Authority, person: Identity) -> None:
    async with grpc_server(authority.issue("coordinator", "c-0")) as port:
        found = await look(port, person)
    assert found.ok, found
    assert found.certificate is not None
    assert found.certificate.title == "coordinator 'c-0' of cluster c0ffee00"
    assert found.certificate.not_after == pytest.approx(time.time() + 365 * DAY_SECONDS, abs=100)


async def test_credentials_for_a_peer_in_the_clear(person: Identity) -> None:
    async with grpc_server(None) as port:
        found = await look(port, person)
    assert found.cause is Cause.PEER_IN_CLEAR
    assert "speaks in the clear" in found.text


async def test_no_credentials_for_a_peer_with_tls(authority: Authority) -> None:
    async with grpc_server(authority.issue("coordinator", "c-0")) as port:
        found = await look(port)
    assert found.cause is Cause.PEER_WANTS_TLS
    assert "gradstream login" in found.cure
    assert found.certificate is not None


async def test_wrong_ca(person: Identity) -> None:
    other = Authority("bad0bad0")
    async with grpc_server(other.issue("coordinator", "c-0")) as port:
        found = await look(port, person)
    assert found.cause is Cause.WRONG_CA
    assert "signed by the CA of bad0bad0; our ca.pem is the CA of c0ffee00" in found.text


async def test_a_renewed_ca_of_the_same_cluster(person: Identity) -> None:
    async with grpc_server(Authority().issue("coordinator", "c-0")) as port:
        found = await look(port, person)
    assert found.cause is Cause.WRONG_CA
    assert "another CA than our ca.pem, which has the same name" in found.text


async def test_the_peers_certificate_has_expired(authority: Authority, person: Identity) -> None:
    async with grpc_server(authority.issue("coordinator", "c-0", -10, -2)) as port:
        found = await look(port, person)
    assert found.cause is Cause.PEER_EXPIRED
    assert "coordinator 'c-0' of cluster c0ffee00, which expired on" in found.text


async def test_the_peers_certificate_is_not_valid_yet(authority: Authority, person: Identity) -> None:
    async with grpc_server(authority.issue("coordinator", "c-0", 2, 20)) as port:
        found = await look(port, person)
    assert found.cause is Cause.NOT_YET_VALID
    assert "clock" in found.cure


async def test_a_worker_where_the_coordinator_should_be(authority: Authority, person: Identity) -> None:
    async with grpc_server(authority.issue("worker", "w-1")) as port:
        found = await look(port, person)
    assert found.cause is Cause.WRONG_ROLE
    assert "the certificate of worker 'w-1' of cluster c0ffee00, not that of a coordinator" in found.text


@pytest.mark.parametrize("name", ["stranger", "none"])
async def test_our_certificate_is_refused(name: str, authority: Authority, person: Identity) -> None:
    """We trust it, it does not trust us."""
    stranger = replace(Authority("bad0bad0").issue("viewer", "eve"), ca=authority.ca)
    async with grpc_server(authority.issue("coordinator", "c-0")) as port:
        found = await look(port, stranger if name == "stranger" else Identity(authority.ca))
    assert found.cause is Cause.OWN_REFUSED, found
    assert "refuses our certificate" in found.text


async def test_our_certificates(authority: Authority, person: Identity) -> None:
    async with grpc_server(authority.issue("coordinator", "c-0")) as port:
        expired = await look(port, authority.issue("viewer", "ann", -10, -1))
        early = await look(port, authority.issue("viewer", "ann", 1, 10))
        no_key = await look(port, replace(person, key=b"x"))
        others_key = await look(port, replace(person, key=authority.issue("viewer", "bob").key))
        no_ca = await look(port, replace(person, ca=b"x"))
        later = await look(port, person, now=time.time() + 400 * DAY_SECONDS)
    assert [found.cause for found in (expired, early, no_key, others_key, no_ca, later)] == [
        Cause.OWN_EXPIRED,
        Cause.NOT_YET_VALID,
        Cause.OWN_CREDENTIALS,
        Cause.OWN_CREDENTIALS,
        Cause.OWN_CREDENTIALS,
        Cause.OWN_EXPIRED,
    ]
    assert "our certificate (cert.pem) expired on" in expired.text
