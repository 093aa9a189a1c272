"""`gradstream doctor` against real servers: its findings and its summary."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from canned_jobs import serving_by
from support.certificates import Authority

from gradstream.coordinator.cli import main
from gradstream.coordinator.cli.doctor import gather as _doctor_gather
from gradstream.coordinator.cli.doctor.diagnosis import diagnose
from gradstream.coordinator.cli.doctor.facts import ClusterFacts
from gradstream.coordinator.cli.doctor.gather import Targets, gather, read_credentials
from gradstream.coordinator.server import Coordinator
from gradstream.coordinator.timing import Timing
from gradstream.core.credentials.tls_diagnosis import Cause, Identity
from gradstream.core.errors import ConfigError
from gradstream.core.node import probe, session
from gradstream.core.node.session import NodeIdentity, NodeSession, SessionSettings
from gradstream.core.rpc import access
from gradstream.core.rpc import errors as rpc_errors
from gradstream.core.rpc.channel import SERVER_OPTIONS, listen, new_server, open_channel
from gradstream.proto.v1 import coordinator_pb2, coordinator_pb2_grpc, jobs_pb2, jobs_pb2_grpc

SERVER, WORKER = coordinator_pb2.NODE_KIND_PARAMETER_SERVER, coordinator_pb2.NODE_KIND_WORKER
TOKEN = "gst_c0ffee00_12345678_" + 43 * "x"


@pytest.fixture(autouse=True)
def _small_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = probe.measure_bandwidth
    monkeypatch.setattr(probe, "measure_bandwidth", lambda stub: measure(stub, num_bytes=1 << 20))
    for name in ("GRADSTREAM_COORDINATOR", "GRADSTREAM_FINE_TUNING", "GRADSTREAM_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)


@asynccontextmanager
async def probed(role: str, **options: Any) -> AsyncIterator[str]:
    """The address of a server that offers ProbeService alone."""
    server = new_server()
    probe.add_probe(server, role, **options)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def coordinator_at(directory: Path) -> AsyncIterator[str]:
    made = Coordinator("127.0.0.1:0", directory, Timing(heartbeat_seconds=0.05))
    await made.start()
    try:
        yield made.address
    finally:
        await made.stop()


async def _idle(directive: Any) -> None: ...


@asynccontextmanager
async def node_at(address: str, coordinator: str, kind: Any, name: str, disk: Path) -> AsyncIterator[None]:
    """A node that registers and sends heartbeats as real ones do, and has told of itself once."""
    identity = NodeIdentity(kind, name, address, 1 << 30, "cpu", disk_directory=lambda: disk)
    made = NodeSession(SessionSettings(coordinator), identity, coordinator_pb2.Activity, list, _idle)
    task = asyncio.create_task(made.run())
    async with open_channel(coordinator) as channel:
        stub: Any = jobs_pb2_grpc.JobsServiceStub(channel)
        for _ in range(500):
            listed = await stub.ListNodes(jobs_pb2.ListNodesRequest())
            if any(node.name == name and node.vitals.linked for node in listed.nodes):
                break
            await asyncio.sleep(0.02)
        else:
            raise AssertionError(f"{name} told nothing")
    try:
        yield
    finally:
        made.leave()
        await task


def worst(facts: ClusterFacts) -> list[tuple[str, str]]:
    return [(check.name, check.result) for check in diagnose(facts) if check.result != "ok"]


async def test_a_cluster_that_is_well(tmp_path: Path) -> None:
    """All that is told and measured arrives, of nodes both from themselves and through the coordinator."""
    async with AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(coordinator_at(tmp_path))
        server = await stack.enter_async_context(probed(access.SERVER))
        worker = await stack.enter_async_context(probed(access.WORKER, disk_directory=lambda: tmp_path))
        tuning = await stack.enter_async_context(probed(access.FINE_TUNING))
        await stack.enter_async_context(node_at(server, coordinator, SERVER, "s-0", tmp_path))
        await stack.enter_async_context(node_at(worker, coordinator, WORKER, "w-0", tmp_path))
        said: list[str] = []
        facts = await gather(Targets(coordinator, tuning), said.append)
    assert worst(facts) == []
    assert facts.coordinator is not None
    assert facts.coordinator.machine is not None
    assert facts.coordinator.machine.disk_directory == str(tmp_path)
    assert facts.fine_tuning is not None
    assert facts.fine_tuning.bandwidth is not None
    assert [node.title for node in facts.nodes] == ["server s-0", "worker w-0"]
    for node in facts.nodes:
        assert node.service is not None
        assert node.service.bandwidth is not None
        assert node.machine is not None
        assert node.machine.free_disk_bytes is not None
        assert node.link is not None
        assert 0 < node.link.seconds < 5
        assert abs(node.link.clock_ahead_seconds) < 1
    assert said[-1] == "the link to worker w-0"
    # Servers' links first.
    assert said.index("the link to server s-0") < said.index("the link to worker w-0")


@pytest.mark.parametrize(("shared", "result"), [(True, "ok"), (False, "fail")])
async def test_a_run_root_that_must_be_shared_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool, result: str
) -> None:
    if not shared:
        monkeypatch.setattr(session.shared_storage, "answer", lambda check: "does not see in /runs what it should")
    async with (
        coordinator_at(tmp_path / "state") as coordinator,
        node_at("127.0.0.1:1", coordinator, SERVER, "s-0", tmp_path),
    ):
        facts = await gather(Targets(coordinator, run_root=str(tmp_path / "runs")))
        nothing = await gather(Targets(coordinator))
    found = next(check for check in diagnose(facts) if check.name == "run_root")
    assert found.result == result
    if shared:
        assert found.message == f"{tmp_path}/runs: the coordinator and 1 parameter server see what each writes there"
    else:
        assert found.message.startswith("parameter server s-0 does not see in /runs")
        assert found.cure.startswith("let run_root be one directory")
    asked = next(check for check in diagnose(nothing) if check.name == "run_root")
    assert "--run-root DIR" in asked.message


async def test_a_node_of_another_version_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot register, so nobody would see it among the nodes; once it can, it is forgotten."""
    async with coordinator_at(tmp_path) as coordinator:
        with monkeypatch.context() as patch:
            patch.setattr(session, "__version__", "0.0.9")
            identity = NodeIdentity(WORKER, "old", "127.0.0.1:1", 1 << 30, "cpu")
            with pytest.raises(ConfigError):
                await NodeSession(SessionSettings(coordinator), identity, coordinator_pb2.Activity, list, _idle).run()
        checks = diagnose(await gather(Targets(coordinator)))
        refused = next(check for check in checks if check.name == "worker old")
        assert refused.result == "fail"
        assert "runs gradstream 0.0.9, the coordinator 0.1.0" in refused.message
        assert refused.cure == "install the same version on both"
        async with node_at("127.0.0.1:1", coordinator, WORKER, "old", tmp_path):
            facts = await gather(Targets(coordinator))
        assert facts.refused == []
        # Nothing listens where it says that it is.
        assert facts.nodes[0].service is not None
        assert facts.nodes[0].service.connection.cause is Cause.REFUSED


