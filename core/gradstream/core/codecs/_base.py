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
    """Whether decode(encode(x)) depends only on x and the seed, without state between calls, unless a job sets
    `codec.residual_decay`."""
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

    def new_state(self, shape: Shape, device: torch.device | str = "cpu") -> State:
        """The initial state of a slot: at least "residual", zeros of `shape`. Depends only on the shape."""
        return {"residual": torch.zeros(shape, device=device)}

    def encode_with(self, values: torch.Tensor, state: State, seed: int = 0, decay: float = 1.0) -> Payload:
        """Encode values + residual. What is left out, times `decay`, becomes the new residual.

        This is error feedback (Seide et al. 2014, Karimireddy et al. 2019), with the decay of SparseLoCo (Sarfi et al.
        2025). With decay 1, values + old residual == decoded + new residual, up to fp32's rounding. If an element of
        the sum is not finite, the payload is not finite either, and the state stays unchanged, because the step will be
        skipped.

        A state belongs to one slot and one fragment. It is changed in place and must not be shared between threads.
        Raises ValueError for the state of another slice.
        """
        residual = residual_of(values, state).view(values.shape)
        sums = values.detach() + residual
        payload = self.encode(sums, seed)
        if not sums.numel() or bool(torch.stack(sums.aminmax()).isfinite().all()):
            self.decode(payload, residual, seed)
            torch.sub(sums, residual, out=residual)
            decayed(residual, decay)
        return payload


class ResidualCodec(Codec):
    """A codec that sends too little without a residual: the part that it leaves out is added to later contributions."""

    exact_class: ClassVar[bool] = False

    @abstractmethod
    def encode_with(self, values: torch.Tensor, state: State, seed: int = 0, decay: float = 1.0) -> Payload: ...

    def encode(self, values: torch.Tensor, seed: int = 0) -> Payload:
        """Encode as `encode_with`, with a new state."""
        return self.encode_with(values, self.new_state(tuple(values.shape), values.device), seed)


def residual_of(values: torch.Tensor, state: State) -> torch.Tensor:
    """The state's residual on the values' device, as (N,). Raises ValueError for the state of another slice."""
    residual = state["residual"]
    if residual.numel() != values.numel():
        raise ValueError(f"a residual of {residual.numel()} elements for a slice of {values.numel()}")
    if residual.device != values.device:
        for key, tensor in state.items():
            state[key] = tensor.to(values.device)
        residual = state["residual"]
    return residual.view(-1)


def decayed(residual: torch.Tensor, decay: float) -> None:
    """Multiply a new residual by the decay, in place."""
    if decay != 1.0:
        residual.mul_(decay)
