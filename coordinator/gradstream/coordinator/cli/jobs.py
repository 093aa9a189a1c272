"""Commands about jobs: submit, watch, ls, status, pause, resume, replay, replan, stop."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from gradstream.coordinator.cli.options import (
    CoordinatorOption,
    EndedJobArgument,
    NamedJobArgument,
    NewestJobArgument,
    OutputFormat,
    OutputOption,
    OverrideOption,
    RecipeArgument,
    RequestIdOption,
    find_recipe,
    name_it,
    open_client,
)
from gradstream.coordinator.cli.views import terminal

if TYPE_CHECKING:
    from gradstream.client import Client, Job

TABLE_JOBS = 50


def submit(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show its progress until it ends.")] = False,
    request_id: RequestIdOption = None,
    slurm: Annotated[
        bool,
        typer.Option(
            "--slurm",
            help="Submit a Slurm job that starts a cluster for this recipe on its nodes. Prints Slurm's id.",
        ),
    ] = False,
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes", metavar="N", min=1, help="With --slurm: nodes.", show_default="2, or as the recipe needs"
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            "--time", metavar="TIME", help="With --slurm: the time limit, like 4:00:00.", show_default="the partition's"
        ),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option("--partition", metavar="NAME", help="With --slurm: the partition.", show_default="Slurm's"),
    ] = None,
    servers: Annotated[
        int | None,
        typer.Option(
            "--servers",
            metavar="N",
            min=1,
            help="With --slurm: parameter servers, spread over the first nodes.",
            show_default="cluster.min_servers",
        ),
    ] = None,
    workers_per_node: Annotated[
        int | None,
        typer.Option(
            "--workers-per-node",
            metavar="N",
            min=1,
            help="With --slurm: workers on each node.",
            show_default="one for each GPU, else one",
        ),
    ] = None,
    drain: Annotated[
        int | None,
        typer.Option(
            "--drain",
            metavar="SECONDS",
            help="With --slurm: how long before the time limit training stops with a checkpoint.",
            show_default="120",
        ),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch",
            metavar="KEY=VALUE",
            help="With --slurm: another option of sbatch, like account=physics or gpus-per-node=4; may be repeated.",
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Submit a recipe to a cluster, or with --slurm to Slurm. Prints the new job's id."""
    from gradstream.core.model.check import recipe_warnings
    from gradstream.core.recipe.loading import load_recipe

    of_slurm = {
        "--nodes": nodes,
        "--time": time,
        "--partition": partition,
        "--servers": servers,
        "--workers-per-node": workers_per_node,
        "--drain": drain,
        "--sbatch": sbatch,
    }
    own = coordinator if coordinator != os.environ.get("GRADSTREAM_COORDINATOR") else None
    _check_together(slurm, of_slurm, {"--watch": watch, "--request-id": request_id, "--coordinator": own})
    resolved = load_recipe(find_recipe(recipe), overrides or ())
    for warning in recipe_warnings(resolved):
        terminal.warn(warning)
    if slurm:
        from gradstream.coordinator.cli.slurm import DRAIN_SECONDS, SlurmOptions, submit_to_slurm

        seconds = drain if drain is not None else DRAIN_SECONDS
        options = SlurmOptions(nodes, time, partition, servers, workers_per_node, seconds, sbatch or ())
        made = submit_to_slurm(resolved, options)
        if output is OutputFormat.json:
            terminal.print_json(made.to_dict())
            return
        terminal.print_line(made.slurm_job_id, flush=True)
        for line in made.advice():
            terminal.say(line)
        return
    with open_client(coordinator) as client:
        job = client.submit(resolved, request_id=request_id)
        if watch:
            terminal.say(f"submitted {job.job_id}")
            _watch(client, job, output)
            return
    _print_job(job, output)
    terminal.hint(f"watch it: gradstream watch {job.job_id}", f"its log:  gradstream logs -f {job.job_id}")


