"""A parameter server in a process of its own, without a coordinator, and processes that push to it and pull from it.

The processes run the cluster's own code: the servicer, the shard and its thread pool on uvloop, the channels, the
framing. Only two parts are replaced: the coordinator's directives by commands over a pipe, and gradients by payloads
that were encoded beforehand. Times are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil
import torch
import uvloop

from gradstream.core.codecs import Payload
from gradstream.core.codecs.payloads import BundleCodec, split
from gradstream.core.data.manifest import parse_manifest
from gradstream.core.kernels import preload
from gradstream.core.machine import memory
from gradstream.core.model.model import inventory
from gradstream.core.plan.bundles import Bundle
from gradstream.core.plan.fragments import cut
from gradstream.core.plan.plan import Plan, Server
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.rpc.access import SERVER
from gradstream.core.rpc.channel import listen, new_server, open_channel
from gradstream.core.rpc.guard import Guard
from gradstream.core.rpc.token_sources import FileTokens
from gradstream.core.rpc.transport import Transport
from gradstream.core.wire.frames import Assembler, checksum, frames, parse, verify
from gradstream.core.wire.stubs import ParameterServerStub, add_parameter_server
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.servicer import ParameterServerServicer
from gradstream.services.parameter_server.shard import Shard

FRAGMENT_ELEMENTS = 1 << 20
ANSWER_SECONDS = 120.0
LATENESS_SECONDS = 0.02
"""Time between two measurements of the event loop's lateness."""
BARE_SERVICE = "gradstream.bench.Bare"
_MODEL = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_SLOT_TOKENS = 8


def make_plan(
    codec: str,
    num_slots: int,
    num_layers: int = 4,
    pull: str | None = None,
    checkpoint_root: str = "",
    checkpoint_steps: int = 0,
) -> Plan:
    """Make a plan of one server: 4 MiB fragments, 16 MiB of embedding and 16 MiB a layer in fp32.

    The norms are one bundle of a few KiB. `codec` is the codec of pushes, and of pulls unless `pull` is given. Every
    `checkpoint_steps` steps a checkpoint is written below `checkpoint_root`.
    """
    config = _MODEL | {"num_hidden_layers": num_layers}
    recipe = {
        "name": "transport",
        "model": {"config": config},
        "training": {
            "num_steps": 1000,
            "num_slots": num_slots,
            "global_batch": num_slots,
            "microbatch": 1,
            "sequence_length": 8,
        },
        "codec": {"push": codec, "pull": pull or codec},
        "validation": {"num_samples": num_slots},
        "checkpoint": {"interval_steps": checkpoint_steps},
        "data": {"path": "none"},
    }
    data = {"token_dtype": "uint16", "vocab_size": 8192, "end_of_text_id": 0, "tokenizer_sha256": "0" * 64}
    tensors = tuple(inventory(config))
    return Plan(
        job_id="transport",
        epoch=1,
        recipe=parse_recipe(recipe),
        model_config=config,
        data_manifest=parse_manifest(data | {"shards": []}),
        tensors=tensors,
        fragment_elements=FRAGMENT_ELEMENTS,
        placement=(0,) * len(cut(tensors, FRAGMENT_ELEMENTS)),
        servers=(Server("n0", "server-0", ""),),
        leader=0,
        start_version=0,
        checkpoint_path="",
        checkpoint_root=checkpoint_root,
    )


def payloads_of(plan: Plan) -> list[Payload]:
    """Encode a random gradient's contribution for every bundle with the plan's push codec."""
    generator = torch.Generator().manual_seed(1)
    return [np.concatenate(_encode(plan, item, generator)) for item in plan.bundles]


def _encode(plan: Plan, bundle: Bundle, generator: torch.Generator) -> list[Payload]:
    values = [torch.randn(fragment.num_elements, generator=generator) for fragment in bundle.fragments]
    return _codec(plan, bundle, plan.recipe.codec.push).encode(values, 0)


def _codec(plan: Plan, bundle: Bundle, codec: str) -> BundleCodec:
    return BundleCodec(bundle, plan.tensors, codec, plan.recipe.codec.embedding)


