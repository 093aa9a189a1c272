"""Hand-framed messages: exactly protobuf's bytes, read back as they were sent; nothing from a peer is trusted."""

import gc
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from gradstream.core.codecs import Payload
from gradstream.core.errors import ProtocolError
from gradstream.core.wire.frames import ALIGNMENT_BYTES, PIECE_BYTES, Assembler, checksum, frame, frames, parse, verify
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.proto.v1 import plan_pb2

SIZES = [0, 1, 127, 128, 16_383, 16_384, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 5]
CONTRIBUTION = pb.ContributionHeader(
    job_id="job-1",
    epoch=3,
    step=2**40,
    slot=7,
    bundle=300,
    codec=plan_pb2.CODEC_BF16,
    fragment_bytes=[12, 8],
    payload_bytes=20,
    crc32c=0xDEADBEEF,
    slot_tokens=1024,
    slot_samples=8,
    slot_loss_sum=-1.5,
)
WEIGHTS = pb.WeightsHeader(
    version=5, bundle=2, codec=plan_pb2.CODEC_INT8, payload_bytes=9, crc32c=1, delta=True, fragment_bytes=[4, 5]
)
every_message = pytest.mark.parametrize(
    ("message_class", "header"), [(pb.PushRequest, CONTRIBUTION), (pb.PullResponse, WEIGHTS)], ids=["push", "pull"]
)


def weights_header(payload: bytes) -> pb.WeightsHeader:
    return pb.WeightsHeader(version=1, bundle=1, payload_bytes=len(payload), crc32c=checksum(payload))


def array(payload: bytes) -> Payload:
    return np.frombuffer(payload, dtype=np.uint8)


def without_padding(header: Any) -> Any:
    found = type(header)()
    found.CopyFrom(header)
    assert not any(found.padding)
    found.ClearField("padding")
    return found


def assemble(messages: Iterable[bytes]) -> list[tuple[pb.WeightsHeader, bytes]]:
    """What a receiver makes of messages whose headers it believes."""
    assembler: Assembler[pb.WeightsHeader] = Assembler()
    found = []
    for message in messages:
        encoded, piece = parse(message)
        if encoded is not None:
            assembler.begin(pb.WeightsHeader.FromString(bytes(encoded)))
        whole = assembler.add(piece)
        if whole is not None:
            found.append((whole[0], whole[1].tobytes()))
    assert assembler.idle
    return found


@every_message
@pytest.mark.parametrize("size", SIZES)
def test_frames_are_protobufs_own_bytes(message_class: Any, header: Any, size: int) -> None:
    """Of the header with its padding: what protobuf makes of its own reading of a message is that message."""
    payload = os.urandom(size)
    pieces = [payload[begin : begin + PIECE_BYTES] for begin in range(0, size, PIECE_BYTES)] or [b""]
    messages = list(frames(header, [array(payload)]))
    padded = type(header)()
    padded.CopyFrom(header)
    padded.padding = message_class.FromString(messages[0]).header.padding
    assert without_padding(padded) == header
    assert messages == [
        message_class(header=padded if number == 0 else None, payload=piece).SerializeToString()
        for number, piece in enumerate(pieces)
    ]


@every_message
@pytest.mark.parametrize("size", SIZES)
def test_parse_is_the_inverse(message_class: Any, header: Any, size: int) -> None:
    payload = os.urandom(size)
    parsed = [parse(message) for message in frames(header, [array(payload)])]
    assert b"".join(bytes(piece) for _, piece in parsed) == payload
    assert without_padding(type(header).FromString(bytes(parsed[0][0] or b""))) == header
    assert all(encoded is None for encoded, _ in parsed[1:])


@pytest.mark.parametrize("size", [1, 2, 127, 128, 16_383, 16_384, PIECE_BYTES])
def test_a_payload_begins_at_a_multiple_of_8_bytes_whatever_the_header_takes(size: int) -> None:
    """Around 128 bytes of header its length takes a byte more, and the padding may be what makes it so."""
    payload = os.urandom(size)
    paddings = set()
    for name_bytes in [*range(80, 160), *range(16_340, 16_400)]:
        header = pb.ContributionHeader(job_id="j" * name_bytes, payload_bytes=size)
        (message,) = frames(header, [array(payload)])
        assert (len(message) - size) % ALIGNMENT_BYTES == 0, (name_bytes, size)
        encoded, piece = parse(message)
        assert bytes(piece) == payload
        decoded = pb.PushRequest.FromString(message)
        assert decoded.payload == payload
        assert decoded.header == pb.ContributionHeader.FromString(bytes(encoded or b""))
        assert without_padding(decoded.header) == header
        assert decoded.SerializeToString() == message
        paddings.add(len(decoded.header.padding))
    assert len(paddings) >= 8, "headers of all lengths were tried"


