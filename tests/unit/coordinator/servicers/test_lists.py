"""Lists in pages and histories by filter, over real gRPC; clients of earlier releases get an answer too."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from coordinator_fakes import Cluster, report_checkpoint, step_report

from gradstream.client import AsyncClient
from gradstream.coordinator.state.history import HistoryFilter
from gradstream.proto.v1 import coordinator_pb2, jobs_pb2


async def watched(cluster: Cluster, job_id: str, **asked: Any) -> list[jobs_pb2.WatchJobResponse]:
    return [item async for item in cluster.jobs.WatchJob(jobs_pb2.WatchJobRequest(job_id=job_id, **asked))]


async def test_jobs_by_state_and_by_number(cluster: Cluster) -> None:
    jobs = [await cluster.submit() for _ in range(5)]
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=jobs[1]))
    found, token = [], ""
    for size in (2, 2, 1):
        page = await cluster.jobs.ListJobs(jobs_pb2.ListJobsRequest(page_size=2, page_token=token))
        found += [job.job_id for job in page.jobs]
        token = page.next_page_token
        assert (len(page.jobs), bool(token)) == (size, size == 2)
    assert found == jobs[::-1]
    assert len((await cluster.jobs.ListJobs(jobs_pb2.ListJobsRequest())).jobs) == 5
    async with AsyncClient(cluster.address) as client:
        assert [job.job_id for job in await client.jobs(states=["stopped"])] == [jobs[1]]
        assert [job.job_id for job in await client.jobs(states=["queued", "stopped"], limit=3)] == jobs[:1:-1]
        assert [job.job_id for job in await client.jobs(limit=5)] == jobs[::-1]


async def test_nodes_and_checkpoints_come_in_pages(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    servers, workers = await cluster.running(job_id, workers=2)
    await workers[1].die()
    for version in (2, 4):
        for step in (version - 2, version - 1):
            await cluster.stub.ReportStep(step_report(job_id, step))
        for server in servers:
            await report_checkpoint(server, version)
        await cluster.watch(job_id, lambda item, version=version: item.checkpoint.version == version)
    whole = await cluster.jobs.ListNodes(jobs_pb2.ListNodesRequest())
    assert [node.name for node in whole.nodes] == ["ps-0", "ps-1", "worker-0", "worker-1"]
    assert [node.alive for node in whole.nodes] == [True, True, True, False]
    asked, names = jobs_pb2.ListNodesRequest(page_size=3), []
    while True:
        nodes = await cluster.jobs.ListNodes(asked)
        names.append([node.name for node in nodes.nodes])
        asked.page_token = nodes.next_page_token
        if not asked.page_token:
            break
    assert names == [["ps-0", "ps-1", "worker-0"], ["worker-1"]]
    one = jobs_pb2.ListCheckpointsRequest(job_id=job_id, page_size=1)
    first = await cluster.jobs.ListCheckpoints(one)
    one.page_token = first.next_page_token
    second = await cluster.jobs.ListCheckpoints(one)
    assert ([c.version for c in first.checkpoints], first.next_page_token) == ([2], "2")
    assert ([c.version for c in second.checkpoints], second.next_page_token) == ([4], "")
    whole_list = await cluster.jobs.ListCheckpoints(jobs_pb2.ListCheckpointsRequest(job_id=job_id))
    assert list(whole_list.checkpoints) == [*first.checkpoints, *second.checkpoints]
    for call, request in (
        (cluster.jobs.ListNodes, jobs_pb2.ListNodesRequest(page_token="x/y")),
        (cluster.jobs.ListCheckpoints, jobs_pb2.ListCheckpointsRequest(page_token="x/y")),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="there is no page after 'x/y'"):
            await call(request)


async def test_a_history_by_filter(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    await cluster.running(job_id, workers=2)
    for step in range(3):
        await cluster.stub.ReportStep(step_report(job_id, step))
    found = await watched(cluster, job_id, event_kinds=["node"], nodes=["worker-1"])
    assert [item.event.message for item in found] == ["worker worker-1 is here (cpu)"]
    assert [item.step.step for item in await watched(cluster, job_id, kinds=["step"], tail=2)] == [1, 2]
    whole = await watched(cluster, job_id)
    (page,) = await watched(cluster, job_id, paged=True)
    assert list(page.items) == whole
    for wrong, reason in (
        ({"level": "warn"}, "log lines have no level 'warn'; did you mean 'warning'"),
        ({"nodes": ["x"] * 257}, "257 nodes are named, 256 at most"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match=reason):
            await watched(cluster, job_id, **wrong)
    async with AsyncClient(cluster.address) as client:
        last = [item.cursor async for item in client.watch(job_id, follow=False, kinds=["event"], tail=3)]
        assert last == [item.cursor for item in whole if item.HasField("event")][-3:]


async def test_a_watcher_wakes_only_for_what_it_wants_and_at_the_end(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    await cluster.running(job_id)
    notifier = cluster.coordinator.controller.notifier
    request = jobs_pb2.WatchJobRequest(job_id=job_id, kinds=["log"], nodes=["worker-7"], follow=True)
    call = cluster.jobs.WatchJob(request)
    reading = asyncio.create_task(anext(aiter(call)))
    async with asyncio.timeout(10):
        while job_id not in notifier._watchers:  # noqa: ASYNC110 (its arrival cannot be awaited)
            await asyncio.sleep(0.01)
    before = notifier.num_wakes
    for step in range(2):
        await cluster.stub.ReportStep(step_report(job_id, step))
    for node in ("worker-6", "worker-7"):
        line = coordinator_pb2.LogLine(text=node)
        notifier.append(job_id, [jobs_pb2.WatchJobResponse(log=jobs_pb2.NodeLogLine(node=node, line=line))])
    assert (await asyncio.wait_for(reading, 10)).log.node == "worker-7"
    assert notifier.num_wakes - before == 1
    await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id=job_id, now=True))
    assert await asyncio.wait_for(anext(aiter(call), None), 10) is None
    assert job_id not in notifier._watchers


async def test_a_watcher_is_told_of_what_changes_after_its_look_began(cluster: Cluster) -> None:
    notifier = cluster.coordinator.controller.notifier
    with notifier.watching("a-1", HistoryFilter(kinds=("step",))) as watcher:
        watcher.begin()
        notifier.changed("a-1", [jobs_pb2.WatchJobResponse(step=coordinator_pb2.ReportStepRequest())])
        await asyncio.wait_for(watcher.wait(), 10)
        watcher.begin()
        notifier.changed("a-1", [jobs_pb2.WatchJobResponse(event=jobs_pb2.Event())])
        assert not watcher._changed.is_set()
        notifier.changed("a-1")
        await asyncio.wait_for(watcher.wait(), 10)
