"""Codecs that send every element: fp32, bf16, and blocks of small numbers with a shared scale.

For tensors in the CPU's memory they call `kernels.dense`, where a bundle encodes all its fragments in one call. On
other devices they are chains of torch operations with the same bits.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch

from gradstream.core.codecs import _device
from gradstream.core.codecs._base import Codec, Payload
from gradstream.core.kernels import dense
from gradstream.core.kernels.blocks import BLOCK
from gradstream.core.kernels.dense import I64, address_of, addresses_of
from gradstream.proto.v1 import plan_pb2


class DenseCodec(Codec):
    """A codec with kernels in `kernels.dense`, of kind `kind`."""

    kind: ClassVar[int]

    def key(self, seed: int) -> int:
        """The kernels' key for a seed."""
        return 0

    def encode(self, values: torch.Tensor, seed: int = 0) -> Payload:
        values = values.detach()
        if values.device.type != "cpu":
            return _device.to_host(self.encode_by_torch(values.view(-1), seed))
        payload = np.empty(self.encoded_bytes((values.numel(),)), dtype=np.uint8)
        call = self._call(values, seed)
        dense.encode(*call, addresses_of([values], call[1]), _address(payload))
        return payload

    def encode_delta(self, values: torch.Tensor, held: torch.Tensor, seed: int = 0) -> Payload:
        if values.device.type != "cpu":
            return super().encode_delta(values, held, seed)
        payload = np.empty(self.encoded_bytes((values.numel(),)), dtype=np.uint8)
        call = self._call(values, seed)
        addresses = addresses_of([values], call[1]), addresses_of([held], call[1])
        dense.encode_delta(*call, *addresses, _address(payload))
        return payload

    def decode(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self._decode(payload, out, seed, False)

    def decode_add(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self._decode(payload, out, seed, True)

    def _decode(self, payload: Payload, out: torch.Tensor, seed: int, add: bool) -> None:
        self.check_size(payload.nbytes, tuple(out.shape))
        if out.device.type == "cpu":
            call = self._call(out, seed)
            dense.decode(*call, _address(payload), addresses_of([out], call[1]), add)
            return
        values_N = self.decode_by_torch(_device.from_host(payload, out.device), out.numel(), seed)
        out.view(-1).add_(values_N) if add else out.view(-1).copy_(values_N)

    def _call(self, values: torch.Tensor, seed: int) -> tuple[I64, I64, I64]:
        """Kind, number of elements and key, as arguments of a kernel for one fragment."""
        kind, elements, key = np.array([[self.kind], [values.numel()], [self.key(seed)]], dtype=np.int64)
        return kind, elements, key

    @abstractmethod
    def encode_by_torch(self, values_N: torch.Tensor, seed: int) -> torch.Tensor:
        """Encode with torch; the payload is a tensor of any type on the values' device."""

    @abstractmethod
    def decode_by_torch(self, payload_Y: torch.Tensor, num_elements: int, seed: int) -> torch.Tensor:
        """Decode with torch to the values, shape (num_elements,), on the device of the payload's bytes."""


def _address(payload: Payload) -> I64:
    return np.array([address_of(payload)], dtype=np.int64)


class Fp32(DenseCodec):
    """Little-endian binary32, unchanged."""

    name = "fp32"
    wire = plan_pb2.CODEC_FP32
    kind = dense.FP32

    def encode_by_torch(self, values_N: torch.Tensor, seed: int) -> torch.Tensor:
        return values_N

    def decode_by_torch(self, payload_Y: torch.Tensor, num_elements: int, seed: int) -> torch.Tensor:
        return payload_Y.view(torch.float32)


class Bf16(DenseCodec):
    """The upper half of binary32, rounded to nearest even."""

    name = "bf16"
    wire = plan_pb2.CODEC_BF16
    kind = dense.BF16

    def encode_by_torch(self, values_N: torch.Tensor, seed: int) -> torch.Tensor:
        return values_N.to(torch.bfloat16).view(torch.int16)

    def decode_by_torch(self, payload_Y: torch.Tensor, num_elements: int, seed: int) -> torch.Tensor:
        return payload_Y.view(torch.bfloat16).float()


class ScaledCodec(DenseCodec):
    """Blocks of 256 elements with an fp32 scale each: all scales, then the quotients. The last block may be short."""

    bits: ClassVar[int]
    largest: ClassVar[int]

    def encode_by_torch(self, values_N: torch.Tensor, seed: int) -> torch.Tensor:
        num_elements = values_N.numel()
        blocks_BE = self._rotate(_device.blocks(values_N), num_elements // BLOCK, seed)
        scales_B, quotients_BE = _device.quantize(blocks_BE, self.largest)
        if self.bits == 8:
            return _device.bytes_of(scales_B, quotients_BE.view(-1)[:num_elements])
        return _device.bytes_of(scales_B, _device.pack_nibbles(quotients_BE, num_elements))

    def decode_by_torch(self, payload_Y: torch.Tensor, num_elements: int, seed: int) -> torch.Tensor:
        num_blocks = -(-num_elements // BLOCK)
        scales_B, body_X = payload_Y[: 4 * num_blocks].view(torch.float32), payload_Y[4 * num_blocks :]
        quotients_N = body_X.view(torch.int8).float() if self.bits == 8 else _device.unpack_nibbles(body_X)
        values_BE = _device.blocks(quotients_N[:num_elements]) * scales_B[:, None]
        return self._rotate_back(values_BE, num_elements // BLOCK, seed).reshape(-1)[:num_elements]

    def _rotate(self, blocks_BE: torch.Tensor, full: int, seed: int) -> torch.Tensor:
        """Transform the `full` whole blocks before quantization, with torch."""
        return blocks_BE

    def _rotate_back(self, blocks_BE: torch.Tensor, full: int, seed: int) -> torch.Tensor:
        """Invert `_rotate`."""
        return blocks_BE


class Int8(ScaledCodec):
    """Blocks of 256 elements scaled so that the largest magnitude is 127; rounded half to even."""

    name = "int8"
    wire = plan_pb2.CODEC_INT8
    kind = dense.INT8
    bits = 8
    largest = 127


class Int4(ScaledCodec):
    """Blocks of 256 elements scaled so that the largest magnitude is 7; rounded half to even; two in each byte."""

    name = "int4"
    wire = plan_pb2.CODEC_INT4
    kind = dense.INT4
    bits = 4
    largest = 7


class Int4Hadamard(Int4):
    """int4 of blocks that are rotated by random signs and a Walsh-Hadamard transform.

    The rotation spreads an outlier over its block (as in DRIVE, Vargaftik et al. 2021, and QuIP#, Tseng et al. 2024).

    The seed determines the signs. A short last block is not rotated. A value beyond 2e37 may overflow and then counts
    as not finite.
    """

    name = "int4-hadamard"
    wire = plan_pb2.CODEC_INT4_HADAMARD
    kind = dense.HADAMARD

    def key(self, seed: int) -> int:
        return _device.rotation_key(seed)

    def _rotate(self, blocks_BE: torch.Tensor, full: int, seed: int) -> torch.Tensor:
        return torch.cat((_device.rotate(blocks_BE[:full], self.key(seed)), blocks_BE[full:]))

    def _rotate_back(self, blocks_BE: torch.Tensor, full: int, seed: int) -> torch.Tensor:
        return torch.cat((_device.rotate_back(blocks_BE[:full], self.key(seed)), blocks_BE[full:]))


class Int2(DenseCodec):
    """Blocks of 256 elements; each is a sign and one of its block's two levels (`kernels.two_bits` says which).

    The payload has all blocks' levels (two bf16), then the codes, four in each byte. The last block may be short. Two
    free levels lose less than evenly spaced ones: of a block's norm .340 instead of .343 for normal numbers, .420
    instead of .445 for Laplace's distribution, .41 instead of .43 where half of the numbers are zeros.
    """

    name = "int2"
    wire = plan_pb2.CODEC_INT2
    kind = dense.INT2

    def encode_by_torch(self, values_N: torch.Tensor, seed: int) -> torch.Tensor:
        blocks_BE = _device.blocks(values_N)
        counts_B = torch.full((len(blocks_BE),), BLOCK, device=values_N.device)
        if values_N.numel() % BLOCK:
            counts_B[-1] = values_N.numel() % BLOCK
        levels_B2, codes_BE = _device.two_levels(blocks_BE, counts_B)
        return _device.bytes_of(levels_B2, _device.pack_pairs(codes_BE.view(-1)[: values_N.numel()]))

    def decode_by_torch(self, payload_Y: torch.Tensor, num_elements: int, seed: int) -> torch.Tensor:
        num_blocks = -(-num_elements // BLOCK)
        levels_B2 = payload_Y[: 4 * num_blocks].view(torch.bfloat16).view(num_blocks, 2)
        codes_N = _device.unpack_pairs(payload_Y[4 * num_blocks :])[:num_elements]
        return _device.level_values(levels_B2, _device.blocks(codes_N)).reshape(-1)[:num_elements]