def _check_together(slurm: bool, of_slurm: Mapping[str, object], of_cluster: Mapping[str, object]) -> None:
    """Raise ConfigError when options of Slurm come without --slurm, or options of a running cluster with it."""
    from gradstream.core.errors import ConfigError

    for option, value in (of_cluster if slurm else of_slurm).items():
        if value:
            why = "is about a cluster that runs, and --slurm starts one" if slurm else "goes with --slurm"
            raise ConfigError(f"{option} {why}; leave one of them out" if slurm else f"{option} {why}; add that option")


def watch(
    job_id: NamedJobArgument = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show a job's progress until it ends, as `submit --watch` does. Ctrl-C detaches, and the job goes on.

    Also works for a fine-tuning, by its name. Prints the job's id at its end; the exit code is 8 when the job failed.
    """
    with open_client(coordinator) as client:
        _watch(client, client.job(job_id), output)


def _watch(client: Client, job: Job, output: OutputFormat) -> None:
    """Show a job's progress until it ends or a person detaches. Raises JobFailedError."""
    from gradstream.client import JobFailedError
    from gradstream.coordinator.cli.views.progress import ProgressView, is_fine_tuning

    try:
        with ProgressView() as view:
            job = client.wait(job.job_id, view.update)
    except KeyboardInterrupt:
        terminal.say(
            f"detached; {job.job_id} goes on. Look again with: gradstream watch {job.job_id}; "
            f"stop it with: gradstream stop {job.job_id}"
        )
        return
    except JobFailedError as error:
        _print_job(error.job, output)
        raise
    _print_job(job, output)
    if is_fine_tuning(job):
        terminal.hint(f"how good it is: gradstream finetune status {job.name}")
    elif job.state == "finished":
        terminal.hint(f"export it: gradstream ckpt export {job.job_id} --to DIR")
    else:
        terminal.hint(f"go on with it: gradstream resume {job.job_id}")


def _print_job(job: Job, output: OutputFormat) -> None:
    if output is OutputFormat.json:
        terminal.print_json(job.to_dict())
    else:
        terminal.print_line(job.job_id)


def ls(
    states: Annotated[
        list[str] | None, typer.Option("--state", metavar="STATE", help="Jobs in this state; may be repeated.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            "-n",
            min=0,
            metavar="N",
            help="The newest N jobs; 0 for all.",
            show_default=f"{TABLE_JOBS} in a table, else all",
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """List jobs, newest first."""
    if limit is None:
        limit = TABLE_JOBS if output is OutputFormat.table else 0
    with open_client(coordinator) as client:
        # One more than is shown: whether there are older ones.
        jobs = client.jobs(states=states or (), limit=limit + 1 if limit else None)
    has_older = bool(limit) and len(jobs) > limit
    jobs = jobs[:limit] if limit else jobs
    if output is OutputFormat.json:
        terminal.print_json([job.to_dict() for job in jobs])
        return
    if not jobs and states:
        terminal.say(f"no job is {' or '.join(states)}")
        return
    if not jobs:
        terminal.say("no jobs yet")
        terminal.hint("submit one: gradstream submit stdlib-gpt")
        return
    from gradstream.coordinator.cli.views.jobs import jobs_table

    terminal.show(jobs_table(jobs))
    if has_older:
        terminal.say(f"the newest {limit} jobs; all of them: gradstream ls -n 0")
    terminal.hint(f"more about one: gradstream status {jobs[0].job_id}")


def status(
    job_id: NamedJobArgument = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show a job: progress, rates, slot holders, decisions and their reasons, what it waits for, for whom, since when.

    Without JOB: the cluster's nodes, and the job under way, else the newest.
    """
    from gradstream.coordinator.cli.views.jobs import chosen_job, job_view, jobs_to_choose, nodes_table

    with open_client(coordinator) as client:
        nodes, warnings = client.nodes(), client.warnings()
        job = client.job(job_id) if job_id else chosen_job(jobs_to_choose(client))
    if output is OutputFormat.json:
        found = {"job": job.to_dict() if job else None, "nodes": [node.to_dict() for node in nodes]}
        terminal.print_json({**found, "warnings": warnings})
        return
    for warning in warnings:
        terminal.warn(warning)
    if job_id is None:
        if nodes:
            terminal.show(nodes_table(nodes, job))
        else:
            terminal.print_line(f"coordinator {client.address}: no nodes have registered")
        terminal.print_line("")
    if job is None:
        terminal.say("no jobs yet")
        terminal.hint("submit one: gradstream submit stdlib-gpt")
        return
    terminal.show(job_view(job, nodes))
    if not job.state.ended:
        terminal.hint(f"follow it: gradstream watch {job.job_id}", f"its log:   gradstream logs -f {job.job_id}")


def pause(
    job_id: NewestJobArgument = None, coordinator: CoordinatorOption = None, output: OutputOption = OutputFormat.table
) -> None:
    """Pause a job at its next step boundary, with a checkpoint."""
    with open_client(coordinator) as client:
        job = client.pause(job_id or client.job().job_id)
    _print_changed(job, output)
    terminal.hint(f"go on with: gradstream resume {job.job_id}")


def resume(
    job_id: NewestJobArgument = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            min=1,
            show_default="those that it has",
            help="Go on to N steps in all, also with a finished job. From there on the learning rate follows the "
            "schedule of N steps.",
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Go on with a paused job; start a stopped or failed one again from its last checkpoint.

    With --steps also a finished job goes on. Its steps so far stay as they are. From there on the learning rate is that
    of a job of N steps, so it may rise again: the answer names the rate before and after.
    """
    with open_client(coordinator) as client:
        job = client.resume(job_id or client.job().job_id, steps)
    _print_changed(job, output)
    terminal.hint(f"watch it: gradstream watch {job.job_id}")


def replay(
    job_id: NewestJobArgument = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show its progress until it ends.")] = False,
    request_id: RequestIdOption = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Compute a job's rounds again, with the slots that counted there: the new job ends with the same bits.

    For jobs with local.quorum, whose bits depend on which slots were late. The new job may have other workers and
    servers. Prints its id.
    """
    with open_client(coordinator) as client:
        job = client.replay(job_id or client.job().job_id, request_id=request_id)
        if watch:
            terminal.say(f"submitted {job.job_id}")
            _watch(client, job, output)
            return
    _print_job(job, output)
    terminal.hint(f"watch it: gradstream watch {job.job_id}", f"compare:  gradstream ckpt ls {job.job_id} -o json")


def replan(
    job_id: NewestJobArgument = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="SERVER", help="A parameter server to take out of the job; may be repeated."),
    ] = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Bring idle parameter servers into a running job at its next step boundary, or take servers out of it.

    The job writes a checkpoint at the boundary and goes on from this checkpoint under a new plan. No step is lost and
    no bit changes.
    """
    with open_client(coordinator) as client:
        job = client.replan(job_id or client.job().job_id, without or ())
    _print_changed(job, output)
    terminal.hint(f"watch it: gradstream events -f {job.job_id}")


def stop(
    job_id: EndedJobArgument = None,
    now: Annotated[bool, typer.Option("--now", help="At once, without a checkpoint.")] = False,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """End a job at its next step boundary with a checkpoint, or at once without one."""
    with open_client(coordinator) as client:
        if job_id is None:
            raise name_it("gradstream stop", "ends a job", client.job().job_id)
        job = client.stop(job_id, now)
    _print_changed(job, output)
    terminal.hint(f"its checkpoints: gradstream ckpt ls {job_id}; start again: gradstream resume {job_id}")


def _print_changed(job: Job, output: OutputFormat) -> None:
    from gradstream.core.job_states import after_state

    if output is OutputFormat.json:
        terminal.print_json(job.to_dict())
    else:
        terminal.print_line(f"{job.job_id} {job.state}{after_state(job.state, job.reason)}")
