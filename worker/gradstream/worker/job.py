"""A worker's part of one job under one plan: pull a version, compute the held slots, push, repeat.

In a pipeline the replica holds the slots and the worker has a place in the replica. The first worker begins attempts;
the others follow.

    install version t ── compute my slots of step t ── wait for version t + 1, or for more slots
          ▲                                                        │
          └────────────────────────────────────────────────────────┘

A worker requests version t + 1 once version t has fully arrived. So fragments of version t + 1 arrive as soon as a
server publishes them, and a worker whose slots others have computed in the meantime notices at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc.aio
import torch

from gradstream.core.log import get_logger
from gradstream.core.node.faults import Faults
from gradstream.core.node.session import NodeSession
from gradstream.core.plan.bundles import is_tuned
from gradstream.core.plan.leases import SLOTS
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.access import SERVER
from gradstream.core.rpc.channel import open_channel
from gradstream.core.telemetry.sampling import Sampling
from gradstream.core.wire.stubs import ParameterServerStub
from gradstream.proto.v1 import coordinator_pb2
from gradstream.worker.attempt import AbandonedError, Attempt, is_round
from gradstream.worker.attempts import AttemptRunner, Attempts, Done
from gradstream.worker.compute import SlotComputer
from gradstream.worker.held_slots import HeldSlots, RoundSlots
from gradstream.worker.pipeline.membership import Membership
from gradstream.worker.pipeline.place import Place
from gradstream.worker.pipeline.servicer import WorkerServicer
from gradstream.worker.progress import ProgressFiles
from gradstream.worker.pull import Puller
from gradstream.worker.push import Pusher
from gradstream.worker.residuals import ResidualKeeper
from gradstream.worker.samples.readers import Readers
from gradstream.worker.status import Reports, Status
from gradstream.worker.timeline import Timeline, clock_ns, measure
from gradstream.worker.weights import Inbox, WeightInstaller

log = get_logger()


@dataclass(frozen=True)
class LoadedModel:
    """The worker's stages in memory."""

    computer: SlotComputer
    installer: WeightInstaller

    def close(self) -> None:
        """Stop decoding and release the model."""
        self.installer.close()
        self.computer.close()


def load_model(plan: Plan, device: torch.device, worker: int, timeline: Timeline) -> LoadedModel:
    """Build the stages of worker number `worker` of a replica. Called in the compute thread. Raises ConfigError."""
    torch.set_num_threads(plan.recipe.training.num_threads)
    computer = SlotComputer(plan, device, worker, timeline)
    try:
        installer = WeightInstaller(plan, computer.models, computer.parameters, timeline)
    except BaseException:
        computer.close()
        raise
    return LoadedModel(computer, installer)


