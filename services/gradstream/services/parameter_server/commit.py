"""The commit of a step as plain functions: completion, the leader's decision, its application, the leader's report.

`Shard._commit` runs these phases in order on each server. `leader.py` makes servers wait for each other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from gradstream.core.codecs import codec_named, codec_on_wire
from gradstream.core.errors import ProtocolError
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.learning_rate import rate_of_step
from gradstream.proto.v1 import coordinator_pb2, plan_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.accumulation import StepTotals
from gradstream.services.parameter_server.bundle_state import BundleState
from gradstream.services.parameter_server.update_group import UpdateGroup


@dataclass(frozen=True)
class Decision:
    """The leader's decision on a step, which all servers carry out."""

    step: int
    skip: bool
    clip_scale: float
    num_tokens: int
    grad_norm: float
    loss: float
    pushed_bytes: int
    pulled_bytes: int
    consecutive_skips: int
    checkpoint: bool = False
    halt: bool = False
    push_codec: plan_pb2.Codec.ValueType = plan_pb2.CODEC_UNSPECIFIED
    pull_codec: plan_pb2.Codec.ValueType = plan_pb2.CODEC_UNSPECIFIED

    @classmethod
    def from_proto(cls, answer: pb.CompleteStepResponse, step: int) -> Decision:
        """Read the leader's decision on `step` on another server.

        Norm, loss and bytes are not filled in: only the leader reports them. Raises ProtocolError for an invalid
        decision.
        """
        if answer.step != step or not answer.num_tokens or not 0 <= answer.clip_scale <= 1:
            raise ProtocolError(
                f"the leader decided on step {answer.step} of {answer.num_tokens} tokens with a scale of "
                f"{answer.clip_scale:g}, when it was asked for step {step}"
            )
        return cls(
            step=answer.step,
            skip=answer.skip,
            clip_scale=answer.clip_scale,
            num_tokens=answer.num_tokens,
            grad_norm=math.nan,
            loss=math.nan,
            pushed_bytes=0,
            pulled_bytes=0,
            consecutive_skips=answer.consecutive_skips,
            checkpoint=answer.checkpoint,
            push_codec=answer.push_codec,
            pull_codec=answer.pull_codec,
        )

    def to_proto(self) -> pb.CompleteStepResponse:
        """The answer that tells the decision to the other servers."""
        return pb.CompleteStepResponse(
            step=self.step,
            skip=self.skip,
            clip_scale=self.clip_scale,
            num_tokens=self.num_tokens,
            checkpoint=self.checkpoint,
            consecutive_skips=self.consecutive_skips,
            push_codec=self.push_codec,
            pull_codec=self.pull_codec,
        )


# -- complete ----------------------------------------------------------------------------------------------------------


def slots_completion(plan: Plan, server: int, step: int, slots: Iterable[int]) -> pb.CompleteSlotsRequest:
    """Make a server's report to the leader that its bundles have every contribution of these slots to a round."""
    return pb.CompleteSlotsRequest(job_id=plan.job_id, epoch=plan.epoch, step=step, server=server, slots=slots)


def completion(
    plan: Plan, server: int, step: int, states: Iterable[BundleState], totals: StepTotals, pulled_bytes: int
) -> pb.CompleteStepRequest:
    """Make a server's report to the leader that its bundles have every contribution to the step.

    `pulled_bytes` is the number of bytes that the server has sent to workers since it completed the step before.
    """
    return pb.CompleteStepRequest(
        job_id=plan.job_id,
        epoch=plan.epoch,
        step=step,
        server=server,
        squared_norms=[norm for state in states for norm in state.reported_norms()],
        num_tokens=totals.num_tokens,
        pushed_bytes=totals.pushed_bytes,
        pulled_bytes=pulled_bytes,
    )


# -- decide ------------------------------------------------------------------------------------------------------------


