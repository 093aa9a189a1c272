"""The codecs as chains of torch operations, for tensors on other devices than the CPU, and the copies to and from them.

They give the same bits as the kernels in `gradstream.core.kernels.codec` and `residual`: every operation is elementwise
IEEE arithmetic in the kernels' order. They run on any device, so the tests compare them with the kernels on the CPU.

Shape legend: N elements, B blocks, E = 256 elements a block.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from gradstream.core.codecs._base import Payload
from gradstream.core.kernels.blocks import BLOCK, TOPK_CHUNK, TOPK_PART
from gradstream.core.kernels.two_bits import FIRST_BORDER
from gradstream.core.plan.sizes import topk_kept

_WORD = 0xFFFFFFFF
_LARGEST_BF16 = float(torch.finfo(torch.bfloat16).max)
_streams = threading.local()


def to_host(encoded: torch.Tensor) -> Payload:
    """Copy the bytes of a tensor to the host. The caller must not use the tensor afterwards.

    From a GPU the copy runs on its own stream, into pinned memory: the copy does not wait for later work, nor later
    work for the copy.
    """
    encoded = encoded.contiguous().view(-1)
    if encoded.device.type == "cuda":
        crossing = _side_stream(encoded.device)
        crossing.wait_stream(torch.cuda.current_stream(encoded.device))
        pinned = torch.empty(encoded.shape, dtype=encoded.dtype, pin_memory=True)
        with torch.cuda.stream(crossing):
            pinned.copy_(encoded, non_blocking=True)
        encoded.record_stream(crossing)
        crossing.synchronize()
        encoded = pinned
    payload: Payload = encoded.cpu().numpy().view(np.uint8)
    return payload


def from_host(payload: Payload, device: torch.device) -> torch.Tensor:
    """Copy a payload's bytes to a device, shape (bytes,), uint8."""
    return torch.from_numpy(payload).to(device)


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """This thread's stream for copies from `device`."""
    streams: dict[torch.device, torch.cuda.Stream] = _streams.__dict__.setdefault("of_device", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return streams[device]


def is_finite(values: torch.Tensor) -> bool:
    """Whether all values are finite, found from minimum and maximum, which NaN passes through.

    isfinite() over all values takes ten times as long.
    """
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def bytes_of(*parts: torch.Tensor) -> torch.Tensor:
    """Concatenate tensors of any types as bytes."""
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])


def blocks(values_N: torch.Tensor, size: int = BLOCK) -> torch.Tensor:
    """The values as (B, size), padded with zeros at the end."""
    padding = -values_N.numel() % size
    return (torch.nn.functional.pad(values_N, (0, padding)) if padding else values_N).view(-1, size)


