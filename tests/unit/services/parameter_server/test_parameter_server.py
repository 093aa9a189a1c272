"""A parameter server over real gRPC: what it accepts and refuses, and versions that appear everywhere or nowhere."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.shards import (
    FRAGMENTS,
    MODEL,
    NUM_SLOTS,
    SLOT_SAMPLES,
    SLOT_TOKENS,
    TENSORS,
    Cluster,
    gradient,
    make_plan,
    same,
    serving,
    until,
)

from gradstream.core.checkpoint.manifest import directory_of, write_manifest
from gradstream.core.checkpoint.shard import write_shard
from gradstream.core.codecs import codec_named
from gradstream.core.codecs.payloads import seed_of
from gradstream.core.errors import GradstreamError, StaleEpochError
from gradstream.core.model.model import initial_weights
from gradstream.core.plan.bundles import codec_for
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.learning_rate import learning_rate
from gradstream.core.rpc.errors import error_from_rpc
from gradstream.core.wire.frames import Assembler, frame, frames
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.proto.v1 import plan_pb2
from gradstream.services.parameter_server import accumulation
from gradstream.services.parameter_server.servicer import ParameterServerServicer
from gradstream.services.parameter_server.weight_bundle import WeightBundle

REFUSED = grpc.StatusCode.INVALID_ARGUMENT
EXACT = ["fp32", "bf16", "int8", "int4", "int4-hadamard", "int2", "bf16-zstd"]


def initial_fragments() -> dict[int, torch.Tensor]:
    whole = dict(initial_weights(MODEL, 1))
    return {f.index: whole[TENSORS[f.tensor].name].reshape(-1)[f.begin : f.end] for f in FRAGMENTS}


def expected_after(steps: int, plan: Plan) -> dict[int, torch.Tensor]:
    """Plain torch in one process: AdamW over whole tensors, with the gradients added in fp64."""
    rule = plan.recipe.optimizer
    whole = {name: weights.reshape(-1).clone() for name, weights in initial_weights(MODEL, plan.recipe.seed)}
    optimizers = {
        t.name: torch.optim.AdamW(
            [whole[t.name]],
            betas=rule.betas,
            eps=rule.eps,
            weight_decay=rule.weight_decay if t.decay else 0.0,
            fused=True,
        )
        for t in TENSORS
    }
    for step in range(steps):
        sums = {}
        for fragment in FRAGMENTS:
            codec = codec_named(codec_for(TENSORS[fragment.tensor].kind, plan.recipe.codec.push, "bf16"))
            total_N = torch.zeros(fragment.num_elements, dtype=torch.float64)
            for slot in range(NUM_SLOTS):
                seed, decoded_N = seed_of(step, fragment.index), torch.empty(fragment.num_elements)
                codec.decode(codec.encode(gradient(step, slot, fragment.index), seed), decoded_N, seed)
                total_N += decoded_N
            sums[fragment.index] = total_N.float()
        num_tokens = NUM_SLOTS * SLOT_TOKENS
        norm = float(torch.cat([*sums.values()]).double().norm()) / num_tokens
        scale = min(1.0, rule.clip_norm / (norm + 1e-6))
        for number, tensor in enumerate(TENSORS):
            sum_N = torch.cat([sums[f.index] for f in FRAGMENTS if f.tensor == number])
            whole[tensor.name].grad = sum_N.div(float(num_tokens)).mul(scale)
            rate = learning_rate(step, plan.last_version, rule, plan.recipe.schedule)
            optimizers[tensor.name].param_groups[0]["lr"] = rate
            optimizers[tensor.name].step()
    return {f.index: whole[TENSORS[f.tensor].name].detach()[f.begin : f.end] for f in FRAGMENTS}


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_servers", [1, 2])
@pytest.mark.parametrize("push", EXACT)
async def test_steps_are_those_of_one_process(num_servers: int, push: str) -> None:
    plan = make_plan(num_servers, push=push)
    async with serving(plan) as cluster:
        assert same(await cluster.pull(0), initial_fragments())
        for step in range(2):
            await cluster.push(cluster.all_keys(), step)
            found = await cluster.pull(step + 1)
        expected = expected_after(2, plan)
        for index in expected:
            # The clip scale is fp64 on both sides but summed in another order: one rounding of the last bit.
            torch.testing.assert_close(found[index], expected[index], rtol=1e-6, atol=1e-8)
        assert not same(found, initial_fragments())
        await until(lambda: len(cluster.reports) == 2)
        report = cluster.reports[0]
        assert (report.step, report.num_tokens, report.num_samples, report.skipped) == (0, 48, 6, False)
        assert report.loss == pytest.approx((10 + 11 + 12) / 48)
        assert report.grad_norm > plan.recipe.optimizer.clip_norm, "the test must reach the clipping"
        if push != "bf16-zstd":
            assert report.pushed_bytes == NUM_SLOTS * cluster.pushed_bytes()


@pytest.mark.parametrize("push", EXACT)
async def test_the_same_bits_in_any_order_on_any_number_of_servers(push: str) -> None:
    results = []
    orders = [lambda keys: keys, lambda keys: keys[::-1], lambda keys: random.Random(1).sample(keys, len(keys))]
    for num_servers, order in [(1, orders[0]), (2, orders[1]), (3, orders[2])]:
        async with serving(make_plan(num_servers, push=push)) as cluster:
            for step in range(2):
                await cluster.push(order(cluster.all_keys()), step)
                weights = await cluster.pull(step + 1)
            results.append(weights)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


async def test_a_version_appears_everywhere_or_nowhere() -> None:
    """Server 0 has everything; until server 1 has its very last contribution, neither moves."""
    async with serving(make_plan(2)) as cluster:
        last = (2, cluster.plan.bundles_of(1)[0].index)
        await cluster.push(key for key in cluster.all_keys() if key != last)
        leader = cluster.shards[0].leader
        assert leader is not None
        await until(lambda: leader.missing == [1])
        pulls = [asyncio.create_task(cluster.pull_one(server, 1)) for server in (0, 1)]
        first, second = await cluster.status()
        assert (first.version, second.version) == (0, 0)
        assert (list(first.missing_slots), list(second.missing_slots)) == ([], [2])
        assert cluster.shards[0].activity().waiting_for == "the commit of step 0 by server-1"
        assert cluster.shards[1].activity().waiting_for == "slot 2 of step 0"
        assert same(await cluster.pull(0), initial_fragments()), "the old version can still be pulled"
        assert not any(pull.done() for pull in pulls)
        assert cluster.reports == []
        await cluster.push([last])
        assert [version for version, _ in await asyncio.gather(*pulls)] == [1, 1]


async def test_contributions_are_added_as_they_come_and_do_not_wait_in_memory() -> None:
    async with serving(make_plan(1, push="int8")) as cluster:
        state = cluster.shards[0].bundles[0]
        for taken, slot in enumerate((2, 1), start=1):
            await cluster.push([(slot, 0)])
            await until(lambda taken=taken: state.num_added == taken)
            assert (await cluster.status())[0].early_bytes == 0
        assert list((await cluster.status())[0].missing_slots) == [0, 1, 2]
        await cluster.push([(0, 0)])
        await until(lambda: state.complete)


async def test_senders_wait_while_more_comes_than_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is set to one byte, and nothing is added until the test lets it."""
    monkeypatch.setattr(accumulation, "MAX_WAITING_BYTES", 1)
    async with serving(make_plan(1, push="int8")) as cluster:
        state, gate = cluster.shards[0].bundles[0], threading.Event()
        add = state.add
        monkeypatch.setattr(state, "add", lambda codec, step: (gate.wait(30), add(codec, step)))
        one = cluster.push_codec(0).max_bytes
        pushing = asyncio.create_task(cluster.push([(0, 0), (1, 0)]))
        await until(lambda: cluster.shards[0].accumulation.waiting_bytes == one)
        for _ in range(10):
            assert (await cluster.status())[0].early_bytes == one
        gate.set()
        await pushing
        await until(lambda: state.num_added == 2)
        assert (await cluster.status())[0].early_bytes == 0


