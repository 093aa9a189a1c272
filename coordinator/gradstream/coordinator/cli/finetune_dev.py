"""`gradstream finetune dev`: run a fine-tuning from start to end on this machine.

The phases are: start a cluster with a fine-tuning service, create the fine-tuning, follow it to its end, export the
result, stop the cluster, show base and result side by side.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradstream.coordinator.cli.options import OutputFormat, OutputOption, OverrideOption, RecipeArgument, find_recipe
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.client import FineTuning
    from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe

MEMORY_SHARE = 0.8
SHOWN_SAMPLES = 5
DEFAULT_WORKERS = 2


def dev(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    servers: Annotated[
        int | None,
        typer.Option("--servers", min=1, help="Parameter servers to start.", show_default="1, or what the recipe asks"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Workers to start.", show_default="2, or what the recipe asks"),
    ] = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Fine-tune here: start a cluster and a service on this machine, run the recipe, show what was learnt.

    Ctrl-C ends everything; checkpoints stay in the job's directory.
    """
    from gradstream.coordinator.cli.recipe_checks import check_fine_tuning_recipe
    from gradstream.core.errors import ConfigError
    from gradstream.core.extras import require
    from gradstream.core.recipe.fine_tuning_recipe import load_fine_tuning_recipe

    require("`gradstream finetune dev`", "node")
    asked = load_fine_tuning_recipe(find_recipe(recipe), overrides or ())
    if asked.base_model.startswith("job:"):
        raise ConfigError(
            f"base_model {asked.base_model} is a job of another cluster; give a checkpoint's directory, such as "
            f"runs/JOB/checkpoints/step-00000100, or a Hugging Face directory"
        )
    min_servers = asked.cluster.min_servers
    min_workers = max(asked.cluster.min_workers, asked.pipeline.min_workers)
    servers = servers if servers is not None else min_servers
    workers = workers if workers is not None else max(DEFAULT_WORKERS, min_workers)
    for what, have, need in (("servers", servers, min_servers), ("workers", workers, min_workers)):
        if have < need:
            raise ConfigError(f"--{what} {have} is fewer than the {need} that the recipe needs; start more")
    for warning in check_fine_tuning_recipe(asked):
        terminal.warn(warning)
    run = asyncio.run(_run(asked, servers, workers))
    if output is OutputFormat.json:
        terminal.print_json({**run.made.to_dict(), "adapter": str(run.exported)})
        return
    from gradstream.coordinator.cli.views.fine_tunings import chat_flag, held_out, print_comparisons

    print_comparisons(run.made, held_out(run.made)[:SHOWN_SAMPLES])
    print()
    terminal.print_line(f"result: {run.exported}")
    terminal.hint(
        f"use it: gradstream serve fine-tuning --state {os.path.relpath(run.exported.parent / 'fine-tuning')}",
        f"        gradstream finetune generate {run.made.name} --prompt TEXT{chat_flag(run.made)}",
    )


@dataclass(frozen=True)
class _Done:
    made: FineTuning
    exported: Path


async def _run(asked: FineTuningRecipe, servers: int, workers: int) -> _Done:
    """Run a fine-tuning to its end. Raises FineTuningFailedError, and any error that prevents the run."""
    import psutil

    from gradstream.client import AsyncClient, AsyncFineTuningClient
    from gradstream.coordinator.cli.local.cluster import LocalCluster
    from gradstream.coordinator.cli.local.metrics_files import save_metrics
    from gradstream.coordinator.cli.views.fine_tunings import FollowReporter
    from gradstream.coordinator.cli.views.progress import ProgressView

    directory = Path(asked.run_root) / f".dev-{os.getpid()}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    memory = int(psutil.virtual_memory().total * MEMORY_SHARE / (servers + workers + 1))
    terminal.say(f"starting a cluster: parameter servers {servers}, workers {workers}, and a fine-tuning service")
    run_directory: Path | None = None
    try:
        async with (
            LocalCluster(directory, servers, workers, memory, on_news=terminal.warn, fine_tuning=True) as cluster,
            AsyncFineTuningClient(cluster.fine_tuning_address, credentials=cluster.credentials) as client,
        ):
            # 1. Create the fine-tuning and follow it to its end.
            made = await client.create(asked)
            with ProgressView() as view:
                cluster.on_news = view.say
                reporter = FollowReporter(view)
                waiter = asyncio.ensure_future(client.wait(made.name, reporter, poll_seconds=0.5))
                try:
                    futures: set[asyncio.Future[object]] = {waiter, cluster.failed}  # type: ignore[arg-type]
                    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
                    if not waiter.done():
                        cluster.failed.result()
                    made = waiter.result()
                finally:
                    waiter.cancel()
                    cluster.on_news = terminal.warn
            # 2. Export the result and the metrics.
            assert made.job is not None
            run_directory = Path(made.job.run_directory)
            async with AsyncClient(cluster.address, credentials=cluster.credentials) as jobs:
                await save_metrics(jobs, await jobs.job(made.job.job_id))
            exported = await client.export(made.name, run_directory / "export")
            return _Done(made, exported)
    finally:
        if run_directory is not None:
            for name in ("state", "fine-tuning", "logs"):
                if (directory / name).is_dir() and not (run_directory / name).exists():
                    os.replace(directory / name, run_directory / name)
            shutil.rmtree(directory, ignore_errors=True)
        else:
            terminal.say(f"logs and state are in {directory}")
