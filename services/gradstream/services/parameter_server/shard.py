"""A server's share of a job for one epoch: its state, the calls that wait for it, and the versions that it publishes.

Everything runs on the event loop except the arithmetic, which runs in the thread pool. Step t has three phases:
  1. accumulate (`accumulation.py`): contributions are added as they come, in fixed point, or in a round with a quorum
     once the leader has decided which slots count (`quorum.py`);
  2. complete (`commit.py`): every fragment has every slot that counts; the server reports to the leader, which answers
     with its decision;
  3. apply (`commit.py`): the optimizer updates each fragment, which is then published as version t + 1.
A version that gets a checkpoint is written in the background (`checkpointing.py`), bundle by bundle.

The other modules compute and return decisions. Only the shard changes the version, its phase and the codecs, starts
tasks and wakes waiting calls. A pull that comes while the shard loads waits for the start version like any other pull.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from gradstream.core.codecs import Payload, codec_named, codec_on_wire
from gradstream.core.codecs.payloads import CodecBook
from gradstream.core.errors import StaleEpochError
from gradstream.core.log import get_logger
from gradstream.core.machine import memory
from gradstream.core.node.faults import Faults
from gradstream.core.plan.bundles import first_push_codec, is_tuned
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.plan import Plan
from gradstream.core.wire.stream_limits import traffic
from gradstream.proto.v1 import coordinator_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server import commit
from gradstream.services.parameter_server.accumulation import Accumulation
from gradstream.services.parameter_server.bundle_state import BundleState
from gradstream.services.parameter_server.checkpointing import CheckpointWriter
from gradstream.services.parameter_server.commit import CompletedStep, Decision, Update
from gradstream.services.parameter_server.early import EarlyBundles
from gradstream.services.parameter_server.leader import Leader
from gradstream.services.parameter_server.loading import load_bundles
from gradstream.services.parameter_server.moment_bundle import moment_bundles
from gradstream.services.parameter_server.publication import PublishedBundle
from gradstream.services.parameter_server.quorum import SlotLeader
from gradstream.services.parameter_server.status import activity_of, status_of
from gradstream.services.parameter_server.tuner import Tuner
from gradstream.services.parameter_server.update_group import UpdateGroup, update_groups
from gradstream.services.parameter_server.weight_bundle import WeightBundle

log = get_logger()
PAUSE_SECONDS = 2.0
"""Time without a commit after which freed memory goes back to the system. Steps in a row would only need it again."""
T = TypeVar("T")


@dataclass
class Phase:
    """The shard's current phase, for `status`."""

    name: str
    since: float


