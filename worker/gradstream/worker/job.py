"""A worker's part of one job under one plan: pull a version, compute the slots it holds, push, and again.

    install version t ── compute my slots of step t ── wait for version t + 1, or for more slots
          ▲                                                        │
          └────────────────────────────────────────────────────────┘

The next version is asked for as soon as one is installed, so its fragments arrive while the worker still waits for
nothing else, and a worker whose slots others have computed in the meantime learns it at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import torch

from gradstream.core.bundles import is_tuned
from gradstream.core.config import Recipe
from gradstream.core.errors import UnreachableError, one_line
from gradstream.core.log import get_logger
from gradstream.core.plan import Plan
from gradstream.core.rpc import UNARY_TIMEOUT_SECONDS, Backoff, error_from_rpc, open_channel
from gradstream.core.session import NodeSession
from gradstream.core.timeline import SpanKind
from gradstream.core.wire import ParameterServerStub
from gradstream.proto.v1 import coordinator_pb2
from gradstream.worker.compute import AbandonedError, SlotComputer
from gradstream.worker.data import SlotReader, Split
from gradstream.worker.faults import Faults
from gradstream.worker.pull import Puller
from gradstream.worker.push import Pusher
from gradstream.worker.residuals import ResidualKeeper
from gradstream.worker.timeline import RawSpan, Timeline, measure
from gradstream.worker.weights import Inbox, WeightInstaller

log = get_logger()
T = TypeVar("T")


def validates(recipe: Recipe, version: int) -> bool:
    """Whether a validation pass is made at this version: the first, the last, and every interval."""
    interval = recipe.validation.interval_steps
    return interval > 0 and (version % interval == 0 or version == recipe.training.num_steps)


@dataclass(frozen=True)
class Leases:
    """The slots this worker holds, and the number of the table that says so."""

    number: int
    slots: list[int]


class JobRun:
    """See the module's docstring. `run` ends only by an error or by being cancelled."""

    def __init__(self, plan: Plan, session: NodeSession, device: torch.device, cache_directory: Path, faults: Faults):
        self.plan = plan
        self.version = -1
        self._session = session
        self._device = device
        self._cache_directory = cache_directory
        self._faults = faults
        self._compute_thread = ThreadPoolExecutor(1, "compute")
        self._channels: list[grpc.aio.Channel] = [open_channel(server.address) for server in plan.servers]
        stubs = [ParameterServerStub(channel) for channel in self._channels]
        self._timeline = Timeline()
        self._timeline_report: asyncio.Task[None] | None = None
        self._pusher = Pusher(plan, stubs, faults, self._timeline)
        self._puller = Puller(plan, stubs, self._timeline)
        self._keeper = ResidualKeeper(plan, session, self._pusher.residuals, self._pusher.encode_thread)
        self._leases = Leases(0, [])
        self._last_slots: list[int] = []  # of the last table that gave this worker any
        self._unsettled = False  # whether it was given slots since it last told what residuals it has
        self._leases_changed = asyncio.Event()
        self._readers: dict[tuple[Split, int], SlotReader] = {}
        self._computer: SlotComputer
        self._installer: WeightInstaller
        self._superseded = False
        self._phase = "loading"
        self._waiting_for = ""
        self._since = time.time()

    # -- directives ------------------------------------------------------------------------------------------------

    def take_leases(self, number: int, holders: Sequence[str]) -> None:
        """Take a new lease table, if it is newer than the one in hand."""
        if number <= self._leases.number:
            return
        mine = [slot for slot, holder in enumerate(holders) if holder == self._session.node_id]
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
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            self._superseded = True
            if self._timeline_report is not None:
                self._timeline_report.cancel()
            self._keeper.close()
            await self._puller.stop()
            await asyncio.to_thread(self._compute_thread.shutdown, True, cancel_futures=True)
            if hasattr(self, "_installer"):
                self._installer.close()
            if hasattr(self, "_computer"):
                self._computer.close()
            self._pusher.close()
            for reader in self._readers.values():
                reader.close()
            for channel in self._channels:
                await channel.close(None)

    def _load(self) -> None:
        torch.set_num_threads(self.plan.recipe.training.num_threads)
        self._computer = SlotComputer(self.plan, self._device)
        self._installer = WeightInstaller(
            self.plan,
            self._computer.model,
            self._computer.parameters,
            self._timeline,
        )

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
                        "slots from the coordinator",
                        asyncio.wait([upcoming, leases], return_when=asyncio.FIRST_COMPLETED),
                    )
                finally:
                    leases.cancel()
                if upcoming.done():
                    await self._hear_of(upcoming.result())
        finally:
            await _cancelled(upcoming)
            await self._puller.stop()
        if not self._leases.slots:
            await self._wait("slots from the coordinator", self._next_leases())

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
        done: set[int] = set()
        while not upcoming.done():
            todo = [slot for slot in self._leases.slots if slot not in done]
            if not self._leases.slots:
                return False
            if not todo:
                await self._wait_for_next(version, upcoming)
                continue
            slot = todo[0]
            await self._wait(f"the residual of slot {slot}", self._keeper.load(version, slot))
            self._keeper.take_up(version, [slot])
            try:
                await self._slot(version, slot, lambda: not (upcoming.done() or self._superseded))
            except AbandonedError:
                if upcoming.done():
                    break
                return False
            done.add(slot)
        return True

    async def _slot(self, version: int, slot: int, wanted: Callable[[], bool]) -> None:
        recipe = self.plan.recipe
        if validates(recipe, version):
            self._enter("validating")
            reader = await self._reader("validation", slot)
            count = recipe.validation.num_samples // recipe.training.num_slots
            loss_sum, num_tokens = await self._compute(lambda: self._validate_slot(reader, slot, count, wanted))
            self._report_validation(version, slot, loss_sum, num_tokens)
        if version < recipe.training.num_steps:
            self._enter("computing")
            reader = await self._reader("train", slot)
            await self._compute(lambda: self._train_slot(reader, version, slot, wanted))

    def _train_slot(self, reader: SlotReader, step: int, slot: int, wanted: Callable[[], bool]) -> None:
        self._faults.before_slot(step, slot)
        self._pusher.begin_slot()
        tokens = reader.batch(step, self.plan.recipe.training.slot_batch)
        with self._timeline.computing(SpanKind.COMPUTE, slot):
            self._computer.run_slot(step, slot, tokens, self._pusher.submit(step, slot), wanted)

    def _validate_slot(
        self, reader: SlotReader, slot: int, count: int, wanted: Callable[[], bool]
    ) -> tuple[float, int]:
        tokens = reader.validation_batch(count)
        with self._timeline.computing(SpanKind.VALIDATE, slot):
            return self._computer.evaluate(tokens, wanted)

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

    # -- data ------------------------------------------------------------------------------------------------------

    async def _reader(self, split: Split, slot: int) -> SlotReader:
        key: tuple[Split, int] = (split, slot)
        if key not in self._readers:
            recipe = self.plan.recipe
            reader = SlotReader(
                manifest=self.plan.data_manifest,
                path=recipe.data.path,
                cache_directory=str(self._cache_directory),
                slot=slot,
                num_slots=recipe.training.num_slots,
                sequence_length=recipe.training.sequence_length,
                seed=recipe.seed,
                split=split,
                fetch=self._fetch,
            )
            await self._wait(f"the {split} data shards of slot {slot}", reader.prepare())
            self._readers[key] = reader
        return self._readers[key]

    async def _fetch(self, file: str) -> AsyncIterator[bytes]:
        """The bytes of a file of the data set, from the coordinator; while it is away, asked for again without end."""
        request = coordinator_pb2.FetchDataShardRequest(job_id=self.plan.job_id, file=file)
        num_taken = 0
        backoff = Backoff()
        while True:
            # After a break it comes from its beginning again; the hash over the whole tells if it has changed.
            num_again = num_taken
            try:
                async for piece in self._session.stub.FetchDataShard(request):
                    backoff.reset()
                    fresh = piece.payload[num_again:]
                    num_again -= len(piece.payload) - len(fresh)
                    num_taken += len(fresh)
                    yield fresh
                return
            except grpc.aio.AioRpcError as rpc_error:
                error = error_from_rpc(rpc_error, self._session.peer)
                if not isinstance(error, UnreachableError):
                    raise error from None
            await asyncio.sleep(backoff.next())

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
        broken = [stream for stream in self._pusher.streams if stream.unreachable_since is not None]
        waiting_for, since = self._waiting_for, self._since
        if broken:
            waiting_for = f"{broken[0].server.title} to answer"
            since = broken[0].unreachable_since or since
        return coordinator_pb2.Activity(
            job_id=self.plan.job_id,
            phase="waiting" if waiting_for else self._phase,
            step=max(0, self.version),
            waiting_for=waiting_for,
            waiting_since_unix_ms=int(since * 1000) if waiting_for else 0,
            sent_bytes=sum(stream.sent_bytes for stream in self._pusher.streams),
            received_bytes=self._puller.received_bytes,
        )

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
