"""Commands about jobs: submit, ls, status, logs, events, pause, resume, replan, stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradstream.coordinator.cli.options import (
    CoordinatorOption,
    JobArgument,
    NewestJobArgument,
    OutputFormat,
    OutputOption,
    OverrideOption,
    RecipeArgument,
    RequestIdOption,
    find_recipe,
    open_client,
)
from gradstream.coordinator.cli.views import terminal
from gradstream.coordinator.cli.views.step_times import step_line

if TYPE_CHECKING:
    from gradstream.client import Client, Job, Node, Pipeline, ServerMemory


def submit(
    recipe: RecipeArgument,
    overrides: OverrideOption = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show its progress until it ends.")] = False,
    request_id: RequestIdOption = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Submit a recipe to a cluster. Prints the new job's id."""
    from gradstream.core.model.check import recipe_warnings
    from gradstream.core.recipe.loading import load_recipe

    resolved = load_recipe(find_recipe(recipe), overrides or ())
    for warning in recipe_warnings(resolved):
        terminal.warn(warning)
    with open_client(coordinator) as client:
        job = client.submit(resolved, request_id=request_id)
        if watch:
            from gradstream.client import JobFailedError
            from gradstream.coordinator.cli.views.progress import ProgressView

            terminal.say(f"submitted {job.job_id}")
            try:
                with ProgressView() as view:
                    job = client.wait(job.job_id, view.update)
            except KeyboardInterrupt:
                terminal.say(f"detached; {job.job_id} goes on. Stop it with: gradstream stop {job.job_id}")
                return
            except JobFailedError as error:
                _print_job(error.job, output)
                raise
        _print_job(job, output)
    if job.state == "finished":
        terminal.hint(f"export it: gradstream ckpt export {job.job_id} DIRECTORY")
    else:
        terminal.hint(f"watch it: gradstream status {job.job_id}, gradstream logs -f {job.job_id}, gradstream top")


def _print_job(job: Job, output: OutputFormat) -> None:
    if output is OutputFormat.json:
        terminal.print_json(job.to_dict())
    else:
        terminal.print_line(job.job_id)


def ls(coordinator: CoordinatorOption = None, output: OutputOption = OutputFormat.table) -> None:
    """List jobs, newest first."""
    with open_client(coordinator) as client:
        jobs = client.jobs()
    if output is OutputFormat.json:
        terminal.print_json([job.to_dict() for job in jobs])
        return
    if not jobs:
        terminal.say("no jobs yet")
        terminal.hint("submit one: gradstream submit stdlib-gpt")
        return
    terminal.print_table(
        ["JOB", "STATE", ">STEP", ">LOSS", ">VALIDATION", ">TOKENS/S", "ETA", "SUBMITTED", "REASON"],
        [
            (
                job.job_id,
                terminal.state_text(job.state),
                f"{job.version}/{job.num_steps}",
                terminal.format_loss(job.loss),
                terminal.format_loss(job.validation_loss),
                terminal.format_count(job.tokens_per_second) if job.state == "running" else "-",
                terminal.format_duration(job.eta),
                terminal.format_time(job.submitted),
                job.reason,
            )
            for job in jobs
        ],
    )
    terminal.hint(f"more about one: gradstream status {jobs[0].job_id}")