@pytest.mark.parametrize("num_servers", [1, 2])
async def test_duplicates_count_once(num_servers: int) -> None:
    async with serving(make_plan(num_servers)) as cluster:
        # Not all of a step, so that the step cannot be over before the duplicates come.
        most = cluster.all_keys()[:-1]
        accepted = await cluster.push(most)
        assert {response.result for response in accepted} == {pb.PUSH_RESULT_ACCEPTED}
        assert sorted((response.slot, response.bundle) for response in accepted) == most
        duplicates = await cluster.push(most)
        assert {response.result for response in duplicates} == {pb.PUSH_RESULT_DUPLICATE}
        assert len(duplicates) == len(most)
        assert sum(status.num_dropped for status in await cluster.status()) == len(most)
        await cluster.push(cluster.all_keys()[-1:])
        weights = await cluster.pull(1)
    async with serving(make_plan(num_servers)) as once:
        await once.push(once.all_keys())
        assert same(weights, await once.pull(1))


async def test_two_workers_that_hold_the_same_slots_are_harmless() -> None:
    async with serving(make_plan(1)) as cluster:
        streams = await asyncio.gather(*(cluster.push(cluster.all_keys()) for _ in range(3)))
        results = Counter((r.slot, r.bundle, r.result) for responses in streams for r in responses)
        assert all(results[(*key, pb.PUSH_RESULT_ACCEPTED)] == 1 for key in cluster.all_keys())
        weights = await cluster.pull(1)
        assert cluster.shards[0].accumulation.received_bytes == sum(f.num_bytes for f in FRAGMENTS) * NUM_SLOTS
    async with serving(make_plan(1)) as once:
        await once.push(once.all_keys())
        assert same(weights, await once.pull(1))


