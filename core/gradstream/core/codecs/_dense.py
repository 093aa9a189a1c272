"""Codecs that send every element: fp32, bf16, and blocks of small integers with a shared scale."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch

from gradstream.core import kernels
from gradstream.core.codecs import _device
from gradstream.core.codecs._base import Codec, Payload
from gradstream.core.encoded_size import BLOCK
from gradstream.core.kernels import BF16_BLOCK, F32, U8
from gradstream.proto.v1 import plan_pb2


class Fp32(Codec):
    """Little-endian binary32, as it is."""

    name = "fp32"
    wire = plan_pb2.CODEC_FP32

    def encode(self, values: torch.Tensor, seed: int = 0) -> Payload:
        values = values.detach()
        return _device.to_host(values.clone() if values.device.type == "cpu" else values)

    def decode(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self.check_size(payload.nbytes, tuple(out.shape))
        out.view(-1).copy_(torch.from_numpy(payload.view(np.float32)))

    def decode_add(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self.check_size(payload.nbytes, tuple(out.shape))
        out.view(-1).add_(torch.from_numpy(payload.view(np.float32)).to(out.device))


class Bf16(Codec):
    """The upper half of binary32, rounded to nearest even."""

    name = "bf16"
    wire = plan_pb2.CODEC_BF16

    def encode(self, values: torch.Tensor, seed: int = 0) -> Payload:
        return _device.to_host(values.detach().to(torch.bfloat16).view(torch.int16))

    def decode(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self.check_size(payload.nbytes, tuple(out.shape))
        out.view(-1).copy_(bf16_values(payload, out.device))

    def decode_add(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self.check_size(payload.nbytes, tuple(out.shape))
        out_N, end = out.view(-1), 0
        if out.device.type == "cpu":
            end = out_N.numel() // BF16_BLOCK * BF16_BLOCK
            halves_BE = payload[: 2 * end].view(np.uint16).reshape(-1, BF16_BLOCK)
            kernels.bf16_decode_add(halves_BE, whole_blocks(out_N, BF16_BLOCK))
        if end < out_N.numel():
            # bf16 widens to fp32 exactly, so adding mixed types equals adding the decoded values.
            out_N[end:].add_(bf16_values(payload[2 * end :], out.device))


class _Scaled(Codec):
    """Blocks of 256 elements with an fp32 scale each: all scales, then the quotients. The last block may be short.

    In the CPU's memory all go through the kernels, a short last block padded with zeros; other devices use torch.
    """

    bits: ClassVar[int]
    largest: ClassVar[int]
    _delta_kernel: ClassVar[Callable[..., None] | None] = None
    """`encode_delta` of whole blocks in one pass, where there is one."""

    def encode(self, values: torch.Tensor, seed: int = 0) -> Payload:
        values_N = values.detach().view(-1)
        if values_N.device.type != "cpu":
            return _device.to_host(self.encode_by_torch(values_N, seed))
        num_elements = values_N.numel()
        payload = np.empty(self.encoded_bytes((num_elements,)), dtype=np.uint8)
        scales_B, whole_BX, rest_X = self._parts(payload, num_elements)
        full, end = len(whole_BX), len(whole_BX) * BLOCK
        self._encode_blocks(whole_blocks(values_N), scales_B[:full], whole_BX, seed)
        if end < num_elements:
            rest_1X = np.empty((1, BLOCK * self.bits // 8), dtype=np.uint8)
            self._encode_short(padded(values_N[end:], BLOCK), scales_B[full:], rest_1X)
            rest_X[:] = rest_1X[0, : len(rest_X)]
        return payload

    def encode_delta(self, values: torch.Tensor, held: torch.Tensor, seed: int = 0) -> Payload:
        num_elements = values.numel()
        if values.device.type != "cpu" or num_elements % BLOCK or self._delta_kernel is None:
            return super().encode_delta(values, held, seed)
        payload = np.empty(self.encoded_bytes((num_elements,)), dtype=np.uint8)
        scales_B, whole_BX, _ = self._parts(payload, num_elements)
        body_BX = whole_BX.view(np.int8) if self.bits == 8 else whole_BX
        self._delta_kernel(whole_blocks(values.view(-1)), whole_blocks(held.view(-1)), scales_B, body_BX)
        return payload

    def encode_by_torch(self, values_N: torch.Tensor, seed: int) -> torch.Tensor:
        """The payload's bytes, on the tensor's device; the same as the kernels give."""
        num_elements = values_N.numel()
        blocks_BE = self._rotate(_device.blocks(values_N), num_elements // BLOCK, seed)
        scales_B, quotients_BE = _device.quantize(blocks_BE, self.largest)
        if self.bits == 8:
            return _device.bytes_of(scales_B, quotients_BE.view(-1)[:num_elements])
        return _device.bytes_of(scales_B, _device.pack_nibbles(quotients_BE, num_elements))

    def decode(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self._decode(payload, out, seed, False)

    def decode_add(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self._decode(payload, out, seed, True)

    def _decode(self, payload: Payload, out: torch.Tensor, seed: int, add: bool) -> None:
        self.check_size(payload.nbytes, tuple(out.shape))
        out_N = out.view(-1)
        num_elements = out_N.numel()
        if out.device.type != "cpu":
            values_N = self.decode_by_torch(_device.from_host(payload, out.device), num_elements, seed)
            out_N.add_(values_N) if add else out_N.copy_(values_N)
            return
        scales_B, whole_BX, rest_X = self._parts(payload, num_elements)
        full, end = len(whole_BX), len(whole_BX) * BLOCK
        self._decode_blocks(scales_B[:full], whole_BX, whole_blocks(out_N), seed, add)
        if end < num_elements:
            rest_1X = np.zeros((1, BLOCK * self.bits // 8), dtype=np.uint8)
            rest_1X[0, : len(rest_X)] = rest_X
            values_1E = padded(out_N[end:], BLOCK)
            self._decode_short(scales_B[full:], rest_1X, values_1E, add)
            out_N[end:].copy_(torch.from_numpy(values_1E[0, : num_elements - end]))

    def decode_by_torch(self, payload_Y: torch.Tensor, num_elements: int, seed: int) -> torch.Tensor:
        """The values, shape (num_elements,), on the payload's device; the same as the kernels give."""
        num_blocks = -(-num_elements // BLOCK)
        scales_B, body_X = payload_Y[: 4 * num_blocks].view(torch.float32), payload_Y[4 * num_blocks :]
        quotients_N = body_X.view(torch.int8).float() if self.bits == 8 else _device.unpack_nibbles(body_X)
        values_BE = _device.blocks(quotients_N[:num_elements]) * scales_B[:, None]
        return self._rotate_back(values_BE, num_elements // BLOCK, seed).reshape(-1)[:num_elements]

    def _parts(self, payload: Payload, num_elements: int) -> tuple[F32, U8, U8]:
        """Views of a payload: scales, the quotients of the whole blocks as (B, bytes a block), those of the rest."""
        scales_bytes = 4 * -(-num_elements // BLOCK)
        full, block_bytes = num_elements // BLOCK, BLOCK * self.bits // 8
        end = scales_bytes + full * block_bytes
        whole_BX = payload[scales_bytes:end].reshape(full, block_bytes)
        return payload[:scales_bytes].view(np.float32), whole_BX, payload[end:]

    @abstractmethod
    def _encode_short(self, values_BE: F32, scales_B: F32, body_BX: U8) -> None:
        """Run the kernel on a padded last block."""

    @abstractmethod
    def _decode_short(self, scales_B: F32, body_BX: U8, out_BE: F32, add: bool) -> None:
        """Run the kernel on a padded last block."""

    def _encode_blocks(self, values_BE: F32, scales_B: F32, body_BX: U8, seed: int) -> None:
        """Run the kernel on whole blocks."""
        self._encode_short(values_BE, scales_B, body_BX)

    def _decode_blocks(self, scales_B: F32, body_BX: U8, out_BE: F32, seed: int, add: bool) -> None:
        """Run the kernel on whole blocks."""
        self._decode_short(scales_B, body_BX, out_BE, add)

    def _rotate(self, blocks_BE: torch.Tensor, full: int, seed: int) -> torch.Tensor:
        """What is done to the `full` whole blocks before they are quantized, by torch."""
        return blocks_BE

    def _rotate_back(self, blocks_BE: torch.Tensor, full: int, seed: int) -> torch.Tensor:
        """The inverse of `_rotate`."""
        return blocks_BE


class Int8(_Scaled):
    """Blocks of 256 elements scaled so that the largest magnitude is 127; rounded half to even."""

    name = "int8"
    wire = plan_pb2.CODEC_INT8
    bits = 8
    largest = 127
    _delta_kernel = staticmethod(kernels.int8_encode_delta)

    def _encode_short(self, values_BE: F32, scales_B: F32, body_BX: U8) -> None:
        kernels.int8_encode(values_BE, values_BE.view(np.int32), scales_B, body_BX.view(np.int8))

    def _decode_short(self, scales_B: F32, body_BX: U8, out_BE: F32, add: bool) -> None:
        (kernels.int8_decode_add if add else kernels.int8_decode)(scales_B, body_BX.view(np.int8), out_BE)


class Int4(_Scaled):
    """Blocks of 256 elements scaled so that the largest magnitude is 7; rounded half to even; two a byte."""

    name = "int4"
    wire = plan_pb2.CODEC_INT4
    bits = 4
    largest = 7
    _delta_kernel: ClassVar[Callable[..., None] | None] = staticmethod(kernels.int4_encode_delta)

    def _encode_short(self, values_BE: F32, scales_B: F32, body_BX: U8) -> None:
        kernels.int4_encode(values_BE, scales_B, body_BX)

    def _decode_short(self, scales_B: F32, body_BX: U8, out_BE: F32, add: bool) -> None:
        (kernels.int4_decode_add if add else kernels.int4_decode)(scales_B, body_BX, out_BE)


class Int4Hadamard(Int4):
    """int4 of blocks rotated by random signs and a Walsh-Hadamard transform, which spreads an outlier over its block
    (as in DRIVE, Vargaftik et al. 2021, and QuIP#, Tseng et al. 2024).

    The seed decides the signs. A short last block is not rotated. A value beyond 2e37 may overflow: it then counts as
    not finite.
    """

    name = "int4-hadamard"
    wire = plan_pb2.CODEC_INT4_HADAMARD
    _delta_kernel = None

    def _encode_blocks(self, values_BE: F32, scales_B: F32, body_BX: U8, seed: int) -> None:
        kernels.hadamard_encode(values_BE, scales_B, body_BX, _device.rotation_key(seed))

    def _decode_blocks(self, scales_B: F32, body_BX: U8, out_BE: F32, seed: int, add: bool) -> None:
        kernels.hadamard_decode(scales_B, body_BX, out_BE, _device.rotation_key(seed), add)

    def _rotate(self, blocks_BE: torch.Tensor, full: int, seed: int) -> torch.Tensor:
        return torch.cat((_device.rotate(blocks_BE[:full], _device.rotation_key(seed)), blocks_BE[full:]))

    def _rotate_back(self, blocks_BE: torch.Tensor, full: int, seed: int) -> torch.Tensor:
        return torch.cat((_device.rotate_back(blocks_BE[:full], _device.rotation_key(seed)), blocks_BE[full:]))


def bf16_values(payload: Payload, device: torch.device) -> torch.Tensor:
    """A payload's bf16 numbers, shape (N,)."""
    return torch.from_numpy(payload.view(np.int16)).to(device).view(torch.bfloat16)


def whole_blocks(tensor_N: torch.Tensor, block: int = BLOCK) -> F32:
    """The whole blocks of a contiguous fp32 tensor on the CPU, as a view of shape (B, block)."""
    end = tensor_N.numel() // block * block
    array: F32 = tensor_N[:end].detach().numpy().reshape(-1, block)
    return array


def padded(tensor_N: torch.Tensor, block: int) -> F32:
    """A copy of a tensor shorter than a block, as (1, block), the end zeros."""
    array_1E = np.zeros((1, block), dtype=np.float32)
    array_1E[0, : tensor_N.numel()] = tensor_N.detach().numpy()
    return array_1E
