"""Codecs with a residual: topk and sign. PowerSGD and sparse have modules of their own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradstream.core.codecs import _device
from gradstream.core.codecs._base import Payload, ResidualCodec, State, decayed, residual_of
from gradstream.core.errors import ProtocolError
from gradstream.core.kernels import residual as residual_kernels
from gradstream.core.kernels.blocks import BLOCK, TOPK_CHUNK, TOPK_PART
from gradstream.core.kernels.compiled import F32, U8, U16
from gradstream.proto.v1 import plan_pb2

Array = npt.NDArray[Any]
Elements = tuple[U16, U16]
"""The indices of kept elements within their chunks, and their values in bf16, both of shape (M,)."""

_KEPT = TOPK_CHUNK // TOPK_PART
_FP32_MAX = float(np.finfo(np.float32).max)


def sum_is_finite(values_N: torch.Tensor, residual_N: torch.Tensor) -> bool:
    """Whether value + residual is finite everywhere. Both are contiguous, fp32, (N,), on one device."""
    end = 0
    if values_N.device.type == "cpu":
        end = values_N.numel() // BLOCK * BLOCK
        if not residual_kernels.sum_is_finite(whole_blocks(values_N), whole_blocks(residual_N)):
            return False
    return _device.is_finite(values_N[end:] + residual_N[end:])


class InPlaceCodec(ResidualCodec):
    """The base of topk, sign and sparse, whose state is only a residual, updated in place."""

    def encode_with(self, values: torch.Tensor, state: State, seed: int = 0, decay: float = 1.0) -> Payload:
        values_N = values.detach().view(-1)
        residual_N = residual_of(values_N, state)
        if not sum_is_finite(values_N, residual_N):
            return self._not_finite(values_N.numel())
        if values_N.device.type != "cpu":
            payload = _device.to_host(self.encode_by_torch(values_N, residual_N))
        else:
            payload = self._encode(values_N, residual_N)
        decayed(residual_N, decay)
        return payload

    @abstractmethod
    def _encode(self, values_N: torch.Tensor, residual_N: torch.Tensor) -> Payload:
        """Encode with the kernels and update the residual."""

    @abstractmethod
    def encode_by_torch(self, values_N: torch.Tensor, residual_N: torch.Tensor) -> torch.Tensor:
        """Encode with torch and update the residual; the payload's bytes are on the tensor's device."""

    @abstractmethod
    def _not_finite(self, num_elements: int) -> Payload:
        """A payload of NaN."""


class TopK(InPlaceCodec):
    """The 64 elements of largest magnitude in each chunk of 4096: all uint16 indices, then all bf16 values.

    Chunks are those of DeMo (Peng et al. 2024) and SparseLoCo (Sarfi et al. 2025), but of the flattened slice and
    without a transform. A short last chunk keeps one element of every 64 or fewer. Indices rise within a chunk.
    """

    name = "topk"
    wire = plan_pb2.CODEC_TOPK

    def _encode(self, values_N: torch.Tensor, residual_N: torch.Tensor) -> Payload:
        num_elements = values_N.numel()
        payload = np.empty(self.encoded_bytes((num_elements,)), dtype=np.uint8)
        whole, rest = by_chunk(self.elements(payload, num_elements), num_elements)
        encode_chunks(residual_kernels.topk_encode, values_N, residual_N, whole, rest)
        return payload

    def encode_by_torch(self, values_N: torch.Tensor, residual_N: torch.Tensor) -> torch.Tensor:
        num_elements = values_N.numel()
        sums_N, indices_M, places_M = _device.largest_of(values_N + residual_N)
        halves_M = _device.to_bf16(sums_N[places_M])
        sums_N[places_M] -= halves_M.float()
        residual_N.copy_(sums_N[:num_elements])
        return _device.bytes_of(indices_M.to(torch.int16), halves_M)

    def decode(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self._decode(payload, out, False)

    def decode_add(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self._decode(payload, out, True)

    def elements(self, payload: Payload, num_elements: int) -> Elements:
        """The indices and bf16 values of a payload of the right size: views of it, or unpacked."""
        parts_2M = payload.view(np.uint16).reshape(2, -1)
        return parts_2M[0], parts_2M[1]

    def checked_elements(self, payload: Payload, num_elements: int) -> Elements:
        """The indices and bf16 values of a peer's payload. Raises ProtocolError."""
        self.check_size(payload.nbytes, (num_elements,))
        elements = self.elements(payload, num_elements)
        whole, rest = by_chunk(elements, num_elements)
        for indices_CK, length in ((whole[0], TOPK_CHUNK), (rest[0], num_elements % TOPK_CHUNK)):
            if not residual_kernels.topk_indices_hold(indices_CK, length):
                raise ProtocolError(
                    f"{self.name} payload whose indices do not rise within a chunk of {length} elements"
                )
        return elements

    def _decode(self, payload: Payload, out: torch.Tensor, add: bool) -> None:
        out_N = out.view(-1)
        elements = self.checked_elements(payload, out_N.numel())
        if not add:
            out_N.zero_()
        if out.device.type != "cpu":
            _add_by_torch(elements, out_N)
            return
        whole, rest = by_chunk(elements, out_N.numel())
        residual_kernels.topk_add(whole[0], whole[1], whole_blocks(out_N, TOPK_CHUNK))
        end = out_N.numel() // TOPK_CHUNK * TOPK_CHUNK
        if end < out_N.numel():
            residual_kernels.topk_add(rest[0], rest[1], out_N[end:].detach().numpy().reshape(1, -1))

    def _not_finite(self, num_elements: int) -> Payload:
        payload = np.empty(self.encoded_bytes((num_elements,)), dtype=np.uint8)
        for indices_CK, halves_CK in by_chunk(self.elements(payload, num_elements), num_elements):
            indices_CK[:] = np.arange(indices_CK.shape[1], dtype=np.uint16)
            halves_CK[:] = 0x7FC0
        return payload


