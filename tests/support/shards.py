"""A job's shards behind the real servicer in this process, and a worker's pushes and pulls, done by hand."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from gradstream.coordinator.planning.placement import place
from gradstream.core.codecs import Payload, codec_on_wire
from gradstream.core.codecs.payloads import BundleCodec, CodecBook, split
from gradstream.core.data.manifest import parse_manifest
from gradstream.core.model.model import inventory
from gradstream.core.optimizer.rules import whole_tensors
from gradstream.core.plan.bundles import WEIGHTS, Bundle, first_push_codec
from gradstream.core.plan.fragments import cut
from gradstream.core.plan.plan import Plan, Server
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.rpc.channel import listen, new_server, open_channel
from gradstream.core.wire.frames import Assembler, checksum, frames, parse, verify
from gradstream.core.wire.stubs import ParameterServerStub, add_parameter_server
from gradstream.proto.v1 import coordinator_pb2, plan_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.commit import Decision
from gradstream.services.parameter_server.servicer import ParameterServerServicer
from gradstream.services.parameter_server.shard import Shard
from support.micro import MICRO_LLAMA

MODEL = MICRO_LLAMA
TENSORS = inventory(MODEL)
FRAGMENTS = cut(TENSORS, 256)
NUM_SLOTS = 3
SLOT_SAMPLES = 2
SLOT_TOKENS = SLOT_SAMPLES * 8

Key = tuple[int, int]
"""(slot, bundle)"""


def make_plan(num_servers: int, push: str = "fp32", pull: str = "fp32", data: str = "data", **changes: Any) -> Plan:
    """Make a plan for the micro model.

    Keyword arguments replace fields of the plan; `codec`, `optimizer` and `training` replace keys of the recipe's
    sections, and `local` and `start_from` are its sections for local steps and for the first weights.
    """
    recipe = {
        "name": "tiny",
        "seed": 1,
        "model": {"config": MODEL},
        "training": {"num_steps": 3, "num_slots": 3, "global_batch": 6, "microbatch": 1, "sequence_length": 8}
        | changes.pop("training", {}),
        "optimizer": {"learning_rate": 0.01, "clip_norm": 0.5} | changes.pop("optimizer", {}),
        "validation": {"num_samples": 3},
        "checkpoint": {"interval_steps": 1 if changes.get("checkpoint_root") else 0} | changes.pop("checkpoint", {}),
        "codec": {"push": push, "pull": pull, "embedding": "bf16"} | changes.pop("codec", {}),
        "data": {"path": data},
        "local": changes.pop("local", None),
        "start_from": changes.pop("start_from", None),
    }
    tokens = {
        "token_dtype": "uint16",
        "vocab_size": 64,
        "end_of_text_id": 0,
        "tokenizer_sha256": hashlib.sha256(b"{}").hexdigest(),
        "shards": [],
    }
    parsed = parse_recipe(recipe)
    whole = whole_tensors(parsed.optimizer, TENSORS)
    fields: dict[str, Any] = {
        "job_id": "job",
        "epoch": 5,
        "recipe": parsed,
        "model_config": MODEL,
        "data_manifest": parse_manifest(tokens),
        "tensors": tuple(TENSORS),
        "fragment_elements": 256,
        "placement": tuple(place(FRAGMENTS, TENSORS, num_servers, whole)[0]),
        "servers": tuple(Server(f"n{index}", f"server-{index}", "") for index in range(num_servers)),
        "leader": 0,
        "start_version": 0,
        "checkpoint_path": "",
        "checkpoint_root": "",
    }
    return Plan(**(fields | changes))


def gradient(step: int, slot: int, fragment: int) -> torch.Tensor:
    """Make a gradient, summed over the slot's tokens, large enough to be clipped."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * slot + fragment)
    return torch.randn(FRAGMENTS[fragment].num_elements, generator=generator)


def moment(step: int, slot: int, fragment: int, array: str) -> torch.Tensor:
    """Make a slot's moment at the end of a round, summed over the slot's tokens. A square is not negative."""
    values_N = gradient(1_000 + step, slot, fragment) * (1 + len(array))
    return values_N.square() if array == "exp_avg_sq" else values_N


def same(left: dict[int, torch.Tensor], right: dict[int, torch.Tensor]) -> bool:
    """Return whether both have the same fragments with the same bits."""
    return left.keys() == right.keys() and all(
        torch.equal(left[index].view(torch.int32), right[index].view(torch.int32)) for index in left
    )


