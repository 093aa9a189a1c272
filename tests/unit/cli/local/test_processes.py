"""Several processes behind one command: they end together, whichever is killed, and one that dies is named."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from gradstream.coordinator.cli.serve import server_processes
from gradstream.core.errors import ConfigError
from gradstream.core.machine.facts import arithmetic_threads

FAKE = Path(__file__).with_name("fake_gradstream.py")
PROGRAM = """
import asyncio, json, sys
from pathlib import Path
from gradstream.coordinator.cli.local.processes import Child, run_children
from gradstream.core.errors import GradstreamError
names, fake, ready = json.loads(sys.argv[1])
children = [Child(name, [role, "--name", name]) for name, role in names]
try:
    asyncio.run(run_children(children, Path(ready), (sys.executable, fake)))
except GradstreamError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"waited 30 s for {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Command:
    """A process that runs three children."""

    def __init__(self, directory: Path, roles: tuple[str, str, str], **environment: str):
        self.ready = directory / "ready"
        names = [(f"ps-{index}", role) for index, role in enumerate(roles)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps([names, str(FAKE), str(self.ready)])],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.children: list[int] = []

    def up(self) -> Command:
        """Wait until all children are."""
        until(lambda: self.ready.exists() or self.process.poll() is not None, "the ready file")
        assert self.process.poll() is None, self.process.communicate()[1]
        self.children = [child.pid for child in psutil.Process(self.process.pid).children()]
        assert len(self.children) == 3
        return self

    def ended(self) -> tuple[int, str]:
        """Exit code and stderr, once it and all children are gone."""
        _, errors = self.process.communicate(timeout=30)
        until(lambda: not any(map(alive, self.children)), "the children to end")
        return self.process.returncode, errors


@contextmanager
def command(directory: Path, *roles: str, **environment: str) -> Iterator[Command]:
    first, second, third = roles or ("a", "b", "c")
    made = Command(directory, (first, second, third), **environment)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        # The kernel has killed the children with it; nothing is left to end here, or a test above has failed.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all(tmp_path: Path, number: signal.Signals) -> None:
    with command(tmp_path) as running:
        running.up()
        assert running.ready.read_text().split() == ["ps-0", "ps-1", "ps-2"]
        running.process.send_signal(number)
        code, _ = running.ended()
        assert code == 0
        assert list(tmp_path.iterdir()) == []


def test_a_second_signal_kills_what_does_not_listen(tmp_path: Path) -> None:
    with command(tmp_path, "a", "deaf", "c", FAKE_STUBBORN="deaf") as running:
        running.up()
        running.process.send_signal(signal.SIGTERM)
        until(lambda: sum(map(alive, running.children)) == 1, "the other two to end")
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGTERM)
        assert running.ended()[0] == 0


def test_one_that_is_killed_takes_the_others_along_and_is_named(tmp_path: Path) -> None:
    with command(tmp_path) as running:
        victim = next(pid for pid in running.up().children if "ps-1" in psutil.Process(pid).cmdline())
        os.kill(victim, signal.SIGKILL)
        code, errors = running.ended()
        assert code == 1
        [line] = [line for line in errors.splitlines() if line.startswith("error:")]
        assert line.startswith(f"error: ps-1 (process {victim}) ended with signal SIGKILL, so the other 2")
        assert list(tmp_path.iterdir()) == []


def test_one_that_cannot_start_is_named(tmp_path: Path) -> None:
    with command(tmp_path, "a", "b", "bad", FAKE_BROKEN="bad") as running:
        _, errors = running.process.communicate(timeout=30)
        assert running.process.returncode == 1
        assert "error: no memory left\n" in errors
        assert "error: ps-2 (process" in errors
        assert "ended with exit code 1" in errors
        assert list(tmp_path.iterdir()) == []


def test_no_orphans_when_the_command_is_killed(tmp_path: Path) -> None:
    with command(tmp_path) as running:
        running.up()
        running.process.kill()
        assert running.ended()[0] == -signal.SIGKILL


def test_what_the_servers_are_given() -> None:
    first, second = server_processes("c:7000", "ps", "10.0.0.2:7100", 1001, 3, 2, ["--log-level", "info"])
    assert (first.name, second.name) == ("ps-0", "ps-1")
    assert second.arguments == [
        *["parameter-server", "--coordinator", "c:7000", "--name", "ps-1", "--listen", "10.0.0.2:7101"],
        *["--memory", "500", "--threads", "3", "--log-level", "info"],
    ]
    any_port = server_processes("c:7000", "ps", "[::1]:0", 1000, None, 4, [])
    assert {child.arguments[child.arguments.index("--listen") + 1] for child in any_port} == {"[::1]:0"}
    threads = {int(child.arguments[child.arguments.index("--threads") + 1]) for child in any_port}
    assert threads == {arithmetic_threads(4)}
    with pytest.raises(ConfigError, match="need ports up to 65536"):
        server_processes("c:7000", "ps", "h:65535", 1000, None, 2, [])


def test_a_taken_port_is_told_by_the_server_that_wanted_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["--processes", "2", "--listen", f"127.0.0.1:{port - 1}", "--name", "ps", "-c", "127.0.0.1:1"]
        result = subprocess.run(
            [sys.executable, "-m", "gradstream.coordinator.cli", "serve", "parameter-server", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert result.returncode == 1
    assert "the port is in use" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ps-")