def decide_commit(
    step: int,
    reports: Mapping[int, pb.CompleteStepRequest],
    loss_sum: float,
    clip_norm: float,
    consecutive_skips: int,
) -> tuple[Decision, str]:
    """Commit or skip a step that all servers have completed; return (decision, reason).

    The global norm sums every fragment's squared norm exactly (math.fsum), so it does not depend on the placement of
    fragments. The clip scale is computed as in torch.nn.utils.clip_grad_norm_.
    """
    num_tokens = next(iter(reports.values())).num_tokens
    pushed_bytes = sum(report.pushed_bytes for report in reports.values())
    pulled_bytes = sum(report.pulled_bytes for report in reports.values())
    squared = [value for report in reports.values() for value in report.squared_norms]
    finite = all(map(math.isfinite, squared)) and math.isfinite(loss_sum)
    try:
        grad_norm = math.sqrt(math.fsum(squared)) / num_tokens if finite else math.nan
    except OverflowError:  # the sum of finite norms may not be finite
        finite, grad_norm = False, math.nan
    loss = loss_sum / num_tokens
    base = Decision(step, False, 1.0, num_tokens, grad_norm, loss, pushed_bytes, pulled_bytes, 0)
    if not finite:
        skips = consecutive_skips + 1
        return replace(base, skip=True, consecutive_skips=skips), f"the gradient of step {step} is not finite"
    scale = min(1.0, clip_norm / (grad_norm + 1e-6))
    return replace(base, clip_scale=scale), "all servers have every contribution"


@dataclass(frozen=True)
class CompletedStep:
    """A step that every server has completed, as the leader knows it."""

    step: int
    reports: Mapping[int, pb.CompleteStepRequest]
    """The servers' reports, by server."""
    loss_sum: float
    consecutive_skips: int
    """Number of steps skipped directly before this one."""
    halt: bool
    """Whether the coordinator has requested that the job halts at this boundary."""
    push_codec: str
    pull_codec: str
    """The codecs of the next step, by name."""


def decide(plan: Plan, completed: CompletedStep) -> tuple[Decision, str]:
    """Decide on a completed step, as its leader; return (decision, reason).

    A round's mean difference is not clipped: its slots have clipped the gradients of their inner steps. A checkpoint is
    due at the last version, where `checkpoint.interval_steps` pass and at a halt.
    """
    recipe = plan.recipe
    clip_norm = math.inf if plan.rounds.is_round(completed.step) else recipe.optimizer.clip_norm
    decision, reason = decide_commit(
        completed.step, completed.reports, completed.loss_sum, clip_norm, completed.consecutive_skips
    )
    version = completed.step + 1
    due = version == plan.last_version or plan.rounds.passes(version, recipe.checkpoint.interval_steps)
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
    """A decision, with the learning rate and the codec for applying it to a bundle."""

    decision: Decision
    rate: float
    """The learning rate of the step, or of the round's last inner step."""
    pull_codec: str
    """The codec in which the next version is published, by name."""
    num_inner_steps: int
    """Number of inner steps of the round that the commit ends; 0 for an ordinary step."""


def update_of(plan: Plan, decision: Decision) -> Update:
    """Make the update that a decision applies to each bundle of a server."""
    steps = plan.rounds.steps_from(decision.step)
    num_inner_steps = len(steps) if plan.rounds.is_round(decision.step) else 0
    rate = rate_of_step(plan.recipe, steps[-1])
    return Update(decision, rate, codec_on_wire(decision.pull_codec).name, num_inner_steps)


def apply(state: BundleState | UpdateGroup, update: Update) -> None:
    """Update a bundle, or a group of bundles, and encode it for pulls. Worker thread."""
    decision = update.decision
    if decision.skip:
        pass
    elif update.num_inner_steps:
        state.apply_round(decision.num_tokens, update.num_inner_steps)
    else:
        state.apply(decision.num_tokens, decision.clip_scale, update.rate, decision.step)
    state.publish(decision.step + 1, update.pull_codec)


# -- report ------------------------------------------------------------------------------------------------------------


def step_report(
    plan: Plan,
    update: Update,
    num_samples: int,
    push_codec: plan_pb2.Codec.ValueType,
    codec_reason: str,
    slots: Sequence[int] = (),
) -> coordinator_pb2.ReportStepRequest:
    """Make the leader's report of a committed step.

    `push_codec` is the codec of the step's contributions. `slots` are those that counted in a round with a quorum.
    """
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
        pulled_bytes=decision.pulled_bytes,
        push_codec=push_codec,
        pull_codec=decision.pull_codec,
        codec_reason=codec_reason,
        slots=slots,
    )