def status(
    job_id: NewestJobArgument = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show a job: progress, rates, slot holders, decisions and their reasons, what it waits for, for whom, since when.

    Without JOB: the cluster's nodes and the newest job.
    """
    with open_client(coordinator) as client:
        nodes, warnings = client.nodes(), client.warnings()
        job = client.job(job_id) if job_id else _newest(client)
    if output is OutputFormat.json:
        found = {"job": job.to_dict() if job else None, "nodes": [node.to_dict() for node in nodes]}
        terminal.print_json({**found, "warnings": warnings})
        return
    for warning in warnings:
        terminal.warn(warning)
    if job_id is None:
        console = terminal.console()
        if nodes:
            console.print(nodes_table(nodes))
        else:
            console.print(f"coordinator {client.address}: no nodes have registered")
        console.print()
    if job is None:
        terminal.say("no jobs yet")
        terminal.hint("submit one: gradstream submit stdlib-gpt")
        return
    terminal.console().print(job_view(job, nodes))
    if not job.state.ended:
        terminal.hint(f"follow it: gradstream logs -f {job.job_id}, gradstream top")


def _newest(client: Client) -> Job | None:
    jobs = client.jobs()
    return next((job for job in jobs if not job.state.ended), jobs[0] if jobs else None)


def nodes_table(nodes: list[Node]) -> Any:
    """The nodes of a cluster as a rich table."""
    return terminal.make_table(
        ["NODE", "KIND", "ALIVE", "PHASE", ">STEP", ">SENT", ">RECEIVED", ">RESIDENT", "DEVICE", "WAITS FOR"],
        [
            (
                terminal.styled(node.name, terminal.node_style(node.name)),
                node.kind,
                terminal.styled("yes", "green")
                if node.alive
                else terminal.styled(f"no, last heard {terminal.format_time(node.last_heartbeat)}", "red"),
                node.activity.phase,
                node.activity.step or "-",
                terminal.format_bytes(node.activity.sent_bytes),
                terminal.format_bytes(node.activity.received_bytes),
                terminal.format_bytes(node.activity.resident_bytes),
                node.device,
                f"{node.activity.waiting_for} {terminal.format_since(node.activity.waiting_since)}".strip(),
            )
            for node in nodes
        ],
    )


def job_view(job: Job, nodes: list[Node]) -> Any:
    """A job as rich text: one fact a line."""
    from rich.table import Table
    from rich.text import Text

    from gradstream.coordinator.cli.views.progress import counted_tokens

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: Any) -> None:
        table.add_row(name, value if isinstance(value, Text) else Text(str(value)))

    row("job", job.job_id)
    row("state", terminal.state_text(job.state) + (Text(f": {job.reason}") if job.reason else Text()))
    percent = f" ({100 * job.version / job.num_steps:.0f} %)" if job.num_steps else ""
    row("step", f"{job.version} of {job.num_steps}{percent}, epoch {job.epoch}, skipped {job.num_skipped}")
    row("trained on", f"{terminal.format_count(job.num_tokens)} {counted_tokens(job)} in {job.num_samples} samples")
    row("training loss", f"{terminal.format_loss(job.loss)} nats a token")
    first = f" (at the start {job.initial_validation_loss:.4f})" if job.initial_validation_loss is not None else ""
    row("validation loss", f"{terminal.format_loss(job.validation_loss)} nats a token{first}")
    if not job.state.ended:
        row(
            "rates",
            f"{terminal.format_count(job.tokens_per_second)} {counted_tokens(job)}/s, "
            f"up {terminal.format_rate(job.push_bytes_per_second)}, "
            f"down {terminal.format_rate(job.pull_bytes_per_second)}, ETA {terminal.format_duration(job.eta)}",
        )
    if job.num_parameters:
        row("parameters", f"{terminal.format_count(job.num_parameters)} ({job.num_parameters})")
    if job.codecs:
        row("codecs", job.codecs)
    if job.step_breakdown is not None:
        row("a step takes", step_line(job.step_breakdown))
        if not job.state.ended:
            row("", job.step_breakdown.advice)
    if job.hidden_share is not None:
        row("overlap", f"communication hidden by compute: {terminal.format_share(job.hidden_share)}")
    if job.pipeline is not None:
        row("pipeline", pipeline_text(job.pipeline))
    for index, memory in enumerate(job.server_memory):
        row("memory" if index == 0 else "", memory_text(memory))
    row(
        "submitted",
        terminal.format_time(job.submitted) + (f", ended {terminal.format_time(job.ended)}" if job.ended else ""),
    )
    row("files", job.run_directory)
    if not job.state.ended:
        for index, holder in enumerate(job.slot_holders):
            row("slots" if index == 0 else "", f"slot {index}: {holder or 'nobody'}")
        for index, decision in enumerate(job.decisions):
            row("decisions" if index == 0 else "", decision)
        waits = [f"{wait.what}, from {wait.whom}, {terminal.format_since(wait.since)}" for wait in job.waits]
        waits += [
            f"{node.name} waits for {node.activity.waiting_for} "
            f"{terminal.format_since(node.activity.waiting_since)}".strip()
            for node in nodes
            if node.activity.waiting_for
            and node.activity.job_id == job.job_id
            and node.alive
            # The coordinator has most of what nodes wait for among the job's waits already.
            and not any(node.name in f"{wait.what} {wait.whom}" for wait in job.waits)
        ]
        for index, text in enumerate(waits):
            row("waits for" if index == 0 else "", Text(text, style="yellow"))
        if not waits:
            row("waits for", "nothing")
    return table


def pipeline_text(pipeline: Pipeline) -> str:
    """A job's pipeline on one line."""
    stages = f"{pipeline.num_stages} stage{'s' * (pipeline.num_stages != 1)}"
    workers = f"{pipeline.num_workers} worker{'s' * (pipeline.num_workers != 1)}"
    waits = ""
    if pipeline.bubble is not None:
        waits = f", bubble {terminal.format_share(pipeline.bubble)}"
        if pipeline.ideal_bubble is not None:
            waits += f" (ideal {terminal.format_share(pipeline.ideal_bubble)})"
    return f"{stages} on {workers}, schedule {pipeline.schedule}{waits}"


def memory_text(memory: ServerMemory) -> str:
    """A server's memory on one line."""
    parameters = max(1, memory.num_parameters)
    return (
        f"{memory.name}: holds {terminal.format_bytes(memory.state_bytes)} for "
        f"{terminal.format_count(memory.num_parameters)} parameters, {memory.state_bytes / parameters:.2f} B each "
        f"(predicted {memory.predicted_state_bytes / parameters:.2f}); contributions that wait: "
        f"{terminal.format_bytes(memory.early_bytes)} of at most {terminal.format_bytes(memory.most_early_bytes)}"
    )


def logs(
    job_id: NewestJobArgument = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show the log lines of a job's nodes. With -o json, one object a line."""
    from rich.text import Text

    from gradstream.client import LogLine

    def show(item: Any) -> None:
        if not isinstance(item, LogLine):
            return
        if output is OutputFormat.json:
            terminal.print_json_line(item.to_dict())
            return
        console.print(
            Text.assemble(
                (terminal.format_time(item.time), "dim"),
                " ",
                (f"{item.node:<14}", terminal.node_style(item.node)),
                " ",
                (f"{item.level:<7}", terminal.LEVEL_STYLES.get(item.level, "")),
                " ",
                item.text,
            ),
            soft_wrap=True,
        )

    console = terminal.console()
    _watch(coordinator, job_id, follow, show, "log", "logs -f")


def events(
    job_id: NewestJobArgument = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Show a job's history of events: states, plans, leases, nodes, checkpoints. With -o json, one object a line."""
    from rich.text import Text

    from gradstream.client import Event

    def show(item: Any) -> None:
        if not isinstance(item, Event):
            return
        if output is OutputFormat.json:
            terminal.print_json_line(item.to_dict())
            return
        style = "red" if item.kind == "failure" else "yellow" if item.kind == "skip" else "cyan"
        console.print(
            Text.assemble(
                (terminal.format_time(item.time), "dim"), " ", (f"{item.kind:<10}", style), " ", item.message
            ),
            soft_wrap=True,
        )

    console = terminal.console()
    _watch(coordinator, job_id, follow, show, "event", "events -f")


def _watch(coordinator: str | None, job_id: str | None, follow: bool, show: Any, kind: str, command: str) -> None:
    with open_client(coordinator) as client:
        try:
            job_id = client.job(job_id).job_id
            for item in client.watch(job_id, follow=follow, kinds=[kind]):
                show(item)
        except KeyboardInterrupt:
            if not follow:
                raise
            terminal.say(f"\ndetached; {job_id} goes on. Look again with: gradstream {command} {job_id}")


def pause(
    job_id: JobArgument, coordinator: CoordinatorOption = None, output: OutputOption = OutputFormat.table
) -> None:
    """Pause a job at its next step boundary, with a checkpoint."""
    with open_client(coordinator) as client:
        _print_changed(client.pause(job_id), output)
    terminal.hint(f"go on with: gradstream resume {job_id}")


def resume(
    job_id: JobArgument, coordinator: CoordinatorOption = None, output: OutputOption = OutputFormat.table
) -> None:
    """Go on with a paused job; start a stopped or failed one again from its last checkpoint."""
    with open_client(coordinator) as client:
        _print_changed(client.resume(job_id), output)
    terminal.hint(f"watch it: gradstream status {job_id}")


def replan(
    job_id: JobArgument,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without", metavar="SERVER", help="A parameter server that the job shall do without; may be repeated."
        ),
    ] = None,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """Bring idle parameter servers into a running job at its next step boundary, or take servers out of it.

    The job writes a checkpoint at the boundary and goes on from it under a new plan: no step is lost, no bit changes.
    """
    with open_client(coordinator) as client:
        _print_changed(client.replan(job_id, without or ()), output)
    terminal.hint(f"watch it: gradstream events -f {job_id}")


def stop(
    job_id: JobArgument,
    now: Annotated[bool, typer.Option("--now", help="At once, without a checkpoint.")] = False,
    coordinator: CoordinatorOption = None,
    output: OutputOption = OutputFormat.table,
) -> None:
    """End a job at its next step boundary with a checkpoint, or at once without one."""
    with open_client(coordinator) as client:
        _print_changed(client.stop(job_id, now), output)
    terminal.hint(f"its checkpoints: gradstream ckpt ls {job_id}; start again: gradstream resume {job_id}")


def _print_changed(job: Job, output: OutputFormat) -> None:
    if output is OutputFormat.json:
        terminal.print_json(job.to_dict())
    else:
        terminal.print_line(f"{job.job_id} {job.state}" + (f": {job.reason}" if job.reason else ""))