async def test_a_name_that_cannot_be_shown_is_not_remembered(tmp_path: Path) -> None:
    async with coordinator_at(tmp_path) as coordinator, open_channel(coordinator) as channel:
        stub: Any = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
        for name in ("\x1b[31m", "a b", "w"):
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Register(coordinator_pb2.RegisterRequest(kind=WORKER, name=name, version="0"))
        facts = await gather(Targets(coordinator))
    assert [node.title for node in facts.refused] == ["worker w"]


async def test_clock_and_version_of_a_service(tmp_path: Path) -> None:
    async with probed(access.FINE_TUNING, clock=lambda: time.time() - 90, version="0.0.1") as address:
        checks = diagnose(await gather(Targets(fine_tuning=address)))
    assert [check.result for check in checks] == ["ok", "fail", "fail"]
    assert "runs gradstream 0.0.1, this client 0.1.0" in checks[1].message
    assert "1 min 30 s behind this machine's" in checks[2].message or "1 min 29 s behind" in checks[2].message


async def test_a_service_without_probe(tmp_path: Path) -> None:
    """An older gradstream, or any other gRPC server."""
    server = new_server()
    port = listen(server, "127.0.0.1:0")
    await server.start()
    facts = await gather(Targets(f"127.0.0.1:{port}"))
    await server.stop(None)
    assert worst(facts) == [("coordinator", "fail")]
    assert "does not know ProbeService" in diagnose(facts)[0].message


async def test_nodes_that_take_too_long_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor_gather, "REACH_SECONDS", -1.0)
    async with (
        coordinator_at(tmp_path) as coordinator,
        node_at("127.0.0.1:1", coordinator, WORKER, "w-0", tmp_path),
    ):
        facts = await gather(Targets(coordinator))
    assert facts.num_not_called == 1
    assert facts.nodes[0].service is None
    assert any("1 of them were not called" in check.message for check in diagnose(facts))


# ---- Credentials -----------------------------------------------------------------------------------------------------


def write_credentials(directory: Path, identity: Identity, token: str = TOKEN) -> Path:
    directory.mkdir()
    for name, content in (("ca.pem", identity.ca), ("cert.pem", identity.cert), ("key.pem", identity.key)):
        (directory / name).write_bytes(content)
    if token:
        (directory / "token").write_text(f"{token}\n")
    return directory


