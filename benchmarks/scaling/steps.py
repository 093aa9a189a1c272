"""Case `steps`: do the steps of one job complete, with 100 to 1,000 workers behind one address?"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from report import Result, at_most, fail, result

from gradstream.client import Job, Step
from gradstream.core.machine.open_files import max_open_files, shortage
from scaling.cluster import cluster, recipe_of

NUM_STEPS = 6


def max_seconds(num_workers: int, num_servers: int) -> float:
    """Time for all steps, from the submission on.

    On two cores a server's first plan costs 3 to 4 s, because it imports torch and a child process draws its weights;
    a worker's contribution to a server and its pull cost 2 ms. The limit is about three times that.
    """
    return 60 + 10 * num_servers + 0.006 * NUM_STEPS * num_workers * num_servers


async def measure(
    data: Path,
    directory: Path,
    num_workers: int,
    num_servers: int,
    memory: str,
    secure: bool = False,
    num_hosts: int = 0,
    timing: Sequence[str] = (),
) -> list[Result]:
    """Run one job with a slot for each worker; return the share of its steps that completed, and its figures."""
    max_servers = -(-num_servers // (num_hosts or num_servers))
    peers = f"{num_workers} workers with a connection to each of its {max_servers} servers"
    if short := shortage(max_open_files(), num_workers * max_servers, peers):
        fail("scale", f"a process of servers {short}, or take more --hosts")
    times: list[float] = []
    async with cluster(directory, num_servers, memory, secure, num_hosts, timing) as running:
        began = time.monotonic()
        num_processes = await running.start_workers(num_workers, num_servers)
        registered_seconds = time.monotonic() - began
        before, server_before = running.usage("coordinator"), running.usage("server-00")
        async with running.client() as client:
            limits = {"min_workers": num_workers}
            job = await client.submit(recipe_of(data, directory, num_workers, NUM_STEPS, num_servers, cluster=limits))
            try:
                async with asyncio.timeout(max_seconds(num_workers, num_servers)):
                    async for item in client.watch(job.job_id):
                        if isinstance(item, Step):
                            times.append(item.time.timestamp())
                        elif isinstance(item, Job) and item.state.ended:
                            break
            except TimeoutError:
                pass
            job = await client.job(job.job_id)
        if failures := running.worker_failures():
            fail("scale", f"a process of workers has ended: {failures[0]}")
        if not times:
            fail(
                "scale", f"{num_workers} workers, {num_servers} servers: no step; the job is {job.state} ({job.reason})"
            )
        after = running.usage("coordinator")
        server = running.usage("server-00")
    seconds = [end - begin for begin, end in pairwise(times)]
    median = statistics.median(seconds) if seconds else 0.0
    shared = f" in {num_hosts} processes" if num_hosts else ""
    a_server = f"one process with {num_servers / num_hosts:g} servers" if num_hosts else "one server"
    detail = (
        f"{len(times)} of {NUM_STEPS} steps, {num_servers} servers{shared}, workers in {num_processes}; all "
        f"registered in {registered_seconds:.1f} s; {median:.2f} s a step; "
        f"the job is {job.state} ({job.reason or 'no reason'})"
    )
    print(f"{num_workers} workers: {detail}", flush=True)
    results = [result(f"steps_{num_workers:04d}", len(times) / NUM_STEPS, 1.0, detail)]
    if seconds:
        server_seconds = server.cpu_seconds - server_before.cpu_seconds
        cost = f"{after.cpu_seconds - before.cpu_seconds:.1f} CPU s of the coordinator; {a_server} {server_seconds:.1f}"
        results.append(at_most(f"step_seconds_{num_workers:04d}", median, 0.0, cost))
    grown = server.resident_bytes - server_before.resident_bytes
    memory_detail = (
        f"of the coordinator; {a_server} {server.resident_bytes / 2**20:.0f}, {grown / 2**20:.0f} by the job"
    )
    results.append(at_most(f"mib_{num_workers:04d}", after.resident_bytes / 2**20, 0.0, memory_detail))
    return results
