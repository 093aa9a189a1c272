"""`gradstream plan`: what a recipe will take on a cluster, told before anything starts."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from gradstream.coordinator.cli.options import (
    CoordinatorOption,
    OutputFormat,
    OutputOption,
    OverrideOption,
    RecipeArgument,
    find_recipe,
    open_client,
    parse_bit_rate,
    parse_size,
)
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.coordinator.planning.forecast import Forecast
    from gradstream.coordinator.planning.inventory import Inventory
    from gradstream.coordinator.planning.needs import NodeOffer
    from gradstream.core.data.manifest import Manifest
    from gradstream.core.model.profile import SegmentProfile
    from gradstream.core.recipe.recipe import Recipe

DEFAULT_LINK = "10Gb/s"


def plan(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    servers: Annotated[
        int | None, typer.Option("--servers", min=1, help="Number of servers to plan for, instead of a live cluster's.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Number of workers to plan for, instead of a live cluster's.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="What each of them offers; left out: enough.")
    ] = None,
    link: Annotated[str, typer.Option("--link", metavar="RATE", help="Every node's link, both ways.")] = DEFAULT_LINK,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Tell what a recipe will take before anything starts: stage cut, memory, bytes on each link, seconds a step.

    Plans for the nodes of a live cluster; with --workers or --servers, for a cluster that need not exist. Times are
    measured on this machine, segment by segment, as if every worker were like it.
    """
    from gradstream.core.extras import require

    require("`gradstream plan`", "node")
    from gradstream.coordinator.planning.forecast import forecast
    from gradstream.coordinator.planning.planner import NextEpoch, make_plan
    from gradstream.core.errors import ConfigError
    from gradstream.core.recipe.loading import load_recipe

    # 1. What is asked.
    loaded = load_recipe(find_recipe(recipe), overrides or ())
    bits_per_second = parse_bit_rate(link)
    memory_bytes = parse_size(memory) if memory is not None else 0
    if servers is not None or workers is not None:
        servers = servers or loaded.cluster.min_servers
        workers = workers or max(loaded.cluster.min_workers, loaded.pipeline.min_workers)
        server_offers = hypothetical("server", servers, memory_bytes)
        worker_offers = hypothetical("worker", workers, memory_bytes)
    elif memory is not None:
        raise ConfigError("--memory is that of nodes that need not exist; say how many with --workers and --servers")
    else:
        server_offers, worker_offers = live_nodes(coordinator)
    # 2. What is known of data and model.
    manifest = find_manifest(loaded)
    if manifest is None:
        terminal.warn(f"data.path {loaded.data.path} holds no data set yet, so the data was not checked")
    found, profiles = asyncio.run(_look_at_model(loaded))
    # 3. The plan, and what follows from it.
    at = NextEpoch(loaded.name, 1, None, "")
    made, reasons = make_plan(at, loaded, manifest, found, server_offers, worker_offers, profiles)
    told = forecast(made, reasons, profiles, server_offers, worker_offers, bits_per_second)
    if output is OutputFormat.json:
        terminal.print_json(told.to_dict())
        return
    _print(told, loaded)
    terminal.hint(f"run it here: gradstream dev {recipe}; on a cluster: gradstream submit {recipe}")


def hypothetical(kind: str, count: int, memory_bytes: int) -> list[NodeOffer]:
    """Nodes that need not exist."""
    from gradstream.coordinator.planning.needs import NodeOffer

    return [NodeOffer(f"{kind}-{number}", f"{kind}-{number}", "", memory_bytes) for number in range(count)]


def live_nodes(coordinator: str | None) -> tuple[list[NodeOffer], list[NodeOffer]]:
    """(servers, workers) that are live. Raises UnreachableError when no coordinator answers."""
    from gradstream.client import NodeKind
    from gradstream.coordinator.planning.needs import NodeOffer
    from gradstream.core.errors import UnreachableError, one_line

    try:
        with open_client(coordinator) as client:
            nodes = [node for node in client.nodes() if node.alive]
    except UnreachableError as error:
        raise UnreachableError(
            f"{one_line(error)}; or plan for a cluster that need not exist: --workers 4 --servers 2"
        ) from None
    servers, workers = (
        [
            NodeOffer(node.node_id, node.name, node.address, node.memory_bytes, node.flops_per_second)
            for node in nodes
            if node.kind == kind
        ]
        for kind in (NodeKind.PARAMETER_SERVER, NodeKind.WORKER)
    )
    return servers, workers


