"""The machine's id and cores, and its free memory (the container's, if that is less) and disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gradstream.core.machine.open_files import max_open_files
from gradstream.proto.v1 import probe_pb2

CGROUP = Path("/sys/fs/cgroup")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MAX_THREADS = 8
"""Maximum number of threads of a server. More threads would not read and write memory faster."""
READ_SECONDS = 1.0
"""Time within which a disk must answer, and for which an answer stays valid."""

DiskDirectory = Callable[[], Path | None]
"""Returns the directory in which a service writes at the moment."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Free memory and disk, in bytes.

    `free_disk_bytes` is None for a service that writes nothing, and when the disk does not answer. `max_open_files` is
    0 if the process's open files are not limited.
    """

    total_memory_bytes: int
    available_memory_bytes: int
    free_disk_bytes: int | None = None
    disk_directory: str = ""
    max_open_files: int = 0

    def to_proto(self) -> probe_pb2.Machine:
        """The message that carries this."""
        return probe_pb2.Machine(
            total_memory_bytes=self.total_memory_bytes,
            available_memory_bytes=self.available_memory_bytes,
            free_disk_bytes=self.free_disk_bytes,
            disk_directory=self.disk_directory,
            max_open_files=self.max_open_files,
        )

    @classmethod
    def from_proto(cls, message: probe_pb2.Machine) -> Machine:
        """Decode a message."""
        return cls(
            total_memory_bytes=message.total_memory_bytes,
            available_memory_bytes=message.available_memory_bytes,
            free_disk_bytes=message.free_disk_bytes if message.HasField("free_disk_bytes") else None,
            disk_directory=message.disk_directory,
            max_open_files=message.max_open_files,
        )


def machine_id(path: Path = BOOT_ID) -> str:
    """The machine's id: equal in all its processes and containers until a restart; "" if the kernel has none.

    `path` is the kernel's file with the id.
    """
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def arithmetic_threads(num_servers: int = 1) -> int:
    """Number of threads for each of `num_servers` servers that share this machine's cores, at most MAX_THREADS."""
    return max(1, min(MAX_THREADS, (os.cpu_count() or 1) // num_servers))


def read_memory(cgroup: Path = CGROUP) -> tuple[int, int]:
    """(total, available) bytes of memory that this process may use. `cgroup` is the directory with its limits."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for limit_file, used_file, stat_file, cache_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        limit, used = _number(cgroup / limit_file), _number(cgroup / used_file)
        if limit is None or used is None or limit >= total:
            continue
        # The page cache of files, which the kernel drops when memory is needed.
        used -= min(used, _stat(cgroup / stat_file, cache_key))
        return limit, max(0, min(available, limit - used))
    return total, available


def free_disk_bytes(directory: Path) -> int | None:
    """Free bytes on the disk of a directory, which need not exist yet; None when unknown. May block."""
    try:
        place = directory.absolute()
        while not place.exists() and place != place.parent:
            place = place.parent
        return shutil.disk_usage(place).free
    except OSError:
        return None


def read_machine(directory: Path | None) -> Machine:
    """Read the free memory and disk of this machine. Blocks while the directory's disk does not answer."""
    total, available = read_memory()
    free = None if directory is None else free_disk_bytes(directory)
    return Machine(total, available, free, "" if free is None else str(directory), max_open_files())


class MachineReader:
    """Reads free memory and disk without blocking the event loop.

    A disk that hangs occupies one thread, and only the answer about the disk is missing.
    """

    def __init__(self, directory: DiskDirectory, clock: Callable[[], float] = time.monotonic):
        self._directory = directory
        self._clock = clock
        self._reading: asyncio.Future[Machine] | None = None
        self._last: tuple[float, Machine] | None = None

    async def read(self) -> Machine:
        """The free memory and disk, at most `READ_SECONDS` old, within `READ_SECONDS`.

        If the disk takes longer to answer, the disk's value is its last answer.
        """
        if self._last is not None and self._clock() - self._last[0] < READ_SECONDS:
            return self._last[1]
        if self._reading is None:
            self._reading = asyncio.ensure_future(asyncio.to_thread(read_machine, self._directory()))
        reading = self._reading
        done, _ = await asyncio.wait({reading}, timeout=READ_SECONDS)
        if not done:
            return Machine(*read_memory(), max_open_files=max_open_files())
        if self._reading is reading:
            self._reading = None
        found = reading.result()
        self._last = (self._clock(), found)
        return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        # There is no such file, or it says "max".
        return None


def _stat(path: Path, key: str) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
