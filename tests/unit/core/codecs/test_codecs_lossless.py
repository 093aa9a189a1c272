"""zstd codecs: exact bits, expected ratios, and hostile payloads that neither crash nor allocate."""

import struct
import tracemalloc

import numpy as np
import pytest
import torch
import zstandard

from gradstream.core.codecs import Codec, codec_named
from gradstream.core.errors import ProtocolError

PLANES = {"fp32-zstd": 4, "bf16-zstd": 2}
each = pytest.mark.parametrize("codec", [codec_named(name) for name in PLANES], ids=lambda codec: codec.name)
LENGTH = 5000


def forged(codec: Codec, *planes: bytes, lengths: list[int] | None = None) -> np.ndarray:
    """A payload of these planes, raw ones in the places of those not given."""
    parts = [*planes, *[bytes(LENGTH)] * (PLANES[codec.name] - len(planes))]
    header = struct.pack(f"<{len(parts)}I", *(lengths or [len(part) for part in parts]))
    return np.frombuffer(header + b"".join(parts), dtype=np.uint8).copy()


def frame(plain: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(plain)


@each
def test_all_bit_patterns_come_back(codec: Codec) -> None:
    bits_N = torch.randint(-(2**31), 2**31, (LENGTH,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    values_N = bits_N.to(torch.int32).view(torch.float32)
    if codec.name == "bf16-zstd":
        values_N = values_N.nan_to_num(1.0).bfloat16().float()
    payload = codec.encode(values_N)
    assert payload.nbytes <= codec.encoded_bytes((LENGTH,))
    out_N = torch.empty(LENGTH)
    codec.decode(payload, out_N)
    assert torch.equal(out_N.view(torch.int32), values_N.view(torch.int32))


@pytest.mark.parametrize(("name", "least"), [("fp32-zstd", 4 / 3.5), ("bf16-zstd", 4 / 1.5)])
def test_a_gradients_exponents_compress(name: str, least: float) -> None:
    values_N = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)) * 1e-4
    payload = codec_named(name).encode(values_N)
    assert 4 * values_N.numel() / payload.nbytes > least


HOSTILE = {
    "lengths that add up to less": lambda c: forged(c, lengths=[LENGTH - 1] + [LENGTH] * (PLANES[c.name] - 1)),
    "a length of 4 GiB": lambda c: forged(c, lengths=[2**32 - 1] + [LENGTH] * (PLANES[c.name] - 1)),
    "no frame": lambda c: forged(c, b"garbage"),
    "an empty plane": lambda c: forged(c, b""),
    "a frame cut short": lambda c: forged(c, frame(bytes(range(250)) * 20)[:-5]),
    "bytes after the frame": lambda c: forged(c, frame(bytes(LENGTH)) + b"more"),
    "a frame of too little": lambda c: forged(c, frame(bytes(LENGTH - 1))),
    "a frame of one too many": lambda c: forged(c, frame(bytes(LENGTH + 1))),
    "a bomb": lambda c: forged(c, frame(bytes(1 << 26))),
    "a frame that keeps its size to itself": lambda c: forged(c, frame(bytes(1 << 26), write_content_size=False)),
    # Magic, a single segment with a size of eight bytes, 1 TiB, and a last raw block of nothing.
    "a frame that claims 1 TiB": lambda c: forged(
        c, bytes.fromhex("28b52ffde0") + struct.pack("<Q", 1 << 40) + b"\1\0\0"
    ),
    # The same with the size that is due, but a block that is longer.
    "a frame that lies": lambda c: forged(
        c, bytes.fromhex("28b52ffde0") + struct.pack("<Q", LENGTH) + struct.pack("<I", (1 << 20) << 3 | 3)[:3] + b"x"
    ),
    "a skippable frame": lambda c: forged(c, struct.pack("<II", 0x184D2A50, LENGTH - 100) + bytes(LENGTH - 100)),
    "a header cut short": lambda c: np.zeros(3, dtype=np.uint8),
    "nothing": lambda c: np.zeros(0, dtype=np.uint8),
}


@each
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_payload_is_refused_within_bounded_memory(codec: Codec, kind: str) -> None:
    payload = HOSTILE[kind](codec)
    out_N = torch.full((LENGTH,), 7.0)
    tracemalloc.start()
    try:
        for method in (codec.decode, codec.decode_add):
            with pytest.raises(ProtocolError, match=codec.name):
                method(payload, out_N)
        assert tracemalloc.get_traced_memory()[1] < 20 * LENGTH + (1 << 18)
    finally:
        tracemalloc.stop()
    assert (out_N == 7.0).all()


@each
def test_a_flipped_byte_gives_numbers_or_a_protocol_error(codec: Codec) -> None:
    values_N = torch.randn(LENGTH, generator=torch.Generator().manual_seed(0))
    payload = codec.encode(values_N)
    out_N = torch.empty(LENGTH)
    refused = 0
    for at in range(0, payload.nbytes, 37):
        broken = payload.copy()
        broken[at] ^= 0xFF
        try:
            codec.decode(broken, out_N)
        except ProtocolError:
            refused += 1
    assert refused > 0
