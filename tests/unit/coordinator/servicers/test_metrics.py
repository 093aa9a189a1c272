"""GetMetrics and WatchJob for a job that nodes have reported on."""

from __future__ import annotations

import grpc.aio
import pytest
from coordinator_fakes import Cluster, report_validation, step_report

from gradstream.proto.v1 import jobs_pb2


async def rows(cluster: Cluster, job_id: str, **asked: int) -> list[jobs_pb2.StepMetrics]:
    request = jobs_pb2.GetMetricsRequest(job_id=job_id, **asked)
    return [row async for page in cluster.jobs.GetMetrics(request) for row in page.rows]


async def test_metrics_of_a_job_by_its_id_its_name_and_as_the_newest(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    _, (worker,) = await cluster.running(job_id)
    assert await rows(cluster, job_id) == []
    await report_validation(worker, job_id, 0)
    for step in range(2):
        await cluster.stub.ReportStep(step_report(job_id, step, learning_rate=0.25, pulled_bytes=300))
    found = await rows(cluster, job_id)
    assert [(row.step, row.loss, row.num_tokens, row.pulled_bytes) for row in found] == [
        (0, 2.0, 32, 300),
        (1, 2.0, 64, 300),
    ]
    assert (found[0].validation_loss, found[1].step_seconds) == (33 / 16, 1.0)
    assert await rows(cluster, "") == await rows(cluster, "tiny") == found
    assert await rows(cluster, "tiny", first_step=1) == found[1:]
    assert (await cluster.jobs.GetJob(jobs_pb2.GetJobRequest(job_id="tiny"))).job.job_id == job_id
    with pytest.raises(grpc.aio.AioRpcError, match="there is no job 'tony'; did you mean 'tiny-1'"):
        await rows(cluster, "tony")
    # Orders take ids alone: which of several jobs a name means must not be guessed.
    with pytest.raises(grpc.aio.AioRpcError, match="there is no job 'tiny'"):
        await cluster.jobs.StopJob(jobs_pb2.StopJobRequest(job_id="tiny"))


async def test_a_history_of_some_kinds(cluster: Cluster) -> None:
    job_id = await cluster.submit()
    await cluster.running(job_id)
    await cluster.stub.ReportStep(step_report(job_id, 0))

    async def kinds(*wanted: str) -> set[str | None]:
        request = jobs_pb2.WatchJobRequest(job_id=job_id, kinds=wanted)
        return {item.WhichOneof("item") async for item in cluster.jobs.WatchJob(request)}

    assert await kinds() == {"event", "step"}
    assert await kinds("event") == {"event"}
    assert await kinds("step", "log") == {"step"}
    with pytest.raises(grpc.aio.AioRpcError, match="no items of kind 'events'; did you mean 'event'"):
        await kinds("events")
