"""A parameter server in a job with local steps: rounds, their moments, checkpoints, and ordinary steps before them."""

from __future__ import annotations

import math
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from support.shards import (
    FRAGMENTS,
    NUM_SLOTS,
    SLOT_SAMPLES,
    SLOT_TOKENS,
    TENSORS,
    Cluster,
    gradient,
    make_plan,
    moment,
    same,
    serving,
    until,
)

from gradstream.coordinator.planning.needs import server_bytes
from gradstream.core.checkpoint.manifest import directory_of, read_manifest, write_manifest
from gradstream.core.checkpoint.shard import OUTER_MOMENTUM, CheckpointReader, write_shard
from gradstream.core.codecs import codec_named
from gradstream.core.codecs.payloads import seed_of
from gradstream.core.errors import CheckpointError
from gradstream.core.optimizer.optimizer import STEP_COUNT
from gradstream.core.plan.bundles import codec_for
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.learning_rate import rate_of_step
from gradstream.core.wire.frames import frames
from gradstream.core.wire.stream_limits import traffic
from gradstream.services.parameter_server import checkpointing

LENGTH = 4
"""Inner steps of a round."""
MOMENTS = ("exp_avg", "exp_avg_sq")
SLOTS = [{"slot_tokens": (1 + slot) * SLOT_TOKENS, "slot_samples": (1 + slot) * SLOT_SAMPLES} for slot in range(3)]
"""Totals of each slot in a round: their weights differ."""
NUM_TOKENS = sum(totals["slot_tokens"] for totals in SLOTS)


def local_plan(num_servers: int = 1, rounds: int = 3, after: int = 0, **changes: Any) -> Plan:
    """A plan of `rounds` rounds, after `after` ordinary steps. `local` replaces keys of the recipe's section."""
    local: dict[str, Any] = {"steps": LENGTH, "after": after, "moments": "fp32"}
    local |= {"outer": {"learning_rate": 0.8, "momentum": 0.9}} | changes.pop("local", {})
    training = {"num_steps": after + rounds * local["steps"]}
    return make_plan(num_servers, local=local, training=training, **changes)


def saving_plan(directory: Path, num_servers: int = 1, **changes: Any) -> Plan:
    """A plan that saves every version under `directory`."""
    (directory / "tokenizer.json").write_text("{}")
    return local_plan(num_servers, data=str(directory), checkpoint_root=str(directory / "checkpoints"), **changes)


async def push_step(cluster: Cluster, version: int, keys: list[tuple[int, int]] | None = None) -> None:
    """Push all contributions to the step from a version, each slot with its own number of tokens in a round."""
    is_round = cluster.plan.rounds.is_round(version)
    for slot in range(NUM_SLOTS):
        mine = [key for key in (cluster.all_keys(version) if keys is None else keys) if key[0] == slot]
        await cluster.push(mine, version, **(SLOTS[slot] if is_round else {}))


async def everything(cluster: Cluster, version: int) -> None:
    """Pull all bundles of a version, as a worker must before it contributes to the next one."""
    for server, shard in enumerate(cluster.shards):
        assert (await cluster.arrivals(server, version, bundles=[*shard.bundles]))[0] == version


async def saved(cluster: Cluster, version: int) -> str:
    """Wait for a version's checkpoint, write its manifest and return its directory."""
    num_servers = len(cluster.shards)

    def reports() -> list[Any]:
        return [report for report in cluster.checkpoints if report.version == version]

    await until(lambda: len(reports()) == num_servers)
    directory = directory_of(cluster.plan.checkpoint_root, version)
    write_manifest(directory, cluster.plan, version, reports(), {})
    return directory


def array_of(reader: CheckpointReader, kind: str) -> dict[int, torch.Tensor]:
    """An array of a checkpoint, by fragment."""
    return {
        fragment.index: torch.from_numpy(reader.read(kind, TENSORS[fragment.tensor].name, fragment.begin, fragment.end))
        for fragment in FRAGMENTS
    }


def counts_of(reader: CheckpointReader) -> set[float]:
    """AdamW's counts of all fragments in a checkpoint."""
    return {
        float(reader.scalar(STEP_COUNT, TENSORS[fragment.tensor].name, fragment.begin)[0]) for fragment in FRAGMENTS
    }