def header_of(plan: Plan, slot: int, bundle: int, payload: Payload, crc32c: int, step: int = 0) -> Any:
    """Make the header of a valid contribution, for codecs of fixed size."""
    held = plan.bundles[bundle]
    codec = _codec(plan, held, plan.recipe.codec.push)
    sizes = [each.encoded_bytes(item.shape) for each, item in zip(codec.codecs, held.fragments, strict=True)]
    return pb.ContributionHeader(
        job_id=plan.job_id,
        epoch=plan.epoch,
        step=step,
        slot=slot,
        bundle=bundle,
        codec=codec.codec.wire,
        fragment_bytes=sizes,
        payload_bytes=payload.nbytes,
        crc32c=crc32c,
        slot_tokens=_SLOT_TOKENS,
        slot_samples=1,
        slot_loss_sum=1.0,
    )


@dataclass(frozen=True)
class Usage:
    """A process's processor time in seconds since its start, and its memory in bytes now and at its peak."""

    cpu_seconds: float
    resident_bytes: int
    peak_resident_bytes: int


class Child:
    """A process that answers commands: `function(connection)` runs in it until the pipe is closed."""

    def __init__(self, function: Callable[[Connection], None], name: str):
        # spawn, never fork, because gRPC has threads.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=function, args=(theirs,), name=name, daemon=True)
        self.process.start()
        theirs.close()

    def tell(self, *command: Any) -> None:
        """Send a command without waiting for its answer."""
        self._pipe.send(command)

    def answer(self, timeout_seconds: float = ANSWER_SECONDS) -> Any:
        """Receive the answer to the oldest open command. Raises RuntimeError when it failed or takes too long."""
        if not self._pipe.poll(timeout_seconds):
            raise RuntimeError(f"{self.process.name} did not answer in {timeout_seconds:.0f} s")
        ok, value = self._pipe.recv()
        if not ok:
            raise RuntimeError(f"{self.process.name}: {value}")
        return value

    def ask(self, *command: Any) -> Any:
        """Send a command and wait for its answer."""
        self.tell(*command)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _answer_commands(pipe: Connection, make_actor: Callable[[], Any]) -> Coroutine[Any, Any, None]:
    """Run the methods of an actor that the pipe names, until the pipe is closed."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        actor = make_actor()
        commands: asyncio.Queue[tuple[Any, ...] | None] = asyncio.Queue()

        def readable() -> None:
            try:
                commands.put_nowait(pipe.recv())
            except EOFError:
                loop.remove_reader(pipe.fileno())
                commands.put_nowait(None)

        loop.add_reader(pipe.fileno(), readable)
        # uvloop clears the flag, and a command that has arrived in part would then be an error.
        os.set_blocking(pipe.fileno(), True)
        await actor.start()
        while (command := await commands.get()) is not None:
            try:
                pipe.send((True, await getattr(actor, command[0])(*command[1:])))
            except BrokenPipeError:
                break
            except Exception as error:
                pipe.send((False, f"{type(error).__name__}: {error}"))
        await actor.stop()

    return run()


# -- the server --------------------------------------------------------------------------------------------------------


class ServerActor:
    """Commands of a server's process. `credentials` holds a directory for each role; None means without TLS."""

    def __init__(self, credentials: Path | None = None) -> None:
        # As in gradstream.services.parameter_server.server.
        torch.set_num_threads(1)
        self.shard: Shard | None = None
        self.failures: list[Exception] = []
        self._late_seconds = 0.0
        self._checkpoint_times: list[float] = []
        self._executor = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2)), "tensor")
        self._transport = Transport(credentials and credentials / "server")
        guards = []
        if credentials is not None:
            guards.append(Guard(FileTokens(credentials / "coordinator" / "tokens.json")))
        self._server = new_server(*guards)
        self._port = 0

    async def start(self) -> None:
        add_parameter_server(ParameterServerServicer(lambda: self.shard), self._server)
        handlers = {"Push": grpc.stream_unary_rpc_method_handler(_count_bytes, None, None)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(BARE_SERVICE, handlers),))
        self._port = listen(self._server, "127.0.0.1:0", self._transport)
        await self._server.start()
        self._watch = asyncio.create_task(self._measure_lateness())

    async def stop(self) -> None:
        self._watch.cancel()
        await self._server.stop(None)
        if self.shard is not None:
            await self.shard.close("the benchmark is over")

    async def _measure_lateness(self) -> None:
        """Measure how late the event loop comes to a timer, as it would to a heartbeat."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LATENESS_SECONDS
            await asyncio.sleep(LATENESS_SECONDS)
            self._late_seconds = max(self._late_seconds, loop.time() - due)

    async def prepare(self) -> None:
        """Import and compile what a server needs before it takes up a plan."""
        preload.preload()
        memory.settle()
        memory.give_back()

    async def load(self, plan: Plan) -> str:
        """Load a plan; return the server's address."""
        if self.shard is not None:
            await self.shard.close("another plan")

        async def ignore(_: Any) -> None:
            pass

        async def count(_: Any) -> None:
            self._checkpoint_times.append(time.monotonic())

        async def fail(error: Exception) -> None:
            self.failures.append(error)

        self.shard = Shard(plan, 0, self._executor, ignore, ignore, ignore, count, fail)  # type: ignore[arg-type]
        await self.shard.load()
        return f"127.0.0.1:{self._port}"

    async def wait_added(self, num_slots: int) -> float:
        """Wait until every bundle's sum holds `num_slots` slots; return the time."""
        shard = self.shard
        assert shard is not None
        while any(state.num_added < num_slots * state.bundle.num_parts for state in shard.bundles.values()):
            if self.failures:
                raise self.failures[0]
            await asyncio.sleep(0.0005)
        return time.monotonic()

    async def wait_version(self, version: int) -> float:
        """Wait until every bundle is published at a version; return the time."""
        shard = self.shard
        assert shard is not None
        while any(state.published_version < version for state in shard.bundles.values()):
            if self.failures:
                raise self.failures[0]
            await asyncio.sleep(0.0005)
        return time.monotonic()

    async def usage(self) -> Usage:
        """The process's usage. The memory peak is since the previous call."""
        process = psutil.Process()
        times = process.cpu_times()
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # begin a new peak
        return Usage(times.user + times.system, process.memory_info().rss, peak)

    async def lateness(self) -> float:
        """The most seconds that the event loop was late since the previous call."""
        seconds, self._late_seconds = self._late_seconds, 0.0
        return seconds

    async def wait_checkpoints(self, count: int) -> float:
        """Wait until `count` checkpoints have been written; return the time at which the last one was."""
        while len(self._checkpoint_times) < count:
            if self.failures:
                raise self.failures[0]
            await asyncio.sleep(0.01)
        return self._checkpoint_times[count - 1]

    async def state_bytes(self) -> int:
        """Bytes of weights, moments, accumulators and copies."""
        assert self.shard is not None
        return int(self.shard.status().state_bytes)


