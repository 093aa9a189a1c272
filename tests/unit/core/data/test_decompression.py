"""Compressed files: complete in any number of frames, or an error."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable, Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstream.core.data.decompression import PIECE_BYTES, DamagedError, compression_of, unpack

TEXT = b"".join(b"line %d of a text\n" % number for number in range(3000))
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}
PACKED = {name: pack(TEXT) for name, pack in PACK.items()}


def unpacked(data: bytes, compression: str, block_bytes: int = 4096) -> bytes:
    def blocks() -> Iterator[bytes]:
        for begin in range(0, len(data), block_bytes):
            yield data[begin : begin + block_bytes]

    return b"".join(unpack(blocks(), compression))


@pytest.mark.parametrize("name", PACK)
def test_frames_one_after_the_other(name: str) -> None:
    empty = PACK[name](b"")
    for data, expected in (
        (PACKED[name], TEXT),
        (PACKED[name] * 3, TEXT * 3),
        (empty, b""),
        (empty + PACKED[name] + empty, TEXT),
    ):
        for block_bytes in (1, 4096, 1 << 20):
            assert unpacked(data, name, block_bytes) == expected
    assert compression_of(PACKED[name]) == compression_of(empty) == name


@pytest.mark.parametrize("name", PACK)
def test_whatever_is_not_whole_is_an_error(name: str) -> None:
    data = PACKED[name]
    half = len(data) // 2
    for bad, reason in (
        (b"", f"it is empty, and a {name} file never is"),
        (data[:-1], "it ends in the middle"),
        (data[:half], "it ends in the middle"),
        (data[:3], "it ends in the middle"),
        (data + data[:-1], "it ends in the middle"),
        (data + data[:3], "it ends in the middle"),
        (data + b"and garbage", "data after 1 whole frame"),
        (data * 2 + b"and garbage", "data after 2 whole frames"),
        (b"neither", f"no {name} data: "),
        (data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :], f"no {name} data: "),
    ):
        with pytest.raises(DamagedError, match=reason):
            unpacked(bad, name)


@pytest.mark.parametrize("name", PACK)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_cut_is_an_error(name: str, data: st.DataObject) -> None:
    frames = PACKED[name] * 2
    end = data.draw(st.integers(0, len(frames) - 1))
    if end == len(PACKED[name]):  # between two frames: nobody can tell
        return
    with pytest.raises(DamagedError):
        unpacked(frames[:end], name)


def test_padding_and_frames_to_skip() -> None:
    assert unpacked(PACKED["gzip"] + bytes(512), "gzip") == TEXT
    assert unpacked(PACKED["xz"] + bytes(8) + PACKED["xz"], "xz") == TEXT * 2
    skipped = struct.pack("<II", 0x184D2A53, 5) + b"hello"
    assert compression_of(skipped) == "zstd"
    assert unpacked(skipped + PACKED["zstd"] + skipped + PACKED["zstd"], "zstd") == TEXT * 2


@pytest.mark.parametrize("name", PACK)
def test_what_unpacks_to_much_comes_in_pieces(name: str) -> None:
    data = PACK[name](bytes(64 << 20))
    most = 16 << 20 if name == "zstd" else PIECE_BYTES
    sizes = [len(piece) for piece in unpack([data], name)]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= most


def test_a_text_is_not_taken_for_compressed() -> None:
    for text in (b"BZhengzhou", b"BZh9 and more text", b"\x1f", b"", b"text"):
        assert compression_of(text) is None
