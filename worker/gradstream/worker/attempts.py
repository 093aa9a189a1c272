"""Chooses the next attempt of a version, and computes this worker's part of an attempt.

Without a pipeline, and on the first worker of a replica, the next attempt follows from the slots that the worker holds
and those that are done. The other workers compute the attempts that the first worker begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from gradstream.core.node.faults import Faults
from gradstream.core.pipeline.schedule import max_slots
from gradstream.core.plan.plan import Plan
from gradstream.core.telemetry.timeline import SpanKind
from gradstream.worker.attempt import Alone, Attempt, Exchange, num_microbatches, num_samples
from gradstream.worker.compute import SlotComputer
from gradstream.worker.held_slots import HeldSlots
from gradstream.worker.pipeline.inbound import FORWARD
from gradstream.worker.pipeline.neighbours import Neighbours
from gradstream.worker.pipeline.place import Place
from gradstream.worker.progress import ProgressFiles
from gradstream.worker.push import Pusher
from gradstream.worker.residuals import ResidualKeeper
from gradstream.worker.rounds import Progress, RoundComputer
from gradstream.worker.samples.data import SlotReader, Split
from gradstream.worker.samples.readers import Readers
from gradstream.worker.status import Reports, Status
from gradstream.worker.timeline import Timeline
from gradstream.worker.weights import Inbox, WeightInstaller

T = TypeVar("T")
Done = set[tuple[int, bool]]
"""The work done at a version, as (slot, whether it was the validation pass)."""


def next_slots(
    plan: Plan, version: int, held: Sequence[int], to_compute: Sequence[int], done: Collection[tuple[int, bool]]
) -> tuple[tuple[int, ...], bool] | None:
    """The slots of the next attempt at a version, and whether it is a validation pass; None when nothing is left.

    The worker validates the slots that it holds, and trains those in `to_compute`, which may be others in a round. In a
    round of which the ledger has the slots that counted, the others are not computed. Where the quorum decides, the
    held slots take turns in coming first, because the last one of a slow worker is left out.
    """
    validates = plan.recipe.validates(version)
    counted = plan.counted_slots(version) if version < plan.last_version else ()
    if counted is None and held and list(to_compute) == list(held):
        first = version % len(held)
        to_compute = [*held[first:], *held[:first]]
    for slot in dict.fromkeys([*to_compute, *held]):
        if validates and slot in held and (slot, True) not in done:
            return (slot,), True
        if slot in to_compute and (counted is None or slot in counted) and (slot, False) not in done:
            return _together(plan, version, slot, held, done), False
    return None


def _together(
    plan: Plan, version: int, first: int, held: Sequence[int], done: Collection[tuple[int, bool]]
) -> tuple[int, ...]:
    """The slots of one attempt: several in a pipeline, which is then filled once and not once a slot.

    A round has one: each inner step needs the one before.
    """
    slots = [first]
    if plan.replica_size > 1 and not plan.recipe.validates(version) and not plan.rounds.is_round(version):
        slots += [slot for slot in held if slot > first and (slot, False) not in done]
    per_slot = num_microbatches(plan, Attempt(0, version, (first,)))
    count = max_slots(plan.pipeline_schedule, plan.replica_size, per_slot, plan.num_chunks, len(slots))
    return tuple(slots[:count])


class Attempts:
    """Gives out the attempts of a version one after the other, and waits while there is none."""

    def __init__(self, plan: Plan, held: HeldSlots, status: Status, timeline: Timeline):
        self._plan = plan
        self._held = held
        self._status = status
        self._timeline = timeline

    async def begin(self, version: int, done: Done, neighbours: Neighbours | None) -> Attempt | None:
        """Begin the next attempt of a version, on the first worker. Returns None when nothing is left to compute."""
        found = next_slots(self._plan, version, self._held.slots, self._held.to_compute(version), done)
        if found is None:
            return None
        slots, validate = found
        if neighbours is None:
            return Attempt(0, version, slots, validate)
        flushed = neighbours.begin(version, slots, validate)
        return await self._status.wait(f"{neighbours.links[FORWARD].title} to take the messages sent to it", flushed)

    async def follow(
        self, version: int, place: Place, neighbours: Neighbours, upcoming: asyncio.Task[Inbox]
    ) -> Attempt | None:
        """Wait for the next attempt of this version that the first worker begins; called on the other workers.

        Returns None when the next version or a lease table comes first, or when the attempt is void.
        """
        waiting_for = f"work at version {version} from {place.title(0)}"
        if version >= self._plan.last_version:
            waiting_for = "the end of the job"
        leases = asyncio.ensure_future(self._held.next_change())
        coming = asyncio.ensure_future(neighbours.next_attempt())
        wait = self._status.wait
        try:
            with self._timeline.span(SpanKind.WAIT):
                await wait(waiting_for, asyncio.wait([coming, upcoming, leases], return_when=asyncio.FIRST_COMPLETED))
                if coming.done() and coming.result().version > version:
                    # The attempt stays queued until this worker has that version, too.
                    waiting_for = f"version {coming.result().version}"
                    await wait(waiting_for, asyncio.wait([upcoming, leases], return_when=asyncio.FIRST_COMPLETED))
        finally:
            leases.cancel()
            coming.cancel()
        if not coming.done() or coming.result().version > version:
            return None
        attempt = coming.result()
        neighbours.took(attempt)
        return attempt if attempt.version == version and neighbours.is_valid(attempt) else None

    async def wait_for_next(self, version: int, upcoming: asyncio.Task[Inbox]) -> None:
        """Wait for the next version, or for a lease table."""
        if version >= self._plan.last_version:
            waiting_for = "the end of the job"
        else:
            waiting_for = f"version {version + 1} from {', '.join(server.name for server in self._plan.servers)}"
        leases = asyncio.ensure_future(self._held.next_change())
        try:
            with self._timeline.span(SpanKind.WAIT):
                await self._status.wait(
                    waiting_for, asyncio.wait([upcoming, leases], return_when=asyncio.FIRST_COMPLETED)
                )
        finally:
            leases.cancel()


class AttemptRunner:
    """Computes this worker's part of an attempt.

    Reads the samples, runs the passes in the compute thread, and passes gradients to the pusher and a validation loss
    to the reports.
    """

    def __init__(
        self,
        computer: SlotComputer,
        compute_thread: Executor,
        readers: Readers,
        keeper: ResidualKeeper,
        pusher: Pusher,
        faults: Faults,
        timeline: Timeline,
        status: Status,
        reports: Reports,
        installer: WeightInstaller,
        progress: ProgressFiles,
    ):
        self._plan = computer.plan
        self._computer = computer
        self._installer = installer
        self._rounds = RoundComputer(computer, installer.held, progress, keeper.moments)
        self._compute_thread = compute_thread
        self._readers = readers
        self._keeper = keeper
        self._pusher = pusher
        self._faults = faults
        self._timeline = timeline
        self._status = status
        self._reports = reports

    async def run(self, attempt: Attempt, neighbours: Neighbours | None, is_current: Callable[[], bool]) -> None:
        """Compute an attempt.

        Raises AbandonedError when the attempt has become void, or when `is_current()` turns false because the next
        version has come or the job has ended.
        """
        readers = await self._readers_of(attempt)
        for slot in attempt.slots:
            await self._status.wait(f"the residual of slot {slot}", self._keeper.load(attempt.version, slot))
        self._keeper.take_up(attempt.version, list(attempt.slots))

        def wanted() -> bool:
            return (neighbours is None or neighbours.is_valid(attempt)) and is_current()

        def goes_on() -> bool:
            # Called once a microbatch.
            self._status.count_microbatch()
            return wanted()

        exchange: Exchange = Alone()
        if neighbours is not None:
            neighbours.run(attempt, wanted)
            exchange = neighbours
        self._status.enter("validating" if attempt.validate else "computing")
        slot = attempt.slots[0]
        if not attempt.validate:
            if self._plan.rounds.is_round(attempt.version):
                await self._compute(partial(self._round, readers.get(slot), attempt, wanted, goes_on, neighbours))
            else:
                await self._compute(partial(self._train, readers, attempt, wanted, goes_on, exchange))
            return
        found = await self._compute(partial(self._validate, readers.get(slot), attempt, goes_on, exchange))
        if found is not None:
            self._reports.validation(attempt.version, slot, *found)

    async def _readers_of(self, attempt: Attempt) -> dict[int, SlotReader]:
        """The readers of an attempt's slots. Empty where this worker's stages need no tokens."""
        split: Split = "validation" if attempt.validate else "train"
        stages = self._plan.stages_of_worker(self._computer.worker)
        # With packed rows, stages in the middle need tokens too: the attention mask is made from them.
        packed = self._plan.data_manifest.layout == "rows"
        reads = packed or 0 in stages or self._plan.num_stages - 1 in stages
        readers = {}
        for slot in attempt.slots if reads else ():
            coming = self._readers.get(split, slot)
            readers[slot] = await self._status.wait(f"the {split} data shards of slot {slot}", coming)
        return readers

    async def _compute(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._compute_thread, function)

    # -- in the compute thread -------------------------------------------------------------------------------------

    def _train(
        self,
        readers: Mapping[int, SlotReader],
        attempt: Attempt,
        wanted: Callable[[], bool],
        goes_on: Callable[[], bool],
        exchange: Exchange,
    ) -> None:
        step = attempt.version
        batch = self._plan.recipe.training.slot_batch
        for slot in attempt.slots:
            self._faults.before_slot(step, slot)
        batches = {slot: reader.batch(step, batch) for slot, reader in readers.items()}
        with self._timeline.computing(SpanKind.COMPUTE, attempt.slots[0]):
            self._computer.run(
                attempt,
                batches,
                partial(self._pusher.submit, step),
                goes_on,
                exchange,
                lambda slot, stage: self._pusher.backlog.make_room(step, slot, stage, wanted),
            )

    def _round(
        self,
        reader: SlotReader | None,
        attempt: Attempt,
        wanted: Callable[[], bool],
        goes_on: Callable[[], bool],
        neighbours: Neighbours | None,
    ) -> None:
        version, slot = attempt.version, attempt.slots[0]
        count = self._plan.recipe.training.slot_batch

        def begin_step(progress: Progress) -> None:
            self._status.round.begin_step(slot, progress.place)
            self._faults.before_slot(progress.step, slot)
            self._status.detail = f"inner step {progress.place + 1} of {progress.num_steps} of slot {slot}"

        def make_room() -> None:
            for stage in self._plan.stages_of_worker(self._computer.worker):
                self._pusher.backlog.make_room(version, slot, stage, wanted)

        try:
            with self._timeline.computing(SpanKind.COMPUTE, slot):
                self._installer.wait_all()
                self._rounds.run(
                    attempt,
                    lambda number: None if reader is None else reader.batch(number, count),
                    self._pusher.submit(version, slot),
                    goes_on,
                    begin_step,
                    make_room,
                    self._faults.spoils,
                    neighbours,
                )
            self._status.round.end_slot(slot)
        finally:
            self._status.round.leave_slot()
            self._status.detail = ""

    def _validate(
        self, reader: SlotReader | None, attempt: Attempt, wanted: Callable[[], bool], exchange: Exchange
    ) -> tuple[float, int] | None:
        batch = None if reader is None else reader.validation_batch(num_samples(self._plan, attempt))
        with self._timeline.computing(SpanKind.VALIDATE, attempt.slots[0]):
            return self._computer.evaluate(attempt, batch, wanted, exchange)
