"""A cluster on this machine for `gradstream dev`, with a process for each role, as on real machines.

No process outlives this one: they are stopped at the end of the context manager, and the kernel kills them when this
process is killed. A process that dies while the job runs is restarted, so a person can kill one to see the recovery.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from gradstream.coordinator.cli.local.processes import COMMAND, ending
from gradstream.core.credentials.authority import Authority
from gradstream.core.credentials.store import store_for
from gradstream.core.errors import GradstreamError
from gradstream.core.machine.facts import arithmetic_threads
from gradstream.core.rpc.access import ADMIN, COORDINATOR, FINE_TUNING, SERVER, WORKER

READY_TIMEOUT_SECONDS = 120.0
STOP_SECONDS = 10.0
RESTART_PAUSE_SECONDS = 1.0
MAX_RESTARTS = 5
_POLL_SECONDS = 0.05
THROW_AWAY_DAYS = 30
"""Validity of the credentials of a local cluster; no local cluster is expected to run longer."""
ROLES = (COORDINATOR, SERVER, WORKER, FINE_TUNING, ADMIN)


class ClusterError(GradstreamError):
    """A process of the local cluster did not come up or keeps dying."""


@dataclass
class _Member:
    name: str
    arguments: list[str]
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0


class LocalCluster:
    """Starts the processes and restarts those that die. `failed` gets a ClusterError when one keeps dying.

    `directory` takes state, caches and, unless `logs` is given, the logs until `move_logs`. With `fine_tuning` there is
    a fine-tuning service too, with its state in `directory / "fine-tuning"`. `command` is the command to which
    `serve …` arguments are added.
    """

    def __init__(
        self,
        directory: Path,
        num_servers: int,
        num_workers: int,
        memory_bytes: int,
        on_news: Callable[[str], None],
        command: Sequence[str] = COMMAND,
        fine_tuning: bool = False,
        logs: Path | None = None,
    ):
        self.directory = directory
        self.logs = logs or directory / "logs"
        self.address = ""
        self.fine_tuning_address = ""
        self.credentials = directory / "credentials" / ADMIN
        """The credentials for people's commands."""
        self._stored: list[Path] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._num_servers = num_servers
        self._num_workers = num_workers
        self._memory_bytes = memory_bytes
        self._fine_tuning = fine_tuning
        self._command = list(command)
        self.on_news = on_news
        self._members: list[_Member] = []
        self._watchers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> LocalCluster:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def pids(self) -> dict[str, int]:
        """The process id of each process, by name."""
        return {member.name: member.process.pid for member in self._members if member.process is not None}

    async def _start(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(make_credentials, self.directory / "credentials", ROLES)
        # 1. The coordinator, on a free port.
        coordinator = _Member(
            "coordinator",
            [
                "coordinator",
                "--listen",
                "127.0.0.1:0",
                "--state",
                str(self.directory / "state"),
                *self._credentials_of(COORDINATOR),
            ],
        )
        self._members.append(coordinator)
        await self._spawn(coordinator)
        self.address = await self._ready(coordinator)
        # A restarted coordinator must have the same address.
        coordinator.arguments[2] = self.address
        # 2. Servers and workers, all at once.
        common = ["--coordinator", self.address, "--memory", str(self._memory_bytes)]
        # More threads would compete for the cores, and the bundles for which workers wait would not be ready sooner.
        threads = ["--threads", str(arithmetic_threads(self._num_servers))]
        for index in range(self._num_servers):
            name = f"server-{index}"
            self._members.append(
                _Member(name, ["parameter-server", "--name", name, *threads, *common, *self._credentials_of(SERVER)])
            )
        for index in range(self._num_workers):
            name = f"worker-{index}"
            cache = ["--cache", str(self.directory / "cache" / name)]
            self._members.append(
                _Member(name, ["worker", "--name", name, *cache, *common, *self._credentials_of(WORKER)])
            )
        if self._fine_tuning:
            place = ["--listen", "127.0.0.1:0", "--state", str(self.directory / "fine-tuning")]
            self._members.append(
                _Member("fine-tuning", ["fine-tuning", *place, *common, *self._credentials_of(FINE_TUNING)])
            )
        for member in self._members[1:]:
            await self._spawn(member)
        addresses = [await self._ready(member) for member in self._members[1:]]
        if self._fine_tuning:
            # A restarted service must have the same address.
            self.fine_tuning_address = self._members[-1].arguments[2] = addresses[-1]
        self._store(self.address)
        if self._fine_tuning:
            self._store(self.fine_tuning_address)
        # 3. From here on, processes that die are restarted.
        self._watchers = [asyncio.create_task(self._watch(member)) for member in self._members]

    async def stop(self) -> None:
        """End every process: SIGTERM, then SIGKILL after 10 s. Workers and servers first, the coordinator last."""
        for link in self._stored:
            link.unlink(missing_ok=True)
        self._stored = []
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        self._watchers = []
        for group in (self._members[1:], self._members[:1]):
            await asyncio.gather(*(self._end(member) for member in group))

    def move_logs(self, directory: Path) -> None:
        """Move the logs to `directory`. The processes keep writing to the moved files."""
        directory.mkdir(parents=True, exist_ok=True)
        for log in self.logs.iterdir():
            os.replace(log, directory / log.name)
        self.logs.rmdir()
        self.logs = directory

    def last_lines(self, name: str, count: int = 8) -> list[str]:
        """The last lines that process `name` logged."""
        try:
            with (self.logs / f"{name}.log").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 16_384))
                text = log.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-count:]

    async def _spawn(self, member: _Member) -> None:
        ready = self._ready_file(member)
        ready.unlink(missing_ok=True)
        options = ["--ready-file", str(ready), "--die-with-parent", str(os.getpid())]
        with (self.logs / f"{member.name}.log").open("ab") as log:
            member.process = await asyncio.create_subprocess_exec(
                *self._command,
                "serve",
                *member.arguments,
                *options,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Only this process gets Ctrl-C on the terminal; it then decides about the others.
                start_new_session=True,
            )

    def _credentials_of(self, role: str) -> list[str]:
        return ["--credentials", str(self.directory / "credentials" / role)]

    def _store(self, address: str) -> None:
        """Store a link to the credentials for commands on this machine, until the cluster ends."""
        link = store_for(address)
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_symlink():  # left by a cluster that was killed
                link.unlink()
            link.symlink_to(self.credentials.absolute())
        except OSError as error:
            self.on_news(f"other terminals need GRADSTREAM_CREDENTIALS={self.credentials} ({error.strerror}: {link})")
        else:
            self._stored.append(link)

    def _ready_file(self, member: _Member) -> Path:
        return self.directory / f"{member.name}.ready"

    async def _ready(self, member: _Member) -> str:
        """Wait until the process has written its ready file; return the line in it."""
        ready = self._ready_file(member)
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        assert member.process is not None
        while True:
            if ready.exists():
                return ready.read_text(encoding="utf-8").strip()
            if member.process.returncode is not None:
                raise self._error(member, f"{member.name} ended with {ending(member.process.returncode)}")
            if time.monotonic() > deadline:
                raise self._error(member, f"{member.name} did not come up within {READY_TIMEOUT_SECONDS:.0f} s")
            await asyncio.sleep(_POLL_SECONDS)

    def _error(self, member: _Member, what: str) -> ClusterError:
        lines = self.last_lines(member.name)
        for line in lines:
            self.on_news(f"{member.name} | {line}")
        last = f": {lines[-1].strip()}" if lines else ""
        return ClusterError(f"{what}{last} (log: {self.logs / member.name}.log)")

    async def _watch(self, member: _Member) -> None:
        while True:
            assert member.process is not None
            code = await member.process.wait()
            member.restarts += 1
            if member.restarts > MAX_RESTARTS:
                if not self.failed.done():
                    self.failed.set_exception(
                        self._error(member, f"{member.name} died {member.restarts} times, last with {ending(code)}")
                    )
                return
            self.on_news(f"{member.name} died with {ending(code)}; starting it again")
            await asyncio.sleep(RESTART_PAUSE_SECONDS)
            await self._spawn(member)

    async def _end(self, member: _Member) -> None:
        process = member.process
        if process is None:
            return
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                pass
        # Also kill processes that this one started.
        _signal_group(process.pid, signal.SIGKILL)
        await process.wait()


def make_credentials(directory: Path, roles: Iterable[str]) -> None:
    """Create an authority and the credentials of each role, in `directory / role`."""
    with Authority.init(directory / "authority", directory / COORDINATOR / "tokens.json") as authority:
        for role in roles:
            authority.issue(role, role, THROW_AWAY_DAYS, directory / role)


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        pass
