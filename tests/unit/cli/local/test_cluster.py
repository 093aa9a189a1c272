"""The local cluster of `gradstream dev`: no process outlives it, dead ones restart, a failed start is explained."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gradstream.coordinator.cli.local import cluster as _cluster
from gradstream.coordinator.cli.local.cluster import ClusterError, LocalCluster

FAKE = Path(__file__).with_name("fake_gradstream.py")


def make(directory: Path, news: list[str]) -> LocalCluster:
    return LocalCluster(directory, 1, 2, 1 << 30, news.append, command=(sys.executable, str(FAKE)))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def gone(pids: list[int]) -> bool:
    """Whether all processes end within 10 s. Polled: they are nobody's children here."""
    for _ in range(1000):
        if not any(alive(pid) for pid in pids):
            return True
        await asyncio.sleep(0.01)
    return False


async def test_starts_and_stops(tmp_path: Path) -> None:
    async with make(tmp_path / "dev", []) as cluster:
        assert cluster.address == "127.0.0.1:4711"
        assert sorted(cluster.pids) == ["coordinator", "server-0", "worker-0", "worker-1"]
        pids = list(cluster.pids.values())
        assert all(psutil.pid_exists(pid) for pid in pids)
        cluster.move_logs(tmp_path / "run" / "logs")
        assert cluster.last_lines("worker-1") == ["worker starts"]
    assert await gone(pids)
    assert sorted(path.name for path in (tmp_path / "run" / "logs").iterdir()) == [
        "coordinator.log",
        "server-0.log",
        "worker-0.log",
        "worker-1.log",
    ]


async def test_stubborn_process_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STUBBORN", "worker")
    monkeypatch.setattr(_cluster, "STOP_SECONDS", 0.1)
    async with make(tmp_path, []) as cluster:
        pids = list(cluster.pids.values())
    assert await gone(pids)


async def test_failed_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_BROKEN", "parameter-server")
    news: list[str] = []
    cluster = make(tmp_path, news)
    with pytest.raises(ClusterError, match=r"server-0 ended with exit code 1: error: no memory left .*server-0\.log"):
        async with cluster:
            pass
    assert "server-0 | error: no memory left" in news
    assert await gone(list(cluster.pids.values()))


async def test_dead_process_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cluster, "RESTART_PAUSE_SECONDS", 0)
    news: list[str] = []
    async with make(tmp_path, news) as cluster:
        ready = tmp_path / "worker-0.ready"
        old = cluster.pids["worker-0"]
        os.kill(old, signal.SIGKILL)
        async with asyncio.timeout(10):
            while cluster.pids["worker-0"] == old or not ready.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert news == ["worker-0 died with signal SIGKILL; starting it again"]
        assert not cluster.failed.done()


async def test_process_that_keeps_dying_fails_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cluster, "RESTART_PAUSE_SECONDS", 0)
    monkeypatch.setattr(_cluster, "MAX_RESTARTS", 1)
    async with make(tmp_path, []) as cluster:
        monkeypatch.setenv("FAKE_BROKEN", "worker")
        os.kill(cluster.pids["worker-0"], signal.SIGKILL)
        with pytest.raises(ClusterError, match="worker-0 died 2 times, last with exit code 1: error: no memory left"):
            await asyncio.wait_for(cluster.failed, 10)


async def test_nothing_outlives_a_killed_parent(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from pathlib import Path
from gradstream.coordinator.cli.local.cluster import LocalCluster
async def run():
    directory, command = Path({str(tmp_path)!r}), (sys.executable, {str(FAKE)!r})
    async with LocalCluster(directory, 1, 1, 1, print, command=command) as cluster:
        print(*cluster.pids.values(), flush=True)
        await asyncio.Event().wait()
asyncio.run(run())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=subprocess.PIPE)
    assert process.stdout is not None
    pids = [int(pid) for pid in (await process.stdout.readline()).split()]
    assert len(pids) == 3
    process.kill()
    await process.wait()
    assert await gone(pids)