class Cluster:
    """A plan's shards, each behind the real servicer on a server of its own."""

    def __init__(self, plan: Plan, servicer: type[ParameterServerServicer] = ParameterServerServicer):
        self.plan = plan
        self._servicer = servicer
        self.shards: list[Shard] = []
        self.stubs: list[ParameterServerStub] = []
        self.reports: list[coordinator_pb2.ReportStepRequest] = []
        self.failures: list[Exception] = []
        self.checkpoints: list[coordinator_pb2.ReportCheckpointRequest] = []
        self.book = CodecBook(plan.tensors, plan.recipe.codec.embedding)
        self._executor = ThreadPoolExecutor(2)
        self._servers: list[grpc.aio.Server] = []
        self._channels: list[grpc.aio.Channel] = []

    async def start(self) -> None:
        for index in range(len(self.plan.servers)):
            shard = Shard(
                self.plan,
                index,
                self._executor,
                self._ask_leader,
                self._ask_leader_for_slots,
                self._take_step,
                self._take_checkpoint,
                self._take_failure,
            )
            server = new_server()
            add_parameter_server(self._servicer(lambda shard=shard: shard), server)
            channel = open_channel(f"127.0.0.1:{listen(server, '127.0.0.1:0')}")
            await server.start()
            self.shards.append(shard)
            self.stubs.append(ParameterServerStub(channel))
            self._servers.append(server)
            self._channels.append(channel)
        await asyncio.gather(*(shard.load() for shard in self.shards))

    async def stop(self) -> None:
        for shard in self.shards:
            await shard.close("the test is over")
        for channel in self._channels:
            await channel.close(None)
        for server in self._servers:
            await server.stop(None)
        self._executor.shutdown()

    async def _ask_leader(self, report: pb.CompleteStepRequest) -> Decision:
        return Decision.from_proto(await self.stubs[self.plan.leader].CompleteStep(report), report.step)

    async def _ask_leader_for_slots(self, request: pb.CompleteSlotsRequest) -> list[int]:
        return list((await self.stubs[self.plan.leader].CompleteSlots(request)).slots)

    async def _take_step(self, report: coordinator_pb2.ReportStepRequest) -> None:
        self.reports.append(report)

    async def _take_failure(self, error: Exception) -> None:
        self.failures.append(error)

    async def _take_checkpoint(self, report: coordinator_pb2.ReportCheckpointRequest) -> None:
        self.checkpoints.append(report)

    # -- a worker's calls ------------------------------------------------------------------------------------------

    def all_keys(self, step: int = 0) -> list[Key]:
        """The keys of all contributions of a step."""
        moments = self.plan.moment_bundles if self.plan.shares_moments(step) else ()
        return [(slot, bundle.index) for slot in range(NUM_SLOTS) for bundle in (*self.plan.bundles, *moments)]

    def push_codec(self, bundle: int) -> BundleCodec:
        found = self.plan.bundle(bundle)
        return self.book.of(found, self.plan.codec_of(found, first_push_codec(self.plan.recipe.codec)))

    def pushed_bytes(self) -> int:
        """Payload bytes of one slot, for codecs of fixed size."""
        return sum(self.push_codec(bundle.index).max_bytes for bundle in self.plan.bundles)

    def contribution(
        self,
        slot: int,
        bundle: int,
        step: int = 0,
        fill: float | None = None,
        scale: float = 1.0,
        **fields: Any,
    ) -> tuple[pb.ContributionHeader, list[Payload]]:
        """Make a contribution, valid except for the header's `fields`. If `fill` is given, all values are `fill`.

        Other values are multiplied by `scale`.
        """
        codec, array = self.push_codec(bundle), self.plan.bundle(bundle).array
        fragments = [fragment.index for fragment in self.plan.bundle(bundle).fragments]
        if array == WEIGHTS:
            values = [gradient(step, slot, fragment) * scale for fragment in fragments]
        else:
            values = [moment(step, slot, fragment, array) for fragment in fragments]
        if fill is not None:
            values = [torch.full_like(slice_N, fill) for slice_N in values]
        payloads = codec.encode(values, step)
        header: dict[str, Any] = {
            "job_id": self.plan.job_id,
            "epoch": self.plan.epoch,
            "step": step,
            "slot": slot,
            "bundle": bundle,
            "codec": codec.codec.wire,
            "fragment_bytes": [len(payload) for payload in payloads],
            "payload_bytes": sum(map(len, payloads)),
            "crc32c": checksum(*payloads),
            "slot_tokens": SLOT_TOKENS,
            "slot_samples": SLOT_SAMPLES,
            "slot_loss_sum": 10.0 + slot,
        }
        return pb.ContributionHeader(**(header | fields)), payloads

    async def push(
        self, keys: Iterable[Key], step: int = 0, fill: float | None = None, **fields: Any
    ) -> list[pb.PushResponse]:
        """Push valid contributions, to each server in this order; return all acknowledgements."""
        by_server: dict[int, list[bytes]] = {}
        for slot, bundle in keys:
            messages = frames(*self.contribution(slot, bundle, step, fill, **fields))
            by_server.setdefault(self.plan.bundle(bundle).server, []).extend(messages)
        found = await asyncio.gather(*(self.send(server, sent) for server, sent in by_server.items()))
        return [response for responses in found for response in responses]

    async def send(self, server: int, messages: list[bytes]) -> list[pb.PushResponse]:
        """Send raw messages on one push stream, end it, and return the acknowledgements."""

        async def each() -> AsyncIterator[bytes]:
            for message in messages:
                yield message

        responses = [response async for response in self.stubs[server].Push(each())]
        assert responses[0].result == pb.PUSH_RESULT_UNSPECIFIED
        assert responses[0].window_bytes > 0
        return responses[1:]

    async def refusal(self, server: int, messages: list[bytes]) -> grpc.aio.AioRpcError:
        """Send raw messages on one push stream; return the error that ends it."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.send(server, messages)
        return caught.value

    async def arrivals(
        self, server: int, min_version: int, **fields: Any
    ) -> tuple[int, list[tuple[pb.WeightsHeader, Payload]]]:
        """Pull one server's weights with a worker's checks; return the version and the bundles, still encoded."""
        request: dict[str, Any] = {
            "job_id": self.plan.job_id,
            "epoch": self.plan.epoch,
            "min_version": min_version,
            "bundles": list(self.shards[server].weights),
        }
        request |= fields
        version = -1
        found = []
        assembler: Assembler[pb.WeightsHeader] = Assembler()
        async for message in self.stubs[server].Pull(pb.PullRequest(**request)):
            encoded, piece = parse(message)
            if encoded is not None:
                header = pb.WeightsHeader.FromString(bytes(encoded))
                if version < 0:
                    version = header.version
                    assert header.push_codec == self.shards[server].push_codec.wire
                    assert header.codec == plan_pb2.CODEC_UNSPECIFIED
                    continue
                assert header.version == version
                assembler.begin(header)
            whole = assembler.add(piece)
            if whole is not None:
                verify(*whole, "pull")
                found.append(whole)
        moments = self.plan.shares_moments(version)
        expected = [index for index in request["bundles"] if moments or self.plan.bundle(index).array == WEIGHTS]
        assert [header.bundle for header, _ in found] == expected, "in the order asked for"
        return version, found

    async def pull_one(self, server: int, min_version: int, **fields: Any) -> tuple[int, dict[int, torch.Tensor]]:
        """Pull one server's weights in full; return the version and the decoded weights by fragment."""
        version, found = await self.arrivals(server, min_version, **fields)
        weights: dict[int, torch.Tensor] = {}
        for header, payload in found:
            assert not header.delta
            bundle: Bundle = self.plan.bundle(header.bundle)
            codec = self.book.of(bundle, codec_on_wire(header.codec).name)
            out = [torch.empty(fragment.num_elements) for fragment in bundle.fragments]
            codec.decode(split(payload, header.fragment_bytes), out, version)
            weights |= {fragment.index: out_N for fragment, out_N in zip(bundle.fragments, out, strict=True)}
        return version, weights

    async def pull(self, version: int) -> dict[int, torch.Tensor]:
        """Wait for a version and pull it from all servers; return the weights by fragment."""
        pulls = await asyncio.gather(*(self.pull_one(server, version) for server in range(len(self.shards))))
        assert {found for found, _ in pulls} == {version}
        return dict(sorted((index, tensor) for _, weights in pulls for index, tensor in weights.items()))

    async def pull_moments(self, version: int) -> dict[str, dict[int, torch.Tensor]]:
        """Pull the moments of a version from all servers; return them by array and fragment."""
        found: dict[str, dict[int, torch.Tensor]] = {}
        for bundle in self.plan.moment_bundles:
            pulled, moments = await self.pull_one(bundle.server, version, bundles=[bundle.index])
            assert pulled == version
            found.setdefault(bundle.array, {}).update(moments)
        return found

    async def status(self) -> list[pb.GetServerStatusResponse]:
        return [await stub.GetServerStatus(pb.GetServerStatusRequest(job_id=self.plan.job_id)) for stub in self.stubs]


@asynccontextmanager
async def serving(
    plan: Plan, servicer: type[ParameterServerServicer] = ParameterServerServicer
) -> AsyncIterator[Cluster]:
    """Start a plan's cluster and load its shards."""
    cluster = Cluster(plan, servicer)
    try:
        await cluster.start()
        yield cluster
        assert cluster.failures == []
    finally:
        await cluster.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until a condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - a server's state, which has no event for a test to wait for
            await asyncio.sleep(0.001)
