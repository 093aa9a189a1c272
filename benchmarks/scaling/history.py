"""Case `history`: what people read of a coordinator with one job of 100,000 steps among 500 jobs.

The database is made through the state's own interface. A real coordinator answers the calls that the commands make; the
start of a command's process, about 0.3 s of Python, is not part of a figure.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from report import Result, at_most

from gradstream.client import AsyncClient
from gradstream.coordinator.state.sqlite import SqliteState
from gradstream.coordinator.state.state import JobRecord
from gradstream.core.job_states import FINISHED
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2
from scaling.cluster import cluster, recipe_of

MEMORY = Path("/dev/shm")
ROUNDS = 5
NUM_NODES = 100
LONG = "long-1"

Read = Callable[[], Awaitable[int]]


async def measure(data: Path, directory: Path, num_steps: int, num_jobs: int) -> list[Result]:
    """Make the database, start a coordinator on it, and time each read."""
    made_seconds = make_state(data, directory, num_steps, num_jobs)
    print(f"{num_jobs} jobs, one of {num_steps} steps, made in {made_seconds:.1f} s", flush=True)
    results = []
    async with cluster(directory, 0) as running, running.client() as client:
        for name, (read, max_ms) in reads_of(client).items():
            found = await read()  # the first read of a process fills its caches
            before = running.usage("coordinator").cpu_seconds
            seconds = []
            for _ in range(ROUNDS):
                began = time.perf_counter()
                found = await read()
                seconds.append(time.perf_counter() - began)
            spent = (running.usage("coordinator").cpu_seconds - before) / ROUNDS
            said = f"{found} items; {1000 * spent:.0f} ms of the coordinator's CPU"
            results.append(at_most(f"history_{name}_ms", 1000 * min(seconds), max_ms, said))
    return results


def reads_of(client: AsyncClient) -> dict[str, tuple[Read, float]]:
    """The reads by name, each with the time in ms that it may take; each returns the number of items that it got."""

    async def status() -> int:
        await client.nodes()
        await client.warnings()
        return len(await client.jobs(states=["running"], limit=1)) + len(await client.jobs(limit=1))

    async def job() -> int:
        return (await client.job(LONG)).version

    async def ls() -> int:
        return len(await client.jobs(limit=51))

    async def ls_all() -> int:
        return len(await client.jobs())

    def watch(**wanted: object) -> Read:
        async def read() -> int:
            items = client.watch(LONG, follow=False, **wanted)  # type: ignore[arg-type]
            return sum([1 async for _ in items])

        return read

    async def metrics() -> int:
        return sum([1 async for _ in client.metrics(LONG, every=1000)])

    return {
        "status": (status, 20),
        "status_of_a_job": (job, 20),
        "ls": (ls, 20),
        "ls_all": (ls_all, 0),
        "events": (watch(kinds=["event", "checkpoint"]), 1000),
        "events_of_a_kind": (watch(kinds=["event"], event_kinds=["failure"]), 1000),
        "events_of_a_node": (watch(kinds=["event"], nodes=["worker-7"]), 1000),
        "logs": (watch(kinds=["log"]), 1000),
        "logs_of_no_node": (watch(kinds=["log"], nodes=["nobody"]), 1000),
        "logs_tail": (watch(kinds=["log"], tail=20), 1000),
        "metrics_every_1000": (metrics, 1000),
    }


def make_state(data: Path, directory: Path, num_steps: int, num_jobs: int) -> float:
    """Write the state of a coordinator into `directory`/state; return the seconds that it took.

    The state is made in memory where the machine has such a directory: it flushes each step to its disk.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as temporary:
        state = SqliteState(Path(temporary))
        recipe = recipe_of(data, directory, num_slots=1, num_steps=num_steps, num_servers=1)
        record = JobRecord(
            "",
            "short",
            recipe.model_dump_json(),
            (data / "manifest.json").read_text(),
            str(directory / "runs"),
            submitted_unix_ms=1,
            state=FINISHED,
            epoch=1,
        )
        for number in range(1, num_jobs):
            add_job(state, replace(record, job_id=f"short-{number}"), 10)
        add_job(state, replace(record, job_id=LONG, name="long"), num_steps)
        state.close()
        shutil.copytree(temporary, directory / "state")
    return time.perf_counter() - began


def add_job(state: SqliteState, record: JobRecord, num_steps: int) -> None:
    """Add a job with its steps, a line of a node every second step, and an event every 200 steps."""
    state.create_job(record, [event_item(0, "submitted", "submitted")])
    for step in range(num_steps):
        state.record_step(
            coordinator_pb2.ReportStepRequest(
                job_id=record.job_id,
                epoch=1,
                step=step,
                unix_ms=1000 * (step + 1),
                num_tokens=8,
                num_samples=1,
                loss=3.0,
                grad_norm=1.0,
                learning_rate=1e-3,
                pushed_bytes=1000,
                pulled_bytes=1000,
            )
        )
        node = f"worker-{step // 2 % NUM_NODES}"
        if step % 2 == 0:
            line = coordinator_pb2.LogLine(unix_ms=1000 * (step + 1), level="info", text=f"computed step {step}")
            state.append(record.job_id, [jobs_pb2.WatchJobResponse(log=jobs_pb2.NodeLogLine(node=node, line=line))])
        if step % 200 == 0:
            state.append(record.job_id, [event_item(step, "node", f"worker {node} is here (cpu)")])
        if step % 100 == 0:
            state.record_validation(record.job_id, jobs_pb2.Validation(version=step, loss=3.0, num_tokens=8))


def event_item(step: int, kind: str, message: str) -> jobs_pb2.WatchJobResponse:
    """An event of the time of a step."""
    return jobs_pb2.WatchJobResponse(event=jobs_pb2.Event(unix_ms=1000 * (step + 1), kind=kind, message=message))