async def test_a_contribution_to_a_committed_step_is_stale() -> None:
    async with serving(make_plan(1)) as cluster:
        await cluster.push(cluster.all_keys())
        weights = await cluster.pull(1)
        assert {response.result for response in await cluster.push(cluster.all_keys())} == {pb.PUSH_RESULT_STALE}
        assert same(await cluster.pull(1), weights)
        assert list((await cluster.status())[0].missing_slots) == [0, 1, 2]


async def test_a_gradient_that_is_not_finite_advances_the_version_and_leaves_the_weights() -> None:
    async with serving(make_plan(2, push="int8")) as cluster:
        await cluster.push(key for key in cluster.all_keys() if key != (1, 3))
        await cluster.push([(1, 3)], fill=torch.nan)
        assert same(await cluster.pull(1), initial_fragments())
        await until(lambda: len(cluster.reports) == 1)
        assert (cluster.reports[0].skipped, cluster.reports[0].consecutive_skips) == (True, 1)
        await cluster.push(cluster.all_keys(), step=1)
        assert not same(await cluster.pull(2), initial_fragments())
        await until(lambda: len(cluster.reports) == 2)
        assert (cluster.reports[1].skipped, cluster.reports[1].consecutive_skips) == (False, 0)


@pytest.mark.parametrize("losses", [[float("inf"), float("-inf"), 0.0], [1.7e308] * 3, [float("nan")] * 3])
async def test_losses_that_have_no_sum_skip_the_step(losses: list[float]) -> None:
    async with serving(make_plan(2)) as cluster:
        for slot, loss in enumerate(losses):
            await cluster.push([key for key in cluster.all_keys() if key[0] == slot], slot_loss_sum=loss)
        assert same(await cluster.pull(1), initial_fragments())
        await until(lambda: len(cluster.reports) == 1)
        assert cluster.reports[0].skipped


async def test_a_slot_that_contradicts_itself_is_refused() -> None:
    async with serving(make_plan(1)) as cluster:
        await cluster.push([(0, 0)], slot_loss_sum=float("nan"))
        for fields in ({"slot_tokens": 8}, {"slot_samples": 1}):
            contribution = cluster.contribution(0, 1, **({"slot_loss_sum": float("nan")} | fields))
            error = await cluster.refusal(0, list(frames(*contribution)))
            assert error.code() is REFUSED
            assert "differs from" in str(error.details())
        await cluster.push([(0, 1)], slot_loss_sum=float("nan"))


async def test_a_checkpoint_goes_on_bit_for_bit_on_another_number_of_servers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    plan = make_plan(1, data=str(tmp_path), checkpoint_root=str(tmp_path / "checkpoints"))
    async with serving(plan) as cluster:
        await cluster.push(cluster.all_keys())
        await cluster.pull(1)
        await until(lambda: len(cluster.checkpoints) == 1)
        directory = directory_of(plan.checkpoint_root, 1)
        write_manifest(directory, plan, 1, cluster.checkpoints, {})
        await cluster.push(cluster.all_keys(), step=1)
        expected = await cluster.pull(2)
        await until(lambda: len(cluster.checkpoints) == 2)
    async with serving(make_plan(3, epoch=6, start_version=1, checkpoint_path=directory)) as other:
        await other.pull(1)
        await other.push(other.all_keys(), step=1)
        assert same(await other.pull(2), expected)


