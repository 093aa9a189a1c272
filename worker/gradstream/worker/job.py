"""A worker's part of one job under one plan: pull a version, compute the slots it holds, push, and again.

In a pipeline it is the replica that holds the slots, and the worker has a place in it. The first worker begins tries of
them, the others follow.

    install version t ── compute my slots of step t ── wait for version t + 1, or for more slots
          ▲                                                        │
          └────────────────────────────────────────────────────────┘

The next version is asked for as soon as all of one is here, so its fragments arrive while the worker still waits for
nothing else, and from then on a worker whose slots others have computed in the meantime learns it at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import torch

from gradstream.core.errors import one_line
from gradstream.core.log import get_logger
from gradstream.core.node.faults import Faults
from gradstream.core.node.session import NodeSession
from gradstream.core.pipeline.schedule import most_slots
from gradstream.core.plan.bundles import is_tuned
from gradstream.core.plan.leases import SLOTS
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.access import SERVER
from gradstream.core.rpc.channel import UNARY_TIMEOUT_SECONDS, open_channel
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.core.telemetry.timeline import SpanKind
from gradstream.core.wire.stubs import ParameterServerStub
from gradstream.proto.v1 import coordinator_pb2
from gradstream.worker.attempt import AbandonedError, Alone, Exchange, Try, num_microbatches, num_samples
from gradstream.worker.compute import SlotComputer
from gradstream.worker.outbound import Outbound
from gradstream.worker.pipeline.inbound import FORWARD
from gradstream.worker.pipeline.neighbours import Neighbours, Place
from gradstream.worker.pipeline.servicer import WorkerServicer
from gradstream.worker.pull import Puller
from gradstream.worker.push import Pusher
from gradstream.worker.residuals import ResidualKeeper
from gradstream.worker.samples.data import SlotReader, Split
from gradstream.worker.samples.readers import Readers
from gradstream.worker.timeline import RawSpan, Timeline, measure
from gradstream.worker.weights import Inbox, WeightInstaller

log = get_logger()
T = TypeVar("T")


@dataclass(frozen=True)
class Leases:
    """The slots this worker holds, and the number of the table that says so."""

    number: int
    slots: list[int]


class JobRun:
    """See the module's docstring. `run` ends only by an error or by being cancelled."""

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
        """`place` is that in a replica, None in a job without a pipeline."""
        self.plan = plan
        self.place = place
        self.version = -1
        self._session = session
        self._device = device
        self._faults = faults
        self._compute_thread = ThreadPoolExecutor(1, "compute")
        self._channels: list[grpc.aio.Channel] = [
            open_channel(server.address, SERVER, session.transport) for server in plan.servers
        ]
        stubs = [ParameterServerStub(channel) for channel in self._channels]
        self._timeline = Timeline()
        self._timeline_report: asyncio.Task[None] | None = None
        self._servicer = servicer
        self.worker = place.index if place is not None else 0
        self._neighbours: Neighbours | None = None
        self._replica_number = 0  # of the neighbours
        self._again = False  # whether a try was abandoned after this worker, the first one, was done with it
        self._neighbours_failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pusher = Pusher(plan, stubs, faults, self._timeline, self.worker)
        self._puller = Puller(plan, stubs, self._timeline, self.worker)
        self._keeper = ResidualKeeper(plan, session, self._pusher.residuals, self._pusher.encode_thread)
        self._leases = Leases(0, [])
        self._last_slots: list[int] = []  # of the last table that gave this worker any
        self._unsettled = False  # whether it was given slots since it last told what residuals it has
        self._leases_changed = asyncio.Event()
        self._readers = Readers(plan, session, cache_directory)
        self._computer: SlotComputer
        self._installer: WeightInstaller
        self._superseded = False
        self._phase = "loading"
        self._waiting_for = ""
        self._since = time.time()
        self._progress = 0  # microbatches begun

    # -- directives ------------------------------------------------------------------------------------------------

    def take_leases(self, number: int, holders: Sequence[str], place: Place | None = None) -> None:
        """Take a new lease table, if it is newer than the one in hand. In a pipeline, `place` is this worker's by that
        table, with the stages that it has already; None when it has none."""
        if number <= self._leases.number:
            return
        holder_id = self._session.node_id
        if self.plan.has_pipeline:
            self.place = place
            if self._neighbours is not None and (
                place is None or place.replica.number != self._neighbours.place.replica.number
            ):
                self._neighbours.end()
            holder_id = place.replica.workers[0].node_id if place is not None else ""
        mine = [slot for slot, holder in enumerate(holders) if holder and holder == holder_id]
        if mine != self._leases.slots:
            log.info("holds slots", job=self.plan.job_id, slots=mine or "none", table=number)
        self._leases = Leases(number, mine)
        if mine:
            self._last_slots, self._unsettled = mine, self._keeper.active
        self._leases_changed.set()

    # -- the loop --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Work until cancelled. Raises GradstreamError when this worker cannot go on."""
        try:
            await self._compute(self._load)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pusher.run())
                group.create_task(self._walk())
                group.create_task(self._watch_neighbours())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._superseded = True
            if self._timeline_report is not None:
                self._timeline_report.cancel()
            self._keeper.close()
            await self._puller.stop()
            await self._meet(None)
            await asyncio.to_thread(self._compute_thread.shutdown, True, cancel_futures=True)
            if hasattr(self, "_installer"):
                self._installer.close()
            if hasattr(self, "_computer"):
                self._computer.close()
            self._pusher.close()
            self._readers.close()
            for channel in self._channels:
                await channel.close(None)

    async def drain(self) -> None:
        """Wait until residuals that are being written for a checkpoint are reported, or on their way."""
        await self._keeper.drain()

    def _load(self) -> None:
        torch.set_num_threads(self.plan.recipe.training.num_threads)
        self._computer = SlotComputer(self.plan, self._device, self.worker, self._timeline)
        self._installer = WeightInstaller(
            self.plan,
            self._computer.models,
            self._computer.parameters,
            self._timeline,
        )

    async def _watch_neighbours(self) -> None:
        await self._neighbours_failed

    async def _meet(self, place: Place | None) -> None:
        """Let these be the neighbours: those that were are none any more."""
        if self._neighbours is not None:
            self._servicer.set(None)
            await self._neighbours.close()
            self._neighbours = None
        self._replica_number = place.replica.number if place is not None else 0
        if place is not None and self.plan.replica_size > 1:
            self._neighbours = Neighbours(
                self.plan,
                place,
                self._computer.hidden_size,
                self._faults,
                self._timeline,
                self._fail,
                self._compute_again,
                self._session.transport,
            )
            self._servicer.set(self._neighbours)

    def _compute_again(self) -> None:
        self._again = True
        self._leases_changed.set()

    def _fail(self, error: Exception) -> None:
        if not self._neighbours_failed.done():
            self._neighbours_failed.set_exception(error)

    async def _walk(self) -> None:
        upcoming: asyncio.Task[Inbox] | None = None
        try:
            while True:
                if not self._leases.slots:
                    await self._rest(upcoming)
                    upcoming = None
                    continue
                if upcoming is None:
                    upcoming = asyncio.create_task(self._puller.next(self.plan.start_version))
                    names = ", ".join(server.name for server in self.plan.servers)
                    await self._wait(f"weights from {names}", asyncio.wait([upcoming]))
                inbox = await upcoming
                taken = self._timeline.take()
                measured = measure(taken) if is_tuned(self.plan.recipe.codec) else None
                upcoming = asyncio.create_task(self._puller.next(inbox.version + 1, inbox.version, measured))
                self._report_timeline(taken)
                if not await self._work(inbox, upcoming) and self._leases.slots:
                    await _cancelled(upcoming)
                    upcoming = None
        finally:
            await _cancelled(upcoming)

    async def _rest(self, upcoming: asyncio.Task[Inbox] | None) -> None:
        """Wait for slots. Without them there is nothing to pull for; whatever comes later is pulled when slots come.

        Where residuals are kept, though, it must still be known whether the next version has a checkpoint: a pause
        takes the slots away as soon as that version is decided.
        """
        if upcoming is None and self._unsettled:
            upcoming = asyncio.create_task(self._puller.next(self.plan.start_version))
        try:
            if upcoming is not None and self._keeper.active:
                leases = asyncio.ensure_future(self._next_leases())
                try:
                    await self._wait(
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
        if self.place is None or self.place.replica.number != self._replica_number:
            await self._meet(None)
        if not self._leases.slots:
            await self._wait(SLOTS, self._next_leases())

    async def _hear_of(self, inbox: Inbox) -> None:
        """Let the slots' residuals follow a version, and join its checkpoint if it has one."""
        if self._keeper.busy:
            await self._wait("its last residuals to be written", self._keeper.drain())
        self._unsettled = False
        self._keeper.arrived(inbox.version, inbox.checkpoint, self._last_slots)

    async def _work(self, inbox: Inbox, upcoming: asyncio.Task[Inbox]) -> bool:
        """Do this version's slots until the next version comes; False when the version must be pulled again."""
        version = self.version = inbox.version
        for stream in self._pusher.streams:
            stream.forget_before(version)
        self._pusher.use_codec(inbox.push_codec)
        await self._hear_of(inbox)
        self._installer.install(inbox)
        done: set[tuple[int, bool]] = set()  # (slot, whether it was the validation pass)
        upcoming.add_done_callback(lambda _: self._wake())
        while not upcoming.done():
            place = self.place
            if not self._leases.slots:
                return False
            if place is not None and place.replica.number != self._replica_number:
                # What another chain has computed may be lost with one of its members.
                done.clear()
                await self._meet(place)
                continue  # another table may have come meanwhile
            if place is None or place.is_first:
                if self._again:
                    done.clear()
                    self._again = False
                attempt = await self._next_work(version, done)
                if attempt is None:
                    await self._wait_for_next(version, upcoming)
                    continue
            else:
                attempt = await self._follow(version, upcoming)
                if attempt is None:
                    continue
            try:
                await self._run_try(attempt, upcoming)
            except AbandonedError:
                if self._neighbours is not None and place is not None and place.is_first:
                    self._neighbours.void()
                if upcoming.done():
                    break
                if inbox.failed or self._superseded:
                    if self._neighbours is not None:
                        self._neighbours.abandon(attempt, "the weights that it pulled broke off")
                    return False
                continue
            done.update((slot, attempt.validate) for slot in attempt.slots)
        return True

    async def _next_work(self, version: int, done: set[tuple[int, bool]]) -> Try | None:
        """What is to be computed next at a version; None when all of it is done."""
        recipe = self.plan.recipe
        for slot in self._leases.slots:
            if recipe.validates(version) and (slot, True) not in done:
                return await self._new_try(version, (slot,), True)
            if version < recipe.training.num_steps and (slot, False) not in done:
                return await self._new_try(version, self._together(version, slot, done), False)
        return None

    def _together(self, version: int, first: int, done: set[tuple[int, bool]]) -> tuple[int, ...]:
        """The slots that are computed in one go: in a pipeline, so that it is filled once and not for each."""
        slots = [first]
        if self.plan.replica_size > 1 and not self.plan.recipe.validates(version):
            slots += [slot for slot in self._leases.slots if slot > first and (slot, False) not in done]
        per_slot = num_microbatches(self.plan, Try(0, version, (first,)))
        count = most_slots(self.plan.schedule, self.plan.replica_size, per_slot, self.plan.num_chunks, len(slots))
        return tuple(slots[:count])

    async def _new_try(self, version: int, slots: tuple[int, ...], validate: bool) -> Try:
        if self._neighbours is not None:
            flushed = self._neighbours.begin(version, slots, validate)
            return await self._wait(f"{self._neighbours.links[FORWARD].title} to take what it was sent", flushed)
        return Try(0, version, slots, validate)

    async def _follow(self, version: int, upcoming: asyncio.Task[Inbox]) -> Try | None:
        """The next try of this version that the first worker begins; None when something else has happened."""
        assert self._neighbours is not None
        assert self.place is not None
        waiting_for = f"work at version {version} from {self.place.title(0)}"
        if version >= self.plan.num_steps:
            waiting_for = "the end of the job"
        neighbours = self._neighbours
        leases = asyncio.ensure_future(self._next_leases())
        coming = asyncio.ensure_future(neighbours.next_try())
        try:
            with self._timeline.span(SpanKind.WAIT):
                await self._wait(
                    waiting_for, asyncio.wait([coming, upcoming, leases], return_when=asyncio.FIRST_COMPLETED)
                )
                if coming.done() and coming.result().version > version:
                    # It is there when this worker has that version, too.
                    waiting_for = f"version {coming.result().version}"
                    await self._wait(waiting_for, asyncio.wait([upcoming, leases], return_when=asyncio.FIRST_COMPLETED))
        finally:
            leases.cancel()
            coming.cancel()
        if not coming.done() or coming.result().version > version:
            return None
        attempt = coming.result()
        neighbours.took(attempt)
        return attempt if attempt.version == version and neighbours.is_valid(attempt) else None

    async def _run_try(self, attempt: Try, upcoming: asyncio.Task[Inbox]) -> None:
        """Compute this worker's part of a try. Raises AbandonedError."""
        version, neighbours = attempt.version, self._neighbours
        split: Split = "validation" if attempt.validate else "train"
        stages = self.plan.stages_of_worker(self.worker)
        # A stage in the middle needs to know of packed rows which tokens may see which.
        packed = self.plan.data_manifest.layout == "rows"
        reads = packed or 0 in stages or self.plan.num_stages - 1 in stages
        readers = {}
        for slot in attempt.slots if reads else ():
            coming = self._readers.get(split, slot)
            readers[slot] = await self._wait(f"the {split} data shards of slot {slot}", coming)
        for slot in attempt.slots:
            await self._wait(f"the residual of slot {slot}", self._keeper.load(version, slot))
        self._keeper.take_up(version, list(attempt.slots))

        def wanted() -> bool:
            valid = neighbours is None or neighbours.is_valid(attempt)
            return valid and not (upcoming.done() or self._superseded)

        def goes_on() -> bool:
            # Asked once a microbatch.
            self._progress += 1
            return wanted()

        exchange: Exchange = Alone()
        if neighbours is not None:
            neighbours.run(attempt, wanted)
            exchange = neighbours
        self._enter("validating" if attempt.validate else "computing")
        if not attempt.validate:
            await self._compute(lambda: self._train(readers, attempt, goes_on, exchange))
            return
        slot = attempt.slots[0]
        found = await self._compute(lambda: self._validate(readers.get(slot), attempt, goes_on, exchange))
        if found is not None:
            self._report_validation(version, slot, *found)

    def _train(
        self, readers: dict[int, SlotReader], attempt: Try, wanted: Callable[[], bool], exchange: Exchange
    ) -> None:
        step = attempt.version
        batch = self.plan.recipe.training.slot_batch
        for slot in attempt.slots:
            self._faults.before_slot(step, slot)
        batches = {slot: reader.batch(step, batch) for slot, reader in readers.items()}
        with self._timeline.computing(SpanKind.COMPUTE, attempt.slots[0]):
            self._computer.run(attempt, batches, partial(self._pusher.submit, step), wanted, exchange)

    def _validate(
        self, reader: SlotReader | None, attempt: Try, wanted: Callable[[], bool], exchange: Exchange
    ) -> tuple[float, int] | None:
        batch = None if reader is None else reader.validation_batch(num_samples(self.plan, attempt))
        with self._timeline.computing(SpanKind.VALIDATE, attempt.slots[0]):
            return self._computer.evaluate(attempt, batch, wanted, exchange)

    def _wake(self) -> None:
        if self._neighbours is not None:
            self._neighbours.wake()

    async def _wait_for_next(self, version: int, upcoming: asyncio.Task[Inbox]) -> None:
        if version >= self.plan.num_steps:
            waiting_for = "the end of the job"
        else:
            waiting_for = f"version {version + 1} from {', '.join(server.name for server in self.plan.servers)}"
        leases = asyncio.ensure_future(self._next_leases())
        try:
            with self._timeline.span(SpanKind.WAIT):
                await self._wait(waiting_for, asyncio.wait([upcoming, leases], return_when=asyncio.FIRST_COMPLETED))
        finally:
            leases.cancel()

    # -- reports ---------------------------------------------------------------------------------------------------

    def _report_validation(self, version: int, slot: int, loss_sum: float, num_tokens: int) -> None:
        report = coordinator_pb2.ReportValidationRequest(
            job_id=self.plan.job_id,
            epoch=self.plan.epoch,
            version=version,
            slot=slot,
            loss_sum=loss_sum,
            num_tokens=num_tokens,
        )
        # In the background: the coordinator is not in the path of a step.
        self._session.report_later(partial(self._session.stub.ReportValidation, report, timeout=UNARY_TIMEOUT_SECONDS))

    def _report_timeline(self, taken: list[RawSpan]) -> None:
        """Send the timeline of the version that is over: in the background and once, as it may be lost."""
        late = self._timeline_report is not None and not self._timeline_report.done()
        # A report that is still under way is waited for by dropping this one: steps can be faster than the coordinator.
        if self.version >= 0 and taken and not late:
            self._timeline_report = asyncio.create_task(self._send_timeline(taken, self.version))

    async def _send_timeline(self, taken: list[RawSpan], version: int) -> None:
        plan = self.plan
        if version + 1 < plan.num_steps:
            # The weights that the worker waits for are more urgent. (After the last step it waits for nothing, and the
            # job may be over before they are here.)
            await self._puller.settled()
        report = await asyncio.to_thread(
            self._timeline.report, taken, plan.job_id, plan.epoch, version, self._session.node_id
        )
        try:
            await self._session.stub.ReportTimeline(report, timeout=UNARY_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as rpc_error:
            log.debug("a timeline was lost", version=version, cause=one_line(error_from_rpc(rpc_error, "coordinator")))

    # -- status ----------------------------------------------------------------------------------------------------

    def activity(self) -> coordinator_pb2.Activity:
        """What the worker does, for heartbeats."""
        links = self._neighbours.links.values() if self._neighbours is not None else ()
        outbounds: list[Outbound[Any]] = [*self._pusher.streams, *links]
        waiting_for, since = self._waiting_for, self._since
        cut_off, cut_since = self._cut_off(outbounds)
        neighbour = self._neighbours.waiting if self._neighbours is not None else None  # the compute thread's
        if neighbour is not None:
            waiting_for, since = neighbour
        if cut_off:
            waiting_for, since = f"{cut_off} to answer", cut_since
        return coordinator_pb2.Activity(
            job_id=self.plan.job_id,
            phase="waiting" if waiting_for else self._phase,
            step=max(0, self.version),
            waiting_for=waiting_for,
            waiting_since_unix_ms=int(since * 1000) if waiting_for else 0,
            sent_bytes=sum(outbound.sent_bytes for outbound in outbounds),
            received_bytes=self._puller.received_bytes
            + (self._neighbours.received_bytes if self._neighbours is not None else 0),
            unreachable=cut_off,
            unreachable_seconds=max(0.0, time.time() - cut_since) if cut_off else 0.0,
            progress=self._progress + self._puller.num_bundles,
        )

    def _cut_off(self, outbounds: Sequence[Outbound[Any]]) -> tuple[str, float]:
        """The peer that could not be reached for longest, and since when (Unix seconds); ("", 0) when all can."""
        found = [(outbound.title, outbound.cut_off_since) for outbound in outbounds]
        known = [(title, since) for title, since in found if since is not None]
        pulled = self._puller.cut_off
        return min([*known, *([pulled] if pulled is not None else [])], key=lambda peer: peer[1], default=("", 0.0))

    def _enter(self, phase: str) -> None:
        self._phase, self._waiting_for, self._since = phase, "", time.time()

    async def _wait(self, waiting_for: str, what: Awaitable[T]) -> T:
        """Await something while `status` says what."""
        self._waiting_for, self._since = waiting_for, time.time()
        try:
            return await what
        finally:
            self._waiting_for, self._since = "", time.time()

    def _next_leases(self) -> Coroutine[Any, Any, bool]:
        self._leases_changed.clear()  # now, not when the result is awaited: a table may come between
        return self._leases_changed.wait()

    async def _compute(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._compute_thread, function)


async def _cancelled(task: asyncio.Task[Inbox] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
