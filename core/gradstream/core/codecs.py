"""Codecs: how a slice of a tensor is written as bytes. All of them are in the exact class: same input, same bytes.

| name | bytes an element | loses                                            |
|------|------------------|--------------------------------------------------|
| fp32 | 4                | nothing                                          |
| bf16 | 2                | 16 bits of mantissa, rounded to nearest even     |
| int8 | 1 + 4/256        | blocks of 256 scaled by their largest magnitude  |

A value that is not finite stays not finite through every codec, so that a broken gradient is seen, not hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from gradstream.core.errors import ProtocolError
from gradstream.proto.v1 import plan_pb2

INT8_BLOCK = 256

Payload = npt.NDArray[np.uint8]


class Codec(ABC):
    """Encodes and decodes 1-D fp32 tensors. Stateless; methods may run in any thread."""

    name: ClassVar[str]
    wire: ClassVar[plan_pb2.Codec.ValueType]
    exact_class: ClassVar[bool] = True
    """Whether decode(encode(x)) is a function of x alone, with no state kept between calls."""

    @abstractmethod
    def encoded_bytes(self, num_elements: int) -> int:
        """Exact size of the payload of `num_elements`, in bytes."""

    @abstractmethod
    def encode(self, values_N: torch.Tensor) -> Payload:
        """The payload of a contiguous fp32 tensor of shape (N,) on any device. Never aliases the input."""

    @abstractmethod
    def decode(self, payload: Payload, out_N: torch.Tensor) -> None:
        """Write the payload's values over `out_N`, fp32, shape (N,), on the CPU. Raises ProtocolError for a wrong
        length."""

    def decode_add(self, payload: Payload, out_N: torch.Tensor) -> None:
        """Add the payload's values to `out_N`. Raises ProtocolError for a wrong length."""
        values_N = torch.empty_like(out_N)
        self.decode(payload, values_N)
        out_N.add_(values_N)

    def _check(self, payload: Payload, out_N: torch.Tensor) -> None:
        expected = self.encoded_bytes(out_N.numel())
        if payload.nbytes != expected:
            raise ProtocolError(
                f"{self.name} payload of {payload.nbytes} bytes where {out_N.numel()} elements take {expected}"
            )


class Fp32(Codec):
    """Little-endian binary32, as it is."""

    name = "fp32"
    wire = plan_pb2.CODEC_FP32

    def encoded_bytes(self, num_elements: int) -> int:
        return 4 * num_elements

    def encode(self, values_N: torch.Tensor) -> Payload:
        return _bytes_of(values_N.detach().to("cpu", torch.float32, copy=True))

    def decode(self, payload: Payload, out_N: torch.Tensor) -> None:
        self._check(payload, out_N)
        out_N.copy_(torch.from_numpy(payload.view(np.float32)))

    def decode_add(self, payload: Payload, out_N: torch.Tensor) -> None:
        self._check(payload, out_N)
        out_N.add_(torch.from_numpy(payload.view(np.float32)))


class Bf16(Codec):
    """The upper half of binary32, rounded to nearest even."""

    name = "bf16"
    wire = plan_pb2.CODEC_BF16

    def encoded_bytes(self, num_elements: int) -> int:
        return 2 * num_elements

    def encode(self, values_N: torch.Tensor) -> Payload:
        return _bytes_of(values_N.detach().to(torch.bfloat16).cpu().view(torch.int16))

    def decode(self, payload: Payload, out_N: torch.Tensor) -> None:
        self._check(payload, out_N)
        out_N.copy_(self._values(payload))

    def decode_add(self, payload: Payload, out_N: torch.Tensor) -> None:
        self._check(payload, out_N)
        # bf16 widens to fp32 exactly, so adding mixed types equals adding the decoded values.
        out_N.add_(self._values(payload))

    @staticmethod
    def _values(payload: Payload) -> torch.Tensor:
        return torch.from_numpy(payload.view(np.int16)).view(torch.bfloat16)


class Int8(Codec):
    """Blocks of 256 elements scaled so that the largest magnitude is 127; rounded half to even.

    The payload is all blocks' fp32 scales, then one signed byte an element. The last block may be short.
    """

    name = "int8"
    wire = plan_pb2.CODEC_INT8

    def encoded_bytes(self, num_elements: int) -> int:
        return num_elements + 4 * self._num_blocks(num_elements)

    def encode(self, values_N: torch.Tensor) -> Payload:
        values_N = values_N.detach()
        num_elements = values_N.numel()
        num_blocks = self._num_blocks(num_elements)
        padding = num_blocks * INT8_BLOCK - num_elements
        blocks_BE = torch.nn.functional.pad(values_N, (0, padding)).view(num_blocks, INT8_BLOCK)
        scales_B = blocks_BE.abs().amax(dim=1).div_(127.0)
        # A block of zeros has scale 0 and every quotient 0/0; the numbers sent for it must not matter, so they are 0.
        quotients_BE = (blocks_BE / scales_B[:, None]).nan_to_num_(0.0, 127.0, -127.0).round_().clamp_(-127, 127)
        payload = np.empty(self.encoded_bytes(num_elements), dtype=np.uint8)
        payload[: 4 * num_blocks] = _bytes_of(scales_B.cpu())
        payload[4 * num_blocks :] = _bytes_of(quotients_BE.to(torch.int8).cpu().view(-1)[:num_elements])
        return payload

    def decode(self, payload: Payload, out_N: torch.Tensor) -> None:
        self._check(payload, out_N)
        num_elements = out_N.numel()
        num_blocks = self._num_blocks(num_elements)
        scales_B = torch.from_numpy(payload[: 4 * num_blocks].view(np.float32))
        out_N.copy_(torch.from_numpy(payload[4 * num_blocks :].view(np.int8)))
        full = num_elements // INT8_BLOCK
        out_N[: full * INT8_BLOCK].view(full, INT8_BLOCK).mul_(scales_B[:full, None])
        if full < num_blocks:
            out_N[full * INT8_BLOCK :].mul_(scales_B[full])

    @staticmethod
    def _num_blocks(num_elements: int) -> int:
        return -(-num_elements // INT8_BLOCK)


def _bytes_of(tensor_N: torch.Tensor) -> Payload:
    array: Payload = tensor_N.contiguous().numpy().reshape(-1).view(np.uint8)
    return array


_CODECS: tuple[Codec, ...] = (Fp32(), Bf16(), Int8())
_BY_NAME = {codec.name: codec for codec in _CODECS}
_BY_WIRE = {codec.wire: codec for codec in _CODECS}
if set(_BY_WIRE) != set(plan_pb2.Codec.values()) - {plan_pb2.CODEC_UNSPECIFIED}:
    raise RuntimeError("the codecs of gradstream.core.codecs and of plan.proto differ")


def codec_named(name: str) -> Codec:
    """The codec that a recipe names. Raises KeyError for another name: recipes are validated before."""
    return _BY_NAME[name]


def codec_on_wire(wire: int) -> Codec:
    """The codec of a message. Raises ProtocolError for an unknown one."""
    codec = _BY_WIRE.get(wire)  # type: ignore[call-overload]
    if codec is None:
        raise ProtocolError(f"unknown codec {wire}; do both sides run the same gradstream version?")
    return codec  # type: ignore[no-any-return]
