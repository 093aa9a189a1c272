"""A small data set, a small recipe, and scripted nodes that speak the real protocol."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gradstream.coordinator.server import Coordinator
from gradstream.coordinator.timing import Timing
from gradstream.core.checkpoint import shard as checkpoint_shard
from gradstream.core.checkpoint.manifest import directory_of
from gradstream.core.data.manifest import DataShard, Manifest
from gradstream.core.node.session import NodeIdentity, NodeSession, SessionSettings
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.rpc.channel import open_channel
from gradstream.proto.v1 import coordinator_pb2, coordinator_pb2_grpc, jobs_pb2, jobs_pb2_grpc, plan_pb2

SERVER = coordinator_pb2.NODE_KIND_PARAMETER_SERVER
WORKER = coordinator_pb2.NODE_KIND_WORKER
PATIENCE_SECONDS = 60.0
TIMING = Timing(
    heartbeat_seconds=0.1,
    lease_seconds=1.0,
    server_grace_seconds=0.5,
    reunion_seconds=6.0,
    adopt_grace_seconds=3.0,
    tick_seconds=0.02,
    retry_seconds=0.3,
)

# The files of the data set.
TOKENS = np.arange(200, dtype="<u2").tobytes()
INDEX = np.array([0, 200], dtype="<u8").tobytes()
TOKENIZER = json.dumps({"added_tokens": []}).encode()


def make_manifest(num_train: int = 2, vocab_size: int = 64) -> Manifest:
    shards = [
        DataShard(
            file=f"{split}-{number:05d}.tokens",
            index_file=f"{split}-{number:05d}.index",
            split=split,
            num_tokens=200,
            num_documents=1,
            num_bytes=400,
            sha256=hashlib.sha256(TOKENS).hexdigest(),
            index_sha256=hashlib.sha256(INDEX).hexdigest(),
        )
        for split, count in (("train", num_train), ("validation", 2))
        for number in range(count)
    ]
    return Manifest(
        token_dtype="uint16",
        vocab_size=vocab_size,
        end_of_text_id=0,
        tokenizer_sha256=hashlib.sha256(TOKENIZER).hexdigest(),
        shards=tuple(shards),
    )


def write_data(directory: Path) -> Path:
    directory.mkdir(parents=True)
    manifest = make_manifest()
    for shard in manifest.shards:
        (directory / shard.file).write_bytes(TOKENS)
        (directory / shard.index_file).write_bytes(INDEX)
    (directory / "tokenizer.json").write_bytes(TOKENIZER)
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    return directory


def make_recipe(directory: Path, **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "run_root": str(directory / "runs"),
            "model": {
                "config": {
                    "model_type": "llama",
                    "vocab_size": 64,
                    "hidden_size": 16,
                    "intermediate_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 16,
                    "tie_word_embeddings": True,
                }
            },
            "training": {
                "num_steps": 4,
                "num_slots": 2,
                "global_batch": 4,
                "microbatch": 2,
                "sequence_length": 8,
                "max_consecutive_skips": 2,
                **training,
            },
            "data": {"path": str(directory / "data")},
            "validation": {"interval_steps": 2, "num_samples": 2},
            "checkpoint": {"interval_steps": 2, "keep": 2},
            "cluster": {"min_servers": 2, "min_workers": 1, "fragment_bytes": 1024},
        }
    )


class FakeNode:
    """A node whose directives can be awaited. It takes up plans and remembers them as real ones do. While it lives its
    address is a port that listens."""

    def __init__(
        self,
        address: str,
        kind: coordinator_pb2.NodeKind.ValueType,
        name: str,
        memory_bytes: int = 1 << 30,
        flops_per_second: float = 0.0,
    ):
        self._door = socket.create_server(("127.0.0.1", 0))
        listens_at = f"127.0.0.1:{self._door.getsockname()[1]}"
        self.identity = NodeIdentity(kind, name, listens_at, memory_bytes, "cpu", flops_per_second=flops_per_second)
        if flops_per_second:  # nodes of one machine have the best speed that was measured on it
            self.identity.machine_id = name
        self.directives: list[coordinator_pb2.SessionResponse] = []
        self.holds: dict[str, int] = {}
        self.activity = coordinator_pb2.Activity()
        self.plan: Plan | None = None
        self.leases: plan_pb2.LeaseTable | None = None
        self._changed = asyncio.Condition()
        self._connect(address)

    def _connect(self, address: str) -> None:
        self.session = NodeSession(
            SessionSettings(address), self.identity, lambda: self.activity, self._held, self._take
        )
        self.task = asyncio.create_task(self.session.run())

    def _held(self) -> list[coordinator_pb2.HeldJob]:
        return [coordinator_pb2.HeldJob(job_id=job, epoch=epoch) for job, epoch in self.holds.items()]

    async def _take(self, directive: coordinator_pb2.SessionResponse) -> None:
        self.directives.append(directive)
        if directive.HasField("plan"):
            self.plan = Plan.from_proto(directive.plan)
            self.holds[self.plan.job_id] = self.plan.epoch
        elif directive.HasField("leases"):
            assert self.plan is not None, "leases came before the plan"
            self.leases = directive.leases
        elif directive.HasField("release"):
            self.holds.pop(directive.release.job_id, None)
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait until directives have made a condition true."""
        async with asyncio.timeout(PATIENCE_SECONDS), self._changed:
            await self._changed.wait_for(condition)

    async def plan_of(self, epoch: int) -> Plan:
        await self.until(lambda: self.plan is not None and self.plan.epoch == epoch)
        assert self.plan is not None
        return self.plan

    async def slots(self, count: int) -> list[int]:
        """Wait until this node holds so many slots; return them."""
        await self.until(lambda: self.leases is not None and list(self.leases.holders).count(self.node_id) == count)
        assert self.leases is not None
        return [slot for slot, holder in enumerate(self.leases.holders) if holder == self.node_id]

    async def released(self) -> None:
        await self.until(lambda: any(d.HasField("release") for d in self.directives))

    @property
    def node_id(self) -> str:
        return self.session.node_id

    @property
    def stub(self) -> coordinator_pb2_grpc.CoordinatorServiceStub:
        return self.session.stub

    async def kill(self) -> None:
        """The stream breaks without a word. Nobody can tell whether the process lives: it refuses no connection."""
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task
        await self.session.channel.close()

    async def die(self) -> None:
        """The process is gone: its stream breaks, and its machine refuses connections to it."""
        self._door.close()
        await self.kill()

    async def reconnect(self, address: str) -> None:
        """The same process finds the coordinator again, and is registered there."""
        await self.kill()
        self._connect(address)
        await asyncio.wait_for(self.session.registered.wait(), PATIENCE_SECONDS)