def quantize(blocks_BE: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to scales (B,), fp32, and quotients (B, E), int8, in ±largest: see `kernels.codec.int8_encode`."""
    # A tensor, not a Python number: for a division by a constant a GPU may multiply by the reciprocal.
    divisor = torch.full((), largest, device=blocks_BE.device)
    scales_B = blocks_BE.abs().amax(dim=1) / divisor
    usable_B1 = (scales_B.isfinite() & (scales_B != 0))[:, None]
    quotients_BE = torch.where(usable_B1, blocks_BE / scales_B[:, None], 0.0).round_().clamp_(-largest, largest)
    return scales_B, quotients_BE.to(torch.int8)


def pack_nibbles(quotients_BE: torch.Tensor, num_elements: int) -> torch.Tensor:
    """Pack two quotients into each byte, the first one low, shape ((num_elements + 1) // 2,)."""
    nibbles_MP = quotients_BE.view(-1, 2).view(torch.uint8) & 0x0F
    return (nibbles_MP[:, 0] | (nibbles_MP[:, 1] << 4))[: (num_elements + 1) // 2]


def unpack_nibbles(packed_M: torch.Tensor) -> torch.Tensor:
    """Unpack quotients as fp32, shape (2 M,)."""
    nibbles_MP = torch.stack((packed_M & 0x0F, packed_M >> 4), dim=1)
    return ((nibbles_MP.view(-1).to(torch.int8) ^ 8) - 8).float()


def rotate(values_BE: torch.Tensor, key: int) -> torch.Tensor:
    """Rotate each block to H D x: see `kernels.codec.hadamard_encode`."""
    return _hadamard(values_BE * _signs(values_BE, key))


def rotate_back(values_BE: torch.Tensor, key: int) -> torch.Tensor:
    """Rotate each block to D H x, the inverse of `rotate`."""
    return _hadamard(values_BE) * _signs(values_BE, key)


def rotation_key(seed: int) -> int:
    """Reduce a seed of any size to the 32 bits with which the kernels' hash starts."""
    key = 0x9E3779B9  # not 0, which the hash maps to itself
    while True:
        key = mix(key ^ (seed & _WORD))
        seed >>= 32
        if seed in (0, -1):
            return key


def mix(x: int) -> int:
    """Hash a 32-bit number as `kernels.codec._mix`."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """Hash each element of an int64 tensor as `mix`. Products wrap at 64 bits, of which the lower 32 are kept."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def _signs(values_BE: torch.Tensor, key: int) -> torch.Tensor:
    num_blocks, size = values_BE.shape
    block_keys_B = mix_tensor(mix_tensor(torch.arange(num_blocks, device=values_BE.device)) ^ key)
    places_E = torch.arange(size, device=values_BE.device)
    hashes_BE = mix_tensor((block_keys_B[:, None] + places_E) & _WORD)
    return 1.0 - 2.0 * (hashes_BE >> 31).float()


def _hadamard(values_BE: torch.Tensor) -> torch.Tensor:
    num_blocks, size = values_BE.shape
    values_BE = values_BE * 0.0625
    half = size // 2
    while half:
        pairs = values_BE.view(num_blocks, size // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        values_BE = torch.stack((first + second, first - second), dim=2).view(num_blocks, size)
        half //= 2
    return values_BE


def mean_magnitudes(sums_BE: torch.Tensor) -> torch.Tensor:
    """Sum |x| / 256 of each block, as `kernels.residual.sign_encode`. Shape (B,)."""
    return _add_up(sums_BE.abs() * (1 / BLOCK))


def _add_up(values_BE: torch.Tensor) -> torch.Tensor:
    """The sum of each block in the order of `kernels.residual._add_up`. Shape (B,)."""
    while values_BE.shape[1] > 1:
        half = values_BE.shape[1] // 2
        values_BE = values_BE[:, :half] + values_BE[:, half:]
    return values_BE[:, 0]


def largest_of(sums_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose what topk keeps: the sums, padded to whole chunks; the kept indices in their chunks; their places."""
    num_elements = sums_N.numel()
    sums_CE = blocks(sums_N, TOPK_CHUNK)
    order_CE = sums_CE.abs().sort(dim=1, descending=True, stable=True).indices
    chunks, kept = num_elements // TOPK_CHUNK, TOPK_CHUNK // TOPK_PART
    parts = order_CE[:chunks, :kept], order_CE[chunks:, : topk_kept(num_elements % TOPK_CHUNK)]
    indices_M = torch.cat([part.sort(dim=1).values.view(-1) for part in parts])
    places_M = indices_M + torch.arange(len(indices_M), device=sums_N.device) // kept * TOPK_CHUNK
    return sums_CE.view(-1), indices_M, places_M


def two_levels(values_BE: torch.Tensor, counts_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit two levels to each group's magnitudes: levels (B, 2), bf16, and codes (B, E), uint8.

    As `kernels.two_bits._fit_levels`. The first `counts_B` values of a group count, zeros follow. E is at most 256.
    """
    magnitudes_BE = values_BE.abs() * (1 / BLOCK)
    totals_B = _add_up(magnitudes_BE)
    finite_B = totals_B.isfinite()
    border_B = totals_B * FIRST_BORDER / counts_B.float()
    for last in (False, True):
        large_BE = magnitudes_BE > border_B[:, None]
        num_large_B = large_BE.sum(dim=1)
        num_small_B = (counts_B - num_large_B).clamp(min=1).float()
        sums_B = _add_up(torch.where(large_BE, magnitudes_BE, 0.0))
        large_B = sums_B / num_large_B.clamp(min=1).float()
        if not last:
            border_B = torch.where(num_large_B > 0, ((totals_B - sums_B) / num_small_B + large_B) * 0.5, border_B)
    small_B = _add_up(torch.where(large_BE, 0.0, magnitudes_BE)) / num_small_B
    large_B = torch.where(num_large_B > 0, large_B, small_B)
    levels_B2 = to_bf16(torch.stack((small_B, large_B), dim=1) * BLOCK)
    levels_B2 = torch.where(finite_B[:, None], levels_B2, torch.full_like(levels_B2, float("nan")))
    return levels_B2, (large_BE & finite_B[:, None]).to(torch.uint8) * 2 + values_BE.signbit().to(torch.uint8)


def level_values(levels_B2: torch.Tensor, codes_BE: torch.Tensor) -> torch.Tensor:
    """The values of codes, fp32, shape (B, E)."""
    levels_B2 = levels_B2.float()
    magnitudes_BE = torch.where(codes_BE >= 2, levels_B2[:, 1:], levels_B2[:, :1])
    return torch.where((codes_BE & 1).bool(), -magnitudes_BE, magnitudes_BE)


def pack_pairs(codes_N: torch.Tensor) -> torch.Tensor:
    """Pack four 2-bit codes into each byte, the first one lowest, shape (ceil(N / 4),)."""
    weights_4 = 4 ** torch.arange(4, device=codes_N.device)
    return (blocks(codes_N.long(), 4) * weights_4).sum(dim=1).to(torch.uint8)


def unpack_pairs(packed_M: torch.Tensor) -> torch.Tensor:
    """Unpack 2-bit codes, shape (4 M,), uint8."""
    return ((packed_M[:, None] >> (2 * torch.arange(4, device=packed_M.device))) & 3).to(torch.uint8).view(-1)


def pack_twelve_bits(indices_M: torch.Tensor) -> torch.Tensor:
    """Pack two indices below 4096 into three bytes, the first one lowest, shape (ceil(3 M / 2),)."""
    pairs_P2 = blocks(indices_M.long(), 2)
    words_P = pairs_P2[:, 0] | (pairs_P2[:, 1] << 12)
    bytes_P3 = (words_P[:, None] >> (8 * torch.arange(3, device=indices_M.device))) & 0xFF
    return bytes_P3.to(torch.uint8).view(-1)[: (3 * len(indices_M) + 1) // 2]


def pack_bits(flags_N: torch.Tensor) -> torch.Tensor:
    """Pack eight booleans into each byte, the first one lowest, shape (ceil(N / 8),)."""
    weights_8 = 2 ** torch.arange(8, device=flags_N.device)
    return (blocks(flags_N.long(), 8) * weights_8).sum(dim=1).to(torch.uint8)


def unpack_bits(packed_M: torch.Tensor) -> torch.Tensor:
    """Unpack booleans, shape (8 M,)."""
    return ((packed_M[:, None] >> torch.arange(8, device=packed_M.device)) & 1).bool().view(-1)


def to_bf16(values: torch.Tensor) -> torch.Tensor:
    """Round to bf16, to nearest even. Finite values stay finite."""
    return values.clamp(-_LARGEST_BF16, _LARGEST_BF16).to(torch.bfloat16)