class WorkerJob:
    """A worker's part of one job under one plan. `run` ends only with an error or by cancellation."""

    def __init__(
        self,
        plan: Plan,
        session: NodeSession,
        device: torch.device,
        cache_directory: Path,
        faults: Faults,
        servicer: WorkerServicer,
        place: Place | None = None,
    ):
        """`place` is the worker's place in a replica, None in a job without a pipeline."""
        self.plan = plan
        self.version = -1
        self.worker = place.index if place is not None else 0
        self._session = session
        self._device = device
        self._faults = faults
        self._compute_thread = ThreadPoolExecutor(1, "compute")
        self._channels: list[grpc.aio.Channel] = [
            open_channel(server.address, SERVER, session.transport) for server in plan.servers
        ]
        stubs = [ParameterServerStub(channel) for channel in self._channels]
        self._timeline = Timeline()
        self._held = HeldSlots()
        self._pusher = Pusher(plan, stubs, faults, self._timeline, self.worker)
        self._membership = Membership(
            plan,
            place,
            servicer,
            faults,
            self._timeline,
            session.transport,
            self._held.wake,
            self._pusher.backlog.wake,
        )
        self._puller = Puller(plan, stubs, self._timeline, self.worker)
        self._keeper = ResidualKeeper(plan, session, self._pusher.residuals, self._pusher.encode_thread)
        self._readers = Readers(plan, session, cache_directory)
        self._progress = ProgressFiles(plan, cache_directory)
        self._status = Status()
        self._installer: WeightInstaller | None = None
        self._reports = Reports(plan, session, self._timeline, self._puller)
        self._attempts = Attempts(plan, self._held, self._status, self._timeline)
        self._unsettled = False  # whether this worker was given slots since its residuals last followed a version
        self._superseded = False

    # -- directives ------------------------------------------------------------------------------------------------

    def take_leases(self, number: int, holders: Sequence[str], place: Place | None = None) -> None:
        """Take over a lease table if it is newer than the current one.

        In a pipeline, `place` is this worker's place in that table, or None when the worker has no place there. The
        place's stages must be those that the worker has loaded.
        """
        if number <= self._held.table:
            return
        holder_id = self._session.node_id
        if self.plan.has_pipeline:
            self._membership.move(place)
            holder_id = place.replica.workers[0].node_id if place is not None else ""
        mine = [slot for slot, holder in enumerate(holders) if holder and holder == holder_id]
        if mine != self._held.slots:
            log.info("holds slots", job=self.plan.job_id, slots=mine or "none", table=number)
        if mine:
            self._unsettled = self._keeper.active
        self._held.take(number, mine)

    def take_round(self, slots: RoundSlots) -> None:
        """Compute these slots in their round, and abandon a slot of that round that is not among them."""
        self._held.take_round(slots)
        self._wake()

    def take_sampling(self, sampling: Sampling) -> None:
        """Report timelines by this rule from now on."""
        self._reports.sampling = sampling

    # -- for heartbeats --------------------------------------------------------------------------------------------

    def activity(self) -> coordinator_pb2.Activity:
        """The worker's activity, for heartbeats."""
        activity = self._status.activity(
            self.plan.job_id,
            self.version,
            self._pusher,
            self._puller,
            self._membership.neighbours,
            self._installer,
        )
        if activity.detail and self._status.round.slot in self._held.copies(self.version):
            activity.detail += ", a copy"
        activity.kept.extend(self._progress.kept)
        return activity

    # -- from loading to the end -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled. Raises GradstreamError when this worker cannot go on."""
        loading = self._compute_thread.submit(load_model, self.plan, self._device, self.worker, self._timeline)
        try:
            model = await asyncio.wrap_future(loading)
            self._installer = model.installer
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pusher.run())
                group.create_task(self._walk(model))
                group.create_task(self._membership.watch())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._superseded = True
            self._wake()
            self._reports.close()
            self._keeper.close()
            await self._puller.stop()
            await self._membership.leave()
            await asyncio.to_thread(self._compute_thread.shutdown, True, cancel_futures=True)
            # A model that was loaded while this task was cancelled has threads and hooks, too.
            if not loading.cancelled() and loading.exception() is None:
                loading.result().close()
            self._pusher.close()
            self._readers.close()
            await asyncio.to_thread(self._progress.close)
            for channel in self._channels:
                await channel.close(None)

    async def drain(self) -> None:
        """Wait until the residuals that are being written for a checkpoint are reported, or their reports queued."""
        await self._keeper.drain()

    # -- the walk over versions ------------------------------------------------------------------------------------

    async def _walk(self, model: LoadedModel) -> None:
        runner = AttemptRunner(
            model.computer,
            self._compute_thread,
            self._readers,
            self._keeper,
            self._pusher,
            self._faults,
            self._timeline,
            self._status,
            self._reports,
            model.installer,
            self._progress,
        )
        upcoming: asyncio.Task[Inbox] | None = None
        begun_ns: int | None = None  # when the current version arrived; None if the worker has rested since
        try:
            while True:
                if not self._held.slots:
                    await self._rest(upcoming)
                    upcoming = None
                    continue
                if upcoming is None:
                    begun_ns = None
                    upcoming = asyncio.create_task(self._puller.next(self.plan.start_version))
                    names = ", ".join(server.name for server in self.plan.servers)
                    await self._status.wait(f"weights from {names}", asyncio.wait([upcoming]))
                inbox = await upcoming
                taken = self._timeline.take()
                measured = measure(taken) if is_tuned(self.plan.recipe.codec) else None
                upcoming = asyncio.create_task(self._puller.next(inbox.version + 1, inbox.version, measured))
                now_ns = clock_ns()
                period_ns = None if begun_ns is None else (begun_ns, now_ns)
                self._reports.timeline(taken, self.version, period_ns, self._held.last)
                begun_ns = now_ns
                if not await self._work(model, runner, inbox, upcoming) and self._held.slots:
                    await _cancelled(upcoming)
                    upcoming = None
        finally:
            await _cancelled(upcoming)

    async def _rest(self, upcoming: asyncio.Task[Inbox] | None) -> None:
        """Wait for slots, without pulling weights: the worker pulls again once it holds slots.

        Exception: where codecs keep residuals, the worker still waits to learn whether the next version has a
        checkpoint, because a pause takes the slots away as soon as that version is decided.
        """
        if upcoming is None and self._unsettled:
            upcoming = asyncio.create_task(self._puller.next(self.plan.start_version))
        try:
            if upcoming is not None and self._keeper.active:
                leases = asyncio.ensure_future(self._held.next_change())
                try:
                    await self._status.wait(
                        SLOTS,
                        asyncio.wait([upcoming, leases], return_when=asyncio.FIRST_COMPLETED),
                    )
                finally:
                    leases.cancel()
                if upcoming.done():
                    await self._hear_of(upcoming.result())
        finally:
            await _cancelled(upcoming)
            await self._puller.stop()
        if not self._membership.has_met:
            await self._membership.leave()
        if not self._held.slots:
            await self._status.wait(SLOTS, self._held.next_change())

    async def _hear_of(self, inbox: Inbox) -> None:
        """Bring the slots' residuals to a version, and write them if that version has a checkpoint."""
        if self._keeper.busy:
            await self._status.wait("its last residuals to be written", self._keeper.drain())
        self._unsettled = False
        self._keeper.arrived(inbox.version, inbox.checkpoint, self._held.last)

    async def _work(
        self, model: LoadedModel, runner: AttemptRunner, inbox: Inbox, upcoming: asyncio.Task[Inbox]
    ) -> bool:
        """Compute this version's slots until the next version comes. Returns False if it must be pulled again."""
        version = self.version = inbox.version
        for stream in self._pusher.streams:
            stream.forget_before(version)
        self._progress.forget_before(version)
        self._status.round.begin(version if self.plan.rounds.is_round(version) else None)
        self._pusher.use_codec(inbox.push_codec)
        await self._hear_of(inbox)
        model.installer.install(inbox)
        done: Done = set()
        membership = self._membership
        upcoming.add_done_callback(lambda _: self._wake())
        while not upcoming.done():
            place = membership.place
            if not self._held.slots:
                return False
            if place is not None and not membership.has_met:
                # What this worker computed in another replica may be lost with a member of that replica.
                done.clear()
                await membership.meet(place, model.computer.hidden_size)
                continue  # another table may have come in the meantime
            if place is None or place.is_first:
                if membership.again:
                    done.clear()
                    membership.again = False
                attempt = await self._attempts.begin(version, done, membership.neighbours)
                if attempt is None:
                    await self._attempts.wait_for_next(version, upcoming)
                    continue
            else:
                assert membership.neighbours is not None
                attempt = await self._attempts.follow(version, place, membership.neighbours, upcoming)
                if attempt is None:
                    continue
            try:
                await runner.run(attempt, membership.neighbours, partial(self._is_wanted, attempt, upcoming))
            except AbandonedError:
                if membership.neighbours is not None and place is not None and place.is_first:
                    membership.neighbours.void()
                if upcoming.done():
                    break
                if inbox.failed or self._superseded:
                    if membership.neighbours is not None:
                        membership.neighbours.abandon(attempt, "the weights that it pulled broke off")
                    return False
                continue
            done.update((slot, attempt.validate) for slot in attempt.slots)
        return True

    def _is_wanted(self, attempt: Attempt, upcoming: asyncio.Task[Inbox]) -> bool:
        """Whether the next version has not come, and the slot is still to be computed here. Called from any thread."""
        if upcoming.done() or self._superseded:
            return False
        return not (is_round(self.plan, attempt) and self._held.drops(attempt.version, attempt.slots[0]))

    def _wake(self) -> None:
        """Wake the compute thread to check whether its attempt is still wanted."""
        self._membership.wake()
        self._pusher.backlog.wake()


async def _cancelled(task: asyncio.Task[Inbox] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