async def test_a_version_is_saved_although_nobody_computes_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    root = str(tmp_path / "checkpoints")
    plan = make_plan(2, data=str(tmp_path), checkpoint_root=root, checkpoint={"interval_steps": 0})
    async with serving(plan) as cluster:
        await cluster.push(cluster.all_keys())
        held = await cluster.pull(1)
        await cluster.push(cluster.all_keys()[:1], step=1)  # half a step
        for shard in cluster.shards:
            for version in (0, 2, 1, 1):  # of another version, and repeated
                shard.request_snapshot(version)
        await until(lambda: len(cluster.checkpoints) == 2)
        for shard in cluster.shards:
            shard.request_snapshot(1)
        await asyncio.gather(*(shard.drain() for shard in cluster.shards))
        assert sorted((report.version, report.server) for report in cluster.checkpoints) == [(1, 0), (1, 1)]
        directory = directory_of(root, 1)
        write_manifest(directory, plan, 1, cluster.checkpoints, {})
    async with serving(make_plan(1, epoch=6, start_version=1, checkpoint_path=directory)) as other:
        assert same(await other.pull(1), held)


async def test_a_disk_that_takes_no_checkpoint_costs_no_state(tmp_path: Path) -> None:
    """It is tried again, status says why, and the newest checkpoint takes the place of older ones."""
    (tmp_path / "tokenizer.json").write_text("{}")
    root = tmp_path / "checkpoints"
    root.write_text("no directory")
    plan = make_plan(1, data=str(tmp_path), checkpoint_root=str(root))
    async with serving(plan) as cluster:
        await cluster.push(cluster.all_keys())
        await cluster.pull(1)
        shard = cluster.shards[0]
        await until(lambda: shard.checkpoints.unwritten is not None)
        since = shard.activity().waiting_since_unix_ms
        await cluster.push(cluster.all_keys(), step=1)
        await cluster.pull(2)
        await cluster.push(cluster.all_keys()[:0], step=2)
        await until(lambda: shard.checkpoints.unwritten is not None)
        activity = shard.activity()
        assert activity.step == 2
        # Since the disk fails, and not since the newest checkpoint.
        assert activity.waiting_for.startswith("the disk to take its checkpoint: ")
        assert activity.waiting_since_unix_ms == since
        root.unlink()
        await until(lambda: len(cluster.checkpoints) == 1)
        assert cluster.checkpoints[0].version == 2
        assert shard.checkpoints.unwritten is None
        assert cluster.failures == []


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
async def test_whatever_keeps_a_checkpoint_from_the_disk_costs_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    plan = make_plan(1, data=str(tmp_path), checkpoint_root=str(tmp_path / "checkpoints"))
    left = [error]

    def fails_once(*given: Any) -> Any:
        if left:
            raise left.pop()
        return write_shard(*given)

    monkeypatch.setattr("gradstream.services.parameter_server.checkpointing.write_shard", fails_once)
    async with serving(plan) as cluster:
        await cluster.push(cluster.all_keys())
        await until(lambda: len(cluster.checkpoints) == 1)
        assert not left
        assert cluster.failures == []
        assert cluster.shards[0].version == 1


@pytest.mark.parametrize("interval_steps", [1, 0])
async def test_a_copy_for_a_checkpoint_that_finds_no_memory_costs_no_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval_steps: int
) -> None:
    """At a step that has a checkpoint, and of the version at hand."""
    (tmp_path / "tokenizer.json").write_text("{}")
    root = str(tmp_path / "checkpoints")
    plan = make_plan(1, data=str(tmp_path), checkpoint_root=root, checkpoint={"interval_steps": interval_steps})
    snapshot, full = WeightBundle.snapshot, True

    def fails(state: WeightBundle, *given: Any) -> Any:
        if full:
            raise MemoryError
        return snapshot(state, *given)

    monkeypatch.setattr(WeightBundle, "snapshot", fails)
    async with serving(plan) as cluster:
        await cluster.push(cluster.all_keys())
        held = await cluster.pull(1)
        shard = cluster.shards[0]
        shard.request_snapshot(1)
        await until(lambda: shard.activity().waiting_for == "the disk to take its checkpoint: MemoryError")
        full = False
        await until(lambda: len(cluster.checkpoints) == 1)
        assert shard.activity().waiting_for.startswith("slots")
        assert cluster.failures == []
        directory = directory_of(root, 1)
        write_manifest(directory, plan, 1, cluster.checkpoints, {})
    async with serving(make_plan(1, epoch=6, start_version=1, checkpoint_path=directory)) as other:
        assert same(await other.pull(1), held)


