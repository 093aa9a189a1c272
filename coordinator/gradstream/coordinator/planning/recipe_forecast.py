"""Forecast the cost of a recipe on given nodes: measure the model on this machine, make a plan, forecast the plan."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from gradstream.coordinator.planning.forecast import forecast
from gradstream.coordinator.planning.inventory import Inventory, take_inventory, take_profile
from gradstream.coordinator.planning.needs import NodeOffer
from gradstream.coordinator.planning.planner import NextEpoch, make_plan
from gradstream.core.data.manifest import Manifest
from gradstream.core.errors import ConfigError, one_line
from gradstream.core.machine.speed import measure_flops
from gradstream.core.model.profile import SegmentProfile
from gradstream.core.model.trial import ModelUse
from gradstream.core.plan.forecast import Forecast
from gradstream.core.recipe.recipe import Recipe

Offers = tuple[list[NodeOffer], list[NodeOffer]]
"""Servers and workers."""


async def forecast_recipe(
    recipe: Recipe,
    manifest: Manifest | None,
    servers: Sequence[NodeOffer],
    workers: Sequence[NodeOffer],
    link_bits_per_second: float,
) -> Forecast:
    """Forecast the cost of a step of the recipe on these nodes. Without a manifest the data is not checked.

    Raises ConfigError when the model cannot be built or cut, DataError when the data does not fit it, PlanError when
    the nodes cannot hold it.
    """
    warnings = []
    if manifest is None:
        warnings.append(f"data.path {recipe.data.path} holds no data set yet, so the data was not checked")
    found, profiles, unknown = await _measured(recipe)
    warnings += unknown
    profiles, speed = await _at_their_speed(profiles, workers)
    at = NextEpoch(recipe.name, 1, None, "")
    made, reasons = await asyncio.to_thread(make_plan, at, recipe, manifest, found, servers, workers, profiles)
    told = await asyncio.to_thread(forecast, made, reasons, profiles, servers, workers, link_bits_per_second)
    return replace(told, warnings=tuple(warnings), reasons={**told.reasons, **speed})


def hypothetical_nodes(recipe: Recipe, num_servers: int, num_workers: int, memory_bytes: int) -> Offers:
    """Make offers of hypothetical nodes.

    A number of 0 stands for the number that the recipe requires, `memory_bytes` 0 for enough memory.
    """
    counts = {
        "server": num_servers or recipe.cluster.min_servers,
        "worker": num_workers or max(recipe.cluster.min_workers, recipe.pipeline.min_workers),
    }
    servers, workers = (
        [NodeOffer(f"{kind}-{number}", f"{kind}-{number}", "", memory_bytes) for number in range(count)]
        for kind, count in counts.items()
    )
    return servers, workers


async def _at_their_speed(
    profiles: list[SegmentProfile] | None, workers: Sequence[NodeOffer]
) -> tuple[list[SegmentProfile] | None, dict[str, str]]:
    """Scale the profiles to the speed of the fastest worker; return them with a reason.

    If no worker has reported its speed, return the profiles as measured here.
    """
    fastest = max((worker.flops_per_second for worker in workers), default=0.0)
    if not profiles or not fastest:
        return profiles, {}
    import torch

    here = await asyncio.to_thread(measure_flops, torch.device("cpu"))
    return [slower(profile, here / fastest) for profile in profiles], {
        "speed": (
            f"speed: the fastest worker computes {fastest / here:.2g} times as fast as the machine that measured it"
        )
    }


def slower(profile: SegmentProfile, factor: float) -> SegmentProfile:
    """Multiply all times of a segment's profile by `factor`."""
    return replace(
        profile,
        forward_seconds=factor * profile.forward_seconds,
        backward_seconds=factor * profile.backward_seconds,
        backward_input_seconds=factor * profile.backward_input_seconds,
        backward_weight_seconds=factor * profile.backward_weight_seconds,
    )


async def _measured(recipe: Recipe) -> tuple[Inventory, list[SegmentProfile] | None, list[str]]:
    """Measure the recipe's model; return its inventory, the profiles of its segments, and warnings."""
    use = ModelUse.of(recipe)
    try:
        # First, because the profile's measurement also gives the inventory.
        profiles = await take_profile(recipe.model.config, recipe.training, recipe.lora, use)
    except ConfigError as error:
        if recipe.pipeline.stages != 1:
            raise
        # A model that cannot be cut can still be trained without a pipeline.
        found = await take_inventory(recipe.model.config, recipe.lora, use)
        return found, None, [f"times are not known: {one_line(error)}"]
    return await take_inventory(recipe.model.config, recipe.lora, use), profiles, []
