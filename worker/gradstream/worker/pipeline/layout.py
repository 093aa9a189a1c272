"""The messages of the reduction that ends an inner step of a round (gradstream.worker.pipeline.reduction)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from gradstream.core.codecs import Payload
from gradstream.core.errors import ProtocolError
from gradstream.core.plan.plan import Plan
from gradstream.proto.v1 import worker_pb2 as pb
from gradstream.worker.pipeline.inbound import FORWARD


class Layout:
    """What the messages of reductions between a place of a replica and the next one have, from the plan alone."""

    def __init__(self, plan: Plan):
        places = [plan.places_of(tensor) for tensor in plan.tensors]
        self._ends = sorted(max(found) for found in places)  # where each tensor's norm is computed
        self._between = {
            place: tuple(tensor for tensor, found in enumerate(places) if min(found) <= place < max(found))
            for place in range(plan.replica_size)
        }
        self._elements = [tensor.num_elements for tensor in plan.tensors]
        self._size = plan.replica_size

    def tensors(self, place: int) -> tuple[int, ...]:
        """The tied tensors that pass between a place and the next one."""
        return self._between[place]

    def num_numbers(self, place: int, direction: pb.Direction.ValueType) -> int:
        """Number of fp64 numbers in a message between a place and the next one."""
        return bisect_right(self._ends, place) if direction == FORWARD else 1

    def num_bytes(self, place: int, direction: pb.Direction.ValueType) -> int:
        """Payload bytes of a message between a place and the next one."""
        return 8 * self.num_numbers(place, direction) + 4 * sum(self._elements[one] for one in self.tensors(place))

    def num_bytes_to(self, place: int, direction: pb.Direction.ValueType) -> int:
        """Payload bytes of a message that the worker in a place gets; 0 where it gets none in this direction."""
        begin = place - 1 if direction == FORWARD else place
        return self.num_bytes(begin, direction) if 0 <= begin < self._size - 1 else 0

    def pack(self, numbers: Sequence[float], tensors: Sequence[torch.Tensor]) -> Payload:
        """Copy numbers and flat fp32 tensors to a payload."""
        pieces = [np.asarray(numbers, np.float64), *(tensor.detach().cpu().numpy() for tensor in tensors)]
        payload = np.empty(sum(piece.nbytes for piece in pieces), np.uint8)
        for (begin, end), piece in zip(pairwise([0, *accumulate(p.nbytes for p in pieces)]), pieces, strict=True):
            payload[begin:end] = piece.view(np.uint8)
        return payload

    def unpack(
        self, payload: Payload, place: int, direction: pb.Direction.ValueType
    ) -> tuple[list[float], dict[int, torch.Tensor]]:
        """The numbers, and the tensors by number as views, of a payload of the right size."""
        end = 8 * self.num_numbers(place, direction)
        numbers, found = payload[:end].view(np.float64).tolist(), {}
        for tensor in self.tensors(place):
            begin, end = end, end + 4 * self._elements[tensor]
            found[tensor] = torch.from_numpy(payload[begin:end].view(np.float32))
        return numbers, found

    def check_numbers(self, payload: Payload, place: int, direction: pb.Direction.ValueType) -> None:
        """Check the numbers of a payload that the worker in a place got. Raises ProtocolError."""
        begin = place - 1 if direction == FORWARD else place
        numbers = payload[: 8 * self.num_numbers(begin, direction)].view(np.float64)
        wrong = numbers < 0 if direction == FORWARD else (numbers < 0) | (numbers > 1)
        if wrong.any():
            name = "squared norm" if direction == FORWARD else "clip factor"
            raise ProtocolError(f"a {name} of {numbers[wrong][0]:g}")
