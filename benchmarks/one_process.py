"""A job in one process: a worker that holds all slots, and a server, without coordinator and gRPC. No benchmark itself.

The slots, the encoding, the sums, the commits and the publishing are the cluster's own code. Bits do not depend on the
number of workers and servers, so the losses are those of any cluster. Only transport is replaced: a contribution is
offered to the shard in memory, and a published bundle is given to the worker's inbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from runs import Run

from gradstream.core.data.manifest import parse_manifest
from gradstream.core.errors import GradstreamError
from gradstream.core.model.model import inventory
from gradstream.core.node.faults import Faults
from gradstream.core.optimizer.rules import whole_tensors
from gradstream.core.plan.fragments import BYTES_PER_ELEMENT, cut
from gradstream.core.plan.plan import Plan, Server
from gradstream.core.recipe.recipe import Recipe
from gradstream.core.wire.frames import Assembler, parse
from gradstream.core.wire.stubs import ParameterServerStub
from gradstream.proto.v1 import coordinator_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.commit import Decision
from gradstream.services.parameter_server.publication import PublishedBundle
from gradstream.services.parameter_server.shard import Shard
from gradstream.worker.attempt import Alone, Attempt, num_samples
from gradstream.worker.job import LoadedModel, load_model
from gradstream.worker.kept_moments import KeptMoments
from gradstream.worker.push import Contribution, Pusher, PushStream
from gradstream.worker.rounds import RoundComputer
from gradstream.worker.samples.data import SlotReader, Split
from gradstream.worker.timeline import Timeline
from gradstream.worker.weights import Arrival, Inbox

NO_STUB = cast(ParameterServerStub, None)
"""In place of a connection: nothing here opens a stream."""


def train(recipe: Recipe, temporary: Path) -> Run:
    """Train a recipe whose data exist; the last checkpoint is written below `temporary`."""
    return asyncio.run(_train(_plan(recipe, temporary)))


def _plan(recipe: Recipe, temporary: Path) -> Plan:
    config = recipe.model.config
    assert config is not None
    tensors = tuple(inventory(config))
    fragment_elements = recipe.cluster.fragment_bytes // BYTES_PER_ELEMENT
    assert not any(
        tensors[number].num_elements > fragment_elements for number in whole_tensors(recipe.optimizer, tensors)
    )
    return Plan(
        job_id=recipe.name,
        epoch=1,
        recipe=recipe,
        model_config=config,
        data_manifest=parse_manifest((Path(recipe.data.path) / "manifest.json").read_text(encoding="utf-8")),
        tensors=tensors,
        fragment_elements=fragment_elements,
        placement=(0,) * len(cut(tensors, fragment_elements)),
        servers=(Server("n0", "server", ""),),
        leader=0,
        start_version=0,
        checkpoint_path="",
        checkpoint_root=str(temporary / "checkpoints"),
    )


async def _train(plan: Plan) -> Run:
    server = await _Server.start(plan)
    worker = await _Worker.start(plan, server)
    losses: dict[int, float] = {}
    try:
        for version in range(plan.last_version + 1):
            await server.until(worker.install(version))
            is_last = version == plan.last_version
            if is_last or plan.rounds.passes(version, plan.recipe.validation.interval_steps):
                losses[plan.rounds.steps_at(version)] = await worker.evaluate(version)
            if not is_last:
                await server.until(worker.compute(version))
    finally:
        worker.close()
        await server.close()
    slot_steps = plan.recipe.training.num_steps * plan.num_slots
    return Run(losses, server.pushed_bytes / slot_steps, worker.pulled_bytes / plan.recipe.training.num_steps)


class _Server:
    """The job's only shard, with what the coordinator would hear of it."""

    def __init__(self, plan: Plan):
        self.pushed_bytes = 0
        self._executor = ThreadPoolExecutor(1, "tensor")
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.shard = Shard(
            plan,
            0,
            self._executor,
            self._no_other_leader,
            self._no_other_leader,
            self._committed,
            self._written,
            self._report_failure,
            Faults(""),
        )

    @classmethod
    async def start(cls, plan: Plan) -> _Server:
        server = cls(plan)
        await server.shard.load()
        return server

    async def until(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait until `work` is done. Raises the error of the shard if it fails first."""
        task = asyncio.create_task(work)
        await asyncio.wait((task, self._failed), return_when=asyncio.FIRST_COMPLETED)
        if self._failed.done():
            task.cancel()
            self._failed.result()
        await task

    async def close(self) -> None:
        await self.shard.checkpoints.drain()
        await self.shard.close("the job is over")
        self._executor.shutdown()

    async def _no_other_leader(self, report: pb.CompleteStepRequest) -> Decision:
        raise AssertionError("the only server is the leader")

    async def _committed(self, report: coordinator_pb2.ReportStepRequest) -> None:
        if report.skipped:
            raise RuntimeError(f"step {report.step} was skipped: its update is not finite")
        self.pushed_bytes += report.pushed_bytes

    async def _written(self, report: coordinator_pb2.ReportCheckpointRequest) -> None:
        pass

    async def _report_failure(self, error: Exception) -> None:
        self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the job with an error. Called on the event loop."""
        if not self._failed.done():
            self._failed.set_exception(error)


class _Worker:
    """The worker, which holds all slots."""

    def __init__(self, plan: Plan, server: _Server, model: LoadedModel):
        self.pulled_bytes = 0
        self._plan = plan
        self._shard = server.shard
        self._model = model
        self._rounds = RoundComputer(model.computer, model.installer.held, kept=KeptMoments(plan))
        timeline = Timeline()
        self._pusher = Pusher(plan, [NO_STUB], Faults(""), timeline)
        self._pusher.streams = [_Direct(plan, server, timeline)]
        self._readers: dict[tuple[Split, int], SlotReader] = {}

    @classmethod
    async def start(cls, plan: Plan, server: _Server) -> _Worker:
        worker = cls(plan, server, load_model(plan, torch.device("cpu"), 0, Timeline()))
        recipe = plan.recipe
        splits: tuple[Split, Split] = ("train", "validation")
        for split in splits:
            for slot in range(plan.num_slots):
                length = recipe.training.sequence_length
                reader = SlotReader(
                    plan.data_manifest, recipe.data.path, "", slot, plan.num_slots, length, recipe.seed, split
                )
                await reader.prepare()
                worker._readers[split, slot] = reader
        return worker

    async def install(self, version: int) -> None:
        """Pull a version and wait until it is in place."""
        plan, shard = self._plan, self._shard
        inbox = Inbox(version, shard.push_codec.name)
        self._model.installer.install(inbox)
        for index in shard.pulled(version, shard.bundles):
            published = await shard.published(plan.job_id, plan.epoch, index, version, version > 0)
            assert published is not None, "nobody but this worker moves the job on"
            self.pulled_bytes += published.num_bytes if version else 0
            inbox.put(_arrival(published))
        await asyncio.to_thread(self._model.installer.wait_all)
        self._pusher.use_codec(shard.push_codec.name)

    async def evaluate(self, version: int) -> float:
        """Return the validation loss of the installed version, in nats a token."""
        return await asyncio.to_thread(self._evaluate, version)

    async def compute(self, version: int) -> None:
        """Compute all slots from the installed version, and wait until the next one is committed."""
        for slot in range(self._plan.num_slots):
            await asyncio.to_thread(self._compute, version, slot)

    def close(self) -> None:
        self._pusher.close()
        self._model.close()
        for reader in self._readers.values():
            reader.close()

    def _compute(self, version: int, slot: int) -> None:
        reader, count = self._readers["train", slot], self._plan.recipe.training.slot_batch
        attempt = Attempt(0, version, (slot,))
        if self._plan.rounds.is_round(version):
            emit = self._pusher.submit(version, slot)
            self._rounds.run(attempt, lambda number: reader.batch(number, count), emit, lambda: True)
        else:
            self._model.computer.run(
                attempt,
                {slot: reader.batch(version, count)},
                lambda slot: self._pusher.submit(version, slot),
                lambda: True,
                Alone(),
            )

    def _evaluate(self, version: int) -> float:
        sums = []
        for slot in range(self._plan.num_slots):
            attempt = Attempt(0, version, (slot,), validate=True)
            batch = self._readers["validation", slot].validation_batch(num_samples(self._plan, attempt))
            found = self._model.computer.evaluate(attempt, batch, lambda: True, Alone())
            assert found is not None
            sums.append(found)
        return sum(loss_sum for loss_sum, _ in sums) / sum(num_tokens for _, num_tokens in sums)


class _Direct(PushStream):
    """Offers contributions to the shard in this process."""

    def __init__(self, plan: Plan, server: _Server, timeline: Timeline):
        super().__init__(plan.servers[0], NO_STUB, Faults(""), timeline)
        self._receiver = server

    def put(self, message: Contribution) -> None:
        try:
            self._receiver.shard.check(message.header)
            self._receiver.shard.offer(message.header, np.concatenate(message.payloads))
        except GradstreamError as error:
            self._receiver.fail(error)
        message.let_go()


def _arrival(published: PublishedBundle) -> Arrival:
    """Join the messages of a published bundle, as a worker's pull does."""
    assembler: Assembler[pb.WeightsHeader] = Assembler()
    joined = None
    for message in published.messages:
        header, piece = parse(message)
        if header is not None:
            assembler.begin(pb.WeightsHeader.FromString(bytes(header)))
        joined = assembler.add(piece)
    assert joined is not None
    return Arrival(*joined)
