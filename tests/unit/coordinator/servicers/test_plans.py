"""PlanJob: what a recipe will take, on live nodes and on ones that need not exist; nothing is queued."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
from coordinator_fakes import PATIENCE_SECONDS, Cluster, make_recipe

from gradstream.coordinator.nodes.membership import SERVER, WORKER
from gradstream.core.errors import ConfigError, DataError, GradstreamError, PlanError
from gradstream.core.plan.forecast import Forecast
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.proto.v1 import jobs_pb2


async def planned(cluster: Cluster, recipe_json: str = "", **asked: Any) -> Forecast:
    request = jobs_pb2.PlanJobRequest(
        recipe_json=recipe_json or make_recipe(cluster.directory).model_dump_json(),
        **{"link_bits_per_second": 1e9, **asked},
    )
    try:
        return Forecast.from_proto((await cluster.jobs.PlanJob(request)).forecast)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, "coordinator") from None


async def test_a_recipe_is_planned_and_not_queued(cluster: Cluster) -> None:
    with pytest.raises(PlanError, match="no parameter server is live"):
        await planned(cluster)
    cluster.node(SERVER, "ps-0")
    cluster.node(WORKER, "worker-0")
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            if len((await cluster.jobs.ListNodes(jobs_pb2.ListNodesRequest())).nodes) == 2:
                break
            await asyncio.sleep(0.05)
    live = await planned(cluster)
    assert ([server.server for server in live.servers], live.places[0].workers) == (["ps-0"], ("worker-0",))
    imagined = await planned(cluster, num_servers=3, num_workers=2, memory_bytes=1 << 34)
    assert [server.server for server in imagined.servers] == ["server-0", "server-1", "server-2"]
    assert (imagined.num_replicas, imagined.places[0].offered_bytes) == (2, 1 << 34)
    assert imagined.step_seconds is not None
    assert imagined.step_seconds > 0
    assert list(imagined.reasons) == ["servers", "placement", "memory", "start"]
    assert imagined.warnings == ()
    assert list((await cluster.jobs.ListJobs(jobs_pb2.ListJobsRequest())).jobs) == []


async def test_data_that_is_not_there_yet_is_a_warning(cluster: Cluster) -> None:
    (cluster.directory / "data" / "manifest.json").rename(cluster.directory / "kept")
    told = await planned(cluster, num_workers=1)
    assert len(told.warnings) == 1
    assert "holds no data set yet, so the data was not checked" in told.warnings[0]
    (cluster.directory / "data" / "manifest.json").write_text("{")
    with pytest.raises(DataError):
        await planned(cluster, num_workers=1)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"num_servers": 5000}, ConfigError, "num_servers is 5000; a plan is made for at most 4096"),
        ({"link_bits_per_second": 0.0}, ConfigError, "link_bits_per_second is 0; give a link's speed"),
        ({"link_bits_per_second": float("nan")}, ConfigError, "link_bits_per_second is nan"),
        ({"memory_bytes": 1}, ConfigError, "also give num_workers or num_servers"),
        ({"recipe_json": "{}"}, ConfigError, "'name' is missing"),
    ],
)
async def test_what_cannot_be_planned_is_refused(
    cluster: Cluster, asked: dict[str, Any], error: type[GradstreamError], message: str
) -> None:
    with pytest.raises(error, match=message):
        await planned(cluster, **asked)


async def test_a_plan_opens_no_path_that_a_submission_may_not(cluster: Cluster) -> None:
    recipe = make_recipe(cluster.directory)
    elsewhere = recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": "ftp://127.0.0.1:1/data"})})
    with pytest.raises(ConfigError, match="is a URL, and this service opens local paths alone"):
        await planned(cluster, elsewhere.model_dump_json(), num_workers=1)