class Cluster:
    """A coordinator in this process, on a free port, and fakes around it."""

    def __init__(self, directory: Path, timing: Timing = TIMING):
        self.directory = directory
        self.timing = timing
        self.nodes: list[FakeNode] = []
        if not (directory / "data").exists():
            write_data(directory / "data")

    async def start(self) -> None:
        self.coordinator = Coordinator("127.0.0.1:0", self.directory / "state", self.timing)
        await self.coordinator.start()
        self.address = self.coordinator.address
        self._channel = open_channel(self.address)
        self.jobs = jobs_pb2_grpc.JobsServiceStub(self._channel)
        self.stub = coordinator_pb2_grpc.CoordinatorServiceStub(self._channel)

    async def stop(self) -> None:
        for node in self.nodes:
            await node.die()
        await self.stop_coordinator()

    async def stop_coordinator(self) -> None:
        await self._channel.close()
        await self.coordinator.stop()

    async def restart(self) -> None:
        """Another coordinator takes up the state; the nodes must be told its port by `reconnect`."""
        await self.stop_coordinator()
        await self.start()

    def node(self, kind: coordinator_pb2.NodeKind.ValueType, name: str, **more: Any) -> FakeNode:
        node = FakeNode(self.address, kind, name, **more)
        self.nodes.append(node)
        return node

    async def submit(self, **training: Any) -> str:
        recipe = make_recipe(self.directory, **training)
        response = await self.jobs.SubmitJob(jobs_pb2.SubmitJobRequest(recipe_json=recipe.model_dump_json()))
        return response.job.job_id

    async def job(self, job_id: str = "") -> jobs_pb2.Job:
        return (await self.jobs.GetJob(jobs_pb2.GetJobRequest(job_id=job_id))).job

    async def watch(
        self, job_id: str, found: Callable[[jobs_pb2.WatchJobResponse], bool], after: int = 0
    ) -> jobs_pb2.WatchJobResponse:
        """The first item of the history that `found` accepts."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            async for item in self.jobs.WatchJob(
                jobs_pb2.WatchJobRequest(job_id=job_id, after_cursor=after, follow=True)
            ):
                if found(item):
                    return item
        raise AssertionError("the history ended without it")

    async def event(self, job_id: str, text: str, after: int = 0) -> jobs_pb2.WatchJobResponse:
        return await self.watch(job_id, lambda item: text in item.event.message, after)

    async def running(self, job_id: str, servers: int = 2, workers: int = 1) -> tuple[list[FakeNode], list[FakeNode]]:
        """Start nodes and wait until all have the first plan."""
        ps = [self.node(SERVER, f"ps-{number}") for number in range(servers)]
        ws = [self.node(WORKER, f"worker-{number}") for number in range(workers)]
        for node in (*ps, *ws):
            await node.plan_of(1)
        return ps, ws


def step_report(job_id: str, step: int, epoch: int = 1, **more: Any) -> coordinator_pb2.ReportStepRequest:
    values = {"num_tokens": 32, "num_samples": 4, "loss": 2.0, "unix_ms": 1000 * step, "pushed_bytes": 100, **more}
    return coordinator_pb2.ReportStepRequest(job_id=job_id, epoch=epoch, step=step, **values)


async def report_validation(node: FakeNode, job_id: str, version: int, epoch: int = 1) -> None:
    for slot in range(2):
        await node.stub.ReportValidation(
            coordinator_pb2.ReportValidationRequest(
                job_id=job_id, epoch=epoch, version=version, slot=slot, loss_sum=16.0 + slot, num_tokens=8
            )
        )


async def report_checkpoint(node: FakeNode, version: int) -> None:
    """Write and report real files for every server of the plan."""
    for report in write_checkpoint(node, version):
        await node.stub.ReportCheckpoint(report)


def write_checkpoint(node: FakeNode, version: int) -> list[coordinator_pb2.ReportCheckpointRequest]:
    """Write real files for every server of the plan; return the reports of them."""
    reports = []
    plan = node.plan
    assert plan is not None
    directory = directory_of(plan.checkpoint_root, version)
    for server in range(len(plan.servers)):
        shard = [
            (fragment, {"weight": np.full(fragment.num_elements, fragment.index, dtype=np.float32)})
            for fragment in plan.fragments_of(server)
        ]
        entry, digests = checkpoint_shard.write_shard(directory, f"server-{server}.safetensors", plan.tensors, shard)
        reports.append(
            coordinator_pb2.ReportCheckpointRequest(
                job_id=plan.job_id,
                epoch=plan.epoch,
                version=version,
                server=server,
                file=entry.file,
                num_bytes=entry.num_bytes,
                sha256=entry.sha256,
                fragments=[
                    coordinator_pb2.FragmentDigest(fragment=fragment.index, sha256=digest)
                    for (fragment, _), digest in zip(shard, digests, strict=True)
                ],
            )
        )
    return reports
