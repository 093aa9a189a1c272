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

from gradstream.core import kernels
from gradstream.core.errors import ProtocolError
from gradstream.core.kernels import BF16_BLOCK, INT8_BLOCK
from gradstream.proto.v1 import plan_pb2

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
        end = out_N.numel() // BF16_BLOCK * BF16_BLOCK
        halves_BE = payload[: 2 * end].view(np.uint16).reshape(-1, BF16_BLOCK)
        kernels.bf16_decode_add(halves_BE, _blocks(out_N, BF16_BLOCK))
        if end < out_N.numel():
            # bf16 widens to fp32 exactly, so adding mixed types equals adding the decoded values.
            out_N[end:].add_(self._values(payload[2 * end :]))

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
        full = num_elements // INT8_BLOCK if values_N.device.type == "cpu" else 0
        payload = np.empty(self.encoded_bytes(num_elements), dtype=np.uint8)
        scales_B = payload[: 4 * num_blocks].view(np.float32)
        quotients_N = payload[4 * num_blocks :].view(np.int8)
        if full:
            values_BE = values_N[: full * INT8_BLOCK].numpy().reshape(full, INT8_BLOCK)
            quotients_BE = quotients_N[: full * INT8_BLOCK].reshape(full, INT8_BLOCK)
            kernels.int8_encode(values_BE, values_BE.view(np.int32), scales_B[:full], quotients_BE)
        if full < num_blocks:
            self._encode_by_torch(values_N[full * INT8_BLOCK :], scales_B[full:], quotients_N[full * INT8_BLOCK :])
        return payload

    def decode(self, payload: Payload, out_N: torch.Tensor) -> None:
        scales_B, quotients_N, full = self._parts(payload, out_N)
        end = full * INT8_BLOCK
        kernels.int8_decode(scales_B[:full], quotients_N[:end].reshape(full, INT8_BLOCK), _blocks(out_N, INT8_BLOCK))
        if full < len(scales_B):
            out_N[end:].copy_(torch.from_numpy(quotients_N[end:])).mul_(float(scales_B[full]))

    def decode_add(self, payload: Payload, out_N: torch.Tensor) -> None:
        scales_B, quotients_N, full = self._parts(payload, out_N)
        end = full * INT8_BLOCK
        kernels.int8_decode_add(
            scales_B[:full], quotients_N[:end].reshape(full, INT8_BLOCK), _blocks(out_N, INT8_BLOCK)
        )
        if full < len(scales_B):
            out_N[end:].add_(torch.from_numpy(quotients_N[end:]).float().mul_(float(scales_B[full])))

    def _parts(
        self, payload: Payload, out_N: torch.Tensor
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int8], int]:
        """A payload's scales, its quotients and the number of whole blocks. Raises ProtocolError for a wrong length."""
        self._check(payload, out_N)
        num_blocks = self._num_blocks(out_N.numel())
        return (
            payload[: 4 * num_blocks].view(np.float32),
            payload[4 * num_blocks :].view(np.int8),
            out_N.numel() // INT8_BLOCK,
        )

    def _encode_by_torch(
        self, values_N: torch.Tensor, scales_B: npt.NDArray[np.float32], quotients_N: npt.NDArray[np.int8]
    ) -> None:
        """What kernels.int8_encode does, for a short last block and for other devices."""
        num_blocks = len(scales_B)
        padding = num_blocks * INT8_BLOCK - values_N.numel()
        blocks_BE = torch.nn.functional.pad(values_N, (0, padding)).view(num_blocks, INT8_BLOCK)
        found_B = blocks_BE.abs().amax(dim=1).div_(127.0)
        usable_B1 = (found_B.isfinite() & (found_B != 0))[:, None]
        quotients_BE = torch.where(usable_B1, blocks_BE / found_B[:, None], 0.0).round_().clamp_(-127, 127)
        scales_B[:] = found_B.cpu().numpy()
        quotients_N[:] = quotients_BE.to(torch.int8).cpu().view(-1)[: len(quotients_N)].numpy()

    @staticmethod
    def _num_blocks(num_elements: int) -> int:
        return -(-num_elements // INT8_BLOCK)


def _blocks(tensor_N: torch.Tensor, block: int) -> npt.NDArray[np.float32]:
    """The whole blocks of a contiguous fp32 tensor on the CPU, as a view of shape (B, block)."""
    end = tensor_N.numel() // block * block
    array: npt.NDArray[np.float32] = tensor_N[:end].detach().numpy().reshape(-1, block)
    return array


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
