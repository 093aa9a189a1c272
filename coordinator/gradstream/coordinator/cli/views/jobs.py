"""Show jobs and nodes to people: tables, and a job's facts, one per line."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gradstream.coordinator.cli.views import terminal
from gradstream.coordinator.cli.views.step_times import step_line, step_word
from gradstream.coordinator.cli.views.steps import node_step, progress_text, rounds_of
from gradstream.core.job_states import after_state

if TYPE_CHECKING:
    from gradstream.client import Client, Job, Node, Pipeline, ServerMemory


MAX_HOLDER_LINES = 8
"""Up to this many workers have a line each."""
NEWEST_JOBS = 50
"""Number of jobs among which `gradstream top` changes from one to the next."""
UNDER_WAY = ("running", "planning", "paused", "queued")


def chosen_job(jobs: Sequence[Job], job_id: str | None = None) -> Job | None:
    """Choose the job to show: the job with this id or name; without one, the job under way, else the newest.

    `jobs` are all jobs, newest first.
    """
    if job_id is not None:
        return next((job for job in jobs if job_id in (job.job_id, job.name)), None)
    newest = jobs[0] if jobs else None
    return next((job for state in UNDER_WAY for job in jobs if job.state == state), newest)


def jobs_to_choose(client: Client) -> list[Job]:
    """The one job among which `chosen_job` chooses if no job is named: the first that is under way, else the newest."""
    for state in UNDER_WAY:
        found = client.jobs(states=[state], limit=1)
        if found:
            return found
    return client.jobs(limit=1)


def newest_jobs(client: Client, job_id: str | None) -> list[Job]:
    """The newest jobs, with the jobs under way and the job of a person's choice if they are older, newest first."""
    from gradstream.core.errors import ConfigError

    found = client.jobs(limit=NEWEST_JOBS)
    if len(found) < NEWEST_JOBS:
        return found
    older = client.jobs(states=UNDER_WAY[:-1], limit=NEWEST_JOBS)
    if job_id is not None and chosen_job([*found, *older], job_id) is None:
        try:
            older.append(client.job(job_id))
        except ConfigError:
            pass  # it was removed, or never there
    known = {job.job_id for job in found}
    return [*found, *(job for job in older if job.job_id not in known)]


