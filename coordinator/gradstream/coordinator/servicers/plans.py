"""Forecast the cost of a recipe before it is submitted (PlanJob)."""

from __future__ import annotations

import asyncio
import math

from gradstream.coordinator.jobs.plan_making import offers
from gradstream.coordinator.nodes.membership import SERVER, WORKER, Membership
from gradstream.coordinator.planning.recipe_forecast import forecast_recipe, hypothetical_nodes
from gradstream.coordinator.servicers.recipe_data import check_paths, find_data
from gradstream.core.data.manifest import MANIFEST_NAME, Manifest
from gradstream.core.errors import ConfigError
from gradstream.core.plan.forecast import Forecast
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.rpc.limits import MAX_NODES
from gradstream.core.storage import files
from gradstream.core.storage.paths import AllowedPaths
from gradstream.core.storage.pool import StorageThreads
from gradstream.proto.v1 import jobs_pb2


class Plans:
    """Makes forecasts one at a time, because each may measure a model, which uses the processor for seconds."""

    def __init__(self, members: Membership, allowed: AllowedPaths, storage: StorageThreads):
        self._members = members
        self._allowed = allowed
        self._storage = storage
        self._one = asyncio.Semaphore(1)

    async def forecast(self, recipe: Recipe, request: jobs_pb2.PlanJobRequest) -> Forecast:
        """Forecast the recipe's cost on the nodes of the request. Raises ConfigError, DataError and PlanError."""
        check_request(request)
        manifest = await self._storage.call(recipe.data.path, _data, recipe, self._allowed)
        if request.num_servers or request.num_workers:
            nodes = hypothetical_nodes(recipe, request.num_servers, request.num_workers, request.memory_bytes)
        else:
            nodes = offers(self._members.present(SERVER)), offers(self._members.present(WORKER))
        async with self._one:
            return await forecast_recipe(recipe, manifest, *nodes, request.link_bits_per_second)


def check_request(request: jobs_pb2.PlanJobRequest) -> None:
    """Raise ConfigError for an impossible cluster."""
    for what, count in (("servers", request.num_servers), ("workers", request.num_workers)):
        if count > MAX_NODES:
            raise ConfigError(f"num_{what} is {count}; a plan is made for at most {MAX_NODES}")
    rate = request.link_bits_per_second
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"link_bits_per_second is {rate:g}; give a link's speed, like 1e9 for 1 Gb/s")
    if request.memory_bytes and not (request.num_servers or request.num_workers):
        raise ConfigError("memory_bytes is only for hypothetical nodes; also give num_workers or num_servers")


def _data(recipe: Recipe, allowed: AllowedPaths) -> Manifest | None:
    """Find the recipe's data set, None if there is none yet. Raises ConfigError for a path that must not be opened."""
    check_paths(recipe, allowed)
    is_there = MANIFEST_NAME in files.list_names(recipe.data.path)
    return find_data(recipe, allowed) if is_there else None