async def _count_bytes(messages: AsyncIterator[bytes], context: Any) -> bytes:
    """Take messages and drop them, to measure the cost of gRPC alone."""
    num_bytes = 0
    async for message in messages:
        num_bytes += len(message)
    return num_bytes.to_bytes(8, "little")


def run_server(pipe: Connection, credentials: Path | None = None) -> None:
    """Run a server's process."""
    uvloop.run(_answer_commands(pipe, partial(ServerActor, credentials)))


# -- senders -----------------------------------------------------------------------------------------------------------


class SenderActor:
    """Commands of a process that pushes and pulls over any number of streams, each on a channel of its own."""

    def __init__(self, credentials: Path | None = None) -> None:
        self._transport = Transport(credentials and credentials / "worker")
        self._stubs: list[ParameterServerStub] = []
        self._channels: list[grpc.aio.Channel] = []
        self._parameters: list[list[torch.Tensor]] = []
        self._codecs: list[BundleCodec] = []
        self._executor = ThreadPoolExecutor(1, "decode")  # one thread, as in a worker

    async def start(self) -> None:
        """Nothing to prepare."""

    async def stop(self) -> None:
        for channel in self._channels:
            await channel.close(None)

    async def connect(self, address: str, plan: Plan, num_streams: int) -> None:
        """Prepare to push a plan's contributions over `num_streams` streams."""
        for channel in self._channels:
            await channel.close(None)
        self._plan = plan
        self._parameters = []
        self._payloads = payloads_of(plan)
        self._checksums = [checksum(payload) for payload in self._payloads]
        self._channels = [open_channel(address, SERVER, self._transport) for _ in range(num_streams)]
        self._stubs = [ParameterServerStub(channel) for channel in self._channels]
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def push(self, jobs: list[list[tuple[int, list[int]]]], piece_bytes: int, step: int = 0) -> float:
        """Push on stream i the contributions of jobs[i] = [(slot, bundles), …].

        Returns the time of the begin, once all are acknowledged.
        """
        began = time.monotonic()
        await asyncio.gather(*(self._push_one(number, job, piece_bytes, step) for number, job in enumerate(jobs)))
        return began

    async def _push_one(self, number: int, job: list[tuple[int, list[int]]], piece_bytes: int, step: int) -> None:
        changed = asyncio.Event()
        under_way: deque[int] = deque()
        limit = 0

        async def messages() -> AsyncIterator[bytes]:
            for slot, bundles in job:
                for index in bundles:
                    payload = self._payloads[index]
                    while under_way and sum(under_way) + payload.nbytes > limit:
                        changed.clear()
                        await changed.wait()
                    under_way.append(payload.nbytes)
                    header = header_of(self._plan, slot, index, payload, self._checksums[index], step)
                    for message in frames(header, [payload], piece_bytes):
                        yield message

        async for response in self._stubs[number].Push(messages()):
            limit = response.window_bytes
            if response.result:
                if response.result != pb.PUSH_RESULT_ACCEPTED:
                    raise RuntimeError(f"not accepted: {response}")
                under_way.popleft()
            changed.set()

    async def push_bare(self, num_bytes: int, piece_bytes: int) -> tuple[float, float]:
        """Send `num_bytes` bytes to a method that drops them; return the times of begin and end."""
        piece = bytes(piece_bytes)

        async def messages() -> AsyncIterator[bytes]:
            for begin in range(0, num_bytes, piece_bytes):
                yield piece[: num_bytes - begin]

        began = time.monotonic()
        answer = await self._channels[0].stream_unary(f"/{BARE_SERVICE}/Push", None, None)(messages())
        if int.from_bytes(answer, "little") != num_bytes:
            raise RuntimeError("bytes went missing")
        return began, time.monotonic()

    async def pull(self, min_version: int) -> tuple[float, float]:
        """Pull a version as a worker does and decode it into parameters; return the times of begin and end."""
        plan = self._plan
        if not self._parameters:
            self._parameters = [[torch.zeros(item.num_elements) for item in held.fragments] for held in plan.bundles]
            self._codecs = [_codec(plan, held, plan.recipe.codec.pull) for held in plan.bundles]
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        request = pb.PullRequest(
            job_id=plan.job_id,
            epoch=plan.epoch,
            min_version=min_version,
            bundles=[held.index for held in plan.bundles],
        )
        assembler: Assembler[pb.WeightsHeader] = Assembler()
        decoding = []
        async for message in self._stubs[0].Pull(request):
            encoded, piece = parse(message)
            if encoded is not None:
                assembler.begin(pb.WeightsHeader.FromString(bytes(encoded)))
            whole = assembler.add(piece)
            if whole is not None and whole[1].nbytes:
                header, payload = whole
                verify(header, payload, "pull")
                pieces = split(payload, header.fragment_bytes)
                out, codec = self._parameters[header.bundle], self._codecs[header.bundle]
                decoding.append(loop.run_in_executor(self._executor, codec.decode, pieces, out, header.version))
        await asyncio.gather(*decoding)
        if len(decoding) != len(plan.bundles):
            raise RuntimeError(f"{len(decoding)} of {len(plan.bundles)} bundles came")
        return began, time.monotonic()


def run_sender(pipe: Connection, credentials: Path | None = None) -> None:
    """Run a sender's process."""
    torch.set_num_threads(1)
    uvloop.run(_answer_commands(pipe, partial(SenderActor, credentials)))