def test_a_header_without_payload_is_not_padded() -> None:
    assert frame(b"\x08\x05") == b"\x0a\x02\x08\x05"


def test_the_payloads_of_a_bundle_are_one_payload() -> None:
    """In one message as in several."""
    for sizes in ([3, 0, 5], [PIECE_BYTES, 1, 7], [PIECE_BYTES - 1, 2 * PIECE_BYTES]):
        payloads = [os.urandom(size) for size in sizes]
        joined = b"".join(payloads)
        header = pb.WeightsHeader(payload_bytes=len(joined), crc32c=checksum(*map(array, payloads)))
        messages = list(frames(header, [array(payload) for payload in payloads]))
        assert messages == list(frames(header, [array(joined)]))
        ((found, payload),) = assemble(messages)
        assert payload == joined
        verify(found, array(payload), "test")


@pytest.mark.parametrize("shift", range(ALIGNMENT_BYTES))
def test_a_whole_payload_is_used_where_it_lies_if_the_kernels_can_read_it_there(shift: int) -> None:
    """And copied, to where they can, if a peer did not pad its header."""
    payload = os.urandom(64)
    buffer = np.empty(80, dtype=np.uint8)
    begin = (-buffer.__array_interface__["data"][0] + shift) % ALIGNMENT_BYTES
    buffer[begin : begin + 64] = array(payload)
    assembler: Assembler[pb.WeightsHeader] = Assembler()
    assembler.begin(pb.WeightsHeader(payload_bytes=64))
    whole = assembler.add(memoryview(buffer[begin : begin + 64]))
    assert whole is not None
    address = whole[1].__array_interface__["data"][0]
    assert (address == buffer.__array_interface__["data"][0] + begin) == (shift == 0)
    assert address % ALIGNMENT_BYTES == 0
    assert whole[1].tobytes() == payload
    # torch and the kernels get an array like any other.
    assert whole[1].flags.c_contiguous
    assert whole[1].flags.writeable


def test_a_payload_keeps_its_message_alive() -> None:
    payload = os.urandom(4096)
    assembler: Assembler[pb.WeightsHeader] = Assembler()
    (message,) = frames(pb.WeightsHeader(payload_bytes=4096), [array(payload)])
    encoded, piece = parse(message)
    assembler.begin(pb.WeightsHeader.FromString(bytes(encoded or b"")))
    whole = assembler.add(piece)
    assert whole is not None
    del message, encoded, piece
    gc.collect()
    held = [os.urandom(len(payload) + 100) for _ in range(200)]  # what would be written over freed memory
    assert whole[1].tobytes() == payload
    del held


@pytest.mark.parametrize("header", [None, b"", b"\x08\x05"])
@pytest.mark.parametrize("piece", [b"", b"x" * 200])
def test_header_alone_payload_alone_both_or_neither(header: bytes | None, piece: bytes) -> None:
    encoded, found = parse(frame(header, piece))
    if header is None or encoded is None:
        assert header is encoded
    else:
        assert bytes(encoded[: len(header)]) == header
        assert without_padding(pb.WeightsHeader.FromString(bytes(encoded))) == pb.WeightsHeader.FromString(header)
    assert bytes(found) == piece


def test_payloads_are_joined_one_after_another() -> None:
    payloads = [os.urandom(size) for size in (5, 0, PIECE_BYTES + 3, 2 * PIECE_BYTES)]
    messages = [message for payload in payloads for message in frames(weights_header(payload), [array(payload)])]
    found = assemble(messages)
    assert [payload for _, payload in found] == payloads
    for header, payload in found:
        verify(header, np.frombuffer(payload, dtype=np.uint8), "test")


