"""A parameter server over real gRPC: what counts, what is refused, and that a version appears everywhere or nowhere."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.micro import MICRO_LLAMA

from gradstream.core.checkpoint import directory_of, write_manifest
from gradstream.core.codecs import codec_named, codec_on_wire
from gradstream.core.config import parse_recipe
from gradstream.core.data import parse_manifest
from gradstream.core.errors import GradstreamError, StaleEpochError
from gradstream.core.fragments import cut
from gradstream.core.model import initial_weights, inventory
from gradstream.core.placement import place
from gradstream.core.plan import Plan, Server
from gradstream.core.rpc import error_from_rpc, listen, new_server, open_channel
from gradstream.core.wire import Assembler, ParameterServerStub, add_parameter_server, checksum, frames, parse, verify
from gradstream.proto.v1 import coordinator_pb2, plan_pb2
from gradstream.proto.v1 import parameter_server_pb2 as pb
from gradstream.services.parameter_server.leader import Decision
from gradstream.services.parameter_server.optimizer import learning_rate
from gradstream.services.parameter_server.servicer import ParameterServerServicer
from gradstream.services.parameter_server.shard import Shard

MODEL = MICRO_LLAMA
TENSORS = inventory(MODEL)
FRAGMENTS = cut(TENSORS, 256)
NUM_SLOTS = 3
SLOT_SAMPLES = 2
SLOT_TOKENS = SLOT_SAMPLES * 8
REFUSED = grpc.StatusCode.INVALID_ARGUMENT

Key = tuple[int, int]
"""(slot, fragment)"""


def make_plan(num_servers: int, push: str = "fp32", pull: str = "fp32", data: str = "data", **changes: Any) -> Plan:
    recipe = {
        "name": "tiny",
        "seed": 1,
        "model": {"config": MODEL},
        "training": {"num_steps": 3, "num_slots": 3, "global_batch": 6, "microbatch": 1, "sequence_length": 8},
        "optimizer": {"learning_rate": 0.01, "clip_norm": 0.5},
        "validation": {"num_samples": 3},
        "checkpoint": {"interval_steps": 1 if changes.get("checkpoint_root") else 0},
        "codec": {"push": push, "pull": pull},
        "data": {"path": data},
    }
    tokens = {
        "token_dtype": "uint16",
        "vocab_size": 64,
        "end_of_text_id": 0,
        "tokenizer_sha256": "0" * 64,
        "shards": [],
    }
    fields: dict[str, Any] = {
        "job_id": "job",
        "epoch": 5,
        "recipe": parse_recipe(recipe),
        "model_config": MODEL,
        "data_manifest": parse_manifest(tokens),
        "tensors": tuple(TENSORS),
        "fragment_elements": 256,
        "placement": tuple(place(FRAGMENTS, TENSORS, num_servers)[0]),
        "servers": tuple(Server(f"n{index}", f"server-{index}", "") for index in range(num_servers)),
        "leader": 0,
        "start_version": 0,
        "checkpoint_path": "",
        "checkpoint_root": "",
    }
    return Plan(**(fields | changes))


class Cluster:
    """A plan's shards, each behind the real servicer on a server of its own."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.shards: list[Shard] = []
        self.stubs: list[ParameterServerStub] = []
        self.reports: list[coordinator_pb2.ReportStepRequest] = []
        self.failures: list[Exception] = []
        self.checkpoints: list[coordinator_pb2.ReportCheckpointRequest] = []
        self.push_codec = codec_named(plan.recipe.codec.push)
        self.pull_codec = codec_named(plan.recipe.codec.pull)
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
                self._take_step,
                self._take_checkpoint,
                self._take_failure,
            )
            server = new_server()
            add_parameter_server(ParameterServerServicer(lambda shard=shard: shard), server)
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
        answer = await self.stubs[self.plan.leader].CompleteStep(report)
        return Decision(
            answer.step,
            answer.skip,
            answer.clip_scale,
            answer.num_tokens,
            0.0,
            0.0,
            0,
            answer.consecutive_skips,
            answer.checkpoint,
        )

    async def _take_step(self, report: coordinator_pb2.ReportStepRequest) -> None:
        self.reports.append(report)

    async def _take_failure(self, error: Exception) -> None:
        self.failures.append(error)

    async def _take_checkpoint(self, report: coordinator_pb2.ReportCheckpointRequest) -> None:
        self.checkpoints.append(report)

    # -- what a worker does ----------------------------------------------------------------------------------------

    def contribution(
        self, slot: int, fragment: int, step: int = 0, gradient_N: torch.Tensor | None = None, **fields: Any
    ) -> tuple[pb.ContributionHeader, bytes]:
        """A right contribution, but for the header's fields that are given."""
        piece = FRAGMENTS[fragment]
        values_N = gradient(step, slot, fragment) if gradient_N is None else gradient_N
        payload = self.push_codec.encode(values_N).tobytes()
        header: dict[str, Any] = {
            "job_id": self.plan.job_id,
            "epoch": self.plan.epoch,
            "step": step,
            "slot": slot,
            "fragment": fragment,
            "codec": self.push_codec.wire,
            "num_elements": piece.num_elements,
            "payload_bytes": len(payload),
            "crc32c": checksum(payload),
            "slot_tokens": SLOT_TOKENS,
            "slot_samples": SLOT_SAMPLES,
            "slot_loss_sum": 10.0 + slot,
        }
        return pb.ContributionHeader(**(header | fields)), payload

    async def push(self, keys: Iterable[Key], step: int = 0, **fields: Any) -> list[pb.PushResponse]:
        """Push right contributions, in this order to each server; the acknowledgements of all."""
        by_server: dict[int, list[Key]] = {}
        for key in keys:
            by_server.setdefault(self.plan.placement[key[1]], []).append(key)
        messages = {
            server: [m for slot, fragment in mine for m in frames(*self.contribution(slot, fragment, step, **fields))]
            for server, mine in by_server.items()
        }
        found = await asyncio.gather(*(self.send(server, sent) for server, sent in messages.items()))
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
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.send(server, messages)
        return caught.value

    async def pull_one(self, server: int, min_version: int, **fields: Any) -> tuple[int, dict[int, torch.Tensor]]:
        """One server's weights, decoded, with the checks that a worker makes."""
        request: dict[str, Any] = {
            "job_id": self.plan.job_id,
            "epoch": self.plan.epoch,
            "min_version": min_version,
            "codec": self.pull_codec.wire,
            "fragments": list(self.shards[server].fragments),
        }
        request |= fields
        version = -1
        weights: dict[int, torch.Tensor] = {}
        assembler: Assembler[pb.WeightsHeader] = Assembler()
        async for message in self.stubs[server].Pull(pb.PullRequest(**request)):
            encoded, piece = parse(message)
            if encoded is not None:
                header = pb.WeightsHeader.FromString(bytes(encoded))
                if version < 0:
                    version = header.version
                assert header.version == version
                assembler.begin(header)
            whole = assembler.add(piece)
            if whole is not None and whole[0].codec != plan_pb2.CODEC_UNSPECIFIED:
                verify(*whole, "pull")
                out_N = torch.empty(FRAGMENTS[whole[0].fragment].num_elements)
                codec_on_wire(whole[0].codec).decode(whole[1], out_N)
                weights[whole[0].fragment] = out_N
        assert list(weights) == list(request["fragments"]), "in the order asked for"
        return version, weights

    async def pull(self, version: int) -> dict[int, torch.Tensor]:
        """All servers' weights of a version; waits for it."""
        pulls = await asyncio.gather(*(self.pull_one(server, version) for server in range(len(self.shards))))
        assert {found for found, _ in pulls} == {version}
        return {index: tensor for _, weights in pulls for index, tensor in sorted(weights.items())}

    async def status(self) -> list[pb.GetServerStatusResponse]:
        return [await stub.GetServerStatus(pb.GetServerStatusRequest(job_id=self.plan.job_id)) for stub in self.stubs]


