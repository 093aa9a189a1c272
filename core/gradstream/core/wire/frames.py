"""Hand-framed messages of the data plane.

PushRequest and PullResponse are `{header = 1; bytes payload = 15}`. protobuf would copy the payload when it builds
the message, and again when it parses the message. Here the payload is joined once and read as a view. The bytes are
those of protobuf: a test decodes them with the generated classes and compares.

Every field of a peer's message is validated before it is used. An Assembler allocates at most the memory that the plan
allows for a contribution, and returns a payload only if its length is right; `verify` checks its checksum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import google_crc32c
import numpy as np

from gradstream.core.errors import ProtocolError

if TYPE_CHECKING:
    from gradstream.core.codecs import Payload  # whose import needs torch

PIECE_BYTES = 2 << 20
ALIGNMENT_BYTES = 8
_HEADER_TAG = 0x0A  # field 1, length-delimited
_PADDING_TAG = 0x72  # field 14 of the header, length-delimited
_PAYLOAD_TAG = 0x7A  # field 15, length-delimited
# The padding field is never empty, because protobuf leaves out an empty field. It has up to 17 zeros: if a longer
# padding lengthens the encoded header length by a byte, one total length is skipped, and the one 8 bytes on is used.
_PADDINGS = (b"", *(bytes([_PADDING_TAG, zeros]) + bytes(zeros) for zeros in range(1, 18)))

_NOTHING: Payload = np.empty(0, dtype=np.uint8)


class _Header(Protocol):
    @property
    def payload_bytes(self) -> int: ...
    @property
    def crc32c(self) -> int: ...


H = TypeVar("H", bound=_Header)


def checksum(*pieces: Payload | bytes) -> int:
    """CRC-32C of a payload in one or several pieces."""
    value = 0
    for piece in pieces:
        value = google_crc32c.extend(value, piece)
    return int(value)


def frame(header: bytes | None, *pieces: memoryview | bytes | Payload) -> bytes:
    """Frame one message from an encoded header (or none) and a payload, whose pieces are joined once.

    The header is padded so that the payload begins at a multiple of 8 bytes.
    """
    num_bytes = sum(len(piece) for piece in pieces)
    length = b"\x7a" + _varint(num_bytes) if num_bytes else b""
    if header is None:
        return b"".join([length, *pieces])  # type: ignore[list-item]
    for padding in _PADDINGS:
        beginning = b"\x0a" + _varint(len(header) + len(padding))
        if not num_bytes or not (len(beginning) + len(header) + len(padding) + len(length)) % ALIGNMENT_BYTES:
            break
    return b"".join([beginning, header, padding, length, *pieces])  # type: ignore[list-item]


def frames(header: Any, payloads: Sequence[Payload], piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
    """Frame concatenated payloads as messages with pieces of `piece_bytes`. Only the first message has the header."""
    encoded: bytes | None = header.SerializeToString()
    num_bytes = sum(map(len, payloads))
    if num_bytes <= piece_bytes:
        yield frame(encoded, *payloads)
        return
    view = (payloads[0] if len(payloads) == 1 else np.concatenate(payloads)).data
    for begin in range(0, num_bytes, piece_bytes):
        yield frame(encoded, view[begin : begin + piece_bytes])
        encoded = None


def parse(message: bytes) -> tuple[memoryview | None, memoryview]:
    """Split a message into (header or None, piece of payload), as views. Raises ProtocolError."""
    view = memoryview(message)
    header: memoryview | None = None
    payload: memoryview | None = None
    at = 0
    while at < len(view):
        tag = view[at]
        length, at = _read_varint(view, at + 1)
        if at + length > len(view):
            raise ProtocolError("message cut short: a field is longer than the message")
        if tag == _HEADER_TAG and header is None and payload is None:
            header = view[at : at + length]
        elif tag == _PAYLOAD_TAG and payload is None:
            payload = view[at : at + length]
        else:
            raise ProtocolError(f"message with an unexpected field (tag byte {tag})")
        at += length
    return header, view[:0] if payload is None else payload


class Assembler(Generic[H]):
    """Joins pieces into payloads, one after the other, in buffers of exactly the announced size.

    The caller must check a header against the plan before `begin`, which bounds the allocated memory.
    """

    def __init__(self) -> None:
        self._header: H | None = None
        self._buffer: Payload = _NOTHING
        self._filled = 0

    @property
    def idle(self) -> bool:
        """Whether the next message must have a header."""
        return self._header is None

    def begin(self, header: H) -> None:
        """Start a payload. Raises ProtocolError when the payload before it is not complete."""
        if self._header is not None:
            raise ProtocolError(
                f"a new header after {self._filled} of {self._header.payload_bytes} bytes of the payload before it"
            )
        self._header = header
        self._buffer = _NOTHING
        self._filled = 0

    def add(self, piece: memoryview) -> tuple[H, Payload] | None:
        """Add a piece; return (header, payload) if it was the last one. Raises ProtocolError."""
        header = self._header
        if header is None:
            raise ProtocolError("a piece of payload without a header before it")
        end = self._filled + len(piece)
        if end > header.payload_bytes:
            raise ProtocolError(f"payload longer than the {header.payload_bytes} bytes that its header announces")
        if not len(piece) and header.payload_bytes:
            raise ProtocolError("a message without payload")
        arrived = np.frombuffer(piece, dtype=np.uint8)
        address = arrived.__array_interface__["data"][0]
        if end - self._filled < header.payload_bytes or address % ALIGNMENT_BYTES:
            if not self._filled:
                self._buffer = np.empty(header.payload_bytes, dtype=np.uint8)
            self._buffer[self._filled : end] = arrived
            self._filled = end
            if end < header.payload_bytes:
                return None
            payload = self._buffer
        else:  # whole and aligned, as gradstream sends it: used without a copy
            payload = np.asarray(_Unlocked(arrived, address))
        self._header, self._buffer = None, _NOTHING
        return header, payload


class _Unlocked:
    """Presents a message's bytes to numpy as a writable array, although no code writes to them.

    For read-only arrays the kernels would have to be compiled a second time, and torch would warn of each array.
    """

    def __init__(self, owner: Payload, address: int):
        self._owner = owner
        self.__array_interface__ = {"version": 3, "shape": owner.shape, "typestr": "|u1", "data": (address, False)}


def verify(header: _Header, payload: Payload, what: str) -> None:
    """Raise ProtocolError if the payload's checksum is not the header's."""
    found = checksum(payload)
    if found != header.crc32c:
        raise ProtocolError(
            f"{what}: checksum {found:08x} is not the announced {header.crc32c:08x}; the bytes changed on the way"
        )


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(view):
            raise ProtocolError("message cut short inside a length")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ProtocolError("a length in the message is longer than any message may be")
