"""A real cluster for tests: separate OS processes started with `gradstream serve`, on free loopback ports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from gradstream.client import Client, FineTuningClient, Job
from gradstream.core.credentials.tokens import ROLES
from gradstream.proto.v1.parameter_server_pb2 import GetServerStatusRequest
from gradstream.proto.v1.parameter_server_pb2_grpc import ParameterServerServiceStub
from support.credentials import make_credentials
from support.forked import Forked

START_SECONDS = 180.0
ENVIRONMENT = {"GRADSTREAM_DEBUG": "1"}


class Cluster:
    """Starts, kills and counts the processes of one cluster. All files are under `directory`."""

    def __init__(self, directory: Path, secure: bool = False):
        self.directory = directory
        self.credentials = directory / "credentials" if secure else None
        """A directory with credentials for each role and the authority; None without TLS."""
        if self.credentials is not None:
            make_credentials(self.credentials, ROLES)
        self.processes: dict[str, subprocess.Popen[bytes] | Forked] = {}
        self.address = "127.0.0.1:0"
        self.fine_tuning_address = "127.0.0.1:0"
        self._client: Client | None = None
        self._fine_tuning_client: FineTuningClient | None = None

    @property
    def client(self) -> Client:
        """Make a client of the running coordinator."""
        if self._client is None:
            self._client = Client(self.address, credentials=self.credentials and self.credentials / "admin")
        return self._client

    @property
    def fine_tuning_client(self) -> FineTuningClient:
        """Make a client of the running fine-tuning service."""
        if self._fine_tuning_client is None:
            credentials = self.credentials and self.credentials / "admin"
            self._fine_tuning_client = FineTuningClient(self.fine_tuning_address, credentials=credentials)
        return self._fine_tuning_client

    # -- starting --------------------------------------------------------------------------------------------------

    def start_coordinator(self, *timing: str) -> None:
        """Start the coordinator. A second start uses the port and state of the first one.

        `timing` are its settings of times, such as "lease_seconds=2".
        """
        times = [argument for setting in timing for argument in ("--timing", setting)]
        ready = self._launch(
            "coordinator", ["coordinator", "--listen", self.address, "--state", str(self.directory / "state"), *times]
        )
        self.address = self._await_ready("coordinator", ready)

    def start_servers(self, *names: str, faults: str = "", memory: str = "2GiB") -> None:
        """Start parameter servers and wait until they listen. `faults` is GRADSTREAM_FAULTS for them."""
        arguments = ["--coordinator", self.address, "--listen", "127.0.0.1:0", "--memory", memory]
        environment = {"GRADSTREAM_FAULTS": faults} if faults else {}
        ready = {
            name: self._launch(name, ["parameter-server", "--name", name, *arguments], environment) for name in names
        }
        for name, path in ready.items():
            self._await_ready(name, path)

    def start_server_behind(self, name: str, coordinator: str, listen: str, advertise: str) -> None:
        """Start a parameter server behind other addresses: `coordinator` is the coordinator's, `advertise` its own."""
        arguments = ["--coordinator", coordinator, "--listen", listen, "--advertise", advertise, "--memory", "2GiB"]
        self._await_ready(name, self._launch(name, ["parameter-server", "--name", name, *arguments]))

    def start_server_processes(self, name: str, count: int, memory: str = "2GiB") -> list[str]:
        """Start one command that runs `count` parameter servers; return their addresses once all listen."""
        arguments = ["--coordinator", self.address, "--listen", "127.0.0.1:0", "--memory", memory]
        ready = self._ready_file(name)
        command = [sys.executable, "-m", "gradstream.coordinator.cli", "serve", "parameter-server", "--name", name]
        options = ["--processes", str(count), "--ready-file", str(ready), "--die-with-parent", str(os.getpid())]
        with open(self.directory / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [*command, *options, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
                cwd=self.directory,
            )
        return self._await_ready(name, ready).splitlines()

    def start_workers(self, *names: str, faults: str = "", memory: str = "2GiB", coordinator: str = "") -> None:
        """Start workers and wait until they are up.

        `faults` is GRADSTREAM_FAULTS for them. `coordinator` is the address at which they reach the coordinator, if
        that is not its own.
        """
        arguments = [
            "--coordinator",
            coordinator or self.address,
            "--cache",
            str(self.directory / "cache"),
            "--memory",
            memory,
        ]
        environment = {"GRADSTREAM_FAULTS": faults} if faults else {}
        ready = {
            name: self._launch(name, ["worker", "--name", name, "--device", "cpu", *arguments], environment)
            for name in names
        }
        for name, path in ready.items():
            self._await_ready(name, path)

    def start_fine_tuning(self, memory: str = "1GiB") -> None:
        """Start the fine-tuning service. A second start uses the port and state of the first one."""
        arguments = ["--coordinator", self.address, "--listen", self.fine_tuning_address, "--memory", memory]
        state = ["--state", str(self.directory / "fine-tuning"), "--device", "cpu"]
        ready = self._launch("fine-tuning", ["fine-tuning", *arguments, *state])
        self.fine_tuning_address = self._await_ready("fine-tuning", ready)

    def _launch(self, name: str, arguments: list[str], environment: dict[str, str] | None = None) -> Path:
        ready = self._ready_file(name)
        serve = ["serve", *arguments, "--ready-file", str(ready)]
        if self.credentials is not None:
            serve += ["--credentials", str(self.credentials / arguments[0].removeprefix("parameter-"))]
        log = self.directory / f"{name}.log"
        self.processes[name] = Forked(serve, log, self.directory, {**ENVIRONMENT, **(environment or {})})
        return ready

    def _ready_file(self, name: str) -> Path:
        path = self.directory / f"{name}.ready"
        path.unlink(missing_ok=True)
        return path

    def _await_ready(self, name: str, path: Path) -> str:
        wait_until(
            lambda: path.exists() or self.processes[name].poll() is not None,
            f"{name} to start",
            START_SECONDS,
        )
        assert path.exists(), f"{name} ended with {self.processes[name].poll()}:\n{self.log(name)}"
        return path.read_text().strip()

    # -- ending ----------------------------------------------------------------------------------------------------

    def kill(self, *names: str) -> None:
        """Send SIGKILL to all these processes, then wait for them."""
        for name in names:
            self.processes[name].kill()
        for name in names:
            self.processes.pop(name).wait(30)

    def terminate(self, *names: str) -> None:
        """Send SIGTERM to processes and wait until they have ended."""
        for name in names:
            self.processes[name].send_signal(signal.SIGTERM)
        for name in names:
            process = self.processes.pop(name)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"{name} did not end on SIGTERM:\n{self.log(name)}") from None

    def wait_dead(self, name: str, timeout_seconds: float = 120.0) -> int:
        """Wait until a process has ended by itself, by an injected fault; return its exit status."""
        return self.processes.pop(name).wait(timeout_seconds)

    def close(self) -> None:
        """End every process."""
        for client in (self._client, self._fine_tuning_client):
            if client is not None:
                client.close()
        self._client = self._fine_tuning_client = None
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait(30)
        self.processes.clear()

    # -- watching --------------------------------------------------------------------------------------------------

    def log(self, name: str) -> str:
        """The end of a process's log."""
        path = self.directory / f"{name}.log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else ""

    def wait_job(self, job_id: str, timeout_seconds: float = 120.0) -> Job:
        """Wait until a job has ended."""
        return self.wait_for(job_id, lambda job: job.state in ("finished", "failed", "stopped"), "end", timeout_seconds)

    def wait_for(self, job_id: str, condition: Callable[[Job], bool], what: str, timeout_seconds: float = 120.0) -> Job:
        """Wait until a job's status meets a condition. Fails with all logs when it does not in time."""
        last: list[Job] = []

        def met() -> bool:
            last[:] = [self.client.job(job_id)]
            return condition(last[0])

        try:
            wait_until(met, f"{job_id} to {what}", timeout_seconds)
        except AssertionError as error:
            logs = "\n".join(f"--- {path.stem}\n{self.log(path.stem)}" for path in sorted(self.directory.glob("*.log")))
            raise AssertionError(f"{error}; last seen: {last}\n{logs}") from None
        return last[0]

    def finish(self, job_id: str, timeout_seconds: float = 120.0) -> Job:
        """Wait until a job has finished. Any other end fails the test with the reason and the logs."""
        job = self.wait_job(job_id, timeout_seconds)
        if job.state != "finished":
            logs = "\n".join(f"--- {path.stem}\n{self.log(path.stem)}" for path in sorted(self.directory.glob("*.log")))
            raise AssertionError(f"{job_id} {job.state}: {job.reason}\n{logs}")
        return job

    def server_version(self, name: str, job_id: str) -> int:
        """Ask a parameter server itself for the version that it holds of a job."""
        address = (self.directory / f"{name}.ready").read_text().strip()
        with grpc.insecure_channel(address) as channel:
            stub = ParameterServerServiceStub(channel)
            return stub.GetServerStatus(GetServerStatusRequest(job_id=job_id), timeout=10).version

    def final_digest(self, job_id: str) -> str:
        """The sha256 over weights and optimizer state of a job's last checkpoint."""
        return self.client.checkpoints(job_id)[-1].state_sha256


def wait_until(condition: Callable[[], bool], what: str, timeout_seconds: float) -> None:
    """Check a condition every 20 ms until it holds. Raises AssertionError when it does not hold in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_seconds:.0f} s for {what}"
        time.sleep(0.02)


@contextmanager
def running(directory: Path, secure: bool = False) -> Iterator[Cluster]:
    """Yield a cluster, with or without credentials, and end all its processes afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(directory, secure)
    try:
        yield cluster
    finally:
        cluster.close()