def jobs_table(jobs: Sequence[Job]) -> Any:
    """Jobs as a rich table."""
    return terminal.make_table(
        ["JOB", "STATE", ">STEP", ">LOSS", ">VALIDATION?", ">TOKENS/S?", "ETA?", "SUBMITTED?", "REASON…"],
        [
            (
                job.job_id,
                terminal.state_text(job.state),
                f"{job.step}/{job.num_steps}",
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


def nodes_table(nodes: Sequence[Node], job: Job | None) -> Any:
    """The nodes of a cluster as a rich table. `job` is the job for which most of them work.

    In a round of local steps the last column also says which inner step a worker computes.
    """
    in_round = any(node.activity.detail for node in nodes)

    def note(node: Node) -> str:
        wait = wait_text(node, job)
        return (f"waits for {wait}" if wait else node.activity.detail) if in_round else wait

    last = "NOTE…" if in_round else "WAITS FOR…"
    return terminal.make_table(
        ["NODE", "KIND", "ALIVE", "PHASE", ">STEP", ">RESIDENT?", ">SENT?", ">RECEIVED?", "DEVICE?", last],
        [
            (
                node.name,
                node.kind,
                terminal.styled("yes", "green")
                if node.alive
                else terminal.styled(f"no, last heard {terminal.format_time(node.last_heartbeat)}", "red"),
                node.activity.phase,
                node_step(node, job) or "-",
                terminal.format_bytes(node.activity.resident_bytes),
                terminal.format_bytes(node.activity.sent_bytes),
                terminal.format_bytes(node.activity.received_bytes),
                node.device,
                note(node),
            )
            for node in nodes
        ],
    )


def step_seconds(job: Job) -> float | None:
    """The duration of the step, or round, under way at the current rate; None if it is not known."""
    to_go = job.num_steps - job.step
    if job.eta is None or to_go <= 0:
        return None
    return job.eta.total_seconds() / to_go * len(rounds_of(job).steps_from(job.version))


def wait_text(node: Node, job: Job | None) -> str:
    """The wait that a live node reports, once it is longer than usual in a step; else ""."""
    from gradstream.coordinator.timing import judge_wait

    activity = node.activity
    if not node.alive or not activity.waiting_for:
        return ""
    if job is not None and job.job_id == activity.job_id and activity.waiting_since is not None:
        waited = (datetime.now(UTC) - activity.waiting_since).total_seconds()
        if not judge_wait(waited, step_seconds(job))[0]:
            return ""
    return f"{activity.waiting_for} {terminal.format_since(activity.waiting_since)}".strip()


def step_wait(node: Node, job: Job) -> str:
    """The wait of a node that holds up a running job's step; else "". A worker without slots holds up nothing."""
    from gradstream.core.plan.leases import SLOTS

    activity = node.activity
    concerned = job.state == "running" and activity.job_id == job.job_id and activity.waiting_for != SLOTS
    return wait_text(node, job) if concerned else ""


def job_view(job: Job, nodes: Sequence[Node]) -> Any:
    """A job as rich text, one fact per line."""
    from rich.table import Table
    from rich.text import Text

    from gradstream.coordinator.cli.views.progress import counted_tokens

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: Any) -> None:
        table.add_row(name, value if isinstance(value, Text) else Text(str(value)))

    def rows(name: str, values: Sequence[Any]) -> None:
        for index, value in enumerate(values):
            row(name if index == 0 else "", value)

    row("job", job.job_id)
    row("state", terminal.state_text(job.state) + Text(after_state(job.state, job.reason)))
    submitted = f", submitted with {job.submitted_num_steps}" if job.submitted_num_steps != job.num_steps else ""
    row("step", f"{progress_text(job)}{submitted}, epoch {job.epoch}, skipped {job.num_skipped}")
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
        row(f"a {step_word(job.step_breakdown)} takes", step_line(job.step_breakdown))
        if not job.state.ended:
            row("", job.step_breakdown.advice)
    if job.hidden_share is not None:
        row("overlap", f"communication hidden by compute: {terminal.format_share(job.hidden_share)}")
    if job.pipeline is not None:
        row("pipeline", pipeline_text(job.pipeline))
    rows("memory", [memory_text(memory) for memory in job.server_memory])
    row(
        "submitted",
        terminal.format_time(job.submitted) + (f", ended {terminal.format_time(job.ended)}" if job.ended else ""),
    )
    row("files", job.run_directory)
    if not job.state.ended:
        rows("slots", holders_text(job))
        rows("decisions", job.decisions)
        rows("waits for", [Text(text, style="yellow") for text in waits_text(job, nodes)] or ["nothing"])
    return table


def holders_text(job: Job) -> list[str]:
    """List which worker computes which slots, as in "slots 0, 2: worker-0". Many workers share one text."""
    from gradstream.core.plan.leases import slots_text

    slots: dict[str, list[int]] = {}
    for slot, holder in enumerate(job.slot_holders):
        slots.setdefault(holder, []).append(slot)
    texts = [f"{slots_text(held)}: {holder or 'nobody'}" for holder, held in slots.items()]
    return texts if len(texts) <= MAX_HOLDER_LINES else ["; ".join(texts)]


def waits_text(job: Job, nodes: Sequence[Node]) -> list[str]:
    """The waits of a job and its nodes: for what, for whom, and since when."""
    waits = [f"{wait.what}, from {wait.whom}, {terminal.format_since(wait.since)}" for wait in job.waits]
    for node in nodes:
        # Most waits of nodes are already among the job's waits.
        named = any(node.name in f"{wait.what} {wait.whom}" for wait in job.waits)
        text = step_wait(node, job) if not named else ""
        waits += [f"{node.name} waits for {text}"] if text else []
    return waits


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
    state_bytes = memory.state_bytes - memory.newcomer_bytes
    whole = ""
    if memory.newcomer_bytes:
        whole = (
            f"whole bundles for new workers: {terminal.format_bytes(memory.newcomer_bytes)} of at most "
            f"{terminal.format_bytes(memory.max_newcomer_bytes)}; "
        )
    return (
        f"{memory.name}: holds {terminal.format_bytes(state_bytes)} for "
        f"{terminal.format_count(memory.num_parameters)} parameters, {state_bytes / parameters:.2f} B each "
        f"(predicted {memory.predicted_state_bytes / parameters:.2f}); {whole}contributions that wait: "
        f"{terminal.format_bytes(memory.early_bytes)} of at most {terminal.format_bytes(memory.most_early_bytes)}"
    )
