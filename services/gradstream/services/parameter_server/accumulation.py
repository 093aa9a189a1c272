"""Checks the contributions to the step under way and adds them up as they come.

A contribution passes three calls: `check` its header before memory is allocated for it, `offer` it once it is complete
and its checksum is right, `add` those that wait. The sum is in fixed point, so it does not depend on the order of
arrival, and no contribution waits for another one. When contributions come faster than they are added, `room` makes
the senders wait.

In a round whose slots the leader decides on (`quorum.py`) contributions are held, still encoded, until `count` says
which slots count: a slot counts on all servers or on none. What is held does not make senders wait, because the round
may need exactly what they send; it is at most every contribution once.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

from gradstream.core.codecs import Codec, Payload, codec_named, codec_on_wire
from gradstream.core.codecs.payloads import CodecBook, split
from gradstream.core.errors import ProtocolError
from gradstream.core.log import get_logger
from gradstream.core.plan.bundles import WEIGHTS, Bundle
from gradstream.core.plan.leases import slots_text
from gradstream.core.plan.plan import Plan
from gradstream.core.wire.slot_totals import SlotTotals
from gradstream.core.wire.stream_limits import MAX_WAITING_BYTES
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.proto.v1 import plan_pb2
from gradstream.services.parameter_server.bundle_state import BundleState

log = get_logger()


@dataclass(frozen=True)
class StepTotals:
    """A step's totals over all slots, besides the gradients. `loss_sum` is NaN where the losses have no finite sum."""

    num_tokens: int
    num_samples: int
    loss_sum: float
    pushed_bytes: int
    """Payload bytes that reached this server."""


