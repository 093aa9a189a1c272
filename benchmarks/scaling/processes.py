"""Case `processes`: a machine's parameter server as one process and as two, with 8 and 64 workers.

The servers are those of one command, `gradstream serve parameter-server --processes N`. A step is every worker's
contribution and its pull, both in bf16. The simulated workers are one process on the same machine, so the figures
compare numbers of processes and are no server's best.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from itertools import pairwise
from pathlib import Path

from report import Result, at_most, fail, result

from gradstream.client import Job, Step
from scaling.cluster import MODEL, ScaleCluster, cluster, recipe_of
from scaling.workers import SimulatedWorkers

NUM_STEPS = 6
MAX_SECONDS = 240.0
PROCESSES = (1, 2)
SERVER = "server"
MEMORY = "4GiB"
LARGER_MODEL = {
    **MODEL,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
"""8.6 M parameters, for which a step is bytes rather than messages."""


async def measure(data: Path, directory: Path, worker_counts: tuple[int, ...], smoke: bool = False) -> list[Result]:
    """Measure each number of processes with each number of workers."""
    model = dict(MODEL) if smoke else LARGER_MODEL
    results = []
    for num_workers in worker_counts:
        speeds = {}
        for num_processes in PROCESSES:
            own = directory / f"{num_workers}-{num_processes}"
            speeds[num_processes], detail, mib = await _measure(data, own, num_workers, num_processes, model)
            print(f"{num_workers} workers, {num_processes} processes: {detail}", flush=True)
            name = f"{num_workers}_workers_{num_processes}"
            results.append(result(f"processes_gb_per_second_{name}", speeds[num_processes], 0.0, detail))
            results.append(at_most(f"processes_mib_{name}", mib, 0.0, "resident, of all processes of the command"))
        ratio = speeds[2] / speeds[1]
        results.append(result(f"processes_2_over_1_{num_workers}_workers", ratio, 0.0, "GB/s"))
    return results


async def _measure(
    data: Path, directory: Path, num_workers: int, num_processes: int, model: dict[str, object]
) -> tuple[float, str, float]:
    """Return the GB/s of pushes and pulls together, what was seen, and the MiB of all processes of the command."""
    times: list[float] = []
    async with cluster(directory, 0) as running, SimulatedWorkers(running.address, running.transport) as workers:
        await running.start_server_processes(SERVER, num_processes, MEMORY)
        await workers.start(num_workers)
        recipe = recipe_of(
            data,
            directory,
            num_workers,
            NUM_STEPS,
            1,
            model={"config": model},
            cluster={"fragment_bytes": 1 << 20, "min_servers": num_processes, "min_workers": num_workers},
        )
        async with running.client() as client:
            before = _usage(running)
            began = time.time()
            job = await client.submit(recipe)
            async with asyncio.timeout(MAX_SECONDS):
                async for item in client.watch(job.job_id):
                    if isinstance(item, Step):
                        times.append(item.time.timestamp())
                    elif isinstance(item, Job) and item.state.ended:
                        break
            job = await client.job(job.job_id)
            after = _usage(running)
        if workers.failures:
            raise workers.failures[0]
        num_parameters = workers.contributions[0].plan.num_parameters
    if len(times) < NUM_STEPS:
        fail("scale", f"{len(times)} of {NUM_STEPS} steps; the job is {job.state} ({job.reason or 'no reason'})")
    step_seconds = statistics.median(end - begin for begin, end in pairwise(times))
    speed = 2 * 2 * num_parameters * num_workers / step_seconds / 1e9  # bf16 there and back
    detail = (
        f"{speed:.2f} GB/s, {step_seconds:.3f} s a step, {num_parameters / 1e6:.1f} M parameters; first step after "
        f"{times[0] - began:.1f} s; {after[0] - before[0]:.1f} CPU s of the servers; {after[1] >> 20} MiB"
    )
    return speed, detail, after[1] / 2**20


def _usage(running: ScaleCluster) -> tuple[float, int]:
    """Processor time in seconds and resident bytes of the command and its processes."""
    usages = running.usages(SERVER)
    return sum(each.cpu_seconds for each in usages), sum(each.resident_bytes for each in usages)
