"""Muon on servers: torch's steps, with the same bits on any number of servers and over a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.shards import (
    FRAGMENTS,
    NUM_SLOTS,
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
from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.model.model import initial_weights
from gradstream.core.plan.plan import Plan
from gradstream.core.recipe.learning_rate import rate_of_step

NUM_STEPS = 3
MUON = {"kind": "muon"}


def expected_after(num_steps: int, plan: Plan) -> dict[int, torch.Tensor]:
    """What torch's Muon and AdamW make of whole tensors in one process, with the gradients added in fp64."""
    rule = plan.recipe.optimizer
    weights = {name: weights.clone() for name, weights in initial_weights(plan.model_config, plan.recipe.seed)}
    matrices = [TENSORS[number].name for number in plan.whole_tensors]
    muon = torch.optim.Muon(
        [weights[name] for name in matrices],
        weight_decay=rule.weight_decay,
        momentum=rule.muon.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [weights[each.name]], "weight_decay": rule.weight_decay if each.decay else 0.0}
            for each in TENSORS
            if each.name not in matrices
        ],
        betas=rule.betas,
        eps=rule.eps,
    )
    for step in range(num_steps):
        means = {
            each.index: sum(gradient(step, slot, each.index).double() for slot in range(NUM_SLOTS))
            / (NUM_SLOTS * SLOT_TOKENS)
            for each in FRAGMENTS
        }
        norm = float(torch.cat([*means.values()]).norm())
        for number, tensor in enumerate(TENSORS):
            mean_N = torch.cat([means[each.index] for each in FRAGMENTS if each.tensor == number])
            clipped_N = mean_N * min(1.0, rule.clip_norm / (norm + 1e-6))
            weights[tensor.name].grad = clipped_N.float().view(tensor.shape)
        for optimizer in (muon, adamw):
            for group in optimizer.param_groups:
                group["lr"] = rate_of_step(plan.recipe, step)
            optimizer.step()
    return {f.index: weights[TENSORS[f.tensor].name].detach().reshape(-1)[f.begin : f.end] for f in FRAGMENTS}


async def run(cluster: Cluster, first: int = 0) -> dict[int, torch.Tensor]:
    """Push all contributions to the steps from `first` on; return the last version."""
    for step in range(first, NUM_STEPS):
        await cluster.push(cluster.all_keys(), step)
        weights = await cluster.pull(step + 1)
        await until(lambda count=step + 1 - first: len(cluster.checkpoints) == count * len(cluster.shards))
    return weights


def digests(cluster: Cluster, version: int) -> dict[int, bytes]:
    return {
        each.fragment: each.sha256
        for report in cluster.checkpoints
        if report.version == version
        for each in report.fragments
    }


def saving_plan(directory: Path, num_servers: int, **changes: Any) -> Plan:
    """A plan of which every version is saved."""
    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    return make_plan(num_servers, data=str(directory), checkpoint_root=str(directory), optimizer=MUON, **changes)


async def test_the_steps_and_bits_on_any_number_of_servers_and_over_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = saving_plan(tmp_path / "1", 1)
    async with serving(first) as cluster:
        expected = await run(cluster)
        found = {version: digests(cluster, version) for version in range(1, NUM_STEPS + 1)}
        directory = directory_of(first.checkpoint_root, 1)
        write_manifest(directory, first, 1, [each for each in cluster.checkpoints if each.version == 1], {})
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch iterates in fp32 then, as servers do
    for index, by_torch_N in expected_after(NUM_STEPS, first).items():
        torch.testing.assert_close(expected[index], by_torch_N, rtol=0, atol=1e-5)
    reader = CheckpointReader(directory)
    for number, tensor in enumerate(TENSORS):
        kind = "momentum_buffer" if number in first.whole_tensors else "exp_avg"
        assert reader.read(kind, tensor.name, 0, tensor.num_elements).any()
    for num_servers in (2, 3):
        async with serving(saving_plan(tmp_path / str(num_servers), num_servers)) as cluster:
            assert same(await run(cluster), expected)
            assert {version: digests(cluster, version) for version in range(1, NUM_STEPS + 1)} == found
        again = saving_plan(
            tmp_path / f"again-{num_servers}", num_servers, epoch=6, start_version=1, checkpoint_path=directory
        )
        async with serving(again) as cluster:
            assert same(await run(cluster, 1), expected)
            assert digests(cluster, NUM_STEPS) == found[NUM_STEPS]