class Door(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets in who has the token; else refuses as gradstream's guard does."""

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(details)
        if ("authorization", f"Bearer {TOKEN}") in (details.invocation_metadata or ()):
            return handler

        async def refuse(request: Any, context: Any) -> None:
            context.set_trailing_metadata(((rpc_errors.ERROR_CLASS_KEY, "CredentialsError"),))
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "token 12345678 was revoked; ask for a new one")

        return grpc.unary_unary_rpc_method_handler(
            refuse,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


@asynccontextmanager
async def secure_service(identity: Identity) -> AsyncIterator[str]:
    server = grpc.aio.server(interceptors=[Door()], options=SERVER_OPTIONS)
    probe.add_probe(server, access.FINE_TUNING)
    credentials = grpc.ssl_server_credentials([(identity.key, identity.cert)], identity.ca, True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_with_credentials(tmp_path: Path) -> None:
    authority = Authority()
    good = write_credentials(tmp_path / "good", authority.issue("viewer", "ann"))
    revoked = write_credentials(tmp_path / "revoked", authority.issue("viewer", "ann"), TOKEN[:-1] + "y")
    stranger = write_credentials(tmp_path / "stranger", Authority("bad0bad0").issue("viewer", "eve"))
    async with secure_service(authority.issue("fine-tuning", "t", not_after=9)) as address:
        well = await gather(Targets(fine_tuning=address, credentials=good))
        refused = await gather(Targets(fine_tuning=address, credentials=revoked))
        other = await gather(Targets(fine_tuning=address, credentials=stranger))
        clear = await gather(Targets(fine_tuning=address))
    assert [(check.name, check.result) for check in diagnose(well)] == [
        ("credentials", "ok"),
        ("fine-tuning", "ok"),
        ("fine-tuning", "warn"),
    ]
    assert "the certificate of fine-tuning 't' of cluster c0ffee00 is valid until" in diagnose(well)[2].message
    found = diagnose(refused)[-1]
    assert (found.result, found.message, found.cure) == (
        "fail",
        f"{address} refuses: token 12345678 was revoked",
        "ask for a new one",
    )
    assert worst(other) == [("credentials", "fail")]
    assert clear.fine_tuning is not None
    assert clear.fine_tuning.connection.cause is Cause.PEER_WANTS_TLS


def test_credentials_that_cannot_be_used(tmp_path: Path) -> None:
    authority = Authority()
    identity = authority.issue("viewer", "ann")
    missing, none = read_credentials(tmp_path / "nowhere", time.time())
    assert none is None
    assert missing.problem is not None
    assert missing.problem.text == "ca.pem cannot be read (No such file or directory)"
    expired, none = read_credentials(
        write_credentials(tmp_path / "expired", authority.issue("viewer", "ann", -9, -2)), time.time()
    )
    assert none is None
    assert expired.problem is not None
    assert expired.problem.cause is Cause.OWN_EXPIRED
    no_token, usable = read_credentials(write_credentials(tmp_path / "no-token", identity, ""), time.time())
    assert (no_token.has_token, usable) == (False, identity)
    bad_token, _ = read_credentials(write_credentials(tmp_path / "bad-token", identity, "hello"), time.time())
    assert bad_token.token_cluster == ""


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def http_port() -> Iterator[int]:
    """A web server's."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_command(http_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A good service and a bad one: each its line, exit code 1, and the same as JSON."""
    with serving_by(lambda server: probe.add_probe(server, access.FINE_TUNING)) as tuning:
        arguments = ["doctor", "-c", f"127.0.0.1:{http_port}", "--fine-tuning", tuning]
        assert main([*arguments, "-o", "json"]) == 1
        document = json.loads(capsys.readouterr().out)
        assert main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert document["ok"] is False
    assert len(lines) == len(document["checks"])
    coordinator = next(check for check in document["checks"] if check["name"] == "coordinator")
    assert coordinator == {
        "name": "coordinator",
        "result": "fail",
        "message": f"what listens on 127.0.0.1:{http_port} is not gradstream: it speaks HTTP/1",
        "cure": "check the port; the coordinator's is 7000 unless --listen says otherwise",
    }
    assert f"fail coordinator           {coordinator['message']}; {coordinator['cure']}" in lines
    assert any(line.startswith(f"ok   fine-tuning           {tuning} answers: gradstream ") for line in lines)


def test_the_command_with_credentials_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-c", "127.0.0.1:1", "--credentials", str(tmp_path / "nowhere")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"fail credentials           {tmp_path}/nowhere: ca.pem cannot be read")
