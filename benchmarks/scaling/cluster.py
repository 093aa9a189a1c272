"""The real processes of bench-scale: a coordinator and parameter servers, started with `gradstream serve`.

The coordinator can be killed and started again with the same state and address.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from step import await_file, process

from gradstream.client import AsyncClient
from gradstream.coordinator.data.prepare import prepare
from gradstream.coordinator.server import TOKENS_NAME
from gradstream.core.credentials.authority import Authority
from gradstream.core.machine.open_files import RESERVED_FILES, max_open_files
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import PrepareConfig, Recipe
from gradstream.core.rpc.access import ADMIN, COORDINATOR, SERVER, WORKER
from gradstream.core.rpc.transport import Transport

REGISTER_SECONDS = 300.0
"""Time for all simulated workers to register."""
VOCAB_SIZE = 320
MODEL: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODEL_BYTES = 28_672
"""About the model's bytes in fp32."""


def prepare_data(directory: Path) -> Path:
    """Prepare a small data set of the standard library's text; return its directory."""
    data = directory / "data"
    options = PrepareConfig(
        sources=["stdlib:"], vocab_size=VOCAB_SIZE, num_shards=8, max_bytes=200_000, validation_fraction=0.0
    )
    prepare(options, str(data))
    return data


def recipe_of(data: Path, directory: Path, num_slots: int, num_steps: int, num_servers: int, **sections: Any) -> Recipe:
    """The recipe of a tiny job with `num_slots` slots of one sample each. `sections` replace keys of sections.

    Its fragments are so small that each server has a few.
    """
    tree: dict[str, Any] = {
        "name": "scale",
        "seed": 1,
        "run_root": str(directory / "runs"),
        "model": {"config": dict(MODEL)},
        "training": {
            "num_steps": num_steps,
            "num_slots": num_slots,
            "global_batch": num_slots,
            "microbatch": 1,
            "sequence_length": 8,
        },
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"kind": "constant", "warmup_steps": 1},
        "codec": {"push": "bf16", "pull": "bf16"},
        "data": {"path": str(data)},
        "validation": {"interval_steps": 0},
        "checkpoint": {"interval_steps": 0},
        "cluster": {"fragment_bytes": max(256, MODEL_BYTES // num_servers), "min_servers": num_servers},
    }
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
    return parse_recipe(tree)


@dataclass(frozen=True)
class Usage:
    """A process's processor time in seconds, and its resident memory in bytes now."""

    cpu_seconds: float
    resident_bytes: int


class ScaleCluster:
    """A coordinator and servers. Each is a process that ends with the block of `cluster`."""

    def __init__(self, directory: Path, stack: ExitStack, secure: bool = False, timing: Sequence[str] = ()):
        self.directory = directory
        self._timing = [word for setting in timing for word in ("--timing", setting)]
        self.address = "127.0.0.1:0"
        self._credentials = directory / "credentials" if secure else None
        if self._credentials is not None:
            with Authority.init(directory / "authority", self._credentials / COORDINATOR / TOKENS_NAME) as authority:
                for role in (COORDINATOR, SERVER, WORKER, ADMIN):
                    authority.issue(role, role, directory=self._credentials / role)
        self._stack = stack
        self._processes: dict[str, psutil.Process] = {}
        self._coordinator = ExitStack()
        stack.push(self._coordinator)

    async def start_coordinator(self) -> None:
        """Start the coordinator; a second start has the state and address of the first one."""
        state = ["--listen", self.address, "--state", str(self.directory / "state"), *self._timing]
        ready = self._serve(self._coordinator, "coordinator", "coordinator", *state)
        self.address = await asyncio.to_thread(await_file, ready)

    def kill_coordinator(self) -> None:
        """Kill the coordinator and wait for its end."""
        self._coordinator.close()

    async def start_servers(self, count: int, memory: str) -> None:
        """Start parameter servers that offer `memory` each, a few at a time; return when all listen."""
        for begin in range(0, count, 4):
            waiting = []
            for number in range(begin, min(count, begin + 4)):
                name = f"server-{number:02d}"
                common = ["--coordinator", self.address, "--listen", "127.0.0.1:0", "--memory", memory]
                options = ["--name", name, "--threads", "1", *common]
                waiting.append(self._serve(self._stack, name, "parameter-server", *options))
            for ready in waiting:
                await asyncio.to_thread(await_file, ready)

    async def start_hosted_servers(self, count: int, memory: str, num_hosts: int) -> None:
        """Start parameter servers in `num_hosts` processes (scaling.host); return when all listen."""
        names = [f"server-{number:02d}" for number in range(count)]
        waiting = []
        for host in range(num_hosts):
            held = names[host::num_hosts]
            command = [sys.executable, "-m", "scaling.host", *held, "--coordinator", self.address, "--memory", memory]
            command += ["--directory", str(self.directory)]
            if self._credentials is not None:
                command += ["--credentials", str(self._credentials / SERVER)]
            path = {"PYTHONPATH": str(Path(__file__).parents[1])}
            started = self._stack.enter_context(process(command, path, log=self.directory / f"{held[0]}.log"))
            self._processes |= dict.fromkeys(held, psutil.Process(started.pid))
            waiting += [self.directory / f"{name}.ready" for name in held]
        for ready in waiting:
            await asyncio.to_thread(await_file, ready)

    async def start_server_processes(self, name: str, count: int, memory: str) -> None:
        """Start the servers of one command, `--processes count`, which divide `memory`; return when all listen."""
        common = ["--coordinator", self.address, "--listen", "127.0.0.1:0", "--memory", memory]
        ready = self._serve(self._stack, name, "parameter-server", "--name", name, "--processes", str(count), *common)
        await asyncio.to_thread(await_file, ready)

    async def start_workers(self, count: int, num_servers: int) -> int:
        """Start simulated workers in processes of their own (scaling.worker_host); return how many processes.

        Each process has as many workers as its descriptors allow. Return when all workers have registered.
        """
        files = max_open_files()
        most = (files - RESERVED_FILES) // (num_servers + 1) if files else count
        num_processes = -(-count // max(1, most))
        bounds = [number * count // num_processes for number in range(num_processes + 1)]
        waiting = []
        for first, end in pairwise(bounds):
            ready = self.directory / f"workers-{first:04d}.ready"
            command = [sys.executable, "-m", "scaling.worker_host", "--coordinator", self.address]
            command += ["--first", str(first), "--count", str(end - first), "--ready-file", str(ready)]
            if self._credentials is not None:
                command += ["--credentials", str(self._credentials / WORKER)]
            log = ready.with_suffix(".log")
            started = self._stack.enter_context(
                process(command, {"PYTHONPATH": str(Path(__file__).parents[1])}, log=log)
            )
            self._processes[f"workers-{first:04d}"] = psutil.Process(started.pid)
            waiting.append(ready)
        for ready in waiting:
            await asyncio.to_thread(await_file, ready, REGISTER_SECONDS)
        return num_processes

    def worker_failures(self) -> list[str]:
        """The last log line of each process of workers that has ended."""
        names = [name for name, found in self._processes.items() if name.startswith("workers-")]
        ended = [name for name in names if not _runs(self._processes[name])]
        return [(self.directory / f"{name}.log").read_text().strip().rpartition("\n")[2] for name in ended]

    def usage(self, name: str) -> Usage:
        """What a process has used: "coordinator", "server-00" and so on."""
        return _usage(self._processes[name])

    def usages(self, name: str) -> list[Usage]:
        """What a process and the processes below it have used."""
        found = self._processes[name]
        return [_usage(each) for each in (found, *found.children(recursive=True))]

    def client(self) -> AsyncClient:
        """A client of the coordinator."""
        return AsyncClient(self.address, credentials=self._credentials and self._credentials / ADMIN)

    @property
    def transport(self) -> Transport:
        """The transport of all simulated workers, which share one credential."""
        return Transport(self._credentials and self._credentials / WORKER)

    def _serve(self, stack: ExitStack, name: str, role: str, *options: str) -> Path:
        ready = self.directory / f"{name}.ready"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "gradstream.coordinator.cli", "serve", role, *options]
        command += ["--ready-file", str(ready)]
        if self._credentials is not None:
            command += ["--credentials", str(self._credentials / role.removeprefix("parameter-"))]
        started = stack.enter_context(process(command, {}, log=self.directory / f"{name}.log"))
        self._processes[name] = psutil.Process(started.pid)
        return ready


def _runs(found: psutil.Process) -> bool:
    return found.is_running() and found.status() != psutil.STATUS_ZOMBIE


def _usage(found: psutil.Process) -> Usage:
    times = found.cpu_times()
    return Usage(times.user + times.system, int(found.memory_info().rss))


@asynccontextmanager
async def cluster(
    directory: Path,
    num_servers: int,
    memory: str = "2GiB",
    secure: bool = False,
    num_hosts: int = 0,
    timing: Sequence[str] = (),
) -> AsyncIterator[ScaleCluster]:
    """Run a coordinator and servers for the block, `secure` with credentials.

    With `num_hosts` the servers share that many processes; otherwise each has its own. `timing` are settings of the
    coordinator's `--timing`.

    `directory` gets their logs and, unless it has one, their state.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        running = ScaleCluster(directory, stack, secure, timing)
        await running.start_coordinator()
        if num_hosts:
            await running.start_hosted_servers(num_servers, memory, num_hosts)
        else:
            await running.start_servers(num_servers, memory)
        yield running
