"""The codec of SparseLoCo: few elements of each chunk, two bits each."""

from __future__ import annotations

import numpy as np
import torch

from gradstream.core.codecs import _device
from gradstream.core.codecs._base import Payload
from gradstream.core.codecs._residual import Elements, TopK, by_chunk, encode_chunks
from gradstream.core.kernels import two_bits
from gradstream.core.kernels.blocks import TOPK_CHUNK, TOPK_PART
from gradstream.core.kernels.compiled import U8, U32
from gradstream.core.plan.sizes import topk_kept
from gradstream.proto.v1 import plan_pb2

_KEPT = TOPK_CHUNK // TOPK_PART


class Sparse(TopK):
    """topk with 12 bits for an index and 2 bits for a value (SparseLoCo, Sarfi et al. 2025; Covenant-72B, 2026).

    A value is a sign and one of its chunk's two levels, as in int2. The payload has all chunks' levels (two bf16), then
    all indices, then all codes. Bits that are left over in the last byte of each are ignored.
    """

    name = "sparse"
    wire = plan_pb2.CODEC_SPARSE

    def _encode(self, values_N: torch.Tensor, residual_N: torch.Tensor) -> Payload:
        num_elements = values_N.numel()
        payload = np.empty(self.encoded_bytes((num_elements,)), dtype=np.uint8)
        levels_C, packed_indices, packed_codes = _parts(payload, num_elements)
        kept, chunks = topk_kept(num_elements), num_elements // TOPK_CHUNK
        indices_M, codes_M = np.empty(kept, dtype=np.uint16), np.empty(kept, dtype=np.uint8)
        whole, rest = by_chunk((indices_M, codes_M), num_elements)
        encode_chunks(
            two_bits.sparse_encode, values_N, residual_N, [levels_C[:chunks], *whole], [levels_C[chunks:], *rest]
        )
        two_bits.sparse_pack(indices_M, codes_M, packed_indices, packed_codes)
        return payload

    def encode_by_torch(self, values_N: torch.Tensor, residual_N: torch.Tensor) -> torch.Tensor:
        num_elements = values_N.numel()
        sums_N, indices_M, places_M = _device.largest_of(values_N + residual_N)
        kept_CK = _device.blocks(sums_N[places_M], _KEPT)
        counts_C = torch.full((len(kept_CK),), _KEPT, device=values_N.device)
        if num_elements % TOPK_CHUNK:
            counts_C[-1] = topk_kept(num_elements % TOPK_CHUNK)
        levels_C2, codes_CK = _device.two_levels(kept_CK, counts_C)
        sums_N[places_M] -= _device.level_values(levels_C2, codes_CK).view(-1)[: len(places_M)]
        residual_N.copy_(sums_N[:num_elements])
        packed = _device.pack_twelve_bits(indices_M), _device.pack_pairs(codes_CK.view(-1)[: len(places_M)])
        return _device.bytes_of(levels_C2, *packed)

    def elements(self, payload: Payload, num_elements: int) -> Elements:
        kept = topk_kept(num_elements)
        elements = np.empty(kept, dtype=np.uint16), np.empty(kept, dtype=np.uint16)
        two_bits.sparse_unpack(*_parts(payload, num_elements), *elements)
        return elements

    def _not_finite(self, num_elements: int) -> Payload:
        payload = np.zeros(self.encoded_bytes((num_elements,)), dtype=np.uint8)
        levels_C, packed_indices, packed_codes = _parts(payload, num_elements)
        levels_C[:] = two_bits.NAN_LEVELS
        indices_M = (np.arange(topk_kept(num_elements)) % _KEPT).astype(np.uint16)
        two_bits.sparse_pack(indices_M, np.zeros(len(indices_M), dtype=np.uint8), packed_indices, packed_codes)
        return payload


def _parts(payload: Payload, num_elements: int) -> tuple[U32, U8, U8]:
    """Views of a payload: levels (C,), packed indices and packed codes."""
    levels, indices = 4 * -(-num_elements // TOPK_CHUNK), -(-topk_kept(num_elements) * 12 // 8)
    return (
        payload[:levels].view(np.uint32),
        payload[levels : levels + indices],
        payload[levels + indices :],
    )
