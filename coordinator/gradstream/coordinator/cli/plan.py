"""`gradstream plan`: forecast the cost of a recipe on a cluster before anything starts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
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
from gradstream.coordinator.cli.views.plan import print_forecast, settings_text

if TYPE_CHECKING:
    from gradstream.client import Client
    from gradstream.coordinator.planning.needs import NodeOffer
    from gradstream.core.data.manifest import Manifest
    from gradstream.core.plan.forecast import Forecast
    from gradstream.core.recipe.recipe import Recipe

DEFAULT_LINK = "10Gb/s"
ASSUMED = "assumed (say it with --link)"
MAX_JOBS = 5
"""Maximum number of newest jobs in which to look for measured rates of links."""


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
        str | None, typer.Option("--memory", metavar="SIZE", help="Memory of each of them; left out: enough.")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link",
            metavar="RATE",
            help="Every node's link, both ways.",
            show_default="of a live cluster, as its newest job measured it; else 10Gb/s",
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Forecast a recipe's cost before anything starts: stage cut, memory, bytes on each link, seconds per step.

    Plans for the nodes of a live cluster; with --workers or --servers, for a hypothetical cluster. Times are measured
    on this machine, segment by segment, as if every worker were like it. If PyTorch is not installed, the coordinator
    measures and plans on its machine.
    """
    from gradstream.core.errors import ConfigError
    from gradstream.core.extras import installed
    from gradstream.core.recipe.loading import load_recipe

    # 1. The options.
    loaded = load_recipe(find_recipe(recipe), overrides or ())
    is_live = servers is None and workers is None
    bits_per_second, link_reason = (parse_bit_rate(link), "as asked") if link else (0.0, "")
    memory_bytes = parse_size(memory) if memory is not None else 0
    if memory is not None and servers is None and workers is None:
        raise ConfigError("--memory is only for hypothetical nodes; also give --workers or --servers")
    if not link:
        assumed = parse_bit_rate(DEFAULT_LINK), ASSUMED
        bits_per_second, link_reason = (measured_link(coordinator) if is_live else None) or assumed
    # 2. The plan and its forecast.
    plan_it = _plan_here if "node" in installed() else _plan_there
    told = plan_it(loaded, servers or 0, workers or 0, memory_bytes, bits_per_second, coordinator)
    for warning in told.warnings:
        terminal.warn(warning)
    if output is OutputFormat.json:
        terminal.print_json(told.to_dict())
        return
    print_forecast(told, loaded, link_reason)
    terminal.hint(f"run it here: gradstream dev {recipe}; on a cluster: gradstream submit {recipe}")
    for option in told.options:
        if option.advised and option.steps:
            terminal.hint(f"with the advised settings: gradstream submit {recipe} {settings_text(option, loaded)}")


def _plan_here(
    recipe: Recipe, servers: int, workers: int, memory_bytes: int, bits_per_second: float, coordinator: str | None
) -> Forecast:
    """Make the forecast with the model measured on this machine."""
    from gradstream.coordinator.planning.recipe_forecast import forecast_recipe, hypothetical_nodes

    if servers or workers:
        nodes = hypothetical_nodes(recipe, servers, workers, memory_bytes)
    else:
        nodes = live_nodes(coordinator)
    return asyncio.run(forecast_recipe(recipe, find_manifest(recipe), *nodes, bits_per_second))


def _plan_there(
    recipe: Recipe, servers: int, workers: int, memory_bytes: int, bits_per_second: float, coordinator: str | None
) -> Forecast:
    """Make the forecast with the model measured on the coordinator's machine, because this one has no PyTorch."""
    with _live_client(coordinator) as client:
        return client.plan(
            recipe,
            num_servers=servers,
            num_workers=workers,
            memory_bytes=memory_bytes,
            link_bits_per_second=bits_per_second,
        )


def measured_link(coordinator: str | None) -> tuple[float, str] | None:
    """Look up the slowest worker's link in the newest job that measured it; return (bits per second, origin) or None.

    A rate is measured while data is sent. A job that does not wait for the network measures less than the link can
    carry. Raises UnreachableError when no coordinator answers.
    """
    with _live_client(coordinator) as client:
        for job in client.jobs(limit=MAX_JOBS):
            found = client.job(job.job_id).step_breakdown
            rates = [worker.push_bytes_per_second for worker in found.workers] if found is not None else []
            if rates and min(rates) > 0:
                return 8 * min(rates), f"at least, as job {job.job_id} measured it (another one: --link)"
    return None


@contextmanager
def _live_client(coordinator: str | None) -> Iterator[Client]:
    """Open a client; the error when no coordinator answers says how to plan without one."""
    from gradstream.core.errors import UnreachableError, one_line
    from gradstream.core.extras import installed

    try:
        with open_client(coordinator) as client:
            yield client
    except UnreachableError as error:
        cure = (
            "or plan for a cluster that need not exist: --workers 4 --servers 2"
            if "node" in installed()
            else "or plan here, without a coordinator, after pip install 'gradstream[node]'"
        )
        raise UnreachableError(f"{one_line(error)}; {cure}") from None


def live_nodes(coordinator: str | None) -> tuple[list[NodeOffer], list[NodeOffer]]:
    """Ask the coordinator for the live (servers, workers). Raises UnreachableError when it does not answer."""
    from gradstream.client import NodeKind
    from gradstream.coordinator.planning.needs import NodeOffer

    with _live_client(coordinator) as client:
        nodes = [node for node in client.nodes() if node.alive]
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
    """Find the recipe's data set; None if it is missing. Raises DataError if it exists but cannot be used."""
    from gradstream.coordinator.data.inspection import load_manifest
    from gradstream.core.data.manifest import MANIFEST_NAME
    from gradstream.core.storage import files

    return load_manifest(recipe.data.path) if MANIFEST_NAME in files.list_names(recipe.data.path) else None
