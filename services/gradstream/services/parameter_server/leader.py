"""The leader's part of a commit: hear from all servers, decide once, remember the decision."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from gradstream.core.errors import ProtocolError
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.proto.v1 import plan_pb2


@dataclass(frozen=True)
class Decision:
    """What all servers do with a step."""

    step: int
    skip: bool
    clip_scale: float
    num_tokens: int
    grad_norm: float
    loss: float
    pushed_bytes: int
    consecutive_skips: int
    checkpoint: bool = False
    halt: bool = False
    push_codec: plan_pb2.Codec.ValueType = plan_pb2.CODEC_UNSPECIFIED
    pull_codec: plan_pb2.Codec.ValueType = plan_pb2.CODEC_UNSPECIFIED

    @classmethod
    def from_proto(cls, answer: pb.CompleteStepResponse, step: int) -> Decision:
        """The decision on `step` as another server learns it; norm, loss and bytes are the leader's to report. Raises
        ProtocolError for one that no leader makes."""
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
            consecutive_skips=answer.consecutive_skips,
            checkpoint=answer.checkpoint,
            push_codec=answer.push_codec,
            pull_codec=answer.pull_codec,
        )

    def to_proto(self) -> pb.CompleteStepResponse:
        """The answer that carries the decision to the other servers."""
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


def decide_commit(
    step: int,
    reports: Mapping[int, pb.CompleteStepRequest],
    loss_sum: float,
    clip_norm: float,
    consecutive_skips: int,
) -> tuple[Decision, str]:
    """Commit or skip a step that all servers have completed; return (decision, reason).

    The global norm sums every fragment's squared norm exactly (math.fsum), so it does not depend on which server held
    what. The scale is that of torch.nn.utils.clip_grad_norm_.
    """
    num_tokens = next(iter(reports.values())).num_tokens
    pushed_bytes = sum(report.pushed_bytes for report in reports.values())
    squared = [value for report in reports.values() for value in report.squared_norms]
    finite = all(map(math.isfinite, squared)) and math.isfinite(loss_sum)
    try:
        grad_norm = math.sqrt(math.fsum(squared)) / num_tokens if finite else math.nan
    except OverflowError:  # of finite norms the sum may not be
        finite, grad_norm = False, math.nan
    loss = loss_sum / num_tokens
    base = Decision(step, False, 1.0, num_tokens, grad_norm, loss, pushed_bytes, 0)
    if not finite:
        skips = consecutive_skips + 1
        return replace(base, skip=True, consecutive_skips=skips), f"the gradient of step {step} is not finite"
    scale = min(1.0, clip_norm / (grad_norm + 1e-6))
    return replace(base, clip_scale=scale), "all servers have every contribution"


class Leader:
    """Collects the servers' reports of a step and gives each the same decision, however often it asks."""

    def __init__(
        self,
        num_servers: int,
        start_version: int,
        decide: Callable[[int, Mapping[int, pb.CompleteStepRequest]], Decision],
    ):
        self._num_servers = num_servers
        self._decide = decide
        self._step = start_version
        self._reports: dict[int, pb.CompleteStepRequest] = {}
        self._pending: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._last: Decision | None = None

    @property
    def missing(self) -> list[int]:
        """Indices of the servers that have not completed the step under way, once one has; else none."""
        return [server for server in range(self._num_servers) if server not in self._reports] if self._reports else []

    async def complete(self, report: pb.CompleteStepRequest) -> Decision:
        """Take a server's report and return the decision when all have reported. Raises ProtocolError."""
        if self._last is not None and report.step == self._last.step:
            return self._last
        if report.step != self._step or report.server >= self._num_servers:
            raise ProtocolError(
                f"server {report.server} completed step {report.step} while step {self._step} is under way; "
                f"it must load the plan anew"
            )
        if not report.num_tokens or any(other.num_tokens != report.num_tokens for other in self._reports.values()):
            raise ProtocolError(
                f"server {report.server} counted {report.num_tokens} tokens in step {report.step}, others did not"
            )
        if any(norm < 0 for norm in report.squared_norms):
            raise ProtocolError(f"server {report.server} reports a squared norm below 0 for step {report.step}")
        self._reports[report.server] = report
        pending = self._pending
        if len(self._reports) == self._num_servers:
            decision = self._decide(report.step, self._reports)
            self._last = decision
            self._step += 1
            self._reports = {}
            self._pending = asyncio.get_running_loop().create_future()
            pending.set_result(decision)
        return await asyncio.shield(pending)

    def close(self, error: Exception) -> None:
        """Wake everyone who waits, with `error`."""
        if not self._pending.done():
            self._pending.set_exception(error)
            self._pending.exception()  # nobody may be waiting