@given(st.binary(max_size=200))
@example(b"\x0a\x80\x80\x80\x80\x80\x01")  # a length of more than 35 bits
@example(b"\x7a\xff\xff\xff\xff\x7f")  # a length far beyond the message
@example(b"\x0a")
def test_any_bytes_parse_or_are_a_protocol_error(message: bytes) -> None:
    try:
        encoded, piece = parse(message)
    except ProtocolError:
        return
    # Whatever we accept, protobuf reads in the same way (unless the header inside is no valid message).
    try:
        same = pb.PullResponse.FromString(message)
    except DecodeError:
        assert encoded is not None
        with pytest.raises(DecodeError):
            pb.WeightsHeader.FromString(bytes(encoded))
        return
    assert same.payload == bytes(piece)
    assert same.HasField("header") == (encoded is not None)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(
                lambda size, piece: frame(pb.WeightsHeader(payload_bytes=size).SerializeToString(), piece),
                st.integers(0, 64),
                st.binary(max_size=64),
            ),
            st.binary(max_size=40).map(lambda piece: frame(None, piece)),
        ),
        max_size=8,
    )
)
def test_any_stream_assembles_or_is_a_protocol_error(messages: list[bytes]) -> None:
    assembler: Assembler[pb.WeightsHeader] = Assembler()
    for message in messages:
        try:
            encoded, piece = parse(message)
            if encoded is not None:
                try:
                    header = pb.WeightsHeader.FromString(bytes(encoded))
                except DecodeError:
                    return
                if header.payload_bytes > 1 << 20:  # the caller's check: what is announced bounds what is allocated
                    return
                assembler.begin(header)
            whole = assembler.add(piece)
        except ProtocolError:
            return
        if whole is not None:
            assert whole[1].nbytes == whole[0].payload_bytes


@pytest.mark.parametrize("size", [1, 300, PIECE_BYTES + 1])
def test_every_truncation_of_a_message_is_refused_or_shorter(size: int) -> None:
    payload = os.urandom(size)
    message = next(frames(weights_header(payload), [array(payload)]))
    header_end = len(message) - len(payload)
    for end in {*range(header_end), len(message) // 2, len(message) - 1}:
        try:
            _, piece = parse(message[:end])
        except ProtocolError:
            continue
        # Cut exactly between two fields: what is missing is missed by the Assembler, not by parse.
        assert not len(piece)


def test_a_payload_longer_than_announced_is_refused() -> None:
    with pytest.raises(ProtocolError, match="longer than the 3 bytes"):
        assemble(frames(pb.WeightsHeader(payload_bytes=3), [array(b"four")]))


def test_a_header_inside_a_payload_is_refused() -> None:
    header = pb.WeightsHeader(payload_bytes=10)
    with pytest.raises(ProtocolError, match="a new header after 4 of 10 bytes"):
        assemble([*frames(header, [array(b"four")]), *frames(header, [array(b"0123456789")])])


def test_a_payload_without_a_header_is_refused() -> None:
    with pytest.raises(ProtocolError, match="without a header"):
        assemble([frame(None, b"x")])


@pytest.mark.parametrize("header", [None, b""])
def test_a_message_without_payload_is_refused(header: bytes | None) -> None:
    """Else a peer could keep a stream busy for ever without sending anything."""
    assembler: Assembler[pb.WeightsHeader] = Assembler()
    assembler.begin(pb.WeightsHeader(payload_bytes=4))
    assert assembler.add(memoryview(b"ab")) is None
    _, piece = parse(frame(header, b""))
    with pytest.raises(ProtocolError, match="without payload"):
        assembler.add(piece)


@pytest.mark.parametrize(
    "message",
    [
        b"\x7a\x01x\x0a\x00",  # header after payload
        b"\x0a\x00\x0a\x00",  # two headers
        b"\x7a\x01x\x7a\x01y",  # two payloads
        b"\x12\x01x",  # another field
        b"\x08\x01\x00",  # another wire type
    ],
)
def test_fields_that_do_not_belong_are_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError, match="unexpected field"):
        parse(message)


@given(payload=st.binary(min_size=1, max_size=300), data=st.data())
def test_one_flipped_bit_fails_the_checksum(payload: bytes, data: st.DataObject) -> None:
    header = weights_header(payload)
    changed = array(payload).copy()
    verify(header, changed, "bundle 1")
    changed[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ProtocolError, match="bundle 1: checksum"):
        verify(header, changed, "bundle 1")


def test_the_checksum_is_crc32c() -> None:
    assert checksum(b"123456789") == 0xE3069283  # the check value of CRC-32C (RFC 3720)
