"""Pulls: workers that follow differences and new workers hold the same bits at every version."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support.micro import MICRO_LLAMA, micro_plan
from support.shards import Cluster, make_plan, same, serving, until

from gradstream.core.checkpoint.manifest import directory_of, write_manifest
from gradstream.core.checkpoint.shard import REFERENCE, CheckpointReader
from gradstream.core.codecs import codec_named
from gradstream.core.codecs.payloads import BundleCodec, CodecBook, slices, split
from gradstream.core.errors import CheckpointError, StaleEpochError
from gradstream.core.model.model import build, initial_weights
from gradstream.core.node import faults
from gradstream.core.plan.downlink import downlink
from gradstream.core.plan.plan import Plan
from gradstream.core.wire.frames import Assembler, parse, verify
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.commit import Decision
from gradstream.services.parameter_server.publication import PublishedBundle, Publisher, publisher
from gradstream.services.parameter_server.servicer import ParameterServerServicer
from gradstream.services.parameter_server.weight_bundle import WeightBundle
from gradstream.worker.attempt import AbandonedError
from gradstream.worker.pull import Puller
from gradstream.worker.timeline import Timeline
from gradstream.worker.weights import Arrival, Inbox, WeightInstaller

WHOLE = ["fp32", "bf16", "int8", "fp32-zstd", "bf16-zstd"]
DELTA = ["delta-bf16", "delta-int8", "delta-int4", "delta-int4-hadamard", "delta-int2"]
XOR = ["xor-fp32", "xor-bf16"]
KEYFRAME_VERSIONS = 4
NUM_VERSIONS = 10
BOUND_SECONDS = 20


class Publication:
    """The publishers of all bundles of a plan, and weights that walk at random."""

    def __init__(self, plan: Plan, seed: int = 0):
        self.plan = plan
        self.form = downlink(plan.recipe.codec.pull)
        self.version = -1
        self.weights = [torch.zeros(bundle.num_elements) for bundle in plan.bundles]
        self._generator = torch.Generator().manual_seed(seed)
        book = CodecBook(plan.tensors, plan.recipe.codec.embedding)
        self.publishers: list[Publisher] = [
            publisher(self.form, bundle, weights_N, book, plan.recipe.codec.keyframe_versions)
            for bundle, weights_N in zip(plan.bundles, self.weights, strict=True)
        ]

    def walk(self, size: float = 0.01) -> None:
        """Change the weights as a step does."""
        for weights_N in self.weights:
            weights_N += size * torch.randn(len(weights_N), generator=self._generator)

    def publish(self, version: int) -> None:
        self.version = version
        for one in self.publishers:
            one.publish(version, self.form.delta or self.form.full)

    def arrivals(self, holds_before: bool) -> list[Arrival]:
        """What a worker gets that holds the version before, or nothing."""
        bundles = [(one.delta if holds_before else None) or one.full() for one in self.publishers]
        assert {published.version for published in bundles} == {self.version}
        return [arrival_of(published) for published in bundles]


def arrival_of(published: PublishedBundle) -> Arrival:
    """A bundle as a worker takes it from the wire."""
    assembler: Assembler[pb.WeightsHeader] = Assembler()
    whole = None
    for message in published.messages:
        encoded, piece = parse(message)
        if encoded is not None:
            assembler.begin(pb.WeightsHeader.FromString(bytes(encoded)))
        whole = assembler.add(piece)
    assert whole is not None
    verify(*whole, "bundle")
    assert whole[1].nbytes == published.num_bytes
    return Arrival(*whole)


class Worker:
    """A model with the real installer."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.model = build(MICRO_LLAMA)
        by_name = dict(self.model.named_parameters())
        self.parameters = [by_name[tensor.name] for tensor in plan.tensors]
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.fill_(torch.nan)  # what is not overwritten is seen
        self.installer = WeightInstaller(
            plan, [self.model], {(number, 0): found for number, found in enumerate(self.parameters)}, Timeline()
        )

    def take(self, version: int, arrivals: list[Arrival]) -> None:
        inbox = Inbox(version, "bf16")
        for arrival in arrivals:
            inbox.put(arrival)
        self.installer.install(inbox)
        self.installer.wait_all()

    def bits(self) -> dict[int, torch.Tensor]:
        """A copy of its weights by fragment."""
        return {
            f.index: self.parameters[f.tensor].detach().reshape(-1)[f.begin : f.end].clone()
            for f in self.plan.fragments
        }


