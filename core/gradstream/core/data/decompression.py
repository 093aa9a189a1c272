"""Decompression of files in bounded pieces, with an error for every damaged file.

A truncated or damaged frame is an error, and so are bytes after the last frame that belong to no frame. The libraries'
own readers report none of these: zstd's stops without an error in the middle of a truncated frame, or after the first
of several frames; those of bz2 and xz stop at bytes that are not a frame.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

PIECE_BYTES = 1 << 20
ZSTD_FEED_BYTES = 512
"""Input bytes for each call of zstd's decoder, which returns at most 128 KiB for every 4 bytes of its input."""
MAGIC = {
    b"\x1f\x8b\x08": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes([0x50 + number, 0x2A, 0x4D, 0x18]): "zstd" for number in range(16)},  # skippable frames
}
_PADDED = ("gzip", "xz")
"""Formats in which zeros may follow a frame."""


class DamagedError(Exception):
    """A truncated or damaged compressed file. The message is the reason."""


def compression_of(head: bytes) -> str | None:
    """The compression of a file by its first bytes; None when they show none."""
    found = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if found == "bz2" and head[4:10] not in (b"1AY&SY", b"\x17rE8P\x90"):  # a text may begin with "BZh"
        return None
    return found


def unpack(blocks: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """Decompress all frames, in pieces of about PIECE_BYTES at most.

    Raises DamagedError when a frame is truncated or damaged, when other bytes follow, or when there is no frame.
    """
    frame: _Frame | None = None
    num_frames = 0
    for block in blocks:
        rest = block
        while rest:
            if frame is None:
                if num_frames and compression in _PADDED:
                    rest = rest.lstrip(b"\0")
                    if not rest:
                        break
                frame = _FRAMES[compression]()
                num_frames += 1
            try:
                yield from (piece for piece in frame.feed(rest) if piece)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise DamagedError(_reason(error, compression, num_frames)) from None
            except Exception as error:  # zstandard's own error type; the module is imported only when needed
                raise DamagedError(_reason(error, compression, num_frames)) from None
            if not frame.ended:
                break
            rest, frame = frame.left, None
    if frame is not None:
        raise DamagedError(f"it ends in the middle of its {compression} data")
    if not num_frames:
        raise DamagedError(f"it is empty, and a {compression} file never is")


def _reason(error: BaseException, compression: str, num_frames: int) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if "requires too much memory" in text:
        return f"its {compression} window is larger than 128 MiB: compress it again without --long"
    where = f" after {num_frames - 1} whole frame{'s' if num_frames > 2 else ''}" if num_frames > 1 else ""
    return f"no {compression} data{where}: {text}"


class _Frame(Protocol):
    """A decoder of one frame of a compressed file. Once it has `ended`, `left` is the input after the frame."""

    ended: bool
    left: bytes

    def feed(self, data: bytes) -> Iterator[bytes]: ...


class _Gzip:
    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)
        self.ended, self.left = False, b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data and not self._decoder.eof:
            yield self._decoder.decompress(data, PIECE_BYTES)
            data = self._decoder.unconsumed_tail
        self.ended, self.left = self._decoder.eof, self._decoder.unused_data


class _Held:
    """A decoder of a bz2 or xz frame: the library's decoder keeps the input that it has not used."""

    def __init__(self, decoder: Any):
        self._decoder = decoder
        self.ended, self.left = False, b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        yield self._decoder.decompress(data, PIECE_BYTES)
        while not self._decoder.needs_input and not self._decoder.eof:
            yield self._decoder.decompress(b"", PIECE_BYTES)
        self.ended = self._decoder.eof
        self.left = self._decoder.unused_data if self.ended else b""


class _Zstd:
    def __init__(self) -> None:
        import zstandard

        self._decoder: Any = zstandard.ZstdDecompressor().decompressobj()
        self.ended, self.left = False, b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        for begin in range(0, len(data), ZSTD_FEED_BYTES):
            yield self._decoder.decompress(data[begin : begin + ZSTD_FEED_BYTES])
            if self._decoder.eof:
                self.ended = True
                self.left = self._decoder.unused_data + data[begin + ZSTD_FEED_BYTES :]
                return


_FRAMES: dict[str, Any] = {
    "gzip": _Gzip,
    "bz2": lambda: _Held(bz2.BZ2Decompressor()),
    "xz": lambda: _Held(lzma.LZMADecompressor()),
    "zstd": _Zstd,
}