async def test_steps_go_on_over_checkpoints_that_nobody_takes_the_reports_of(tmp_path: Path) -> None:
    """The coordinator is away for longer than from one checkpoint to the next; the newest are kept for it."""
    root = tmp_path / "checkpoints"
    plan = make_plan(
        2, data=str(tmp_path), checkpoint_root=str(root), training={"num_steps": 4}, checkpoint={"keep": 2}
    )
    back = asyncio.Event()
    async with serving(plan) as cluster, asyncio.timeout(30):
        take = cluster._take_checkpoint

        async def later(report: Any) -> None:
            await back.wait()
            await take(report)

        for shard in cluster.shards:
            shard.checkpoints._report = later
        for step in range(4):
            await cluster.push(cluster.all_keys(), step=step)
            await cluster.pull(step + 1)
        drained = asyncio.gather(*(shard.drain() for shard in cluster.shards))
        await until(lambda: sorted(path.name for path in root.iterdir()) == ["step-00000003", "step-00000004"])
        assert cluster.checkpoints == []
        assert not drained.done()
        back.set()
        await drained
        reported = sorted((report.version, report.server) for report in cluster.checkpoints)
        assert reported == [(version, server) for version in (3, 4) for server in (0, 1)]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"epoch": 4}, {"epoch": 6}, {"epoch": 0}, {"job_id": "other"}, {"job_id": ""}])
async def test_another_epoch_or_job_is_stale(fields: dict[str, Any]) -> None:
    async with serving(make_plan(1)) as cluster:
        before = await cluster.status()
        for attempt in (
            cluster.push([(0, 0)], **fields),
            cluster.pull_one(0, 0, **fields),
            cluster.stubs[0].CompleteStep(pb.CompleteStepRequest(**({"job_id": "job", "epoch": 5} | fields))),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await attempt
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "is not in force here: this server is at job epoch 5" in str(caught.value.details())
            assert type(error_from_rpc(caught.value, "server")) is StaleEpochError
        assert await cluster.status() == before


async def test_a_closed_shard_sends_everyone_away() -> None:
    async with serving(make_plan(2)) as cluster:
        await cluster.push(key for key in cluster.all_keys() if cluster.plan.bundles[key[1]].server == 0)
        pull = asyncio.create_task(cluster.pull_one(0, 1))
        leader = cluster.shards[0].leader
        assert leader is not None
        await until(lambda: leader.missing == [1])
        await cluster.shards[0].close("job epoch 6 replaces the plan")
        with pytest.raises(grpc.aio.AioRpcError, match="epoch 6 replaces"):
            await pull
        with pytest.raises(grpc.aio.AioRpcError, match="epoch 6 replaces"):
            await cluster.push([(0, cluster.plan.bundles_of(0)[0].index)])


@contextmanager
def attacked() -> Iterator[tuple[asyncio.Runner, Cluster]]:
    """A cluster of one server, for tests that hypothesis drives: it cannot drive coroutines."""
    with asyncio.Runner() as runner:
        cluster = Cluster(make_plan(1))
        try:
            runner.run(cluster.start())
            yield runner, cluster
            assert cluster.failures == []
        finally:
            runner.run(cluster.stop())


def other_than(right: int, limit: int) -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from([0, right - 1, right + 1, limit]), st.integers(0, limit)).filter(
        lambda value: value != right and value >= 0
    )


