"""A worker's reports on its job to the coordinator: its activity in heartbeats, validation losses, timelines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any, TypeVar

import grpc.aio

from gradstream.core.errors import one_line
from gradstream.core.log import get_logger
from gradstream.core.node.session import NodeSession
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.channel import UNARY_TIMEOUT_SECONDS
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.core.telemetry.sampling import Sampling
from gradstream.proto.v1 import coordinator_pb2
from gradstream.worker.outbound import Outbound, with_refusal
from gradstream.worker.pipeline.neighbours import Neighbours
from gradstream.worker.pull import Puller
from gradstream.worker.push import Pusher
from gradstream.worker.round_report import RoundReport
from gradstream.worker.timeline import RawSpan, Timeline
from gradstream.worker.weights import WeightInstaller

log = get_logger()
T = TypeVar("T")


class Status:
    """The current activity of a job's task: its phase, what it waits for, and since when.

    Runs on the event loop, except `count_microbatch`, `detail` and `round`.
    """

    def __init__(self) -> None:
        self._phase = "loading"
        self._waiting_for = ""
        self._since = time.time()
        self._num_microbatches = 0  # begun
        self.detail = ""
        """What is computed within the phase, for people. Set in the compute thread."""
        self.round = RoundReport()

    def enter(self, phase: str) -> None:
        """Enter a phase, in which the task waits for nothing."""
        self._phase, self._waiting_for, self._since = phase, "", time.time()

    async def wait(self, waiting_for: str, what: Awaitable[T]) -> T:
        """Await `what`; until it is done, `status` shows `waiting_for`."""
        self._waiting_for, self._since = waiting_for, time.time()
        try:
            return await what
        finally:
            self._waiting_for, self._since = "", time.time()

    def count_microbatch(self) -> None:
        """Count a microbatch that begins. Called in the compute thread."""
        self._num_microbatches += 1

    def activity(
        self,
        job_id: str,
        version: int,
        pusher: Pusher,
        puller: Puller,
        neighbours: Neighbours | None,
        installer: WeightInstaller | None,
    ) -> coordinator_pb2.Activity:
        """The worker's activity, for heartbeats.

        As the reason of a wait, a peer that cannot be reached comes first, then what the compute thread waits for: a
        neighbour, servers that have to acknowledge earlier slots, or weights that are under way.
        """
        links = neighbours.links.values() if neighbours is not None else ()
        outbounds: list[Outbound[Any]] = [*pusher.streams, *links]
        waiting_for, since = self._waiting_for, self._since
        cut_off, cut_since = _cut_off(outbounds, puller)
        waits = (
            neighbours.waiting if neighbours is not None else None,
            pusher.backlog.waiting,
            installer.waiting if installer is not None else None,
        )
        for wait in filter(None, waits):  # the compute thread is in one of them at most
            waiting_for, since = wait
        if cut_off:
            waiting_for, since = f"{cut_off} to answer", cut_since
        received_bytes = puller.received_bytes + (neighbours.received_bytes if neighbours is not None else 0)
        return coordinator_pb2.Activity(
            job_id=job_id,
            phase="waiting" if waiting_for else self._phase,
            step=max(0, version),
            waiting_for=waiting_for,
            waiting_since_unix_ms=int(since * 1000) if waiting_for else 0,
            sent_bytes=sum(outbound.sent_bytes for outbound in outbounds),
            received_bytes=received_bytes,
            unreachable=cut_off,
            unreachable_seconds=max(0.0, time.time() - cut_since) if cut_off else 0.0,
            detail=self.detail,
            progress=self._num_microbatches + puller.num_bundles,
            # Without all of the version no slot can begin.
            round=self.round.message() if not puller.is_receiving else None,
        )


def _cut_off(outbounds: Sequence[Outbound[Any]], puller: Puller) -> tuple[str, float]:
    """The peer that has been unreachable for longest, and since when in Unix seconds; ("", 0) when there is none.

    A peer that answers with a refusal is named with the refusal.
    """
    found = [(with_refusal(outbound.title, outbound.refusal), outbound.cut_off_since) for outbound in outbounds]
    known = [(title, since) for title, since in found if since is not None]
    pulled = puller.cut_off
    return min([*known, *([pulled] if pulled is not None else [])], key=lambda peer: peer[1], default=("", 0.0))


class Reports:
    """Sends reports of one job in the background, because the coordinator is not in the path of a step."""

    def __init__(self, plan: Plan, session: NodeSession, timeline: Timeline, puller: Puller):
        self._plan = plan
        self._session = session
        self._timeline = timeline
        self._puller = puller
        self._server_of = [bundle.server for bundle in (*plan.bundles, *plan.moment_bundles)]
        self._timeline_report: asyncio.Task[None] | None = None
        self.sampling = Sampling()
        """Which timelines the coordinator wants."""

    def close(self) -> None:
        """Give up a timeline that is not sent yet."""
        if self._timeline_report is not None:
            self._timeline_report.cancel()

    def validation(self, version: int, slot: int, loss_sum: float, num_tokens: int) -> None:
        """Report the loss of a slot's validation pass: in nats, summed over its target tokens."""
        report = coordinator_pb2.ReportValidationRequest(
            job_id=self._plan.job_id,
            epoch=self._plan.epoch,
            version=version,
            slot=slot,
            loss_sum=loss_sum,
            num_tokens=num_tokens,
        )
        self._session.report_later(partial(self._session.stub.ReportValidation, report, timeout=UNARY_TIMEOUT_SECONDS))

    def timeline(
        self, taken: list[RawSpan], version: int, period_ns: tuple[int, int] | None, slots: Sequence[int]
    ) -> None:
        """Report the timeline and period of a version that is over, if the coordinator wants it.

        `slots` are those that the worker held. Best effort: the report is sent once and may be lost.
        """
        late = self._timeline_report is not None and not self._timeline_report.done()
        # While an earlier report is under way this one is dropped: steps can be faster than the coordinator.
        if version >= 0 and taken and not late and self.sampling.reports(version):
            has_spans = self.sampling.has_spans(version, slots)
            self._timeline_report = asyncio.create_task(self._send_timeline(taken, version, period_ns, has_spans))

    async def _send_timeline(
        self, taken: list[RawSpan], version: int, period_ns: tuple[int, int] | None, has_spans: bool
    ) -> None:
        plan = self._plan
        if version + 1 < plan.last_version:
            # The weights that the worker waits for are more urgent. After the last step the worker waits for none, and
            # the job may end before they have arrived.
            await self._puller.settled()
        report = await asyncio.to_thread(
            self._timeline.report,
            taken,
            plan.job_id,
            plan.epoch,
            version,
            self._session.node_id,
            period_ns,
            self._server_of,
            has_spans,
        )
        try:
            await self._session.stub.ReportTimeline(report, timeout=UNARY_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as rpc_error:
            log.debug("a timeline was lost", version=version, cause=one_line(error_from_rpc(rpc_error, "coordinator")))