class Sign(InPlaceCodec):
    """Each element's sign times its block's mean magnitude (EF-signSGD, Karimireddy et al. 2019).

    The payload has all blocks' means as fp32, then one bit for each element: 1 for negative, the first element lowest.
    The last block may be short.
    """

    name = "sign"
    wire = plan_pb2.CODEC_SIGN

    def _encode(self, values_N: torch.Tensor, residual_N: torch.Tensor) -> Payload:
        num_elements = values_N.numel()
        payload = np.empty(self.encoded_bytes((num_elements,)), dtype=np.uint8)
        scales_B, whole_BY, rest_Y = self._parts(payload, num_elements)
        full, end = len(whole_BY), len(whole_BY) * BLOCK
        residual_kernels.sign_encode(whole_blocks(values_N), whole_blocks(residual_N), scales_B[:full], whole_BY)
        if end < num_elements:
            payload_Y = self.encode_by_torch(values_N[end:], residual_N[end:]).numpy()
            scales_B[full:] = payload_Y[:4].view(np.float32)
            rest_Y[:] = payload_Y[4:]
        return payload

    def encode_by_torch(self, values_N: torch.Tensor, residual_N: torch.Tensor) -> torch.Tensor:
        num_elements = values_N.numel()
        sums_N = values_N + residual_N
        scales_B = _device.mean_magnitudes(_device.blocks(sums_N))
        if num_elements % BLOCK:
            scales_B[-1] = (scales_B[-1] * (BLOCK / (num_elements % BLOCK))).clamp(max=_FP32_MAX)
        negative_N = sums_N.signbit()
        scales_N = scales_B.repeat_interleave(BLOCK)[:num_elements]
        residual_N.copy_(sums_N - torch.where(negative_N, -scales_N, scales_N))
        return _device.bytes_of(scales_B, _device.pack_bits(negative_N))

    def decode(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self._decode(payload, out, False)

    def decode_add(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self._decode(payload, out, True)

    def _decode(self, payload: Payload, out: torch.Tensor, add: bool) -> None:
        self.check_size(payload.nbytes, tuple(out.shape))
        out_N, end = out.view(-1), 0
        num_elements = out_N.numel()
        scales_B, whole_BY, rest_Y = self._parts(payload, num_elements)
        if out.device.type == "cpu":
            end = len(whole_BY) * BLOCK
            residual_kernels.sign_decode(scales_B[: len(whole_BY)], whole_BY, whole_blocks(out_N), add)
            scales_B = scales_B[len(whole_BY) :]
        if end < num_elements:
            scales_N = torch.from_numpy(scales_B).to(out.device).repeat_interleave(BLOCK)[: num_elements - end]
            bits_Y = rest_Y if end else payload[len(payload) - -(-num_elements // 8) :]
            negative_N = _device.unpack_bits(_device.from_host(bits_Y, out.device))[: num_elements - end]
            values_N = torch.where(negative_N, -scales_N, scales_N)
            out_N[end:].add_(values_N) if add else out_N[end:].copy_(values_N)

    @staticmethod
    def _parts(payload: Payload, num_elements: int) -> tuple[F32, U8, U8]:
        """Views of a payload: the scales, the bits of whole blocks as (B, 32), the bits of the rest."""
        begin, full = 4 * -(-num_elements // BLOCK), num_elements // BLOCK
        end = begin + full * (BLOCK // 8)
        return payload[:begin].view(np.float32), payload[begin:end].reshape(full, BLOCK // 8), payload[end:]

    def _not_finite(self, num_elements: int) -> Payload:
        payload = np.zeros(self.encoded_bytes((num_elements,)), dtype=np.uint8)
        self._parts(payload, num_elements)[0][:] = np.nan
        return payload


def by_chunk(parts: Sequence[Array], num_elements: int) -> tuple[list[Array], list[Array]]:
    """Views of arrays with an entry for each kept element: of the whole chunks as (C, 64), of the rest as (1, K)."""
    kept = num_elements // TOPK_CHUNK * _KEPT
    return [part[:kept].reshape(-1, _KEPT) for part in parts], [part[None, kept:] for part in parts]


def encode_chunks(
    kernel: Callable[..., None],
    values_N: torch.Tensor,
    residual_N: torch.Tensor,
    whole: Sequence[Array],
    rest: Sequence[Array],
) -> None:
    """Call an encoding kernel for the whole chunks, then for a short last one, with the arrays that it writes."""
    end = values_N.numel() // TOPK_CHUNK * TOPK_CHUNK
    kernel(whole_blocks(values_N, TOPK_CHUNK), whole_blocks(residual_N, TOPK_CHUNK), *whole)
    if end < values_N.numel():
        residual_1E = padded(residual_N[end:], TOPK_CHUNK)
        # No element of the padding is taken: enough elements lie before it, and of equal ones the first are taken.
        kernel(padded(values_N[end:], TOPK_CHUNK), residual_1E, *rest)
        residual_N[end:].copy_(torch.from_numpy(residual_1E[0, : values_N.numel() - end]))


def _add_by_torch(elements: Elements, out_N: torch.Tensor) -> None:
    """Add checked values on the device of `out_N`. No index occurs twice, so the order does not matter."""
    indices_M = torch.from_numpy(elements[0].astype(np.int64)).to(out_N.device)
    places_M = indices_M + torch.arange(len(indices_M), device=out_N.device) // _KEPT * TOPK_CHUNK
    values_M = torch.from_numpy(elements[1].view(np.int16)).to(out_N.device).view(torch.bfloat16)
    out_N[places_M] += values_M.float()


def whole_blocks(tensor_N: torch.Tensor, block: int = BLOCK) -> F32:
    """The whole blocks of a contiguous fp32 tensor on the CPU, as a view of shape (B, block)."""
    end = tensor_N.numel() // block * block
    array: F32 = tensor_N[:end].detach().numpy().reshape(-1, block)
    return array


def padded(tensor_N: torch.Tensor, block: int) -> F32:
    """A copy of a tensor shorter than a block, as (1, block), padded with zeros at the end."""
    array_1E = np.zeros((1, block), dtype=np.float32)
    array_1E[0, : tensor_N.numel()] = tensor_N.detach().numpy()
    return array_1E