MUTATIONS: dict[str, st.SearchStrategy[Any]] = {
    "slot": st.integers(NUM_SLOTS, 2**32 - 1),
    "bundle": st.integers(len(FRAGMENTS), 2**32 - 1),
    "part": st.integers(1, 2**32 - 1),
    "codec": st.sampled_from([plan_pb2.CODEC_UNSPECIFIED, plan_pb2.CODEC_BF16, plan_pb2.CODEC_INT8, 17, -1]),
    "step": st.integers(1, 2**64 - 1),
    "fragment_bytes": st.one_of(
        st.lists(st.integers(0, 2**64 - 1), max_size=4),
        st.sampled_from([[1023, 1], [1024, 0], [512, 512], [0], [1025]]),
    ).filter([1024].__ne__),
    "payload_bytes": other_than(1024, 2**64 - 1),
    "crc32c": st.integers(0, 2**32 - 1),
    "slot_tokens": st.one_of(st.just(0), st.integers(SLOT_TOKENS + 1, 2**64 - 1)),
    "slot_samples": st.integers(SLOT_SAMPLES + 1, 2**32 - 1),
}
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def works(cluster: Cluster, runner: asyncio.Runner) -> bool:
    """Whether a whole step gives the weights that an undisturbed server gives."""

    async def one_step(on: Cluster) -> dict[int, torch.Tensor]:
        await on.push(on.all_keys())
        return await on.pull(1)

    async def undisturbed() -> dict[int, torch.Tensor]:
        async with serving(cluster.plan) as other:
            return await one_step(other)

    return same(runner.run(one_step(cluster)), runner.run(undisturbed()))


def test_wrong_headers_are_refused_with_nothing_consumed() -> None:
    with attacked() as (runner, cluster):
        runner.run(cluster.push([(0, 1), (2, 1)]))
        runner.run(until(lambda: cluster.shards[0].bundles[1].num_added == 2))
        before = runner.run(cluster.status())

        @few
        @given(st.sampled_from(sorted(MUTATIONS)).flatmap(lambda name: st.tuples(st.just(name), MUTATIONS[name])))
        def check(mutation: tuple[str, Any]) -> None:
            name, value = mutation
            right, payload = cluster.contribution(0, 0)
            if value == getattr(right, name):
                return
            header = pb.ContributionHeader()
            header.CopyFrom(right)
            if name == "fragment_bytes":
                header.fragment_bytes[:] = value
            else:
                setattr(header, name, value)
            error = runner.run(cluster.refusal(0, list(frames(header, payload))))
            assert error.code() is REFUSED, (name, value, error.details())
            assert "\n" not in str(error.details())
            assert runner.run(cluster.status()) == before

        check()


async def test_a_header_counts_among_what_is_half_sent() -> None:
    """It stays as long as its contribution, and padding may make it as large as a message."""
    async with serving(make_plan(1)) as cluster:
        servicer = ParameterServerServicer(lambda: cluster.shards[0])
        header, (payload,) = cluster.contribution(0, 0)
        header.padding = bytes(1 << 20)
        with servicer._streams.admit("ipv4:10.0.0.1:5") as stream:
            servicer._take(frame(header.SerializeToString(), payload[:-1]), Assembler(), stream)
            assert stream.half_sent_bytes >= (1 << 20) + len(payload)


def test_every_field_of_the_header_is_attacked() -> None:
    """A field that is added to the header must be checked by the server, or named here with a reason."""
    fields = {field.name for field in pb.ContributionHeader.DESCRIPTOR.fields}
    other_tests = {"job_id", "epoch", "slot_loss_sum", "padding"}  # of padding only the length ever counts
    assert fields == set(MUTATIONS) | other_tests


def test_a_server_works_as_before_after_every_kind_of_attack() -> None:
    with attacked() as (runner, cluster):
        before = runner.run(cluster.status())
        header, (payload,) = cluster.contribution(0, 0)
        right = list(frames(header, [payload]))
        flipped = payload.copy()
        flipped[0] ^= 1
        encoded = header.SerializeToString()
        for messages, message in [
            (list(frames(header, [flipped])), "checksum"),
            (list(frames(header, [payload[:-1]])), "ended inside a payload"),
            (list(frames(header, [payload, payload[:1]])), "longer than the 1024 bytes"),
            ([right[0][:-1]], "cut short"),
            ([right[0] + b"\x01"], "unexpected field|cut short"),
            ([b""], "without a header"),
            ([b"\x7a\x01x"], "without a header"),
            ([b"\x0a\x02\xff\xff"], "not a valid message"),
            ([b"\x0a" + bytes([len(encoded)]) + encoded], "without payload"),
        ]:
            error = runner.run(cluster.refusal(0, messages))
            assert error.code() is REFUSED
            assert any(part in str(error.details()) for part in message.split("|")), error.details()
            assert runner.run(cluster.status()) == before
        assert works(cluster, runner)