@asynccontextmanager
async def running(plan: Plan) -> AsyncIterator[Cluster]:
    cluster = Cluster(plan)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else run until a condition holds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - a server's state, which has no event for a test to wait for
            await asyncio.sleep(0.001)


def gradient(step: int, slot: int, fragment: int) -> torch.Tensor:
    """Some gradient, summed over the slot's tokens, of a size that makes clipping count."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * slot + fragment)
    return torch.randn(FRAGMENTS[fragment].num_elements, generator=generator)


def all_keys() -> list[Key]:
    return [(slot, fragment.index) for slot in range(NUM_SLOTS) for fragment in FRAGMENTS]


def same(left: dict[int, torch.Tensor], right: dict[int, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[index], right[index]) for index in left)


def initial_fragments() -> dict[int, torch.Tensor]:
    whole = dict(initial_weights(MODEL, 1))
    return {f.index: whole[TENSORS[f.tensor].name].reshape(-1)[f.begin : f.end] for f in FRAGMENTS}


def expected_after(steps: int, plan: Plan) -> dict[int, torch.Tensor]:
    """Plain torch in one process: AdamW over whole tensors, with the gradients in slot order."""
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
    codec = codec_named(plan.recipe.codec.push)
    for step in range(steps):
        sums = {}
        for fragment in FRAGMENTS:
            sum_N = torch.zeros(fragment.num_elements)
            for slot in range(NUM_SLOTS):
                codec.decode_add(codec.encode(gradient(step, slot, fragment.index)), sum_N)
            sums[fragment.index] = sum_N
        num_tokens = NUM_SLOTS * SLOT_TOKENS
        norm = float(torch.cat([*sums.values()]).double().norm()) / num_tokens
        scale = min(1.0, rule.clip_norm / (norm + 1e-6))
        for number, tensor in enumerate(TENSORS):
            sum_N = torch.cat([sums[f.index] for f in FRAGMENTS if f.tensor == number])
            whole[tensor.name].grad = sum_N.div(float(num_tokens)).mul(scale)
            rate = learning_rate(step, plan.num_steps, rule, plan.recipe.schedule)
            optimizers[tensor.name].param_groups[0]["lr"] = rate
            optimizers[tensor.name].step()
    return {f.index: whole[TENSORS[f.tensor].name].detach()[f.begin : f.end] for f in FRAGMENTS}


# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_servers", [1, 2])
@pytest.mark.parametrize("push", ["fp32", "bf16", "int8"])
async def test_steps_are_those_of_one_process(num_servers: int, push: str) -> None:
    plan = make_plan(num_servers, push=push)
    async with running(plan) as cluster:
        assert same(await cluster.pull(0), initial_fragments())
        for step in range(2):
            await cluster.push(all_keys(), step)
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
        payload_bytes = sum(cluster.push_codec.encoded_bytes(fragment.num_elements) for fragment in FRAGMENTS)
        assert report.pushed_bytes == NUM_SLOTS * payload_bytes


@pytest.mark.parametrize("push", ["fp32", "bf16", "int8"])
async def test_the_same_bits_in_any_order_on_any_number_of_servers(push: str) -> None:
    results = []
    orders = [lambda keys: keys, lambda keys: keys[::-1], lambda keys: random.Random(1).sample(keys, len(keys))]
    for num_servers, order in [(1, orders[0]), (2, orders[1]), (3, orders[2])]:
        async with running(make_plan(num_servers, push=push)) as cluster:
            for step in range(2):
                await cluster.push(order(all_keys()), step)
                weights = await cluster.pull(step + 1)
            results.append(weights)
    assert same(results[0], results[1])
    assert same(results[0], results[2])


async def test_a_version_appears_everywhere_or_nowhere() -> None:
    """Server 0 has everything; until server 1 has its very last contribution, neither moves."""
    async with running(make_plan(2)) as cluster:
        last = (2, cluster.plan.fragments_of(1)[0].index)
        await cluster.push(key for key in all_keys() if key != last)
        leader = cluster.shards[0].leader
        assert leader is not None
        await until(lambda: leader.missing == [1])
        pulls = [asyncio.create_task(cluster.pull_one(server, 1)) for server in (0, 1)]
        first, second = await cluster.status()
        assert (first.version, second.version) == (0, 0)
        assert (list(first.missing_slots), list(second.missing_slots)) == ([], [2])
        assert cluster.shards[0].activity().waiting_for == "the commit of step 0 by server-1"
        assert cluster.shards[1].activity().waiting_for == "slots 2 of step 0"
        assert same(await cluster.pull(0), initial_fragments()), "the old version can still be pulled"
        assert not any(pull.done() for pull in pulls)
        assert cluster.reports == []
        await cluster.push([last])
        assert [version for version, _ in await asyncio.gather(*pulls)] == [1, 1]


async def test_early_contributions_wait_encoded_and_are_counted_as_memory() -> None:
    async with running(make_plan(1, push="int8")) as cluster:
        await cluster.push([(2, 0), (1, 0)])
        assert (await cluster.status())[0].early_bytes == 2 * cluster.push_codec.encoded_bytes(256)
        await cluster.push([(0, 0)])
        await until(lambda: cluster.shards[0].fragments[0].complete)
        assert (await cluster.status())[0].early_bytes == 0


@pytest.mark.parametrize("num_servers", [1, 2])
async def test_duplicates_count_once(num_servers: int) -> None:
    async with running(make_plan(num_servers)) as cluster:
        # Not all of a step, so that the step cannot be over before the copies come.
        most = all_keys()[:-1]
        accepted = await cluster.push(most)
        assert {response.result for response in accepted} == {pb.PUSH_RESULT_ACCEPTED}
        assert sorted((response.slot, response.fragment) for response in accepted) == most
        copies = await cluster.push(most)
        assert {response.result for response in copies} == {pb.PUSH_RESULT_DUPLICATE}
        assert len(copies) == len(most)
        assert sum(status.num_dropped for status in await cluster.status()) == len(most)
        await cluster.push(all_keys()[-1:])
        weights = await cluster.pull(1)
    async with running(make_plan(num_servers)) as once:
        await once.push(all_keys())
        assert same(weights, await once.pull(1))


async def test_two_workers_that_hold_the_same_slots_are_harmless() -> None:
    async with running(make_plan(1)) as cluster:
        streams = await asyncio.gather(*(cluster.push(all_keys()) for _ in range(3)))
        results = Counter((r.slot, r.fragment, r.result) for responses in streams for r in responses)
        assert all(results[(*key, pb.PUSH_RESULT_ACCEPTED)] == 1 for key in all_keys())
        weights = await cluster.pull(1)
        assert cluster.shards[0].received_bytes == sum(f.num_bytes for f in FRAGMENTS) * NUM_SLOTS
    async with running(make_plan(1)) as once:
        await once.push(all_keys())
        assert same(weights, await once.pull(1))


async def test_a_contribution_to_a_committed_step_is_stale() -> None:
    async with running(make_plan(1)) as cluster:
        await cluster.push(all_keys())
        weights = await cluster.pull(1)
        assert {response.result for response in await cluster.push(all_keys())} == {pb.PUSH_RESULT_STALE}
        assert same(await cluster.pull(1), weights)
        assert list((await cluster.status())[0].missing_slots) == [0, 1, 2]


async def test_a_gradient_that_is_not_finite_advances_the_version_and_leaves_the_weights() -> None:
    async with running(make_plan(2, push="int8")) as cluster:
        await cluster.push(key for key in all_keys() if key != (1, 3))
        await cluster.push([(1, 3)], gradient_N=torch.full((256,), torch.nan))
        assert same(await cluster.pull(1), initial_fragments())
        await until(lambda: len(cluster.reports) == 1)
        assert (cluster.reports[0].skipped, cluster.reports[0].consecutive_skips) == (True, 1)
        await cluster.push(all_keys(), step=1)
        assert not same(await cluster.pull(2), initial_fragments())
        await until(lambda: len(cluster.reports) == 2)
        assert (cluster.reports[1].skipped, cluster.reports[1].consecutive_skips) == (False, 0)


@pytest.mark.parametrize("losses", [[float("inf"), float("-inf"), 0.0], [1.7e308] * 3, [float("nan")] * 3])
async def test_losses_that_have_no_sum_skip_the_step(losses: list[float]) -> None:
    async with running(make_plan(2)) as cluster:
        for slot, loss in enumerate(losses):
            await cluster.push([key for key in all_keys() if key[0] == slot], slot_loss_sum=loss)
        assert same(await cluster.pull(1), initial_fragments())
        await until(lambda: len(cluster.reports) == 1)
        assert cluster.reports[0].skipped


async def test_a_slot_that_contradicts_itself_is_refused() -> None:
    async with running(make_plan(1)) as cluster:
        await cluster.push([(0, 0)], slot_loss_sum=float("nan"))
        for fields in ({"slot_tokens": 8}, {"slot_samples": 1}):
            header, payload = cluster.contribution(0, 1, **({"slot_loss_sum": float("nan")} | fields))
            error = await cluster.refusal(0, list(frames(header, payload)))
            assert error.code() is REFUSED
            assert "differs from" in str(error.details())
        await cluster.push([(0, 1)], slot_loss_sum=float("nan"))


async def test_a_checkpoint_goes_on_bit_for_bit_on_another_number_of_servers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    plan = make_plan(1, data=str(tmp_path), checkpoint_root=str(tmp_path / "checkpoints"))
    async with running(plan) as cluster:
        await cluster.push(all_keys())
        await cluster.pull(1)
        await until(lambda: len(cluster.checkpoints) == 1)
        directory = directory_of(plan.checkpoint_root, 1)
        write_manifest(directory, plan, 1, cluster.checkpoints, {})
        await cluster.push(all_keys(), step=1)
        expected = await cluster.pull(2)
        await until(lambda: len(cluster.checkpoints) == 2)
    async with running(make_plan(3, epoch=6, start_version=1, checkpoint_path=directory)) as other:
        await other.pull(1)
        await other.push(all_keys(), step=1)
        assert same(await other.pull(2), expected)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"epoch": 4}, {"epoch": 6}, {"epoch": 0}, {"job_id": "other"}, {"job_id": ""}])
async def test_another_epoch_or_job_is_stale(fields: dict[str, Any]) -> None:
    async with running(make_plan(1)) as cluster:
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
    async with running(make_plan(2)) as cluster:
        await cluster.push(key for key in all_keys() if cluster.plan.placement[key[1]] == 0)
        pull = asyncio.create_task(cluster.pull_one(0, 1))
        leader = cluster.shards[0].leader
        assert leader is not None
        await until(lambda: leader.missing == [1])
        await cluster.shards[0].close("job epoch 6 replaces the plan")
        with pytest.raises(grpc.aio.AioRpcError, match="epoch 6 replaces"):
            await pull
        with pytest.raises(grpc.aio.AioRpcError, match="epoch 6 replaces"):
            await cluster.push([(0, cluster.plan.fragments_of(0)[0].index)])


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
    "fragment": st.integers(len(FRAGMENTS), 2**32 - 1),
    "part": st.integers(1, 2**32 - 1),
    "codec": st.sampled_from([plan_pb2.CODEC_UNSPECIFIED, plan_pb2.CODEC_BF16, plan_pb2.CODEC_INT8, 17, -1]),
    "step": st.integers(1, 2**64 - 1),
    "num_elements": other_than(256, 2**64 - 1),
    "payload_bytes": other_than(1024, 2**64 - 1),
    "crc32c": st.integers(0, 2**32 - 1),
    "slot_tokens": st.one_of(st.just(0), st.integers(SLOT_TOKENS + 1, 2**64 - 1)),
    "slot_samples": st.integers(SLOT_SAMPLES + 1, 2**32 - 1),
}
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def works(cluster: Cluster, runner: asyncio.Runner) -> bool:
    """Whether a whole step gives the weights that an undisturbed server gives."""

    async def one_step(on: Cluster) -> dict[int, torch.Tensor]:
        await on.push(all_keys())
        return await on.pull(1)

    async def undisturbed() -> dict[int, torch.Tensor]:
        async with running(cluster.plan) as other:
            return await one_step(other)

    return same(runner.run(one_step(cluster)), runner.run(undisturbed()))


def test_wrong_headers_are_refused_with_nothing_consumed() -> None:
    with attacked() as (runner, cluster):
        runner.run(cluster.push([(0, 1), (2, 1)]))
        runner.run(until(lambda: cluster.shards[0].fragments[1].next_slot == 1))
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
            setattr(header, name, value)
            error = runner.run(cluster.refusal(0, list(frames(header, payload))))
            assert error.code() is REFUSED, (name, value, error.details())
            assert "\n" not in str(error.details())
            assert runner.run(cluster.status()) == before

        check()


def test_every_field_of_the_header_is_attacked() -> None:
    """A field that is added to the header must be checked by the server, or named here with a reason."""
    fields = {field.name for field in pb.ContributionHeader.DESCRIPTOR.fields}
    other_tests = {"job_id", "epoch", "slot_loss_sum"}
    assert fields == set(MUTATIONS) | other_tests


def test_a_server_works_as_before_after_every_kind_of_attack() -> None:
    with attacked() as (runner, cluster):
        before = runner.run(cluster.status())
        header, payload = cluster.contribution(0, 0)
        right = list(frames(header, payload))
        flipped = bytes([payload[0] ^ 1]) + payload[1:]
        encoded = header.SerializeToString()
        for messages, message in [
            (list(frames(header, flipped)), "checksum"),
            (list(frames(header, payload[:-1])), "ended inside a payload"),
            (list(frames(header, payload + b"x")), "longer than the 1024 bytes"),
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
        header, payload = cluster.contribution(0, 0)
        right = next(frames(header, payload))
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


@pytest.mark.parametrize("pull", ["fp32", "bf16", "int8"])
async def test_a_pull_waits_for_its_version_and_gives_it_in_the_recipes_codec(pull: str) -> None:
    async with running(make_plan(1, pull=pull)) as cluster:
        waiting = asyncio.create_task(cluster.pull_one(0, 1))
        assert (await cluster.pull_one(0, 0))[0] == 0
        assert not waiting.done()
        await cluster.push(all_keys())
        version, weights = await waiting
        assert version == 1
        codec = codec_named(pull)
        for index, state in cluster.shards[0].fragments.items():
            expected_N = torch.empty_like(state.weights_N)
            codec.decode(codec.encode(state.weights_N), expected_N)
            assert torch.equal(weights[index], expected_N)


async def test_fragments_come_in_the_order_asked_for() -> None:
    async with running(make_plan(1)) as cluster:
        order = [5, 0, 7]
        _, weights = await cluster.pull_one(0, 0, fragments=order)
        assert list(weights) == order
        assert (await cluster.pull_one(0, 0, fragments=[]))[1] == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fragments": [0, 10_000]}, "pull of fragment 10000, which server 0 does not hold"),
        ({"codec": plan_pb2.CODEC_INT8}, "pull with codec int8, but the recipe says fp32"),
        ({"codec": plan_pb2.CODEC_UNSPECIFIED}, "unknown codec 0"),
    ],
)
async def test_a_wrong_pull_is_refused(fields: dict[str, Any], message: str) -> None:
    async with running(make_plan(1)) as cluster:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.pull_one(0, 0, **fields)
        assert caught.value.code() is REFUSED
        assert message in str(caught.value.details())


async def test_another_servers_fragment_is_refused() -> None:
    async with running(make_plan(2)) as cluster:
        theirs = cluster.plan.fragments_of(1)[0].index
        with pytest.raises(grpc.aio.AioRpcError, match=f"pull of fragment {theirs}, which server 0 does not hold"):
            await cluster.pull_one(0, 0, fragments=[theirs])
        error = await cluster.refusal(0, list(frames(*cluster.contribution(0, theirs))))
        assert error.code() is REFUSED
        assert f"fragment {theirs} is not held by server 0" in str(error.details())


async def test_only_the_leader_takes_reports() -> None:
    async with running(make_plan(2)) as cluster:
        request = pb.CompleteStepRequest(job_id="job", epoch=5, step=0, server=0, num_tokens=1)
        with pytest.raises(grpc.aio.AioRpcError, match="server 1 is not the leader") as caught:
            await cluster.stubs[1].CompleteStep(request)
        assert isinstance(error_from_rpc(caught.value, "server"), GradstreamError)


async def test_the_status_of_another_job_is_empty() -> None:
    async with running(make_plan(1)) as cluster:
        other = await cluster.stubs[0].GetServerStatus(pb.GetServerStatusRequest(job_id="other"))
        assert other == pb.GetServerStatusResponse()
        status = (await cluster.status())[0]
        assert (status.epoch, status.num_fragments) == (5, len(FRAGMENTS))
        assert status.num_parameters == sum(tensor.num_elements for tensor in TENSORS)
        assert status.state_bytes >= 5 * 4 * status.num_parameters
