"""A server's share of a job for one epoch: takes contributions, walks from version to version with the other servers.

Everything runs on the event loop but the arithmetic, which goes to the thread pool. The life of step t:
  1. accumulate: contributions are added in slot order as their turn comes; early ones wait, still encoded;
  2. complete: every fragment has every slot; the leader is told and answers with the decision;
  3. apply: the optimizer runs over each fragment, which is then published as version t + 1.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeAlias, TypeVar

from gradstream.core.checkpoint.manifest import FileEntry, State, directory_of, shard_file_name
from gradstream.core.checkpoint.shard import CheckpointReader, write_shard
from gradstream.core.codecs import Payload, codec_named, codec_on_wire
from gradstream.core.codecs.payloads import CodecBook, split
from gradstream.core.errors import ProtocolError, StaleEpochError, one_line
from gradstream.core.log import get_logger
from gradstream.core.model.model import initial_weights
from gradstream.core.node.faults import Faults
from gradstream.core.plan.bundles import first_push_codec, is_tuned
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.fragments import Fragment
from gradstream.core.plan.plan import Plan
from gradstream.core.pretrained.base import BaseReader
from gradstream.core.rpc.retry import Backoff
from gradstream.core.storage import files
from gradstream.proto.v1 import coordinator_pb2, plan_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.bundle_state import BundleState
from gradstream.services.parameter_server.leader import Decision, Leader, decide_commit
from gradstream.services.parameter_server.optimizer import learning_rate
from gradstream.services.parameter_server.publication import Copy
from gradstream.services.parameter_server.tuner import Tuner

log = get_logger()
T = TypeVar("T")
Written: TypeAlias = tuple[FileEntry, list[bytes]]


@dataclass(frozen=True)
class SlotTotals:
    """What every contribution of a slot says about the slot."""

    num_tokens: int
    num_samples: int
    loss_sum: float

    def same_counts(self, other: SlotTotals) -> bool:
        """Whether both count the same tokens and samples."""
        return (self.num_tokens, self.num_samples) == (other.num_tokens, other.num_samples)

    def same_loss(self, other: SlotTotals) -> bool:
        """Whether both have the same loss; NaN is the same as NaN."""
        return self.loss_sum == other.loss_sum or (math.isnan(self.loss_sum) and math.isnan(other.loss_sum))


@dataclass
class Phase:
    """What the shard does, for `status`."""

    name: str
    since: float


class Shard:
    """See the module's docstring. `complete_at_leader` reaches the leader on another server; the leader does not use
    it."""

    def __init__(
        self,
        plan: Plan,
        index: int,
        executor: ThreadPoolExecutor,
        complete_at_leader: Callable[[pb.CompleteStepRequest], Awaitable[Decision]],
        report_step: Callable[[coordinator_pb2.ReportStepRequest], Awaitable[None]],
        report_checkpoint: Callable[[coordinator_pb2.ReportCheckpointRequest], Awaitable[None]],
        report_failure: Callable[[Exception], Awaitable[None]],
        faults: Faults | None = None,
    ):
        self.plan = plan
        self.index = index
        self.version = -1
        self.checkpointed = False  # whether `version` gets a checkpoint
        self.failed = False  # whether something went wrong for good: what is held is of no use any more
        self.phase = Phase("loading", time.time())
        self.received_bytes = 0
        self.sent_bytes = 0
        self.num_dropped = 0
        recipe = plan.recipe
        form = downlink(recipe.codec.pull)
        self.push_codec = codec_named(first_push_codec(recipe.codec))
        self.pull_codec = form.delta or form.full
        self._book = CodecBook(plan.tensors, recipe.codec.embedding)
        self.bundles = {
            bundle.index: BundleState(bundle, plan.tensors, recipe, form, self._book)
            for bundle in plan.bundles_of(index)
        }
        self._tuner = Tuner(plan) if is_tuned(recipe.codec) and index == plan.leader else None
        self.leader = Leader(len(plan.servers), plan.start_version, self._decide) if index == plan.leader else None
        self._executor = executor
        self._complete_at_leader = complete_at_leader
        self._report_step = report_step
        self._report_checkpoint = report_checkpoint
        self._report_failure = report_failure
        self._faults = faults or Faults("")
        self._slots: dict[int, SlotTotals] = {}
        self._step_bytes = 0
        self._num_complete = 0
        self._consecutive_skips = 0
        self._boundary: coordinator_pb2.BoundaryRequest | None = None
        self._full_copies = asyncio.Lock()
        self._changed = asyncio.Event()
        self._closed: StaleEpochError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._checkpoint_task: asyncio.Task[None] | None = None
        # Reports of files that the coordinator has not taken yet, by version.
        self._unreported: dict[int, asyncio.Task[None]] = {}
        # The last version whose checkpoint was begun, or was there at the start.
        self._checkpoint_version = plan.start_version
        self._snapshots = False  # whether a copy of the version at hand is being made
        # Why no checkpoint can be written, and since when (Unix seconds); None while one can.
        self._unwritten: tuple[str, float] | None = None
        self._trouble: tuple[str, float] | None = None  # the same, until a checkpoint has been written
        # Since when (Unix seconds) a step waits for the checkpoint before to be written.
        self._settling_since: float | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Initialize the fragments from the seed or from the plan's checkpoint, and publish the start version."""
        await self._run(self._load)
        for state in self.bundles.values():
            state.begin_step(self.plan.start_version)
        self._enter(self.plan.start_version)
        log.info(
            "shard loaded",
            job=self.plan.job_id,
            epoch=self.plan.epoch,
            version=self.version,
            bundles=len(self.bundles),
            source=self.plan.source,
        )

    def _load(self) -> None:
        plan = self.plan
        if plan.checkpoint_path:
            reader = CheckpointReader(plan.checkpoint_path)
            for state in self.bundles.values():
                state.load(reader)
            self._consecutive_skips = reader.manifest.progress.get("consecutive_skips", 0)
        elif (tuning := plan.recipe.finetuning) is not None and plan.lora is None:
            base = BaseReader(tuning.base)
            for state in self.bundles.values():
                state.take_base(base)
        else:
            wanted: dict[str, list[tuple[BundleState, int]]] = {}
            for state in self.bundles.values():
                for number, fragment in enumerate(state.bundle.fragments):
                    wanted.setdefault(plan.tensors[fragment.tensor].name, []).append((state, number))
            for name, tensor in initial_weights(plan.model_config, plan.recipe.seed, set(wanted), plan.lora):
                for state, number in wanted[name]:
                    state.initialize(number, tensor)
        for state in self.bundles.values():
            state.publish(plan.start_version, self.pull_codec)

    async def close(self, reason: str) -> None:
        """Stop at once; everyone who waits gets a StaleEpochError."""
        self._closed = StaleEpochError(reason)
        if self.leader is not None:
            self.leader.close(self._closed)
        self._notify()
        tasks = [*self._tasks, *([self._checkpoint_task] if self._checkpoint_task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Streams that are told of the end one by one still know the shard; its memory is free now.
        self.bundles = {}

    async def drain(self) -> None:
        """Wait until a checkpoint that is being written is reported."""
        if self._checkpoint_task is not None:
            await asyncio.gather(self._checkpoint_task, return_exceptions=True)
        await asyncio.gather(*self._unreported.values(), return_exceptions=True)

    # -- push ------------------------------------------------------------------------------------------------------

    def check(self, header: pb.ContributionHeader) -> None:
        """Check a header of this epoch against the plan before anything is allocated for it. Raises ProtocolError."""
        state = self.bundles.get(header.bundle)
        if state is None:
            raise ProtocolError(f"bundle {header.bundle} is not held by server {self.index}")
        what = f"contribution to bundle {header.bundle} from slot {header.slot} of step {header.step}"
        if header.slot >= self.plan.num_slots:
            raise ProtocolError(f"{what}: the job has {self.plan.num_slots} slots")
        if header.part >= state.bundle.num_parts:
            raise ProtocolError(f"{what}: part {header.part}, but its tensors have {state.bundle.num_parts}")
        if header.step >= self.plan.num_steps:
            raise ProtocolError(f"{what}: the job has {self.plan.num_steps} steps")
        if header.step > self.version:
            raise ProtocolError(f"{what}: step {self.version} is under way here")
        codec = self.push_codec
        if header.step < self.version:
            codec = codec_on_wire(header.codec)  # of a step that is over: it will be dropped, but must be sound
        if header.codec != codec.wire:
            name = plan_pb2.Codec.Name(header.codec) if header.codec in plan_pb2.Codec.values() else header.codec
            raise ProtocolError(f"{what}: codec {name}, but it is {codec.name} here")
        try:
            self._book.of(state.bundle, codec.name).check_sizes(header.fragment_bytes, header.payload_bytes)
        except ProtocolError as error:
            raise ProtocolError(f"{what}: {error}") from None
        training = self.plan.recipe.training
        most_tokens = training.slot_batch * training.sequence_length
        if not 0 < header.slot_tokens <= most_tokens or header.slot_samples > training.slot_batch:
            raise ProtocolError(
                f"{what}: {header.slot_tokens} tokens of {header.slot_samples} samples, but a slot has at most "
                f"{most_tokens} of {training.slot_batch}"
            )

    def offer(self, header: pb.ContributionHeader, payload: Payload) -> pb.PushResult.ValueType:
        """Take a checked and verified contribution, once. Raises ProtocolError."""
        state = self.bundles[header.bundle]
        if header.step < self.version:
            self.num_dropped += 1
            return pb.PUSH_RESULT_STALE
        turn = state.turn(header.slot, header.part)
        if state.has(turn):
            self.num_dropped += 1
            return pb.PUSH_RESULT_DUPLICATE
        totals = SlotTotals(header.slot_tokens, header.slot_samples, header.slot_loss_sum)
        known = self._slots.setdefault(header.slot, totals)
        if not known.same_loss(totals):
            # Two workers computed parts of one slot and round differently: the step is as good, but its bits now depend
            # on who computed what.
            log.warning(
                "two workers differ on a slot's loss; are they of one kind?",
                job=self.plan.job_id,
                step=header.step,
                slot=header.slot,
            )
        if not known.same_counts(totals):
            raise ProtocolError(
                f"slot {header.slot} of step {header.step}: {totals} differs from {known} of an earlier contribution"
            )
        state.early[turn] = split(payload, header.fragment_bytes)
        self._step_bytes += payload.nbytes
        self.received_bytes += payload.nbytes
        self._add_if_ready(state)
        return pb.PUSH_RESULT_ACCEPTED

    def _add_if_ready(self, state: BundleState) -> None:
        if state.ready_to_add:
            state.adding = True
            self._spawn(self._add(state))

    async def _add(self, state: BundleState) -> None:
        codec = self._book.of(state.bundle, self.push_codec.name)
        while state.next_turn in state.early:
            turn = state.next_turn
            await self._run(state.add_next, codec, state.early[turn], self.version, turn)
            # Only now: until it is added, a second copy must find it.
            state.next_turn += 1
            del state.early[turn]
        state.adding = False
        if state.complete:
            self._num_complete += 1
            if self._num_complete == len(self.bundles):
                self._spawn(self._commit())

    # -- commit ----------------------------------------------------------------------------------------------------

    async def _commit(self) -> None:
        step = self.version
        self.phase = Phase("committing", time.time())
        report = pb.CompleteStepRequest(
            job_id=self.plan.job_id,
            epoch=self.plan.epoch,
            step=step,
            server=self.index,
            squared_norms=[norm for state in self.bundles.values() for norm in state.squared_norms],
            num_tokens=sum(totals.num_tokens for totals in self._slots.values()),
            pushed_bytes=self._step_bytes,
        )
        decision = await (self.leader.complete(report) if self.leader else self._complete_at_leader(report))
        self._faults.decided(step)
        # From here on version step + 1 is decided. No worker can contribute to it before it has pulled every
        # fragment, so a contribution that arrives while fragments are being updated belongs to the step that is over.
        # Before workers hear of the version:
        self.checkpointed = decision.checkpoint
        push_codec, self.push_codec = self.push_codec.wire, codec_on_wire(decision.push_codec)
        self.pull_codec = codec_on_wire(decision.pull_codec).name
        self._enter(step + 1, "applying")
        self._consecutive_skips = decision.consecutive_skips
        recipe = self.plan.recipe
        rate = learning_rate(step, self.plan.num_steps, recipe.optimizer, recipe.schedule)
        num_samples = sum(totals.num_samples for totals in self._slots.values())
        self._slots.clear()
        self._step_bytes = 0
        self._num_complete = 0
        checkpoint = decision.checkpoint
        if checkpoint:
            await self._settle_checkpoint()
        copies = await asyncio.gather(
            *(self._apply(state, decision, rate, checkpoint) for state in self.bundles.values())
        )
        self._enter(step + 1)
        whole = [copy for copy in copies if copy is not None]
        if checkpoint and len(whole) == len(copies):
            self._begin_checkpoint(step + 1, list(chain.from_iterable(whole)))
        elif checkpoint:
            del whole, copies
            self.request_snapshot(step + 1)
        if self.leader is not None:
            await self._report_step(self._step_report(decision, rate, num_samples, push_codec))

    async def _apply(
        self, state: BundleState, decision: Decision, rate: float, checkpoint: bool
    ) -> list[tuple[Fragment, State]] | None:
        """Update a bundle and publish it; its copy for a checkpoint, None where there is no memory for one."""

        def work() -> list[tuple[Fragment, State]] | None:
            if not decision.skip:
                state.apply(decision.num_tokens, decision.clip_scale, rate)
            state.publish(decision.step + 1, self.pull_codec)
            try:
                return state.snapshot() if checkpoint else []
            except Exception as error:
                self._note_unwritten(error)
                return None

        copies = await self._run(work)
        state.begin_step(decision.step + 1)
        self._notify()
        return copies

    def _decide(self, step: int, reports: Mapping[int, pb.CompleteStepRequest]) -> Decision:
        try:
            loss_sum = math.fsum(totals.loss_sum for _, totals in sorted(self._slots.items()))
        except (OverflowError, ValueError):  # beyond fp64, or inf - inf
            loss_sum = math.nan
        recipe = self.plan.recipe
        decision, reason = decide_commit(step, reports, loss_sum, recipe.optimizer.clip_norm, self._consecutive_skips)
        if decision.skip:
            log.warning("step skipped", job=self.plan.job_id, step=step, reason=reason)
        version = step + 1
        interval = recipe.checkpoint.interval_steps
        halt = self._boundary is not None
        due = version == self.plan.num_steps or (interval > 0 and version % interval == 0)
        checkpoint = due or halt
        self._boundary = None
        push, pull = self.push_codec.name, self.pull_codec
        if self._tuner is not None:
            self._tuner.committed(time.monotonic())
            push = self._tuner.codec if self._tuner.push else push
            pull = self._tuner.codec if self._tuner.pull else pull
        return replace(
            decision,
            checkpoint=checkpoint,
            halt=halt,
            push_codec=codec_named(push).wire,
            pull_codec=codec_named(pull).wire,
        )

    def request_boundary(self, request: coordinator_pb2.BoundaryRequest) -> None:
        """On the leader: checkpoint at the next commit and say in its report that the job halts there."""
        self._boundary = request

    def _step_report(
        self, decision: Decision, rate: float, num_samples: int, push_codec: plan_pb2.Codec.ValueType
    ) -> coordinator_pb2.ReportStepRequest:
        return coordinator_pb2.ReportStepRequest(
            job_id=self.plan.job_id,
            epoch=self.plan.epoch,
            step=decision.step,
            num_tokens=decision.num_tokens,
            num_samples=num_samples,
            loss=decision.loss,
            grad_norm=decision.grad_norm,
            learning_rate=rate,
            skipped=decision.skip,
            consecutive_skips=decision.consecutive_skips,
            unix_ms=int(time.time() * 1000),
            halted=decision.halt,
            pushed_bytes=decision.pushed_bytes,
            push_codec=push_codec,
            pull_codec=decision.pull_codec,
            codec_reason=self._tuner.reason if self._tuner is not None else "",
        )

    def request_snapshot(self, version: int) -> None:
        """Write a checkpoint of `version`, without a commit, if this is the version at hand and it has none yet."""
        if self._can_snapshot(version) and not self._snapshots:
            self._snapshots = True
            self._spawn(self._snapshot(version))

    async def _snapshot(self, version: int) -> None:
        """Try until the copies are made, or another version is at hand: whatever goes wrong costs no state."""
        backoff = Backoff(1.0, 30.0)
        try:
            while self._can_snapshot(version):
                try:
                    await self._take_snapshot(version)
                except Exception as error:
                    self._note_unwritten(error)
                    await asyncio.sleep(backoff.next())
        finally:
            self._snapshots = False
            if self._checkpoint_version < version:
                self._unwritten = None

    async def _take_snapshot(self, version: int) -> None:
        await self._settle_checkpoint()
        copies = await asyncio.gather(*(self._run(state.snapshot) for state in self.bundles.values()))
        # A step may have been decided meanwhile: its update may be in the copies.
        if self._can_snapshot(version):
            self._begin_checkpoint(version, list(chain.from_iterable(copies)))

    def _can_snapshot(self, version: int) -> bool:
        settled = self._closed is None and self.phase.name not in ("loading", "applying")
        return settled and self.version == version > self._checkpoint_version

    async def _settle_checkpoint(self) -> None:
        """Wait until no copy is on its way to the disk: one at a time bounds the memory. One that the disk does not
        take makes room for the newer one."""
        if self._checkpoint_task is not None and self._unwritten is not None:
            self._checkpoint_task.cancel()
            self._unwritten = None
        if self._checkpoint_task is not None:
            self._settling_since = time.time()
            await asyncio.gather(self._checkpoint_task, return_exceptions=True)
            self._settling_since = None

    def _begin_checkpoint(self, version: int, copies: list[tuple[Fragment, State]]) -> None:
        self._checkpoint_version = version
        writing = self._write_checkpoint(version, copies, self._consecutive_skips)
        self._checkpoint_task = asyncio.create_task(self._guard(writing))

    def _note_unwritten(self, error: Exception) -> None:
        """Remember why no checkpoint can be written, for `status`."""
        cause, known = one_line(error), self._trouble
        if known is None or known[0] != cause:
            log.error("a checkpoint cannot be written, trying again", job=self.plan.job_id, cause=cause)
        self._trouble = self._unwritten = (cause, known[1] if known is not None else time.time())

    async def _write_file(self, directory: str, file: str, copies: list[tuple[Fragment, State]]) -> Written:
        """Write this server's file of a checkpoint, as often as it takes: whatever keeps it from the disk costs no
        state."""
        backoff = Backoff(1.0, 30.0)
        while True:
            try:
                written = await asyncio.to_thread(write_shard, directory, file, self.plan.tensors, copies)
                self._trouble = self._unwritten = None
                return written
            except Exception as error:
                self._note_unwritten(error)
            await asyncio.sleep(backoff.next())

    async def _write_checkpoint(self, version: int, copies: list[tuple[Fragment, State]], num_skips: int) -> None:
        plan = self.plan
        # In the order of their indices, whatever bundles they lie in.
        copies.sort(key=lambda copy: copy[0].index)
        directory = directory_of(plan.checkpoint_root, version)
        file = shard_file_name(plan.epoch, self.index, len(plan.servers))
        began = time.monotonic()
        entry, digests = await self._write_file(directory, file, copies)
        log.info(
            "checkpoint shard written",
            job=plan.job_id,
            version=version,
            file=files.join(directory, file),
            seconds=round(time.monotonic() - began, 2),
        )
        report = coordinator_pb2.ReportCheckpointRequest(
            job_id=plan.job_id,
            epoch=plan.epoch,
            version=version,
            server=self.index,
            file=entry.file,
            num_bytes=entry.num_bytes,
            sha256=entry.sha256,
            fragments=[
                coordinator_pb2.FragmentDigest(fragment=fragment.index, sha256=digest)
                for (fragment, _), digest in zip(copies, digests, strict=True)
            ],
            consecutive_skips=num_skips,
        )
        # On its own: the next checkpoint, and so the step before it, must not wait for the coordinator.
        self._unreported[version] = self._spawn(self._report_file(report))
        # Nobody removes old checkpoints while the coordinator is away.
        while len(self._unreported) > max(2, plan.recipe.checkpoint.keep):
            oldest = min(self._unreported)
            self._unreported.pop(oldest).cancel()
            log.info("a checkpoint's file makes room for newer ones, unreported", job=plan.job_id, version=oldest)
            await asyncio.to_thread(_remove, directory_of(plan.checkpoint_root, oldest), file)

    async def _report_file(self, report: coordinator_pb2.ReportCheckpointRequest) -> None:
        try:
            await self._report_checkpoint(report)
        finally:
            self._unreported.pop(report.version, None)

    # -- pull ------------------------------------------------------------------------------------------------------

    async def wait_version(self, job_id: str, epoch: int, min_version: int) -> int:
        """Wait until `min_version` is decided; return the version under way. Raises StaleEpochError."""
        while True:
            self.check_epoch(job_id, epoch)
            if self.version >= max(0, min_version):
                return self.version
            await self._changed.wait()

    async def copy(self, job_id: str, epoch: int, bundle: int, version: int, holds: bool) -> Copy | None:
        """Wait until a bundle is published at `version`; what a worker gets that `holds` the version before, or does
        not. None when the bundle has moved on. Raises StaleEpochError."""
        while True:
            self.check_epoch(job_id, epoch)
            state = self.bundles[bundle]
            if state.published_version == version:
                break
            if state.published_version > version:
                return None
            await self._changed.wait()
        copy = state.delta() if holds else None
        if copy is None:
            async with self._full_copies:
                # One at a time: a crowd of newcomers waits for the copy that the first one had made.
                copy = await self._run(state.full)
        # The next version may be in the making, though not published yet.
        return copy if copy.version == version else None

    def measured(self, peer: str, measurement: pb.LinkMeasurement) -> None:
        """Take what the worker behind `peer` saw of its speed and its links; only a leader that tunes has use for
        it."""
        if self._tuner is not None:
            self._tuner.measured(peer, measurement)

    # -- status ----------------------------------------------------------------------------------------------------

    def missing_slots(self) -> list[int]:
        """Slots of the step under way of which some contribution has not arrived."""
        if self.version < 0 or self.version >= self.plan.num_steps:
            return []
        states = self.bundles.values()
        return [slot for slot in range(self.plan.num_slots) if not all(state.has_slot(slot) for state in states)]

    def activity(self) -> coordinator_pb2.Activity:
        """What the shard does, for heartbeats."""
        waiting_for = ""
        missing = self.missing_slots() if self.phase.name == "accumulating" else []
        if missing:
            waiting_for = f"slots {', '.join(map(str, missing))} of step {self.version}"
        elif self.phase.name == "committing":
            absent = self.leader.missing if self.leader is not None else [self.plan.leader]
            names = ", ".join(self.plan.servers[server].name for server in absent)
            waiting_for = f"the commit of step {self.version} by {names}" if names else ""
        since = self.phase.since
        if self._unwritten is not None:
            waiting_for, since = f"the disk to take its checkpoint: {self._unwritten[0]}", self._unwritten[1]
        elif self._settling_since is not None:
            waiting_for, since = "the disk to take its last checkpoint", self._settling_since
        finished = self.version >= self.plan.num_steps
        states = self.bundles.values()
        return coordinator_pb2.Activity(
            job_id=self.plan.job_id,
            phase="idle" if finished else self.phase.name,
            step=max(0, self.version),
            waiting_for=waiting_for,
            waiting_since_unix_ms=int(since * 1000) if waiting_for else 0,
            sent_bytes=self.sent_bytes,
            received_bytes=self.received_bytes,
            missing_slots=missing,
            state_bytes=sum(state.state_bytes for state in states),
            early_bytes=sum(state.early_bytes for state in states),
            num_parameters=sum(state.bundle.num_elements for state in states) if self.version >= 0 else 0,
        )

    def status(self) -> pb.GetServerStatusResponse:
        """What the shard holds."""
        states = self.bundles.values()
        return pb.GetServerStatusResponse(
            epoch=self.plan.epoch,
            version=max(0, self.version),
            num_fragments=sum(len(state.bundle.fragments) for state in states),
            num_parameters=sum(state.bundle.num_elements for state in states),
            state_bytes=sum(state.state_bytes for state in states),
            early_bytes=sum(state.early_bytes for state in states),
            missing_slots=self.missing_slots(),
            num_dropped=self.num_dropped,
        )

    # -- helpers ---------------------------------------------------------------------------------------------------

    def check_epoch(self, job_id: str, epoch: int) -> None:
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
        """Run a background task; what goes wrong in it ends the shard and is reported, never swallowed."""
        try:
            await work
        except StaleEpochError as error:
            if self._closed is None:
                log.warning("left the step", job=self.plan.job_id, cause=str(error))
        except Exception as error:
            self.failed = True
            await self._report_failure(error)


def _remove(directory: str, file: str) -> None:
    """Remove a file that nobody knows of, and its directory if that is empty then."""
    with suppress(OSError):
        files.remove(files.join(directory, file))
        os.rmdir(directory)
