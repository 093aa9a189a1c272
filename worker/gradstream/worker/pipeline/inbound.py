"""Messages with a payload from a neighbour in a pipeline: those expected, in order, and those that have arrived."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from gradstream.core.errors import ProtocolError
from gradstream.core.pipeline.schedule import Op, Schedule, make_schedule
from gradstream.core.pipeline.validation import validate
from gradstream.proto.v1 import worker_pb2 as pb
from gradstream.worker.attempt import Attempt

FORWARD, BACKWARD = pb.DIRECTION_FORWARD, pb.DIRECTION_BACKWARD
WORDS = {FORWARD: "activation", BACKWARD: "gradient"}
Key = tuple[int, int]
"""(stage that computed a tensor, microbatch counted over the attempt's slots, in a round over its inner steps);
for a reduction (REDUCTION, inner step)."""
REDUCTION = -1
"""What the key of a reduction's message has in the place of a stage."""


@lru_cache(maxsize=64)
def sequence(schedule: Schedule, sender: int, receiver: int, direction: pb.Direction.ValueType) -> tuple[Key, ...]:
    """The tensors that one worker sends to another in a direction, in the order in which it computes them."""
    found = []
    for action in schedule.rows[sender]:
        if action.op is Op.FORWARD:
            to, there = action.stage + 1, FORWARD
        elif action.op in (Op.BACKWARD, Op.BACKWARD_INPUT):
            to, there = action.stage - 1, BACKWARD
        else:
            continue
        if there == direction and 0 <= to < schedule.num_stages and schedule.worker_of(to) == receiver:
            found.append((action.stage, action.microbatch))
    return tuple(found)


@lru_cache(maxsize=64)
def window_of(schedule: Schedule, worker: int) -> int:
    """The number of tensors that may wait at a worker.

    The schedule's validator computes this bound. With it no sender ever has to hold back a tensor that is needed.
    """
    if schedule.name in ("forward", "gpipe"):
        return schedule.num_microbatches * schedule.num_chunks
    # Beyond this number of microbatches the bound stays the same.
    most = 8 * schedule.num_workers * schedule.num_chunks
    if schedule.num_microbatches > most:
        schedule = make_schedule(schedule.name, schedule.num_workers, most, schedule.num_chunks)
    return max(2, validate(schedule).waiting_messages[worker])


@dataclass(frozen=True)
class Expectation:
    """What an attempt brings from a neighbour: `order`, which repeats for each inner step of a round.

    `num_microbatches` are those of one inner step. `has_reduction` says whether a reduction's message ends each.
    """

    order: tuple[Key, ...]
    num_microbatches: int = 1
    num_inner_steps: int = 1
    has_reduction: bool = False


class _Expected:
    """The messages expected for one attempt, in their order, and how many have arrived."""

    def __init__(self, attempt: Attempt, expectation: Expectation):
        self.attempt = attempt
        self.num_arrived = 0
        self._what = expectation
        self._order = expectation.order + ((REDUCTION, 0),) * expectation.has_reduction
        self._places = {key: place for place, key in enumerate(self._order)}

    @property
    def is_complete(self) -> bool:
        return self.num_arrived == len(self._order) * self._what.num_inner_steps

    def place(self, key: Key) -> int | None:
        """The place of a message in the order of all; None if it is not expected."""
        stage, number = key
        step, number = (number, 0) if stage == REDUCTION else divmod(number, self._what.num_microbatches)
        place = self._places.get((stage, number))
        if place is None or step >= self._what.num_inner_steps:
            return None
        return step * len(self._order) + place

    def next_text(self) -> str:
        """The next message, for people."""
        step, place = divmod(self.num_arrived, len(self._order))
        stage, microbatch = self._order[place]
        if stage == REDUCTION:
            return f"the reduction of inner step {step}"
        return f"that of microbatch {step * self._what.num_microbatches + microbatch} from stage {stage}"


class InboundStream:
    """A stream that a neighbour has opened."""

    def __init__(self) -> None:
        self.num_taken = 0
        self.changed = asyncio.Event()
        """Set when the neighbour must be told its credit."""


class Inbound:
    """The tensors and reductions that one neighbour sends in one direction."""

    def __init__(self, title: str, direction: pb.Direction.ValueType):
        self.title = title
        self.direction = direction
        self.arrived: dict[tuple[int, Key], tuple[torch.Tensor, float]] = {}  # by attempt number
        self.stream: InboundStream | None = None  # the one opened last; it supersedes older ones
        self._expected: deque[_Expected] = deque()
        self._newest = 0  # newest attempt of which a tensor has come: the neighbour is done with earlier ones
        self._max_waiting = 0
        self._posted: deque[torch.Tensor] = deque()

    def begin(self, attempt: Attempt, expectation: Expectation, window: int, posted: Sequence[torch.Tensor]) -> None:
        """Expect the messages of one more attempt, in their order, after those of earlier attempts.

        `posted` are buffers to decode into.
        """
        while self._expected and self._expected[0].is_complete:
            self._expected.popleft()
        self._expected.append(_Expected(attempt, expectation))
        # Never less than was granted before: tensors may be under way on that grant.
        self._max_waiting = max(self._max_waiting, window)
        self._posted = deque(posted)
        self.tell()

    def open(self) -> InboundStream:
        """Begin a stream that the neighbour has opened. It supersedes the neighbour's earlier stream."""
        self.tell()
        self.stream = InboundStream()
        return self.stream

    def tell(self) -> None:
        """Have the neighbour told its credit."""
        if self.stream is not None:
            self.stream.changed.set()

    def forget_before(self, number: int) -> None:
        """Drop the tensors of attempts with lower numbers, which are void."""
        self._expected = deque(expected for expected in self._expected if expected.attempt.number >= number)
        self.arrived = {key: value for key, value in self.arrived.items() if key[0] >= number}

    @property
    def window(self) -> int:
        """The number of tensors that may still come before one is used."""
        return max(0, self._max_waiting - len(self.arrived))

    def expect(self, number: int, key: Key, what: str) -> Attempt | None:
        """Return the attempt of a message that is the next one to come.

        Returns None for a message that came already or belongs to an attempt that is over. Raises ProtocolError for any
        other message.
        """
        expected = next((found for found in self._expected if found.attempt.number == number), None)
        if expected is None or number < self._newest:
            return None
        place = expected.place(key)
        is_tensor = key[0] != REDUCTION
        if place is None:
            word = WORDS[self.direction] if is_tensor else "reduction"
            raise ProtocolError(f"{what}: this worker gets no such {word} from it in this attempt")
        if place < expected.num_arrived:
            return None
        if place > expected.num_arrived:
            raise ProtocolError(f"{what}: out of order, {expected.next_text()} comes first")
        if is_tensor and not self.window:  # a reduction needs no credit: one waits at most
            raise ProtocolError(f"{what}: {self._max_waiting} tensors wait here already")
        return expected.attempt

    def buffer(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a posted buffer, or a new one where microbatches differ in shape."""
        if self._posted and tuple(self._posted[0].shape) == shape:
            return self._posted.popleft()
        return torch.empty(shape)

    def take(self, number: int, key: Key, tensor: torch.Tensor, loss_sum: float) -> bool:
        """Store a message that was expected. Returns False when its attempt has become void in the meantime."""
        for expected in self._expected:
            if expected.attempt.number == number and expected.place(key) == expected.num_arrived:
                self.arrived[number, key] = (tensor, loss_sum)
                self._newest = number
                expected.num_arrived += 1
                return True
        return False