class Shard:
    """A server's share of a job for one epoch.

    `complete_at_leader` and `complete_slots_at_leader` send a report to the leader on another server; the leader does
    not use them.
    """

    def __init__(
        self,
        plan: Plan,
        index: int,
        executor: ThreadPoolExecutor,
        complete_at_leader: Callable[[pb.CompleteStepRequest], Awaitable[Decision]],
        complete_slots_at_leader: Callable[[pb.CompleteSlotsRequest], Awaitable[Sequence[int]]],
        report_step: Callable[[coordinator_pb2.ReportStepRequest], Awaitable[None]],
        report_checkpoint: Callable[[coordinator_pb2.ReportCheckpointRequest], Awaitable[None]],
        report_failure: Callable[[Exception], Awaitable[None]],
        faults: Faults | None = None,
    ):
        self.plan = plan
        self.index = index
        self.traffic = traffic(plan)[index]
        self.version = -1  # -1 while the shard loads
        self.checkpointed = False  # whether `version` gets a checkpoint
        self.skipped = False  # whether the step that made `version` was skipped
        self.failed = False  # whether the shard failed: its state is of no more use
        self.phase = Phase("loading", time.time())
        self.sent_bytes = 0
        # The part of `sent_bytes` that was sent before the last step was completed.
        self._counted_bytes = 0
        recipe = plan.recipe
        form = downlink(recipe.codec.pull)
        self.push_codec = codec_named(first_push_codec(recipe.codec))
        self.pull_codec = form.delta or form.full
        book = CodecBook(plan.tensors, recipe.codec.embedding)
        self.weights = {
            bundle.index: WeightBundle(bundle, plan.tensors, recipe, form, book) for bundle in plan.bundles_of(index)
        }
        self._groups = update_groups(plan, index, self.weights)
        self.moments = moment_bundles(plan, self.weights.values(), book)
        """The bundles of moments that slots share, by the index of their bundle of weights."""
        shared = [state for states in self.moments.values() for state in states]
        self.bundles: dict[int, BundleState] = {**self.weights, **{state.bundle.index: state for state in shared}}
        """All bundles, of weights and of moments."""
        self.num_parameters = sum(state.bundle.num_elements for state in self.weights.values())
        self.accumulation = Accumulation(plan, index, self.bundles, book, executor)
        self.checkpoints = CheckpointWriter(plan, index, self.weights, executor, report_checkpoint, self._spawn)
        self._tuner = Tuner(plan) if is_tuned(recipe.codec) and index == plan.leader else None
        self.leader = Leader(len(plan.servers), plan.start_version, self._decide) if index == plan.leader else None
        local = recipe.local if plan.has_quorum and index == plan.leader else None
        self.slot_leader = SlotLeader(plan, local) if local is not None else None
        self._slot_report: asyncio.Task[None] | None = None  # waits for the leader's decision on the slots of a round
        self._early = EarlyBundles(executor, self._notify)
        self._executor = executor
        self._complete_at_leader = complete_at_leader
        self._complete_slots_at_leader = complete_slots_at_leader
        self._report_step = report_step
        self._report_failure = report_failure
        self._faults = faults or Faults("")
        self._consecutive_skips = 0
        self._halt = False  # on the leader, whether the job halts at the next boundary
        self._full_lock = asyncio.Lock()
        self._changed = asyncio.Event()
        self._closed: StaleEpochError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Initialize the fragments from the plan's source, and publish the start version."""
        version = self.plan.start_version
        weights = list(self.weights.values())
        pulled = [self.bundles[index] for index in self.pulled(version, self.bundles)]
        self._consecutive_skips = await self._run(load_bundles, self.plan, weights, pulled, self.pull_codec)
        for state in pulled:
            state.begin_step(version, self.plan.rounds.is_round(version))
        self._enter(version)
        log.info(
            "shard loaded",
            job=self.plan.job_id,
            epoch=self.plan.epoch,
            version=self.version,
            bundles=len(self.weights),
            source=self.plan.source,
        )

    @property
    def loaded(self) -> bool:
        """Whether the start version has been published."""
        return self.version >= 0

    async def close(self, reason: str) -> None:
        """Stop at once. All waiting calls get a StaleEpochError."""
        self._closed = StaleEpochError(reason)
        for leader in (self.leader, self.slot_leader):
            if leader is not None:
                leader.close(self._closed)
        self._notify()
        if self._pause is not None:
            self._pause.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.accumulation.close()
        # Streams hold references to the shard until they have ended; free its memory now.
        for held in (self.bundles, self.weights, self.moments):
            held.clear()
        self._groups.clear()

    # -- push ------------------------------------------------------------------------------------------------------

    def check(self, header: pb.ContributionHeader) -> None:
        """Check a header of this epoch against the plan before anything is allocated for it. Raises ProtocolError."""
        self.accumulation.check(header, self.version, self.push_codec)

    def offer(self, header: pb.ContributionHeader, payload: Payload) -> pb.PushResult.ValueType:
        """Take a checked and verified contribution once. Raises ProtocolError."""
        result = self.accumulation.offer(header, payload, self.version)
        state = self.bundles[header.bundle]
        if result == pb.PUSH_RESULT_ACCEPTED:
            self._add_waiting(state)
            if self.accumulation.is_whole(header.slot):
                self._report_slots()
        return result

    async def room(self) -> None:
        """Wait while too many bytes of contributions wait to be added. Returns at once when the shard is closed."""
        await self.accumulation.room()

    def _report_slots(self) -> None:
        """Report the slots that are whole here to the leader, in place of an earlier report that waits."""
        if self._slot_report is not None:
            self._slot_report.cancel()
        self._slot_report = self._spawn(self._complete_slots())

    async def _complete_slots(self) -> None:
        request = commit.slots_completion(self.plan, self.index, self.version, self.accumulation.whole)
        leader = self.slot_leader
        slots = await (leader.complete(request) if leader else self._complete_slots_at_leader(request))
        self.accumulation.count(slots)
        for state in self.accumulation.expected:
            self._add_waiting(state)

    def _add_waiting(self, state: BundleState) -> None:
        if state.start_adding():
            self._spawn(self._add(state))

    async def _add(self, state: BundleState) -> None:
        if await self.accumulation.add(state, self.version, self.push_codec):
            self._spawn(self._commit())
        elif state.complete and self.plan.rounds.is_round(self.version):
            num_tokens = self.accumulation.totals().num_tokens  # every slot has contributed to this bundle
            self._spawn(self._early.make(state, num_tokens, self.version + 1, self.pull_codec))

    # -- commit ----------------------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        """Get the leader's decision on a completed step, apply it and publish the next version."""
        plan, step = self.plan, self.version
        self.phase = Phase("committing", time.time())
        totals = self.accumulation.totals()
        slots = self.accumulation.counted if plan.has_quorum and plan.rounds.is_round(step) else ()
        pulled_bytes, self._counted_bytes = self.sent_bytes - self._counted_bytes, self.sent_bytes
        report = commit.completion(plan, self.index, step, self.accumulation.expected, totals, pulled_bytes)
        decision = await (self.leader.complete(report) if self.leader else self._complete_at_leader(report))
        self._faults.decided(step)
        await self._early.settle()
        # From here on version step + 1 is decided. No worker can contribute to it before pulling every fragment, so a
        # contribution that arrives while fragments are being updated belongs to the step that is over.
        # Set before workers learn of the version:
        update = commit.update_of(plan, decision)
        self.checkpointed, self.skipped = decision.checkpoint, decision.skip
        push_codec, self.push_codec = self.push_codec.wire, codec_on_wire(decision.push_codec)
        self.pull_codec = update.pull_codec
        self._enter(step + 1, "applying")
        self._consecutive_skips = decision.consecutive_skips
        self.accumulation.begin_step(step + 1)
        if self.slot_leader is not None:
            self.slot_leader.begin_step(step + 1)
        await asyncio.gather(*(self._apply(group, update) for group in self._groups))
        self._enter(step + 1)
        if decision.checkpoint:
            self.checkpoints.begin(step + 1, self._consecutive_skips)
        self._trim_in_a_pause()
        if self.leader is not None:
            reason = self._tuner.reason if self._tuner is not None else ""
            await self._report_step(commit.step_report(plan, update, totals.num_samples, push_codec, reason, slots))

    def _trim_in_a_pause(self) -> None:
        """Return freed memory once no step has been committed for PAUSE_SECONDS."""
        loop = asyncio.get_running_loop()
        if self._pause is not None:
            self._pause.cancel()
        self._pause = loop.call_later(PAUSE_SECONDS, loop.run_in_executor, self._executor, memory.trim)

    async def _apply(self, group: UpdateGroup, update: Update) -> None:
        """Update and publish bundles, once a checkpoint that is being written no longer needs them as they are.

        Their moments follow: they share the weights' optimizer, and ordinary steps update them with the weights.
        """
        version = update.decision.step + 1
        for weights in group.bundles:
            await self.checkpoints.release(weights.bundle.index)
        await self._run(commit.apply, group, update)
        for weights in group.bundles:
            weights.begin_step(version, self.plan.rounds.is_round(version))
        self._notify()
        if not self.plan.shares_moments(version):
            return
        for weights in group.bundles:
            for state in self.moments[weights.bundle.index]:
                await self._run(commit.apply, state, update)
                state.begin_step(version)
                self._notify()

    def _decide(self, step: int, reports: Mapping[int, pb.CompleteStepRequest]) -> Decision:
        """Decide, on the leader, on a step that all servers have completed and on the codecs of the next step."""
        halt, self._halt = self._halt, False
        push, pull = self.push_codec.name, self.pull_codec
        if self._tuner is not None:
            self._tuner.committed(time.monotonic())
            push, pull = self._tuner.codecs(push, pull)
        loss_sum = self.accumulation.totals().loss_sum
        decision, reason = commit.decide(
            self.plan, CompletedStep(step, reports, loss_sum, self._consecutive_skips, halt, push, pull)
        )
        if decision.skip:
            log.warning("step skipped", job=self.plan.job_id, step=step, reason=reason)
        return decision

    def request_boundary(self) -> None:
        """Make the job halt at the next commit, with a checkpoint and a note in the step's report. On the leader."""
        self._halt = True

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def request_snapshot(self, version: int) -> None:
        """Write a checkpoint of `version` without a commit, if it is the current version and has no checkpoint yet."""
        settled = self._closed is None and self.phase.name not in ("loading", "applying")
        if settled and self.version == version > self.checkpoints.version:
            self.checkpoints.begin(version, self._consecutive_skips)

    async def drain(self) -> None:
        """Wait until a checkpoint that is being written is reported."""
        await self.checkpoints.drain()

    # -- pull ------------------------------------------------------------------------------------------------------

    async def wait_version(self, job_id: str, epoch: int, min_version: int) -> int:
        """Wait until `min_version` is decided; return the version under way. Raises StaleEpochError."""
        while True:
            self.check_epoch(job_id, epoch)
            if self.version >= max(0, min_version):
                return self.version
            await self._changed.wait()

    async def early(
        self, job_id: str, epoch: int, version: int, bundles: Iterable[int]
    ) -> AsyncIterator[tuple[int, PublishedBundle]]:
        """Yield bundles of the next version, `version`, as they are made, until it is decided. Raises StaleEpochError.

        They are for workers with the version before. They do not hold if the round is skipped.
        """
        sent: set[int] = set()
        while True:
            self.check_epoch(job_id, epoch)
            if self.version != version - 1:
                return
            if (made := self._early.next(bundles, sent)) is None:
                await self._changed.wait()
            else:
                sent.add(made[0])
                yield made

    def pulled(self, version: int, bundles: Iterable[int]) -> list[int]:
        """Those of `bundles` that a version has. Moments are pulled only where a round begins with them."""
        shares = self.plan.shares_moments(version)
        return [index for index in bundles if shares or index in self.weights]

    async def published(
        self, job_id: str, epoch: int, bundle: int, version: int, holds: bool
    ) -> PublishedBundle | None:
        """Wait until a bundle is published at `version`; return the messages for a worker.

        `holds` tells whether the worker holds the version before. Returns None when the bundle is already at a later
        version. Raises StaleEpochError.
        """
        while True:
            self.check_epoch(job_id, epoch)
            state = self.bundles[bundle]
            if state.published_version == version:
                break
            if state.published_version > version:
                return None
            await self._changed.wait()
        published = state.delta() if holds else None
        if published is None:
            async with self._full_lock:
                # One call at a time encodes the bundle; other new workers wait and get the same messages.
                published = await self._run(state.full)
        # The next version may be encoded already, though not published yet.
        return published if published.version == version else None

    def measured(self, peer: str, measurement: pb.LinkMeasurement) -> None:
        """Take measurements of the worker behind `peer`. Only a leader of a job with `codec: auto` uses them."""
        if self._tuner is not None:
            self._tuner.measured(peer, measurement)

    # -- status ----------------------------------------------------------------------------------------------------

    def activity(self) -> coordinator_pb2.Activity:
        """The shard's activity, for heartbeats."""
        return activity_of(self)

    def status(self) -> pb.GetServerStatusResponse:
        """The shard's state, for GetServerStatus."""
        return status_of(self)

    # -- helpers ---------------------------------------------------------------------------------------------------

    def check_epoch(self, job_id: str, epoch: int) -> None:
        """Raise StaleEpochError unless this is the current plan of this server."""
        if self._closed is not None:
            raise self._closed
        if job_id != self.plan.job_id or epoch != self.plan.epoch:
            raise StaleEpochError(
                f"plan {job_id} epoch {epoch} is not in force here: this server is at {self.plan.job_id} epoch "
                f"{self.plan.epoch}; take up the plan that the coordinator sends"
            )

    def _enter(self, version: int, phase: str = "accumulating") -> None:
        self.version = version
        self.phase = Phase(phase, time.time())
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _run(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def _spawn(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _guard(self, work: Awaitable[None]) -> None:
        """Run a background task. An error in the task ends the shard and is reported."""
        try:
            await work
        except StaleEpochError as error:
            if self._closed is None:
                log.warning("gave up the step", job=self.plan.job_id, cause=str(error))
        except Exception as error:
            self.failed = True
            await self._report_failure(error)
