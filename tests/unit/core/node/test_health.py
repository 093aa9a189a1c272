"""Health checks of a real service."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from gradstream.core.errors import ProtocolError, UnreachableError
from gradstream.core.node.health import ask, main


@pytest.fixture
def server() -> Iterator[tuple[grpc.Server, str]]:
    made = grpc.server(ThreadPoolExecutor(2))
    port = made.add_insecure_port("127.0.0.1:0")
    yield made, f"127.0.0.1:{port}"
    made.stop(None).wait()


def test_it_says_what_the_service_says(server: tuple[grpc.Server, str]) -> None:
    made, address = server
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, made)
    made.start()
    for status, answer, code in (("SERVING", "SERVING", 0), ("NOT_SERVING", "NOT_SERVING", 1)):
        servicer.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
        assert ask(address, "worker") == answer
        assert main([address, "worker"]) == code


def test_nobody_there_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    begin = time.monotonic()
    with pytest.raises(UnreachableError, match="does not answer"):
        ask(address, "worker")
    assert main([address, "worker"]) == 1
    assert time.monotonic() - begin < 4
    assert capsys.readouterr().out.count("\n") == 1


def test_a_service_without_health_is_named(server: tuple[grpc.Server, str]) -> None:
    made, address = server
    made.start()
    with pytest.raises(ProtocolError, match="knows nothing of health"):
        ask(address, "worker")


def test_it_imports_little() -> None:
    """Every container runs it every few seconds."""
    code = "import sys, gradstream.core.node.health; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"numpy", "pydantic", "rich", "torch", "typer"}.isdisjoint(found)