def mean(plan: Plan, version: int, fragment: int, array: str = "weights") -> torch.Tensor:
    """The mean over all tokens of what the slots send in a round, in fp64."""
    total_N = torch.zeros(FRAGMENTS[fragment].num_elements, dtype=torch.float64)
    for slot in range(NUM_SLOTS):
        if array == "weights":
            kind = TENSORS[FRAGMENTS[fragment].tensor].kind
            codec = codec_named(codec_for(kind, plan.recipe.codec.push, plan.recipe.codec.embedding))
            sent_N = gradient(version, slot, fragment)
        else:
            assert plan.recipe.local is not None
            codec, sent_N = codec_named(plan.recipe.local.moments.codec(array)), moment(version, slot, fragment, array)
        seed, decoded_N = seed_of(version, fragment), torch.empty_like(sent_N)
        codec.decode(codec.encode(sent_N.view(FRAGMENTS[fragment].shape), seed), decoded_N.view_as(sent_N), seed)
        total_N += decoded_N
    return total_N / NUM_TOKENS


def close(found: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> None:
    """Compare each fragment to 2e-6 of the largest magnitude among its values and the mean's."""
    assert found.keys() == expected.keys()
    for index in found:
        most = float(expected[index].abs().max())
        torch.testing.assert_close(found[index].double(), expected[index].double(), rtol=1e-6, atol=1e-6 * most)


# -- rounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_servers", [1, 2])
@pytest.mark.parametrize(
    ("push", "moments", "outer"),
    [
        ("fp32", "fp32", {"learning_rate": 0.8, "momentum": 0.9}),
        ("int8", "bf16", {"learning_rate": 0.7, "momentum": 0.8, "nesterov": False}),
        ("int4", {"exp_avg": "int8", "exp_avg_sq": "bf16"}, {"learning_rate": 1.0, "momentum": 0.0}),
    ],
)
async def test_a_round_applies_the_outer_rule_to_the_mean_difference_and_averages_the_moments(
    num_servers: int, push: str, moments: Any, outer: dict[str, Any]
) -> None:
    plan = local_plan(num_servers, push=push, local={"moments": moments, "outer": outer})
    assert plan.recipe.local is not None
    rule = plan.recipe.local.outer
    async with serving(plan) as cluster:
        first = await cluster.pull(0)
        assert all(
            not values_N.any() for found in (await cluster.pull_moments(0)).values() for values_N in found.values()
        )
        weights = {index: torch.nn.Parameter(values_N.double()) for index, values_N in first.items()}
        torch_rule = torch.optim.SGD(
            weights.values(),
            lr=rule.learning_rate,
            momentum=rule.momentum,
            nesterov=rule.momentum > 0 and rule.nesterov,
        )
        for version in range(2):
            await push_step(cluster, version)
            found = await cluster.pull(version + 1)
            for index, parameter in weights.items():
                parameter.grad = mean(plan, version, index)
            torch_rule.step()
            close(found, {index: parameter.detach() for index, parameter in weights.items()})
            held = await cluster.pull_moments(version + 1)
            assert tuple(held) == MOMENTS
            for array in MOMENTS:
                expected = {index: mean(plan, version, index, array) for index in weights}
                if moments == "fp32":
                    close(held[array], expected)
                for index, values_N in expected.items():  # coarser codecs: sent once more
                    assert float((held[array][index] - values_N).abs().max()) <= float(values_N.abs().max()) / 100
        await until(lambda: len(cluster.reports) == 2)
        report = cluster.reports[1]
        assert (report.step, report.num_tokens, report.num_samples) == (1, NUM_TOKENS, NUM_TOKENS // 8)
        assert report.learning_rate == rate_of_step(plan.recipe, 2 * LENGTH - 1)
        norm = math.sqrt(sum(float(mean(plan, 1, index).square().sum()) for index in weights))
        assert report.grad_norm == pytest.approx(norm, rel=1e-6)
        assert norm > 0.1, "a gradient of this norm would be clipped"
        assert report.pushed_bytes == NUM_SLOTS * sum(
            cluster.push_codec(bundle.index).max_bytes for bundle in (*plan.bundles, *plan.moment_bundles)
        )


@pytest.mark.parametrize(
    ("optimizer", "pull", "after", "local"),
    [
        ("adamw", "delta-int4", 2, {"moments": {"exp_avg": "int8", "exp_avg_sq": "factored"}}),
        ("adamw", "bf16", 2, {"inner_state": "reset"}),
        ("muon", "bf16", 2, {"moments": "bf16"}),
    ],
)
async def test_the_same_bits_in_any_order_on_any_number_of_servers(
    tmp_path: Path, optimizer: str, pull: str, after: int, local: dict[str, Any]
) -> None:
    """In ordinary steps and rounds. The hash of a version covers all that is saved."""
    rule = {"kind": optimizer}
    digests = []
    for num_servers in (1, 2, 3):
        (tmp_path / str(num_servers)).mkdir()
        changes: dict[str, Any] = {"after": after, "push": "int8", "pull": pull, "local": local, "optimizer": rule}
        async with serving(saving_plan(tmp_path / str(num_servers), num_servers, **changes)) as cluster:
            for version in range(after + 2):
                keys = cluster.all_keys(version)
                await push_step(cluster, version, random.Random(num_servers).sample(keys, len(keys)))
                await everything(cluster, version + 1)
            digests.append(
                [read_manifest(await saved(cluster, version)).state_sha256 for version in (after + 1, after + 2)]
            )
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize(("inner_state", "version"), [("shared", 1), ("shared", 2), ("shared", 3), ("reset", 3)])
async def test_a_job_goes_on_bit_for_bit_from_any_version(tmp_path: Path, inner_state: str, version: int) -> None:
    """From an ordinary step, from the version at which rounds begin, and from a round."""
    changes: dict[str, Any] = {"after": 2, "push": "int8", "pull": "delta-int8", "local": {"inner_state": inner_state}}
    async with serving(saving_plan(tmp_path, **changes)) as cluster:
        for step in range(4):
            await push_step(cluster, step)
            await everything(cluster, step + 1)
        directory = await saved(cluster, version)
        expected = read_manifest(await saved(cluster, 4)).state_sha256
    (tmp_path / "other").mkdir()
    resumed = saving_plan(tmp_path / "other", 3, epoch=6, start_version=version, checkpoint_path=directory, **changes)
    async with serving(resumed) as other:
        for step in range(version, 4):
            await push_step(other, step)
            await everything(other, step + 1)
        assert read_manifest(await saved(other, 4)).state_sha256 == expected


async def test_a_checkpoint_has_the_moments_and_the_outer_momentum_of_its_version(tmp_path: Path) -> None:
    async with serving(saving_plan(tmp_path)) as cluster:
        await push_step(cluster, 0)
        held, weights = await cluster.pull_moments(1), await cluster.pull(1)
        reader = CheckpointReader(await saved(cluster, 1))
        assert reader.kinds == {"weight", OUTER_MOMENTUM, STEP_COUNT, *MOMENTS}
        assert same(array_of(reader, "weight"), weights)
        for array in MOMENTS:
            assert same(array_of(reader, array), held[array])
        close(array_of(reader, OUTER_MOMENTUM), {index: mean(cluster.plan, 0, index) for index in weights})
        assert counts_of(reader) == {LENGTH}


async def test_rounds_that_reset_the_moments_save_none(tmp_path: Path) -> None:
    async with serving(saving_plan(tmp_path, local={"inner_state": "reset"})) as cluster:
        assert cluster.plan.moment_bundles == ()
        await push_step(cluster, 0)
        assert CheckpointReader(await saved(cluster, 1)).kinds == {"weight", OUTER_MOMENTUM}


@pytest.mark.parametrize("poisoned", ["weights", "exp_avg", "exp_avg_sq"])
async def test_a_round_that_is_not_finite_changes_nothing(tmp_path: Path, poisoned: str) -> None:
    """Whether the difference is not finite or a moment."""
    async with serving(saving_plan(tmp_path, 2, after=1)) as cluster:
        await push_step(cluster, 0)
        weights, moments = await cluster.pull(1), await cluster.pull_moments(1)
        before = CheckpointReader(await saved(cluster, 1))
        bundles = (*cluster.plan.bundles, *cluster.plan.moment_bundles)
        bad = (1, next(bundle.index for bundle in bundles if bundle.array == poisoned))
        await push_step(cluster, 1, [key for key in cluster.all_keys(1) if key != bad])
        await cluster.push([bad], 1, fill=math.nan, **SLOTS[1])
        assert same(await cluster.pull(2), weights)
        found = await cluster.pull_moments(2)
        assert all(same(found[array], moments[array]) for array in MOMENTS)
        await until(lambda: len(cluster.reports) == 2)
        assert (cluster.reports[1].skipped, cluster.reports[1].consecutive_skips) == (True, 1)
        after = CheckpointReader(await saved(cluster, 2))
        assert after.manifest.state_sha256 == before.manifest.state_sha256
        await push_step(cluster, 2)
        assert not same(await cluster.pull(3), weights)


# -- ordinary steps and rounds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
async def test_the_first_round_begins_with_the_moments_of_the_ordinary_steps(tmp_path: Path, kind: str) -> None:
    """And the steps before it are those of a job without local steps."""
    optimizer: dict[str, Any] = {"kind": kind} | ({"momentum": 0.9} if kind == "sgd" else {})
    arrays = MOMENTS if kind == "adamw" else ("momentum_buffer",)
    async with serving(make_plan(1, optimizer=optimizer, training={"num_steps": 2 + LENGTH})) as ordinary:
        for step in range(2):
            await push_step(ordinary, step)
            expected = await ordinary.pull(step + 1)
        states = {fragment.index: arrays_N for fragment, arrays_N in _snapshot(ordinary)}
    async with serving(local_plan(2, rounds=1, after=2, optimizer=optimizer)) as cluster:
        for step in range(2):
            await push_step(cluster, step)
            found = await cluster.pull(step + 1)
            assert cluster.plan.shares_moments(step + 1) is (step == 1)
        assert same(found, expected)
        moments = await cluster.pull_moments(2)
        for array in arrays:
            assert same(moments[array], {index: torch.from_numpy(state[array]) for index, state in states.items()})
        await push_step(cluster, 2)
        await cluster.pull(3)
        close(
            (await cluster.pull_moments(3))[arrays[0]],
            {fragment.index: mean(cluster.plan, 2, fragment.index, arrays[0]) for fragment in FRAGMENTS},
        )


def _snapshot(cluster: Cluster) -> list[Any]:
    return [pair for shard in cluster.shards for state in shard.weights.values() for pair in state.snapshot()]


async def test_ordinary_steps_take_no_moments_and_send_none() -> None:
    async with serving(local_plan(after=1)) as cluster:
        moment_bundle = cluster.plan.moment_bundles[0].index
        error = await cluster.refusal(0, list(frames(*cluster.contribution(0, moment_bundle))))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "slots contribute moments to rounds only" in str(error.details())
        version, found = await cluster.arrivals(0, 0, bundles=[*cluster.shards[0].bundles])
        assert (version, [header.bundle for header, _ in found]) == (0, list(cluster.shards[0].weights))
        await push_step(cluster, 0)
        version, found = await cluster.arrivals(0, 1, bundles=[*cluster.shards[0].bundles])
        assert (version, [header.bundle for header, _ in found]) == (1, list(cluster.shards[0].bundles))


async def test_a_round_waits_for_every_moment_of_every_slot() -> None:
    async with serving(local_plan(2)) as cluster:
        last = (2, cluster.plan.moment_bundles[-1].index)
        await push_step(cluster, 0, [key for key in cluster.all_keys() if key != last])
        statuses = await cluster.status()
        assert sorted(list(status.missing_slots) for status in statuses) == [[], [2]]
        assert {status.version for status in statuses} == {0}
        assert sum(status.num_parameters for status in statuses) == cluster.plan.num_parameters
        await cluster.push([last], 0, **SLOTS[2])
        await cluster.pull(1)


async def test_a_tied_tensor_of_a_pipeline_has_two_parts_in_ordinary_steps_and_one_in_rounds() -> None:
    table = replace(TENSORS[0], last_unit=TENSORS[-1].unit)
    plan = local_plan(after=1, tensors=(table, *TENSORS[1:]), stage_ends=(2, 1 + TENSORS[-1].unit))
    async with serving(plan) as cluster:
        tied = [(slot, bundle.index) for slot in range(NUM_SLOTS) for bundle in plan.bundles if bundle.num_parts == 2]
        await push_step(cluster, 0)
        assert len(tied) > NUM_SLOTS
        assert (await cluster.status())[0].version == 0
        await cluster.push(tied, 0, part=1)
        await everything(cluster, 1)
        error = await cluster.refusal(0, list(frames(*cluster.contribution(*tied[0], 1, part=1))))
        assert "part 1, but its tensors have 1" in str(error.details())
        await push_step(cluster, 1, [key for key in cluster.all_keys(1) if key != tied[-1]])
        statuses = await cluster.status()
        assert [(status.version, list(status.missing_slots)) for status in statuses] == [(1, [tied[-1][0]])]
        await push_step(cluster, 1, tied[-1:])
        await cluster.pull(2)


async def test_a_header_may_name_the_tokens_of_a_whole_round() -> None:
    async with serving(local_plan(rounds=2, after=1)) as cluster:
        most = {"slot_tokens": LENGTH * SLOT_TOKENS, "slot_samples": LENGTH * SLOT_SAMPLES}
        error = await cluster.refusal(0, list(frames(*cluster.contribution(0, 0, 0, **most))))
        assert f"a slot has at most {SLOT_TOKENS} of {SLOT_SAMPLES}" in str(error.details()), "in an ordinary step"
        await push_step(cluster, 0)
        await everything(cluster, 1)
        for more in ({"slot_tokens": most["slot_tokens"] + 1}, {"slot_samples": most["slot_samples"] + 1}):
            error = await cluster.refusal(0, list(frames(*cluster.contribution(0, 0, 1, **(most | more)))))
            assert f"a slot has at most {most['slot_tokens']} of {most['slot_samples']}" in str(error.details())
        wrong = cluster.contribution(0, cluster.plan.moment_bundles[0].index, 1, codec=codec_named("bf16").wire)
        assert "codec CODEC_BF16, but it is fp32" in str((await cluster.refusal(0, list(frames(*wrong)))).details())
        await cluster.push(cluster.all_keys(1), 1, **most)
        await cluster.pull(2)


async def test_a_slot_of_fewer_steps_may_name_no_more_tokens_than_they_have() -> None:
    async with serving(local_plan(local={"slot_steps": [LENGTH, *[1] * (NUM_SLOTS - 1)]})) as cluster:
        most = {"slot_tokens": LENGTH * SLOT_TOKENS, "slot_samples": LENGTH * SLOT_SAMPLES}
        error = await cluster.refusal(0, list(frames(*cluster.contribution(1, 0, 0, **most))))
        assert f"a slot has at most {SLOT_TOKENS} of {SLOT_SAMPLES}" in str(error.details())
        one = {"slot_tokens": SLOT_TOKENS, "slot_samples": SLOT_SAMPLES}
        for slot, bundle in cluster.all_keys(0):
            await cluster.push([(slot, bundle)], 0, **(one if slot else most))
        await cluster.pull(1)


@pytest.mark.parametrize("optimizer", [{"kind": "sgd", "momentum": 0.0}])
async def test_rounds_of_one_step_with_plain_sgd_are_ordinary_steps(optimizer: dict[str, Any]) -> None:
    """A slot's difference is then the learning rate times its gradient; the outer rule takes it as it is."""
    optimizer |= {"learning_rate": 0.5, "clip_norm": 1e9, "weight_decay": 0.0}
    outer = {"learning_rate": 1.0, "momentum": 0.0}
    async with (
        serving(make_plan(2, optimizer=optimizer)) as ordinary,
        serving(
            local_plan(2, optimizer=optimizer, local={"steps": 1, "inner_state": "reset", "outer": outer})
        ) as rounds,
    ):
        for step in range(3):
            await ordinary.push(ordinary.all_keys(), step)
            expected = await ordinary.pull(step + 1)
            rate = rate_of_step(rounds.plan.recipe, step)
            await rounds.push(rounds.all_keys(), step, scale=rate)
            found = await rounds.pull(step + 1)
        for index in expected:
            torch.testing.assert_close(found[index], expected[index], rtol=1e-6, atol=1e-7)


# -- from and to other jobs --------------------------------------------------------------------------------------------


async def test_starts_with_the_state_of_a_job_without_rounds_and_the_other_way_round(tmp_path: Path) -> None:
    """Moments go over, an outer momentum begins with zeros, and a job without rounds has no use for it."""
    for name in ("ordinary", "rounds"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
    root = tmp_path / "ordinary"
    plan = make_plan(1, data=str(root), checkpoint_root=str(root / "checkpoints"))
    async with serving(plan) as cluster:
        await push_step(cluster, 0)
        weights = await cluster.pull(1)
        ordinary = await saved(cluster, 1)
    assert CheckpointReader(ordinary).kinds == {"weight", STEP_COUNT, *MOMENTS}
    plan = saving_plan(tmp_path / "rounds", 2, start_from=_start(ordinary))
    async with serving(plan) as cluster:
        assert same(await cluster.pull(0), weights)
        moments = await cluster.pull_moments(0)
        assert all(same(moments[array], array_of(CheckpointReader(ordinary), array)) for array in MOMENTS)
        await push_step(cluster, 0)
        weights, moments = await cluster.pull(1), await cluster.pull_moments(1)
        close(
            array_of(CheckpointReader(rounds := await saved(cluster, 1)), OUTER_MOMENTUM),
            {index: mean(plan, 0, index) for index in weights},
        )
    async with serving(make_plan(1, start_from=_start(rounds))) as cluster:
        assert same(await cluster.pull(0), weights)
        state = {fragment.index: arrays for fragment, arrays in _snapshot(cluster)}
        for array in MOMENTS:
            assert same(moments[array], {index: torch.from_numpy(arrays[array]) for index, arrays in state.items()})
        assert OUTER_MOMENTUM not in state[0]


async def test_a_checkpoint_without_moments_is_named(tmp_path: Path) -> None:
    async with serving(saving_plan(tmp_path, local={"inner_state": "reset"})) as cluster:
        await push_step(cluster, 0)
        await cluster.pull(1)
        directory = await saved(cluster, 1)
    cluster = Cluster(make_plan(1, start_from=_start(directory)))
    try:
        with pytest.raises(CheckpointError, match=r"has no 'exp_avg.*; .* local.inner_state: reset"):
            await cluster.start()
    finally:
        await cluster.stop()
    async with serving(make_plan(1, start_from=_start(directory) | {"optimizer": False})) as other:
        assert len(await other.pull(0)) == len(FRAGMENTS)


def _start(directory: str) -> dict[str, Any]:
    manifest = read_manifest(directory)
    return {
        "weights": directory,
        "optimizer": True,
        "checkpoint": directory,
        "state_sha256": manifest.state_sha256,
    }


# -- checkpoints while rounds go on, and memory ------------------------------------------------------------------------


async def test_a_checkpoint_written_during_the_next_round_is_of_one_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is held up at its first fragment, until a round has replaced weights and moments."""
    gate = threading.Event()

    def held_up(shard: Any) -> Any:
        for fragment in shard:
            gate.wait(20)
            yield fragment

    monkeypatch.setattr(
        checkpointing,
        "write_shard",
        lambda to, file, of, shard, sizes: write_shard(to, file, of, held_up(shard), sizes),
    )
    async with serving(saving_plan(tmp_path, push="int8")) as cluster:
        await push_step(cluster, 0)
        expected = {**await cluster.pull_moments(1), "weight": await cluster.pull(1)}
        await push_step(cluster, 1)
        await everything(cluster, 2)
        assert not same(await cluster.pull(2), expected["weight"])
        assert not same((await cluster.pull_moments(2))["exp_avg"], expected["exp_avg"])
        gate.set()
        reader = CheckpointReader(await saved(cluster, 1))
        assert all(same(array_of(reader, array), values) for array, values in expected.items())
        assert counts_of(reader) == {LENGTH}


@pytest.mark.parametrize(
    ("optimizer", "local", "after"),
    [
        ({}, {}, 0),
        ({}, {"moments": {"exp_avg": "int8"}, "outer": {"momentum": 0.0}}, 1),
        ({}, {"inner_state": "reset"}, 0),
        ({}, {"inner_state": "reset"}, 1),
        ({"kind": "sgd", "momentum": 0.9}, {"moments": "bf16"}, 0),
        ({"kind": "sgd"}, {}, 0),
        ({"kind": "muon"}, {"moments": "bf16"}, 0),
    ],
)
async def test_a_server_holds_what_was_predicted(optimizer: dict[str, Any], local: dict[str, Any], after: int) -> None:
    plan = local_plan(1, after=after, optimizer=optimizer, local=local, push="int8", pull="delta-int8")
    predicted = server_bytes(plan.recipe, plan.fragments, plan.tensors)
    async with serving(plan) as cluster:
        for version in range(after + 1):
            await push_step(cluster, version)
            await everything(cluster, version + 1)
        await until(lambda: len(cluster.reports) == after + 1)
        status = (await cluster.status())[0]
        assert status.state_bytes - status.newcomer_bytes == predicted.state
        arrays = [pair for _, state in _snapshot(cluster) for pair in state.items()]
        assert sum(array.nbytes for kind, array in arrays if kind != STEP_COUNT) == predicted.checkpoint
        sizes = [cluster.push_codec(bundle).max_bytes for bundle in cluster.shards[0].bundles]
        assert predicted.early == NUM_SLOTS * sum(sizes)
        peers = traffic(plan)[0]
        assert peers.step_bytes == NUM_SLOTS * sum(sizes)
        assert peers.contribution_bytes >= max(sizes)
        assert peers.request_bytes >= 4 * len(cluster.shards[0].bundles)
