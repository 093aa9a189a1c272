"""Messages for people: one plain line, whatever a peer or a file has put into it."""

from __future__ import annotations

import time

import grpc
import pytest

from gradstream.core.errors import MAX_MESSAGE_CHARACTERS, ConfigError, DataError, nearest, one_line, plain_line
from gradstream.core.rpc.channel import listen, new_server, open_channel
from gradstream.core.rpc.errors import answering
from gradstream.proto.v1 import jobs_pb2, jobs_pb2_grpc

FOREIGN = {
    "long": "a" * 1_000_000,
    "long and foreign": "日" * 100_000,
    "lines": "one\ntwo\r\n\tthree\N{LINE SEPARATOR}four",
    "terminal": "\x1b[2J\x07\x00",
    "surrogate": "\ud800",
    "right to left": "\N{RIGHT-TO-LEFT OVERRIDE}txt.exe",
    "percent": "%" * 5000,
    "four bytes": "\N{GRINNING FACE}" * 5000,
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=list(FOREIGN))
def test_a_message_is_one_plain_line(text: str) -> None:
    error = ConfigError(f"key '{text}' is unknown; remove it")
    for line in (str(error), one_line(error), one_line(ValueError(text))):
        assert line.isprintable()
        assert len(line) <= MAX_MESSAGE_CHARACTERS
        assert plain_line(line) == line
    assert str(error).startswith("key '")
    assert str(error).endswith("; remove it")  # cause and cure stay


def test_a_plain_line_stays_as_it_is() -> None:
    line = "the file × has 3 rows → none; add some…"
    assert plain_line(line) == line


async def test_every_message_reaches_the_caller() -> None:
    """gRPC drops a status whose metadata is too large: the caller would see that instead."""
    texts = list(FOREIGN.values())

    class Refusing(jobs_pb2_grpc.JobsServiceServicer):
        async def GetJob(self, request: jobs_pb2.GetJobRequest, context: grpc.aio.ServicerContext) -> None:  # type: ignore[type-arg]
            async with answering(context):
                raise DataError(texts[int(request.job_id)])

    server = new_server()
    jobs_pb2_grpc.add_JobsServiceServicer_to_server(Refusing(), server)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}") as channel:
            for number, text in enumerate(texts):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await jobs_pb2_grpc.JobsServiceStub(channel).GetJob(jobs_pb2.GetJobRequest(job_id=str(number)))
                assert caught.value.details() == str(DataError(text))
    finally:
        await server.stop(None)


def test_the_nearest_of_many_is_found_in_no_time() -> None:
    began = time.monotonic()
    assert nearest("x" * 4_000_000, ["xyz"]) == ""
    assert nearest("xyz", ["a" * 4_000_000] * 100 + ["xyy"]) == "; did you mean 'xyy'?"
    nearest("xyz", (f"name-{number}" for number in range(10**9)))
    assert time.monotonic() - began < 5
