"""What every codec is, and what a codec with a residual adds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from gradstream.core.errors import ProtocolError
from gradstream.core.plan import sizes
from gradstream.core.plan.sizes import Shape
from gradstream.proto.v1 import plan_pb2

Payload = npt.NDArray[np.uint8]
State = dict[str, torch.Tensor]


class Codec(ABC):
    """Encodes and decodes fp32 slices of a tensor. Stateless; methods may run in any thread.

    `shape` is a fragment's, (rows, columns) or (elements,); both sides must use the same one.
    """

    name: ClassVar[str]
    wire: ClassVar[plan_pb2.Codec.ValueType]
    exact_class: ClassVar[bool] = True
    """Whether decode(encode(x)) is a function of x and the seed alone, with no state kept between calls."""
    fixed_size: ClassVar[bool] = True
    """Whether all payloads of a shape have the same length."""

    def encoded_bytes(self, shape: Shape) -> int:
        """Size of the payload of a slice, in bytes: exact, or the most it can be where the length varies."""
        return sizes.encoded_bytes(self.name, shape)

    def check_size(self, payload_bytes: int, shape: Shape) -> None:
        """Raise ProtocolError for a size that no payload of this shape has. For use before memory is allocated."""
        expected = self.encoded_bytes(shape)
        if payload_bytes != expected:
            raise ProtocolError(
                f"{self.name} payload of {payload_bytes} bytes where {math.prod(shape)} elements take {expected}"
            )

    @abstractmethod
    def encode(self, values: torch.Tensor, seed: int = 0) -> Payload:
        """The payload of a contiguous fp32 tensor on any device. Never aliases the input."""

    @abstractmethod
    def decode(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        """Write the payload's values over `out`, contiguous fp32, in the shape that was encoded, on any device.

        `seed` is the one it was encoded with. Raises ProtocolError for bytes that are no payload of this shape, and
        then leaves `out` as it was.
        """

    def encode_delta(self, values: torch.Tensor, held: torch.Tensor, seed: int = 0) -> Payload:
        """The payload of values - held, which is added to `held` as the receiver will add it."""
        payload = self.encode(values - held, seed)
        self.decode_add(payload, held, seed)
        return payload

    def decode_add(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        """Add the payload's values to `out`. Raises ProtocolError as `decode` does."""
        values = torch.empty_like(out)
        self.decode(payload, values, seed)
        out.add_(values)


class ResidualCodec(Codec):
    """A codec that keeps what it could not send, to send it later (error feedback, Seide et al. 2014, Karimireddy et
    al. 2019).

    The state belongs to one slot and one fragment. It is changed in place and must not be shared between threads.
    """

    exact_class: ClassVar[bool] = False

    @abstractmethod
    def new_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        """What a slot starts with: at least "residual", zeros of `shape`. A function of the shape alone."""

    @abstractmethod
    def encode_with(self, values: torch.Tensor, state: State, seed: int = 0) -> Payload:
        """The payload of values + residual; what it leaves out becomes the new residual.

        values + old residual == decoded + new residual, up to fp32's rounding. If the sum is not finite anywhere, the
        payload is, too, and the state stays as it was: the step is going to be skipped.
        """

    def encode(self, values: torch.Tensor, seed: int = 0) -> Payload:
        """As `encode_with` on a fresh state."""
        return self.encode_with(values, self.new_state(tuple(values.shape), values.device), seed)
