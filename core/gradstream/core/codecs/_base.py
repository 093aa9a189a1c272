"""The base classes of codecs, without and with a residual."""

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

    `shape` is the shape of a fragment, (rows, columns) or (elements,). Both sides must use the same shape.
    """

    name: ClassVar[str]
    wire: ClassVar[plan_pb2.Codec.ValueType]
    exact_class: ClassVar[bool] = True
    """Whether decode(encode(x)) depends only on x and the seed, without state between calls."""
    fixed_size: ClassVar[bool] = True
    """Whether all payloads of a shape have the same length."""

    def encoded_bytes(self, shape: Shape) -> int:
        """Size of the payload of a slice in bytes: exact, or the maximum for a codec of variable length."""
        return sizes.encoded_bytes(self.name, shape)

    def check_size(self, payload_bytes: int, shape: Shape) -> None:
        """Raise ProtocolError for a size that no payload of this shape has, before memory is allocated for it."""
        expected = self.encoded_bytes(shape)
        if payload_bytes != expected:
            raise ProtocolError(
                f"{self.name} payload of {payload_bytes} bytes where {math.prod(shape)} elements take {expected}"
            )

    @abstractmethod
    def encode(self, values: torch.Tensor, seed: int = 0) -> Payload:
        """Encode a contiguous fp32 tensor on any device. The payload never shares memory with the input."""

    @abstractmethod
    def decode(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        """Write the payload's values to `out`: contiguous fp32, in the encoded shape, on any device.

        `seed` is the seed of `encode`. Raises ProtocolError for bytes that are not a payload of this shape, and then
        leaves `out` unchanged.
        """

    def encode_delta(self, values: torch.Tensor, held: torch.Tensor, seed: int = 0) -> Payload:
        """Encode values - held, and add the decoded payload to `held`, as the receiver does."""
        payload = self.encode(values - held, seed)
        self.decode_add(payload, held, seed)
        return payload

    def decode_add(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        """Add the payload's values to `out`. Raises ProtocolError as `decode` does."""
        values = torch.empty_like(out)
        self.decode(payload, values, seed)
        out.add_(values)


class ResidualCodec(Codec):
    """A codec with a residual: the part that it could not send is added to later ones (error feedback).

    See Seide et al. 2014 and Karimireddy et al. 2019.

    A state belongs to one slot and one fragment. It is changed in place and must not be shared between threads.
    """

    exact_class: ClassVar[bool] = False

    @abstractmethod
    def new_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        """The initial state of a slot: at least "residual", zeros of `shape`. Depends only on the shape."""

    @abstractmethod
    def encode_with(self, values: torch.Tensor, state: State, seed: int = 0) -> Payload:
        """Encode values + residual. The part that is left out becomes the new residual.

        values + old residual == decoded + new residual, up to fp32's rounding. If an element of the sum is not finite,
        the payload is not finite either, and the state stays unchanged, because the step will be skipped.
        """

    def encode(self, values: torch.Tensor, seed: int = 0) -> Payload:
        """Encode as `encode_with`, with a new state."""
        return self.encode_with(values, self.new_state(tuple(values.shape), values.device), seed)