class Accumulation:
    """The contributions to the step under way on one server. `bundles` belongs to the caller and is only read."""

    def __init__(
        self, plan: Plan, server: int, bundles: Mapping[int, BundleState], book: CodecBook, executor: Executor
    ):
        self.received_bytes = 0
        self.num_dropped = 0
        self._plan = plan
        self._server = server
        self._bundles = bundles
        self._book = book
        self._executor = executor
        self._slots: dict[int, SlotTotals] = {}
        self.expected: list[BundleState] = []
        """The bundles to which slots contribute in the step under way."""
        self._missing_S: list[int] = []  # contributions of each slot that have not come
        self._counted: frozenset[int] | None = None  # the slots that count; None until the leader has decided
        self._held: dict[int, list[tuple[BundleState, list[Payload]]]] = {}  # by slot, until it is known to count
        self._held_bytes = 0
        self._waiting_bytes = 0
        self._closed = False
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._step_bytes = 0
        self._num_complete = 0
        self.begin_step(plan.start_version)

    def check(self, header: pb.ContributionHeader, version: int, push_codec: Codec) -> None:
        """Check a header of this epoch against the plan and the current version and codec.

        Called before anything is allocated for the contribution. Raises ProtocolError.
        """
        state = self._bundles.get(header.bundle)
        if state is None:
            raise ProtocolError(f"bundle {header.bundle} is not held by server {self._server}")
        what = f"contribution to bundle {header.bundle} from slot {header.slot} of step {header.step}"
        if header.slot >= self._plan.num_slots:
            raise ProtocolError(f"{what}: the job has {self._plan.num_slots} slots")
        if header.step >= self._plan.last_version:
            raise ProtocolError(f"{what}: the job has {self._plan.last_version} steps")
        num_parts = self._plan.parts_of(state.bundle, header.step)
        if header.part >= num_parts:
            raise ProtocolError(f"{what}: part {header.part}, but its tensors have {num_parts}")
        if header.step > version:
            raise ProtocolError(f"{what}: step {version} is under way here")
        if not self._counts(state.bundle, header.step):
            raise ProtocolError(f"{what}: slots contribute moments to rounds only, and that step is an ordinary one")
        codec = self._codec(state.bundle, push_codec)
        if header.step < version:
            codec = codec_on_wire(header.codec)  # of a past step: it will be dropped, but must be valid
        if header.codec != codec.wire:
            name = plan_pb2.Codec.Name(header.codec) if header.codec in plan_pb2.Codec.values() else header.codec
            raise ProtocolError(f"{what}: codec {name}, but it is {codec.name} here")
        try:
            self._book.of(state.bundle, codec.name).check_sizes(header.fragment_bytes, header.payload_bytes)
        except ProtocolError as error:
            raise ProtocolError(f"{what}: {error}") from None
        training = self._plan.recipe.training
        max_samples = training.slot_batch * self._plan.rounds.num_slot_steps(header.step, header.slot)
        max_tokens = max_samples * training.sequence_length
        if not 0 < header.slot_tokens <= max_tokens or header.slot_samples > max_samples:
            raise ProtocolError(
                f"{what}: {header.slot_tokens} tokens of {header.slot_samples} samples, but a slot has at most "
                f"{max_tokens} of {max_samples}"
            )

    def _counts(self, bundle: Bundle, step: int) -> bool:
        """Whether slots contribute to a bundle in a step: to weights always, to moments in rounds that share them."""
        return bundle.array == WEIGHTS or self._plan.shares_moments(step)

    def _codec(self, bundle: Bundle, push_codec: Codec) -> Codec:
        """The codec of the contributions to a bundle in a step whose gradients have `push_codec`."""
        return codec_named(self._plan.codec_of(bundle, push_codec.name))

    def offer(self, header: pb.ContributionHeader, payload: Payload, version: int) -> pb.PushResult.ValueType:
        """Take a checked and verified contribution once; return whether it was accepted, stale or a duplicate.

        Raises ProtocolError.
        """
        state = self._bundles[header.bundle]
        if header.step < version or (self._counted is not None and header.slot not in self._counted):
            self.num_dropped += 1
            return pb.PUSH_RESULT_STALE
        if state.has(header.slot, header.part):
            self.num_dropped += 1
            return pb.PUSH_RESULT_DUPLICATE
        self._compare(header)
        state.take(header.slot, header.part)
        payloads = split(payload, header.fragment_bytes)
        if self._counted is None:
            self._held.setdefault(header.slot, []).append((state, payloads))
            self._held_bytes += payload.nbytes
        else:
            state.put(payloads)
            self._count_waiting(payload.nbytes)
        self._missing_S[header.slot] -= 1
        self._step_bytes += payload.nbytes
        self.received_bytes += payload.nbytes
        return pb.PUSH_RESULT_ACCEPTED

    def _compare(self, header: pb.ContributionHeader) -> None:
        """Compare a contribution's totals of its slot with those of the slot's first one. Raises ProtocolError."""
        totals = SlotTotals(header.slot_tokens, header.slot_samples, header.slot_loss_sum)
        known = self._slots.setdefault(header.slot, totals)
        if not known.same_loss(totals):
            # Two workers computed parts of one slot and round differently. The step is valid, but its bits now depend
            # on which worker computed which part.
            log.warning(
                "two workers computed different losses of one slot; are their processors of one kind?",
                job=self._plan.job_id,
                step=header.step,
                slot=header.slot,
            )
        if not known.same_counts(totals):
            raise ProtocolError(
                f"slot {header.slot} of step {header.step}: {totals} differs from {known} of an earlier contribution"
            )

    def is_whole(self, slot: int) -> bool:
        """Whether this server holds every contribution of a slot; False once it is decided which slots count."""
        return slot in self._held and not self._missing_S[slot]

    @property
    def whole(self) -> list[int]:
        """The slots of which this server holds every contribution, in rising order."""
        return sorted(filter(self.is_whole, self._held))

    def count(self, slots: Collection[int]) -> None:
        """Let the contributions of the slots that count wait to be added, and drop those of the others.

        Does nothing if that was decided before. Raises ProtocolError for a slot that is not whole here.
        """
        if self._counted is not None:
            return
        whole = self.whole
        if not slots or not set(slots).issubset(whole):
            raise ProtocolError(f"the leader counts {slots_text(slots)}, but whole here are {slots_text(whole)}")
        self._counted = frozenset(slots)
        for state in self.expected:
            state.count_slots(len(slots))
        for slot, contributions in self._held.items():
            if slot not in self._counted:
                self._slots.pop(slot)
                self.num_dropped += len(contributions)
                continue
            for state, payloads in contributions:
                state.put(payloads)
                self._count_waiting(sum(map(len, payloads)))
        self._held.clear()
        self._held_bytes = 0

    @property
    def counted(self) -> tuple[int, ...]:
        """The slots that count in the step under way, in rising order; none while that is open."""
        return tuple(sorted(self._counted or ()))

    async def room(self) -> None:
        """Wait while too many bytes of contributions wait to be added."""
        await self._has_room.wait()

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the contributions that were taken and are not in a sum yet."""
        return self._waiting_bytes + self._held_bytes

    def close(self) -> None:
        """Let nobody wait for room any more: nothing will be added."""
        self._closed = True
        self.expected = []
        self._has_room.set()

    def _count_waiting(self, change: int) -> None:
        self._waiting_bytes += change
        if self._waiting_bytes < MAX_WAITING_BYTES or self._closed:
            self._has_room.set()
        else:
            self._has_room.clear()

    async def add(self, state: BundleState, version: int, push_codec: Codec) -> bool:
        """Add a bundle's contributions while any wait, after its `start_adding` has returned True.

        Returns whether this completed the last bundle of this server.
        """
        codec = self._book.of(state.bundle, self._codec(state.bundle, push_codec).name)
        loop = asyncio.get_running_loop()
        more = True
        while more:
            await loop.run_in_executor(self._executor, state.add, codec, version)
            more, added_bytes = state.finish_adding()
            self._count_waiting(-added_bytes)
        if not state.complete:
            return False
        self._num_complete += 1
        return self._num_complete == len(self.expected)

    def totals(self) -> StepTotals:
        """The step's totals over the slots that have arrived, once it is known over those that count."""
        try:
            loss_sum = math.fsum(totals.loss_sum for _, totals in sorted(self._slots.items()))
        except (OverflowError, ValueError):  # beyond fp64, or inf - inf
            loss_sum = math.nan
        return StepTotals(
            num_tokens=sum(totals.num_tokens for totals in self._slots.values()),
            num_samples=sum(totals.num_samples for totals in self._slots.values()),
            loss_sum=loss_sum,
            pushed_bytes=self._step_bytes,
        )

    def begin_step(self, version: int) -> None:
        """Reset the totals for the step from `version`. Bundles begin it one by one, as each is published."""
        self._slots.clear()
        self._held.clear()
        self._held_bytes = 0
        counted = self._plan.counted_slots(version)
        self._counted = frozenset(counted) if counted is not None else None
        self.expected = [state for state in self._bundles.values() if self._counts(state.bundle, version)]
        for state in self.expected:
            state.count_slots(self._plan.num_slots if counted is None else len(counted))
        num_parts = sum(self._plan.parts_of(state.bundle, version) for state in self.expected)
        self._missing_S = [num_parts] * self._plan.num_slots
        self._step_bytes = 0
        self._num_complete = 0

    def missing_slots(self) -> list[int]:
        """The slots that may count and of which a contribution is still missing."""
        counted = self._counted
        return [
            slot for slot, missing in enumerate(self._missing_S) if missing and (counted is None or slot in counted)
        ]
