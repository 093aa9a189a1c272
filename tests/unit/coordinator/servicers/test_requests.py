"""Submission is idempotent: a repeated request makes one job."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest
from coordinator_fakes import Cluster, make_recipe

from gradstream.core.errors import ConfigError
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.proto.v1 import jobs_pb2


def request(cluster: Cluster, request_id: str, **training: int) -> jobs_pb2.SubmitJobRequest:
    recipe = make_recipe(cluster.directory, **training)
    return jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json(), request_id=request_id)


async def submitted(cluster: Cluster, asked: jobs_pb2.SubmitJobRequest) -> str:
    return (await cluster.jobs.SubmitJob(asked)).job.job_id


async def listed(cluster: Cluster) -> list[str]:
    return [job.job_id for job in (await cluster.jobs.ListJobs(jobs_pb2.ListJobsRequest())).jobs]


async def test_a_repeated_request_is_the_same_job_after_a_restart_too(cluster: Cluster) -> None:
    asked = request(cluster, "one")
    assert await submitted(cluster, asked) == "tiny-1"
    assert await submitted(cluster, asked) == "tiny-1"
    await cluster.restart()
    # What the first has made does not have to be there any more.
    (cluster.directory / "data" / "manifest.json").rename(cluster.directory / "kept")
    assert await submitted(cluster, asked) == "tiny-1"
    (cluster.directory / "kept").rename(cluster.directory / "data" / "manifest.json")
    assert await submitted(cluster, request(cluster, "two")) == "tiny-2"
    assert await listed(cluster) == ["tiny-2", "tiny-1"]


async def test_requests_without_an_id_are_jobs_of_their_own(cluster: Cluster) -> None:
    asked = request(cluster, "")
    assert [await submitted(cluster, asked) for _ in range(2)] == ["tiny-1", "tiny-2"]


async def test_a_request_that_comes_while_it_is_under_way_is_one_job(cluster: Cluster) -> None:
    asked = request(cluster, "one")
    assert set(await asyncio.gather(*(submitted(cluster, asked) for _ in range(16)))) == {"tiny-1"}
    assert await listed(cluster) == ["tiny-1"]


async def test_an_id_that_was_used_for_another_recipe_is_refused(cluster: Cluster) -> None:
    await submitted(cluster, request(cluster, "one"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await submitted(cluster, request(cluster, "one", num_steps=6))
    error = error_from_rpc(caught.value, "coordinator")
    assert isinstance(error, ConfigError)
    assert str(error) == "request id one is that of job tiny-1, which has another recipe; take a new id for each job"
    assert await listed(cluster) == ["tiny-1"]


@pytest.mark.parametrize("request_id", ["a b", "x" * 65, "\x1b[31m", "é"])
async def test_what_cannot_be_an_id_is_refused(cluster: Cluster, request_id: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="is malformed; use 1 to 64 letters"):
        await submitted(cluster, request(cluster, request_id))
