"""`gradstream serve` in processes that start with torch and transformers imported.

Each process of a cluster would spend seconds of a core on its imports. multiprocessing's fork server imports once and
forks the others. They are separate processes and run the command's own entry point. The tests of `serve --processes`,
of `dev` and of bad input run the command as a user starts it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest

_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(["support.preloaded"])


def _start_fork_server() -> None:
    # Python 3.11's fork server does not get the path of its parent process, and does not report failing imports.
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        forkserver.ensure_running()


class Forked:
    """A process with the part of subprocess.Popen's interface that a cluster needs."""

    def __init__(self, arguments: Sequence[str], log: Path, directory: Path, environment: Mapping[str, str]):
        _start_fork_server()
        # When the tests are interrupted, a daemon is ended and not waited for.
        self._process = _FORKS.Process(
            target=_run, args=(list(arguments), log, directory, dict(environment)), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The process id."""
        pid = self._process.pid
        assert pid is not None
        return pid

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout_seconds: float) -> int:
        """Wait for the end of the process; return its exit status as `poll` does. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout_seconds)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout_seconds)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def _run(arguments: list[str], log: Path, directory: Path, environment: dict[str, str]) -> None:
    os.chdir(directory)
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(output, standard)
    sys.argv = ["gradstream", *arguments, "--die-with-parent", str(os.getppid())]
    from gradstream.coordinator.cli import main

    sys.exit(main())
