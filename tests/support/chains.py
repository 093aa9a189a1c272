"""Workers of a replica in one process: their neighbours with real servers in front of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc.aio

from gradstream.core.errors import GradstreamError
from gradstream.core.node.faults import Faults
from gradstream.core.plan.plan import Plan
from gradstream.core.rpc.channel import listen, new_server, open_channel
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.core.wire.frames import frame
from gradstream.core.wire.stubs import WorkerStub, add_worker
from gradstream.proto.v1 import plan_pb2
from gradstream.proto.v1 import worker_pb2 as pb
from gradstream.worker.pipeline.inbound import FORWARD
from gradstream.worker.pipeline.neighbours import Neighbours
from gradstream.worker.pipeline.place import Place
from gradstream.worker.pipeline.servicer import WorkerServicer
from gradstream.worker.timeline import Timeline

BOUND_SECONDS = 20.0
HIDDEN_SIZE = 16
"""Of the micro model."""


class Node:
    """One worker's neighbours, with a real server in front of them."""

    def __init__(self) -> None:
        self.servicer = WorkerServicer()
        self.server = new_server()
        self.address = f"127.0.0.1:{listen(self.server, '127.0.0.1:0')}"
        self.neighbours: Neighbours
        self.errors: list[Exception] = []
        self.voids = 0
        add_worker(self.servicer, self.server)

    def meet(self, plan: Plan, place: Place) -> None:
        def void() -> None:
            self.voids += 1

        self.neighbours = Neighbours(plan, place, HIDDEN_SIZE, Faults(""), Timeline(), self.errors.append, void)
        self.servicer.set(self.neighbours)


class Chain:
    """All workers of a replica."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.nodes = [Node() for _ in range(plan.replica_size)]
        self.thread = ThreadPoolExecutor(plan.replica_size)

    async def form(self, number: int = 1) -> None:
        workers = [
            plan_pb2.PipelineWorker(node_id=f"w{index}.1", name=f"w{index}", address=node.address)
            for index, node in enumerate(self.nodes)
        ]
        replica = plan_pb2.Replica(number=number, workers=workers)
        for index, node in enumerate(self.nodes):
            node.meet(self.plan, Place(replica, index))

    async def compute(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Run a compute thread's call."""
        future = asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)
        return await asyncio.wait_for(future, BOUND_SECONDS)

    async def close(self) -> None:
        for node in self.nodes:
            await node.neighbours.close()
            await node.server.stop(None)
        self.thread.shutdown()


async def until(condition: Callable[[], bool], what: str) -> None:
    async with asyncio.timeout(BOUND_SECONDS):
        while not condition():  # noqa: ASYNC110 - it changes in several tasks and threads
            await asyncio.sleep(0.01)
    assert condition(), what


def hello(**changes: Any) -> pb.StageHello:
    fields = {"job_id": "job", "epoch": 1, "table": 1, "worker": 0, "direction": FORWARD, **changes}
    return pb.StageHello(**fields)


def message(**content: Any) -> bytes:
    return frame(pb.StageHeader(**content).SerializeToString())


async def answer(node: Node, messages: list[bytes], opening: pb.StageHello | None = None) -> GradstreamError:
    """What a stream of these messages, after a hello, is refused with."""
    channel = open_channel(node.address)

    async def stream() -> AsyncIterator[bytes]:
        yield message(hello=opening or hello())
        for item in messages:
            yield item
        await asyncio.sleep(BOUND_SECONDS)

    try:
        async with asyncio.timeout(BOUND_SECONDS):
            async for _ in WorkerStub(channel).Stream(stream()):
                pass
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error, "the worker")
    finally:
        await channel.close(None)
    raise AssertionError("the stream was not refused")