def test_arbitrary_bytes_never_harm_the_server() -> None:
    with attacked() as (runner, cluster):
        before = runner.run(cluster.status())
        right = next(frames(*cluster.contribution(0, 0)))
        noise = st.binary(min_size=1, max_size=80)
        cut_or_joined = st.builds(lambda end, tail: right[:end] + tail, st.integers(0, len(right) - 1), noise)

        @few
        @given(st.lists(st.one_of(noise, cut_or_joined), min_size=1, max_size=4))
        def check(messages: list[bytes]) -> None:
            if messages[0] == right:
                return
            error = runner.run(cluster.refusal(0, messages))
            # A message that happens to be a header speaks of another job. Where the server hangs up while we still
            # write, gRPC's client tells of its own failed write instead of the status that it got.
            ours = error.details() == "Internal error from Core"
            assert ours or error.code() in (REFUSED, grpc.StatusCode.FAILED_PRECONDITION), error
            assert runner.run(cluster.status()) == before

        check()
        assert works(cluster, runner)


# -- pulls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pull", ["fp32", "bf16", "int8", "fp32-zstd", "bf16-zstd"])
async def test_a_pull_waits_for_its_version_and_gives_it_in_the_recipes_codec(pull: str) -> None:
    async with serving(make_plan(1, pull="fp32")) as plain:
        await plain.push(plain.all_keys())
        masters = await plain.pull(1)
    async with serving(make_plan(1, pull=pull)) as cluster:
        waiting = asyncio.create_task(cluster.pull_one(0, 1))
        assert (await cluster.pull_one(0, 0))[0] == 0
        assert not waiting.done()
        await cluster.push(cluster.all_keys())
        version, weights = await waiting
        assert version == 1
        for index, master_N in masters.items():
            codec = codec_named(codec_for(TENSORS[FRAGMENTS[index].tensor].kind, pull, "bf16"))
            expected_N = torch.empty_like(master_N)
            codec.decode(codec.encode(master_N), expected_N)
            assert torch.equal(weights[index], expected_N)


async def test_bundles_come_in_the_order_asked_for() -> None:
    async with serving(make_plan(1)) as cluster:
        order = [5, 0, 7]
        _, found = await cluster.arrivals(0, 0, bundles=order)
        assert [header.bundle for header, _ in found] == order
        assert (await cluster.pull_one(0, 0, bundles=[]))[1] == {}


async def test_a_bundle_that_is_not_held_is_refused() -> None:
    async with serving(make_plan(2)) as cluster:
        theirs = cluster.plan.bundles_of(1)[0].index
        mine = cluster.plan.bundles_of(0)[0].index
        for wrong in (theirs, 10_000):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await cluster.pull_one(0, 0, bundles=[mine, wrong])
            assert caught.value.code() is REFUSED
            assert f"pull of bundle {wrong}, which server 0 does not hold" in str(caught.value.details())
        error = await cluster.refusal(0, list(frames(*cluster.contribution(0, theirs))))
        assert error.code() is REFUSED
        assert f"bundle {theirs} is not held by server 0" in str(error.details())


async def test_only_the_leader_takes_reports() -> None:
    async with serving(make_plan(2)) as cluster:
        request = pb.CompleteStepRequest(job_id="job", epoch=5, step=0, server=0, num_tokens=1)
        with pytest.raises(grpc.aio.AioRpcError, match="server 1 is not the leader") as caught:
            await cluster.stubs[1].CompleteStep(request)
        assert isinstance(error_from_rpc(caught.value, "server"), GradstreamError)


async def test_the_status_of_another_job_is_empty() -> None:
    async with serving(make_plan(1)) as cluster:
        other = await cluster.stubs[0].GetServerStatus(pb.GetServerStatusRequest(job_id="other"))
        assert other == pb.GetServerStatusResponse()
        status = (await cluster.status())[0]
        assert (status.epoch, status.num_fragments) == (5, len(FRAGMENTS))
        assert status.num_parameters == sum(tensor.num_elements for tensor in TENSORS)
        assert status.state_bytes >= 5 * 4 * status.num_parameters
