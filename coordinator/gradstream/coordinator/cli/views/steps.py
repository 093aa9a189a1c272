"""Steps for people. With local steps each inner step of a round counts, and a commit is called a round."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradstream.core.recipe.rounds import Rounds

if TYPE_CHECKING:
    from gradstream.client import Job, Node, StepMetrics


def rounds_of(job: Job) -> Rounds:
    """The steps for which each version of a job stands, from its recipe."""
    local = job.recipe.get("local") or {}
    return Rounds(job.num_steps, local.get("steps", 0), local.get("after", 0))


def progress_text(job: Job) -> str:
    """The steps that are done, as "90 of 2400 (4 %), 3 of 80 rounds of 30 steps"."""
    percent = f" ({100 * job.step / job.num_steps:.0f} %)" if job.num_steps else ""
    rounds = rounds_of(job)
    done = f", {rounds.rounds_at(job.version)} of {rounds.num_rounds} rounds of {rounds.length} steps"
    return f"{job.step} of {job.num_steps}{percent}{done if rounds.length else ''}"


def node_step(node: Node, job: Job | None) -> int:
    """The number of steps that are done at the version at which a node works."""
    version = node.activity.step
    return rounds_of(job).steps_at(version) if job is not None and node.activity.job_id == job.job_id else version


def round_name(rounds: Rounds, version: int) -> str:
    """The name of a version in a trace: of the round that starts from it, if one does."""
    if not rounds.is_round(version):
        return f"version {version}"
    return f"{rounds.commit_text(version)}, {rounds.title(version)}"


def row_steps(row: StepMetrics) -> str:
    """The steps of a row of metrics: "90", or "90-119" of a round."""
    num_steps = row.num_steps or 1
    return f"{row.step}-{row.step + num_steps - 1}" if num_steps > 1 else str(row.step)
