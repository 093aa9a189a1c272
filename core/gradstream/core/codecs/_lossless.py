"""Lossless compression: bytes are sorted into planes of equal significance, each compressed by zstd.

The plane with the exponents compresses well, those of the mantissas hardly. A plane that would not shrink is sent
uncompressed. The payload has each plane's length as a little-endian uint32, the least significant plane first, then the
planes. A plane whose length is the number of elements is uncompressed; a shorter one is a zstd frame that names its
content size.
"""

from __future__ import annotations

import math
import struct
import threading
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import zstandard

from gradstream.core.codecs._base import Codec, Payload
from gradstream.core.codecs._dense import Bf16, Fp32
from gradstream.core.errors import ProtocolError
from gradstream.core.kernels import codec
from gradstream.core.kernels.compiled import U8
from gradstream.core.plan.sizes import PLANE_HEADER_BYTES, PLANES
from gradstream.proto.v1 import plan_pb2

_LEVEL = 1
_local = threading.local()


class PlaneCodec(Codec):
    """The codec `inner`, of fixed word size, with its payload split into planes and compressed."""

    fixed_size: ClassVar[bool] = False
    inner: ClassVar[Codec]

    def check_size(self, payload_bytes: int, shape: tuple[int, ...]) -> None:
        most = self.encoded_bytes(shape)
        least = PLANES[self.name] * PLANE_HEADER_BYTES
        if not least <= payload_bytes <= most:
            raise ProtocolError(
                f"{self.name} payload of {payload_bytes} bytes where {math.prod(shape)} elements take {least} to {most}"
            )

    def encode(self, values: torch.Tensor, seed: int = 0) -> Payload:
        return self.pack(self.inner.encode(values))

    def pack(self, inner_payload: Payload) -> Payload:
        """Compress a payload of the inner codec, or any other words of the same size."""
        num_planes = PLANES[self.name]
        words_N = inner_payload.view(f"<u{num_planes}")
        planes_PN = np.empty((num_planes, len(words_N)), dtype=np.uint8)
        codec.split_planes(words_N, planes_PN)
        compressor = _compressor()
        parts: list[bytes | npt.NDArray[np.uint8]] = []
        for plane_N in planes_PN:
            frame = compressor.compress(plane_N.data)
            parts.append(frame if len(frame) < len(plane_N) else plane_N)
        header = struct.pack(f"<{num_planes}I", *(len(part) for part in parts))
        payload: Payload = np.concatenate([np.frombuffer(part, dtype=np.uint8) for part in (header, *parts)])
        return payload

    def decode(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self.inner.decode(self.unpack(payload, tuple(out.shape)), out)

    def decode_add(self, payload: Payload, out: torch.Tensor, seed: int = 0) -> None:
        self.inner.decode_add(self.unpack(payload, tuple(out.shape)), out)

    def unpack(self, payload: Payload, shape: tuple[int, ...]) -> Payload:
        """Decompress to the packed words. Raises ProtocolError. Allocates at most twice the inner payload."""
        self.check_size(payload.nbytes, shape)
        num_elements, num_planes = math.prod(shape), PLANES[self.name]
        begin = num_planes * PLANE_HEADER_BYTES
        lengths = struct.unpack(f"<{num_planes}I", payload[:begin].tobytes())
        if begin + sum(lengths) != payload.nbytes:
            raise ProtocolError(f"{self.name} payload of {payload.nbytes} bytes whose planes add up to {sum(lengths)}")
        planes_PN = np.empty((num_planes, num_elements), dtype=np.uint8)
        for plane, length in enumerate(lengths):
            planes_PN[plane] = self._plane(payload[begin : begin + length], num_elements)
            begin += length
        words_N = np.zeros(num_elements, dtype=f"<u{num_planes}")
        codec.join_planes(planes_PN, words_N)
        return words_N.view(np.uint8)

    def _plane(self, part: U8, num_elements: int) -> U8:
        """Decompress one plane, shape (num_elements,). Raises ProtocolError."""
        if len(part) == num_elements:
            return part
        try:
            # The decompressor allocates what the frame claims, so the claim is checked first.
            claimed = zstandard.get_frame_parameters(part.data).content_size
            if claimed != num_elements:
                raise ProtocolError(f"{self.name} plane of {claimed} bytes where {num_elements} are due")
            plain = _decompressor().decompress(part.data, max_output_size=num_elements, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ProtocolError(f"{self.name} payload that zstd refuses: {error}") from None
        if len(plain) != num_elements:
            raise ProtocolError(f"{self.name} plane of {len(plain)} bytes where {num_elements} are due")
        return np.frombuffer(plain, dtype=np.uint8)


class Fp32Zstd(PlaneCodec):
    """fp32 in four planes."""

    name = "fp32-zstd"
    wire = plan_pb2.CODEC_FP32_ZSTD
    inner = Fp32()


class Bf16Zstd(PlaneCodec):
    """bf16 in two planes, with the rounding of bf16."""

    name = "bf16-zstd"
    wire = plan_pb2.CODEC_BF16_ZSTD
    inner = Bf16()


def _compressor() -> zstandard.ZstdCompressor:
    """This thread's compressor. Threads must not share one."""
    found: zstandard.ZstdCompressor | None = getattr(_local, "compressor", None)
    if found is None:
        found = _local.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
    return found


def _decompressor() -> zstandard.ZstdDecompressor:
    found: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if found is None:
        found = _local.decompressor = zstandard.ZstdDecompressor()
    return found
