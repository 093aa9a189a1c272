"""The commit of a step, as plain functions: what a server tells the leader, what the leader decides, what the decision
does to each bundle, and what the leader reports.

A server's own order of these phases is `Shard._commit`; who waits for whom is in `leader.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from gradstream.core.codecs import codec_named, codec_on_wire
from gradstream.core.errors import one_line
from gradstream.core.plan.plan import Plan
from gradstream.proto.v1 import coordinator_pb2, plan_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.accumulation import StepTotals
from gradstream.services.parameter_server.bundle_state import BundleState, FragmentState
from gradstream.services.parameter_server.leader import Decision, decide_commit
from gradstream.services.parameter_server.optimizer import learning_rate

# -- complete ----------------------------------------------------------------------------------------------------------


def completion(
    plan: Plan, server: int, step: int, states: Iterable[BundleState], totals: StepTotals
) -> pb.CompleteStepRequest:
    """What a server tells the leader once its bundles have every contribution to the step."""
    return pb.CompleteStepRequest(
        job_id=plan.job_id,
        epoch=plan.epoch,
        step=step,
        server=server,
        squared_norms=[norm for state in states for norm in state.squared_norms],
        num_tokens=totals.num_tokens,
        pushed_bytes=totals.pushed_bytes,
    )


# -- decide ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompletedStep:
    """A step that every server has completed, as its leader sees it."""

    step: int
    reports: Mapping[int, pb.CompleteStepRequest]
    """By server."""
    loss_sum: float
    consecutive_skips: int
    """Skipped steps just before this one."""
    halt: bool
    """Whether the coordinator has asked for the job to halt at this boundary."""
    push_codec: str
    pull_codec: str
    """The codecs of the next step, by name."""


def decide(plan: Plan, completed: CompletedStep) -> tuple[Decision, str]:
    """The leader's decision on a completed step and its reason.

    A checkpoint is due at the last version, at every `checkpoint.interval_steps` and at a halt.
    """
    recipe = plan.recipe
    decision, reason = decide_commit(
        completed.step,
        completed.reports,
        completed.loss_sum,
        recipe.optimizer.clip_norm,
        completed.consecutive_skips,
    )
    version = completed.step + 1
    interval = recipe.checkpoint.interval_steps
    due = version == plan.num_steps or (interval > 0 and version % interval == 0)
    decision = replace(
        decision,
        checkpoint=due or completed.halt,
        halt=completed.halt,
        push_codec=codec_named(completed.push_codec).wire,
        pull_codec=codec_named(completed.pull_codec).wire,
    )
    return decision, reason


# -- apply -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """What a decision does to each bundle of a server."""

    decision: Decision
    rate: float
    """The step's learning rate."""
    pull_codec: str
    """The codec in which the next version is published, by name."""


def update_of(plan: Plan, decision: Decision) -> Update:
    """What a decision does to each bundle of a server."""
    recipe = plan.recipe
    rate = learning_rate(decision.step, plan.num_steps, recipe.optimizer, recipe.schedule)
    return Update(decision, rate, codec_on_wire(decision.pull_codec).name)


@dataclass(frozen=True)
class Applied:
    """A bundle that was updated: its snapshot for a checkpoint, empty where none is due; None where there is no memory
    for one, and why."""

    snapshot: list[FragmentState] | None
    cause: str = ""


def apply(state: BundleState, update: Update) -> Applied:
    """Update a bundle's weights, make the copies that workers pull, and the snapshot where a checkpoint is due; worker
    thread."""
    decision = update.decision
    if not decision.skip:
        state.apply(decision.num_tokens, decision.clip_scale, update.rate)
    state.publish(decision.step + 1, update.pull_codec)
    try:
        return Applied(state.snapshot() if decision.checkpoint else [])
    except Exception as error:
        return Applied(None, one_line(error))


# -- report ------------------------------------------------------------------------------------------------------------


def step_report(
    plan: Plan, update: Update, num_samples: int, push_codec: plan_pb2.Codec.ValueType, codec_reason: str
) -> coordinator_pb2.ReportStepRequest:
    """The leader's report of a committed step; `push_codec` is the one in which its contributions came."""
    decision = update.decision
    return coordinator_pb2.ReportStepRequest(
        job_id=plan.job_id,
        epoch=plan.epoch,
        step=decision.step,
        num_tokens=decision.num_tokens,
        num_samples=num_samples,
        loss=decision.loss,
        grad_norm=decision.grad_norm,
        learning_rate=update.rate,
        skipped=decision.skip,
        consecutive_skips=decision.consecutive_skips,
        unix_ms=int(time.time() * 1000),
        halted=decision.halt,
        pushed_bytes=decision.pushed_bytes,
        push_codec=push_codec,
        pull_codec=decision.pull_codec,
        codec_reason=codec_reason,
    )