def find_manifest(recipe: Recipe) -> Manifest | None:
    """The recipe's data set; None when it is not there. Raises DataError when it is there and cannot be used."""
    from gradstream.coordinator.data.inspection import load_manifest
    from gradstream.core.data.manifest import MANIFEST_NAME
    from gradstream.core.storage import files

    return load_manifest(recipe.data.path) if MANIFEST_NAME in files.list_names(recipe.data.path) else None


async def _look_at_model(recipe: Recipe) -> tuple[Inventory, list[SegmentProfile] | None]:
    from gradstream.coordinator.planning.inventory import take_inventory, take_profile
    from gradstream.core.errors import ConfigError, one_line
    from gradstream.core.model.trial import ModelUse

    use = ModelUse.of(recipe)
    try:
        # Before the inventory, which comes with it.
        profiles = await take_profile(recipe.model.config, recipe.training, recipe.lora, use)
    except ConfigError as error:
        if recipe.pipeline.stages != 1:
            raise
        # A model that cannot be cut can be trained whole.
        found = await take_inventory(recipe.model.config, recipe.lora, use)
        terminal.warn(f"times are not known: {one_line(error)}")
        return found, None
    return await take_inventory(recipe.model.config, recipe.lora, use), profiles


# --- for people -------------------------------------------------------------------------------------------------------


def _print(told: Forecast, recipe: Recipe) -> None:
    where = f"{len(told.servers)} servers, {told.num_replicas * len(told.places)} workers"
    terminal.print_line(f"{recipe.name}: {terminal.format_count(told.num_parameters)} parameters on {where}")
    print()
    if told.stages:
        terminal.print_table(
            ["STAGE", "PLACE", "SEGMENTS", ">PARAMETERS", ">FORWARD", ">BACKWARD", ""],
            [
                (
                    stage.stage,
                    stage.place,
                    _span(stage.segments),
                    terminal.format_count(stage.num_parameters),
                    _seconds(stage.forward_seconds),
                    _seconds(stage.backward_seconds),
                    "" if stage.measured else "estimated",
                )
                for stage in told.stages
            ],
        )
        print()
    terminal.print_table(
        ["NODE", "NAMES", ">NEEDS", ">OFFERS"],
        [
            *(
                (
                    f"worker in place {place.place}",
                    _some(place.workers),
                    *_memory(place.need_bytes, place.offered_bytes),
                )
                for place in told.places
            ),
            *(
                ("parameter server", server.server, *_memory(server.need_bytes, server.offered_bytes))
                for server in told.servers
            ),
        ],
    )
    print()
    terminal.print_table(
        ["LINK", "FROM", "TO", ">BYTES A STEP"],
        [(link.kind, link.sender, link.receiver, terminal.format_bytes(link.step_bytes)) for link in told.links],
    )
    print()
    if told.step_seconds is not None and told.compute_seconds is not None and told.bubble is not None:
        idle = f", {100 * told.bubble:.0f} % of it idle in the pipeline" if len(told.places) > 1 else ""
        terminal.print_line(
            f"a step takes about {_seconds(told.step_seconds)}: compute {_seconds(told.compute_seconds)} for "
            f"{told.num_microbatches} microbatches a replica{idle}; push {_seconds(told.push_seconds)} and pull "
            f"{_seconds(told.pull_seconds)} at {told.link_bits_per_second / 1e9:g} Gb/s, of which "
            f"{_seconds(told.exposed_seconds or 0)} are not hidden"
        )
        terminal.print_line(f"that is {terminal.format_count(told.tokens_per_second or 0)} tokens/s")
    for reason in told.reasons.values():
        terminal.print_line(reason)


def _span(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - 4
    return ", ".join(names[:4]) + (f" and {more} more" if more > 0 else "")


def _memory(need: int, offered: int) -> tuple[str, str]:
    return terminal.format_bytes(need), terminal.format_bytes(offered) if offered else "not said"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
