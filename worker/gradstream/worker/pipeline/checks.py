"""Checks of a neighbour's messages by their headers alone, before anything is allocated for a message."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradstream.core.codecs import Codec
from gradstream.core.errors import ConfigError, ProtocolError
from gradstream.core.plan.plan import Plan
from gradstream.proto.v1 import plan_pb2
from gradstream.proto.v1 import worker_pb2 as pb
from gradstream.worker.attempt import Attempt, is_round, schedule_for
from gradstream.worker.pipeline.inbound import FORWARD, REDUCTION, WORDS, Inbound
from gradstream.worker.pipeline.layout import Layout
from gradstream.worker.pipeline.place import Place, Shapes

MAX_UPCOMING_ATTEMPTS = 64
"""Attempts that may wait at a worker, void ones not counted. Beyond its neighbour's credit the first worker begins only
one or two."""


def has_payload(header: pb.StageHeader) -> bool:
    """Whether a message has a payload."""
    return header.WhichOneof("content") in ("tensor", "reduction")


@dataclass(frozen=True)
class HeaderChecks:
    """The checks of one worker in one place. `codec` is the codec of activations."""

    plan: Plan
    place: Place
    shapes: Shapes
    codec: Codec
    layout: Layout

    def check(self, inbound: Inbound, header: pb.StageHeader, latest: Attempt | None, num_upcoming: int) -> bool:
        """Check a message's header; return whether its payload is to be used.

        `latest` is the newest attempt that has begun here; `num_upcoming` is the number of attempts that wait to be
        computed. Raises ProtocolError that names the neighbour.
        """
        kind = header.WhichOneof("content")
        forward = inbound.direction == FORWARD
        if kind == "begin":
            if not forward or self.place.is_first:
                raise ProtocolError(f"{inbound.title}: it must not begin an attempt here")
            self._check_attempt(inbound, header.begin, num_upcoming)
        elif kind == "abandon":
            if forward or self.place.index + 1 == self.plan.replica_size:
                raise ProtocolError(f"{inbound.title}: it must not abandon an attempt here")
        elif not has_payload(header):
            raise ProtocolError(f"{inbound.title}: a message without content")
        if not has_payload(header):
            if header.payload_bytes:
                raise ProtocolError(
                    f"{inbound.title}: {header.payload_bytes} payload bytes in a message without a payload"
                )
            return False
        if kind == "reduction":
            return self._check_reduction(inbound, header, latest)
        return self._check_tensor(inbound, header, latest)

    def _check_attempt(self, inbound: Inbound, begin: pb.StageAttempt, num_upcoming: int) -> None:
        training = self.plan.recipe.training
        what = f"{inbound.title}: attempt {begin.number}"
        last = self.plan.last_version + begin.validate
        slots = list(begin.slots)
        if begin.version >= last:
            raise ProtocolError(f"{what}: version {begin.version}, but the job has {self.plan.last_version} steps")
        if not slots or max(slots) >= training.num_slots or len(set(slots)) < len(slots):
            raise ProtocolError(f"{what}: slots {slots}, but the job has {training.num_slots}")
        if begin.validate and len(slots) != 1:
            raise ProtocolError(f"{what}: a validation pass of {len(slots)} slots")
        attempt = Attempt(begin.number, begin.version, tuple(slots), begin.validate)
        if is_round(self.plan, attempt) and len(slots) != 1:
            raise ProtocolError(f"{what}: a round of {len(slots)} slots")
        if begin.void_before > begin.number:
            raise ProtocolError(f"{what}: void_before {begin.void_before} is above its own number")
        if num_upcoming >= MAX_UPCOMING_ATTEMPTS:
            raise ProtocolError(f"{what}: {MAX_UPCOMING_ATTEMPTS} attempts wait here already")
        try:
            schedule_for(self.plan, attempt)
        except ConfigError as error:
            raise ProtocolError(f"{what}: {error}") from None

    def _check_tensor(self, inbound: Inbound, header: pb.StageHeader, latest: Attempt | None) -> bool:
        tensor = header.tensor
        what = (
            f"{inbound.title}, {WORDS[inbound.direction]} of microbatch {tensor.microbatch} from stage {tensor.stage} "
            f"of attempt {tensor.attempt_number}"
        )
        if latest is None or tensor.attempt_number > latest.number:
            raise ProtocolError(f"{what}: that attempt has not begun here")
        if tensor.codec != self.codec.wire:
            name = plan_pb2.Codec.Name(tensor.codec) if tensor.codec in plan_pb2.Codec.values() else tensor.codec
            raise ProtocolError(f"{what}: codec {name}, but the recipe says activations: {self.codec.name}")
        attempt = inbound.expect(tensor.attempt_number, (tensor.stage, tensor.microbatch), what)
        if attempt is None:
            # The payload will be dropped, but it must not be larger than any tensor can be.
            most = self.codec.encoded_bytes((math.prod(self.shapes.largest),))
            if header.payload_bytes > most:
                raise ProtocolError(f"{what}: {header.payload_bytes} bytes, more than the {most} of any microbatch")
            return False
        shape = self.shapes.of(attempt, tensor.microbatch)
        if tuple(tensor.shape) != shape:
            raise ProtocolError(f"{what}: shape {list(tensor.shape)}, but it is {list(shape)} here")
        try:
            self.codec.check_size(header.payload_bytes, (math.prod(shape),))
        except ProtocolError as error:
            raise ProtocolError(f"{what}: {error}") from None
        return True

    def _check_reduction(self, inbound: Inbound, header: pb.StageHeader, latest: Attempt | None) -> bool:
        reduction = header.reduction
        what = f"{inbound.title}, reduction of inner step {reduction.inner_step} of attempt {reduction.attempt_number}"
        if latest is None or reduction.attempt_number > latest.number:
            raise ProtocolError(f"{what}: that attempt has not begun here")
        num_bytes = self.layout.num_bytes_to(self.place.index, inbound.direction)
        if header.payload_bytes != num_bytes:
            raise ProtocolError(f"{what}: {header.payload_bytes} bytes, but it has {num_bytes} here")
        return inbound.expect(reduction.attempt_number, (REDUCTION, reduction.inner_step), what) is not None
