"""Foreign payloads: decoded, or refused with no state changed and no memory beyond the stated bound."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import allocating_at_most, fuzzed, mutated_bytes, taken

from gradstream.core.codecs import CODEC_NAMES, Codec, PlaneCodec, codec_named, codec_on_wire
from gradstream.core.errors import ProtocolError

SHAPES = [(1,), (255,), (256,), (1500,), (8, 600), (4096,), (3, 5000), (64, 64)]
GUARD = 64
every_codec = pytest.mark.parametrize("name", CODEC_NAMES)


def array(payload: bytes) -> Any:
    return np.frombuffer(bytearray(payload), dtype=np.uint8)


def decode(codec: Codec, payload: bytes, shape: tuple[int, ...], add: bool) -> torch.Tensor | None:
    """What a payload means, or None when it was refused. Nothing beside the values may ever be written."""
    count = math.prod(shape)
    memory = torch.full((count + 2 * GUARD,), 0.5)
    out = memory[GUARD : GUARD + count].view(shape)
    done = taken(lambda: (codec.decode_add if add else codec.decode)(array(payload), out, 7) or True, ProtocolError)
    assert (memory[:GUARD] == 0.5).all()
    assert (memory[GUARD + count :] == 0.5).all()
    if done is None:
        assert (out == 0.5).all(), "a refused payload has left something"
        return None
    return out


@every_codec
@pytest.mark.parametrize("add", [False, True])
def test_payloads_of_any_bytes_are_decoded_or_refused(name: str, add: bool) -> None:
    codec = codec_named(name)

    @fuzzed(0.3)
    @given(shape=st.sampled_from(SHAPES), data=st.data())
    def check(shape: tuple[int, ...], data: Any) -> None:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
        right = codec.encode(values, 7).tobytes()
        size = codec.encoded_bytes(shape)
        noise = st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed).bytes(size))
        payload = data.draw(st.one_of(mutated_bytes([right]), noise, st.binary(max_size=40)))
        if data.draw(st.booleans()):  # of the right size at least
            payload = (payload + right)[: len(right)]
        decode(codec, payload, shape, add)

    check()


@every_codec
def test_what_was_encoded_is_decoded(name: str) -> None:
    """Of any numbers: what is not finite stays so somewhere, and the size is the one that is announced."""
    codec = codec_named(name)

    @fuzzed(0.3)
    @given(
        shape=st.sampled_from(SHAPES),
        odd=st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e-45, -0.0]), max_size=5),
        seed=st.integers(0, 2**64),
    )
    def check(shape: tuple[int, ...], odd: list[float], seed: int) -> None:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 7))
        values.view(-1)[: len(odd)] = torch.tensor(odd[: values.numel()])
        payload = codec.encode(values, seed)
        codec.check_size(len(payload), shape)
        out = torch.empty(shape)
        codec.decode(payload, out, seed)
        assert values.isfinite().all() or not out.isfinite().all()

    check()


@every_codec
@given(size=st.sampled_from([0, 1, 3, 2**31, 2**32, 2**63, 2**64 - 1]), shape=st.sampled_from(SHAPES))
def test_announced_sizes_are_checked_before_anything_is_allocated(name: str, size: int, shape: tuple[int, ...]) -> None:
    codec = codec_named(name)
    taken(lambda: codec.check_size(size, shape), ProtocolError)
    if size > 5 * math.prod(shape) + 100:
        with pytest.raises(ProtocolError):
            codec.check_size(size, shape)


@given(st.integers(-(2**31), 2**31 - 1))
def test_codecs_on_the_wire(wire: int) -> None:
    taken(lambda: codec_on_wire(wire), ProtocolError)


def bombs(codec: PlaneCodec, num_elements: int) -> dict[str, bytes]:
    """Payloads with a frame of zeros that is, or says that it is, much larger than a plane."""
    compressor = zstandard.ZstdCompressor(level=19)
    large = compressor.compress(bytes(1 << 24))
    silent = zstandard.ZstdCompressor(level=19, write_content_size=False).compress(bytes(1 << 24))
    # The claim lies: the frame header's content size is replaced by that of a plane.
    lying = bytearray(compressor.compress(bytes(num_elements)))
    right = compressor.compress(bytes(num_elements))
    frames = {
        "large": large,
        "without a size": silent,
        "cut short": right[:-1],
        "two frames": right + right,
        "a frame and noise": right + b"noise",
        "a skippable frame": b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + right,
        "a dictionary": bytes(lying[:4]) + bytes([lying[4] | 1]) + bytes(lying[5:]),
        "empty": b"",
    }
    planes = {"fp32-zstd": 4, "bf16-zstd": 2}[codec.name]
    found = {}
    for kind, frame in frames.items():
        parts = [frame, *[right] * (planes - 1)]
        found[kind] = struct.pack(f"<{planes}I", *map(len, parts)) + b"".join(parts)
    return found


@pytest.mark.parametrize("name", ["fp32-zstd", "bf16-zstd"])
def test_bombs_of_zstd_are_refused(name: str) -> None:
    codec = codec_named(name)
    assert isinstance(codec, PlaneCodec)
    shape = (20_000,)
    for kind, payload in bombs(codec, 20_000).items():
        with allocating_at_most(1 << 20):
            assert decode(codec, payload, shape, add=False) is None, kind


@pytest.mark.parametrize("name", ["fp32-zstd", "bf16-zstd"])
@fuzzed()
@given(lengths=st.lists(st.sampled_from([0, 1, 99, 100, 101, 2**31, 2**32 - 1]), min_size=4, max_size=4))
def test_lengths_of_planes_that_lie_are_refused(name: str, lengths: list[int]) -> None:
    codec = codec_named(name)
    planes = {"fp32-zstd": 4, "bf16-zstd": 2}[name]
    payload = struct.pack(f"<{planes}I", *lengths[:planes]) + bytes(100 * planes)
    decode(codec, payload, (100,), add=False)