@contextmanager
def worker(plan: Plan) -> Iterator[Worker]:
    made = Worker(plan)
    try:
        yield made
    finally:
        made.installer.close()


def bits_of(plan: Plan, flat: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Flat tensors of all bundles, by fragment."""
    found = {}
    for bundle, flat_N in zip(plan.bundles, flat, strict=True):
        for fragment, slice_N in zip(bundle.fragments, slices(flat_N, bundle), strict=True):
            found[fragment.index] = slice_N.clone()
    return dict(sorted(found.items()))


def rounded(plan: Plan, weights: list[torch.Tensor], codec: str, version: int) -> dict[int, torch.Tensor]:
    """Weights as they come out of a codec."""
    out = [torch.empty_like(weights_N) for weights_N in weights]
    for bundle, weights_N, out_N in zip(plan.bundles, weights, out, strict=True):
        bundle_codec = BundleCodec(bundle, plan.tensors, codec, plan.recipe.codec.embedding)
        bundle_codec.decode(bundle_codec.encode(slices(weights_N, bundle), version), slices(out_N, bundle), version)
    return bits_of(plan, out)


@pytest.mark.parametrize("pull", [*WHOLE, *DELTA, *XOR])
def test_followers_and_newcomers_hold_the_same_bits_at_every_version(pull: str) -> None:
    plan = micro_plan(codec={"pull": pull, "keyframe_versions": KEYFRAME_VERSIONS})
    publication = Publication(plan)
    publication.walk(0.1)
    with worker(plan) as follower:
        for version in range(NUM_VERSIONS):
            publication.publish(version)
            arrivals = publication.arrivals(holds_before=version > 0)
            follower.take(version, arrivals)
            with worker(plan) as newcomer:
                newcomer.take(version, publication.arrivals(holds_before=False))
                assert same(follower.bits(), newcomer.bits()), version
            keyframe = publication.form.keeps_reference and version % KEYFRAME_VERSIONS == 0
            whole = publication.form.delta is None or version == 0 or keyframe
            assert {arrival.header.delta for arrival in arrivals} == {not whole}
            # The form that the worker holds them in: exact, but for the difference that is still to come.
            if not publication.form.keeps_reference or whole:
                assert same(follower.bits(), rounded(plan, publication.weights, publication.form.full, version))
            else:
                assert not same(follower.bits(), bits_of(plan, publication.weights))
                full_bytes = sum(arrival.header.payload_bytes for arrival in publication.arrivals(False))
                assert sum(arrival.header.payload_bytes for arrival in arrivals) < 0.6 * full_bytes
            publication.walk()


@pytest.mark.parametrize("pull", DELTA)
def test_errors_of_differences_do_not_add_up(pull: str) -> None:
    plan = micro_plan(codec={"pull": pull})
    publication = Publication(plan)
    publication.walk(0.1)
    codec = codec_named(pull.removeprefix("delta-"))
    errors = []
    with worker(plan) as follower:
        for version in range(80):
            before = follower.bits()
            publication.publish(version)
            follower.take(version, publication.arrivals(holds_before=version > 0))
            held, weights = follower.bits(), bits_of(plan, publication.weights)
            errors.append(float(sum((held[index] - weights[index]).square().sum() for index in held)) ** 0.5)
            # Within half a quantization step of the difference that was sent; of vectors, half a step of bf16. In
            # int2, whose levels are means, a number and its level are apart by less than the largest number.
            for fragment in plan.fragments if version and pull != "delta-int4-hadamard" else []:
                largest = float((weights[fragment.index] - before[fragment.index]).abs().max())
                vector = plan.tensors[fragment.tensor].kind == "vector"
                step = {"bf16": 2**-7, "int8": 1 / 127, "int4": 1 / 7, "int2": 2}["bf16" if vector else codec.name]
                error_N = held[fragment.index] - weights[fragment.index]
                assert float(error_N.abs().max()) <= 0.5 * step * largest + 1e-6
            publication.walk()
    assert errors[0] == 0
    assert errors[1] > 0
    assert max(errors[40:]) < 1.5 * max(errors[1:5])


def test_a_difference_carries_what_the_last_one_left_out() -> None:
    """Weights that stand still: each version halves what is missing, or better, until fp32 has no more to give."""
    plan = micro_plan(codec={"pull": "delta-int4"})
    publication = Publication(plan)
    publication.publish(0)
    publication.walk(0.1)
    with worker(plan) as follower:
        follower.take(0, publication.arrivals(False))
        left = [float(sum(weights_N.abs().sum() for weights_N in publication.weights))]
        weights = bits_of(plan, publication.weights)
        for version in range(1, 8):
            # What was published as version 0 were zeros: all of the weights is difference.
            publication.publish(version)
            follower.take(version, publication.arrivals(True))
            held = follower.bits()
            left.append(float(sum((held[index] - weights[index]).abs().sum() for index in held)))
    assert all(after < 0.5 * before for before, after in itertools.pairwise(left[:5]))


@pytest.mark.parametrize("pull", DELTA)
@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_restored_reference_goes_on_with_the_same_bits(pull: str, at: int) -> None:
    """Also where the checkpoint is at a keyframe, or right after one."""
    plan = micro_plan(codec={"pull": pull, "keyframe_versions": KEYFRAME_VERSIONS})
    through, resumed = Publication(plan), Publication(plan)
    with worker(plan) as follower, worker(plan) as other:
        through.walk(0.1)
        for version in range(at + 1):
            through.publish(version)
            follower.take(version, through.arrivals(holds_before=version > 0))
            if version < at:
                through.walk()
        for new, old in zip(resumed.publishers, through.publishers, strict=True):
            saved_N = old.saved()
            assert saved_N is not None
            new.restore(saved_N.clone())
        for weights_N, source_N in zip(resumed.weights, through.weights, strict=True):
            weights_N.copy_(source_N)
        resumed._generator.set_state(through._generator.get_state())
        resumed.publish(at)
        other.take(at, resumed.arrivals(False))
        assert same(other.bits(), follower.bits())
        for version in range(at + 1, at + 5):
            for publication, follows in ((through, follower), (resumed, other)):
                publication.walk()
                publication.publish(version)
                follows.take(version, publication.arrivals(True))
            assert same(other.bits(), follower.bits()), version


@pytest.mark.parametrize("pull", [*WHOLE, *XOR])
def test_only_forms_that_keep_a_reference_save_one(pull: str) -> None:
    publication = Publication(micro_plan(codec={"pull": pull}))
    publication.publish(0)
    assert all(one.saved() is None for one in publication.publishers)


def test_state_bytes_count_what_is_held() -> None:
    held = {}
    for pull in ("fp32", "bf16", "delta-int8", "xor-bf16"):
        publication = Publication(micro_plan(codec={"pull": pull}))
        for version in range(2):
            publication.walk()
            publication.publish(version)
        before = sum(one.state_bytes for one in publication.publishers)
        deltas = sum(one.delta.num_bytes for one in publication.publishers if one.delta is not None)
        full = sum(one.full().num_bytes for one in publication.publishers)
        held[pull] = (before - deltas, sum(one.state_bytes for one in publication.publishers) - before, full)
    array = 4 * publication.plan.num_parameters
    assert held["fp32"] == (array, 0, array)
    assert held["bf16"] == (array // 2, 0, array // 2)
    assert held["delta-int8"] == (array, array, array)  # the whole bundle is framed for a newcomer alone
    assert held["xor-bf16"] == (array // 2, array // 2, array // 2)


# -- over gRPC ---------------------------------------------------------------------------------------------------------

STEPS = 8


def steps_plan(num_servers: int, pull: str, **changes: Any) -> Plan:
    codec = {"keyframe_versions": KEYFRAME_VERSIONS}
    return make_plan(num_servers, pull=pull, codec=codec, training={"num_steps": STEPS + 1}, **changes)


@asynccontextmanager
async def pulling(cluster: Cluster) -> AsyncIterator[tuple[Worker, Puller]]:
    """A worker with the real puller."""
    with worker(cluster.plan) as made:
        puller = Puller(cluster.plan, cluster.stubs, Timeline())
        try:
            yield made, puller
        finally:
            await puller.stop()


async def in_place(made: Worker, inbox: Inbox) -> dict[int, torch.Tensor]:
    made.installer.install(inbox)
    async with asyncio.timeout(BOUND_SECONDS):
        await asyncio.to_thread(made.installer.wait_all)
    return made.bits()


async def walked(cluster: Cluster, held: bool, first: int = 0, last: int = STEPS) -> list[dict[int, torch.Tensor]]:
    """The bits of each version as a worker has them: one that says what it holds, or one that does not."""
    found = []
    async with pulling(cluster) as (made, puller):
        for version in range(first, last + 1):
            inbox = await puller.next(version, version - 1 if held and version > first else None)
            assert inbox.version == version
            found.append(await in_place(made, inbox))
            if version < last:
                await cluster.push(cluster.all_keys(), version)
    return found


@pytest.mark.parametrize("pull", ["bf16", "delta-int8", "delta-int4-hadamard", "xor-fp32", "xor-bf16"])
async def test_pullers_that_hold_a_version_and_those_that_do_not_get_the_same_bits(pull: str) -> None:
    walks = []
    for num_servers, held in [(1, True), (2, True), (2, False)]:
        async with serving(steps_plan(num_servers, pull)) as cluster:
            walks.append(await walked(cluster, held))
            # A worker that comes late.
            assert same(walks[-1][-1], await cluster.pull(STEPS))
    for versions in zip(*walks, strict=True):
        assert all(same(versions[0], other) for other in versions[1:])


def noting_pulls() -> tuple[dict[int, list[int]], type[ParameterServerServicer]]:
    """A servicer that notes which versions each server is asked for, in rising order, and where it notes them."""
    asked: dict[int, list[int]] = {}

    class Noting(ParameterServerServicer):
        async def Pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[bytes]:
            index = self._shard(request.job_id, request.epoch).index
            asked[index] = sorted([*asked.get(index, []), request.min_version])
            async for message in super().Pull(request, context):
                yield message

    return asked, Noting


@pytest.mark.parametrize("pull", ["bf16", "delta-int8"])
@pytest.mark.parametrize("late", [0, 1, 2])
async def test_workers_that_see_servers_at_different_versions_wait_for_a_common_one(pull: str, late: int) -> None:
    """A version is pulled when all servers have decided it: a worker never has bundles of two, nor of one that a server
    does not know of. A newcomer asks for any version, another worker for the next one."""
    go_on = asyncio.Event()
    asked, servicer = noting_pulls()
    plan = steps_plan(3, pull, leader=1 if late == 0 else 0)
    async with serving(plan) as undisturbed:
        expected = await walked(undisturbed, held=True, last=2)
    async with serving(plan, servicer) as cluster:
        shard = cluster.shards[late]
        real = shard._complete_at_leader

        async def hearing_late(report: pb.CompleteStepRequest) -> Decision:
            decision = await real(report)
            await go_on.wait()
            return decision

        async with pulling(cluster) as (one, puller), pulling(cluster) as (other, newcomer):
            assert same(await in_place(one, await puller.next(0)), expected[0])
            await cluster.push(cluster.all_keys(), 0)
            assert same(await in_place(one, await puller.next(1, 0)), expected[1])
            shard._complete_at_leader = hearing_late
            await cluster.push(cluster.all_keys(), 1)
            ahead = [index for index in range(3) if index != late]
            await until(lambda: all(cluster.shards[index].version == 2 for index in ahead))
            asked[late].clear()
            waiting = [
                asyncio.create_task(puller.next(2, 1)),
                asyncio.create_task(newcomer.next(0)),
            ]
            # The late one answers the newcomer with the version before, and is asked again for the others'.
            await until(lambda: asked[late] == [0, 2, 2])
            assert cluster.shards[late].version == 1
            assert not any(task.done() for task in waiting), "a version that one server does not know was given"
            go_on.set()
            first, second = await asyncio.wait_for(asyncio.gather(*waiting), BOUND_SECONDS)
            assert (first.version, second.version) == (2, 2)
            assert same(await in_place(one, first), expected[2])
            assert same(await in_place(other, second), expected[2])


@pytest.mark.parametrize("victim", [0, 1], ids=["the leader", "another server"])
async def test_a_version_of_which_a_server_dies_before_it_publishes_appears_nowhere(
    victim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to a worker, and not as a checkpoint, though the others have published it and written their files."""

    def die() -> None:
        raise StaleEpochError("killed")  # the task ends here, as the process would

    monkeypatch.setattr(faults, "_kill", die)
    asked, servicer = noting_pulls()
    plan = steps_plan(2, "bf16", checkpoint_root=str(tmp_path))
    async with (
        serving(plan, servicer) as cluster,
        pulling(cluster) as (made, puller),
        pulling(cluster) as (_, late),
    ):
        shard, other = cluster.shards[victim], cluster.shards[1 - victim]
        shard._faults = faults.Faults("kill@step=0,decided=1")
        before = await in_place(made, await puller.next(0))
        asked.clear()
        await cluster.push(cluster.all_keys(), 0)
        await until(lambda: bool(cluster.checkpoints) and other.phase.name == "accumulating")
        waiting = [asyncio.create_task(puller.next(1, 0)), asyncio.create_task(late.next(0))]
        await until(lambda: asked.get(victim) == [0, 1, 1])
        assert (shard.version, other.version) == (0, 1)
        assert not any(task.done() for task in waiting)
        assert [report.server for report in cluster.checkpoints] == [1 - victim]
        with pytest.raises(CheckpointError, match="do not cover the plan"):
            write_manifest(directory_of(str(tmp_path), 1), plan, 1, cluster.checkpoints, {})
        assert same(made.bits(), before)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize("held", [0, 1, 3, 4, 2**63])
async def test_a_worker_that_holds_another_version_gets_the_whole(held: int) -> None:
    """Only that of version 2 is worth a difference to version 3."""
    async with serving(steps_plan(1, "delta-int8")) as cluster:
        for step in range(3):
            await cluster.push(cluster.all_keys(), step)
            await until(
                lambda step=step: cluster.shards[0].phase.name == "accumulating" and cluster.shards[0].version > step
            )
        version, whole = await cluster.arrivals(0, 3, held_version=held)
        assert version == 3
        assert not any(header.delta for header, _ in whole)
        _, differences = await cluster.arrivals(0, 3, held_version=2)
        assert all(header.delta for header, _ in differences)


async def test_a_pull_that_breaks_in_the_middle_of_a_difference_is_made_again_whole() -> None:
    breaks: list[int] = []

    class Breaking(ParameterServerServicer):
        """Breaks off a pull after as many messages as `breaks` says, once."""

        async def Pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[bytes]:
            limit = breaks.pop() if breaks and request.HasField("held_version") else None
            sent = 0
            async for message in super().Pull(request, context):
                if sent == limit:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")
                yield message
                sent += 1

    plan = steps_plan(2, "delta-int8")
    async with serving(plan) as cluster:
        undisturbed = await walked(cluster, held=True)
    async with serving(plan, Breaking) as cluster, pulling(cluster) as (made, puller):
        num_broken = 0
        version, held = 0, None
        while version <= STEPS:
            if version in (2, 3, 6) and held == version - 1:
                breaks.append(1 + 2 * version)  # the version itself, then some bundles
            inbox = await puller.next(version, held)
            assert inbox.version == version
            try:
                found = await in_place(made, inbox)
            except AbandonedError:
                num_broken += 1
                held = None
                continue
            assert same(found, undisturbed[version]), version
            held = version
            if version < STEPS:
                await cluster.push(cluster.all_keys(), version)
            version += 1
        assert num_broken == 3


@pytest.mark.parametrize("breaks", [False, True])
async def test_the_next_version_is_asked_for_when_the_pull_under_way_is_over(breaks: bool) -> None:
    asked: list[tuple[int, int | None]] = []
    held_up = asyncio.Event()

    class HoldingUp(ParameterServerServicer):
        """Keeps the first pull's bundles, but for one, until `held_up` is set; then it may break off."""

        async def Pull(self, request: pb.PullRequest, context: Any) -> AsyncIterator[bytes]:
            asked.append((request.min_version, request.held_version if request.HasField("held_version") else None))
            first, sent = len(asked) == 1, 0
            async for message in super().Pull(request, context):
                if first and sent == 2:  # the version itself and a bundle
                    await held_up.wait()
                    if breaks:
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")
                yield message
                sent += 1

    async with serving(steps_plan(1, "delta-int8"), HoldingUp) as cluster, pulling(cluster) as (_, puller):
        await puller.next(0)
        cancelled, upcoming = (asyncio.create_task(puller.next(1, 0)) for _ in range(2))
        # A request that was made before this one would be there before it, too.
        await cluster.stubs[0].GetServerStatus(pb.GetServerStatusRequest(job_id="job"))
        assert asked == [(0, None)]
        cancelled.cancel()
        held_up.set()
        await until(lambda: len(asked) > 1)
        # Nobody holds a version of which not all has come.
        assert asked[1:] == [(1, None if breaks else 0)]
        await cluster.push(cluster.all_keys(), 0)
        inbox = await asyncio.wait_for(upcoming, BOUND_SECONDS)
        assert inbox.version == 1
        assert cancelled.cancelled()


@pytest.mark.parametrize("pull", ["bf16", "delta-int8", "xor-bf16"])
async def test_a_version_in_the_making_is_not_given_for_the_one_asked(pull: str) -> None:
    """Between `publish` and `begin_step` what workers pull of a bundle is of the next version, its published version is
    not."""
    async with serving(steps_plan(1, pull)) as cluster:
        shard = cluster.shards[0]
        state = shard.bundles[0]
        for holds in (False, True):
            published = await shard.published("job", 5, 0, 0, holds)
            assert published is not None
            assert published.version == 0
        await asyncio.to_thread(state.publish, 1, shard.pull_codec)
        for holds in (False, True):
            assert await shard.published("job", 5, 0, 0, holds) is None
        state.begin_step(1)
        for holds in (False, True):
            published = await shard.published("job", 5, 0, 1, holds)
            assert published is not None
            assert published.version == 1
            assert arrival_of(published).header.delta == (holds and pull != "bf16")


@pytest.mark.parametrize("pull", ["int8", "delta-int8", "xor-fp32"])
def test_whole_bundles_made_while_versions_are_published_are_of_one_version(pull: str) -> None:
    """Two threads of a server: one publishes, the other makes whole bundles for newcomers."""
    plan = micro_plan(codec={"pull": pull, "keyframe_versions": 3})
    form, book = downlink(pull), CodecBook(plan.tensors, "bf16")
    bundle = max(plan.bundles, key=lambda one: one.num_elements)
    state = WeightBundle(bundle, plan.tensors, plan.recipe, form, book)
    codec = book.of(bundle, form.full)

    def content(published: PublishedBundle) -> tuple[int, bytes]:
        arrival = arrival_of(published)
        assert arrival.header.version == published.version
        out_N = torch.empty(bundle.num_elements)
        codec.decode(split(arrival.payload, arrival.header.fragment_bytes), slices(out_N, bundle), published.version)
        return published.version, out_N.numpy().tobytes()

    def publish(version: int) -> None:
        for number, fragment in enumerate(bundle.fragments):
            state.initialize(number, version + torch.arange(fragment.begin, fragment.end) / 64)
        state.publish(version, form.delta or form.full)

    publish(0)
    expected = dict([content(state.full())])
    seen = []
    with ThreadPoolExecutor(1) as executor:
        for version in range(1, 200):
            publishing = executor.submit(publish, version)
            while not publishing.done():
                seen.append(content(state.full()))
            publishing.result()
            expected.update([content(state.full())])
    assert len(expected) == 200
    assert len(seen) > 200
    assert all(expected[version] == found for version, found in seen)


@pytest.mark.parametrize("pull", ["delta-int8", "delta-int4-hadamard"])
async def test_a_checkpoint_holds_the_reference_and_goes_on_bit_for_bit(pull: str, tmp_path: Path) -> None:
    """On another number of servers, whose bundles are others."""
    (tmp_path / "tokenizer.json").write_text("{}")
    root = str(tmp_path / "checkpoints")
    plan = steps_plan(1, pull, data=str(tmp_path), checkpoint_root=root)
    async with serving(plan) as cluster:
        through = await walked(cluster, held=True)
        await until(lambda: len(cluster.checkpoints) == STEPS)
        reports = {report.version: report for report in cluster.checkpoints}
    # Version 4 is a keyframe, whose reference is the weights; version 3's is what came of three differences.
    for start in (3, 4):
        directory = directory_of(root, start)
        write_manifest(directory, plan, start, [reports[start]], {})
        reader = CheckpointReader(directory)
        for fragment in plan.fragments:
            saved = reader.read(REFERENCE, plan.tensors[fragment.tensor].name, fragment.begin, fragment.end)
            assert torch.equal(torch.from_numpy(saved), through[start][fragment.index])
        resumed = steps_plan(3, pull, epoch=6, start_version=start, checkpoint_path=directory)
        async with serving(resumed) as other:
            found = await walked(other, held=True, first=start)
        for left, right in zip(found, through[start:], strict=True):
            assert same(left, right)


def test_a_reference_of_zeros_is_not_what_a_restored_publisher_gives() -> None:
    """A checkpoint's reference is taken even where the plan starts at a version that would be a keyframe."""
    plan = micro_plan(codec={"pull": "delta-int8", "keyframe_versions": 1})
    publication = Publication(plan)
    publication.walk()
    saved = [torch.full_like(weights_N, 2.0) for weights_N in publication.weights]
    for one, saved_N in zip(publication.publishers, saved, strict=True):
        one.restore(saved_N)
    publication.publish(5)
    with worker(plan) as newcomer:
        newcomer.take(5, publication.arrivals(False))
        assert all((slice_N == 2).all() for slice_N in newcomer.bits().values())
        publication.publish(6)
        newcomer.take(6, publication.arrivals(True))
        assert same(newcomer.bits(), bits_of(plan, publication.weights))


def test_initial_weights_are_published_exactly() -> None:
    """Version 0 of a job that pulls differences is what every worker could have made of the seed."""
    plan = micro_plan(codec={"pull": "delta-int4"})
    book = CodecBook(plan.tensors, "bf16")
    whole = dict(initial_weights(MICRO_LLAMA, 3))
    with worker(plan) as newcomer:
        arrivals = []
        for bundle in plan.bundles:
            state = WeightBundle(bundle, plan.tensors, plan.recipe, downlink("delta-int4"), book)
            for number, fragment in enumerate(bundle.fragments):
                whole_N = whole[plan.tensors[fragment.tensor].name].reshape(-1)
                state.initialize(number, whole_N[fragment.begin : fragment.end])
            state.publish(0, "int4")
            assert state.delta() is None
            arrivals.append(arrival_of(state.full()))
        newcomer.take(0, arrivals)
        for tensor, parameter in zip(plan.tensors, newcomer.parameters, strict=True):
            assert torch.equal(parameter.detach(), whole[tensor.name])
