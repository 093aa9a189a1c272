"""AdamW with bf16 moments: bits that depend on nothing but the recipe, rounding without bias, a loss near fp32's."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.shards import make_plan, same, serving, until

from gradstream.core.checkpoint.manifest import directory_of, write_manifest
from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.kernels.moments import round_moments
from gradstream.core.optimizer.optimizer import Optimizer
from gradstream.core.optimizer.rule import Slice
from gradstream.core.plan.fragments import Fragment, Tensor
from gradstream.core.recipe.recipe import OptimizerConfig
from gradstream.services.parameter_server.bf16_moments import Bf16MomentsOptimizer

RULE = OptimizerConfig(moments="bf16", learning_rate=0.01)


def rounded(values_N: torch.Tensor, key: int, begin: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same values as both moments, rounded."""
    bits_N = values_N.numpy().view(np.uint32)
    out = np.zeros((2, len(values_N)), np.uint16)
    round_moments(bits_N, bits_N, key, begin, out[0], out[1])
    first_N, second_N = (torch.from_numpy(half.view(np.int16)).view(torch.bfloat16).float() for half in out)
    return first_N, second_N


def test_rounding_is_to_a_neighbour_and_right_on_average() -> None:
    for value in (1.0 + 1 / 1024, -3e-9, 7.77e11):
        values_N = torch.full((200_000,), value)
        exact = float(values_N[0])
        for found_N in rounded(values_N, 12345):
            neighbours = sorted(set(found_N.tolist()))
            assert len(neighbours) == 2
            assert neighbours[0] < exact < neighbours[1]
            gap = neighbours[1] - neighbours[0]
            assert abs(float(found_N.double().mean()) - exact) < 0.01 * gap
    first_N, second_N = rounded(values_N, 12345)
    assert abs(np.corrcoef(first_N.numpy(), second_N.numpy())[0, 1]) < 0.01, "the moments' draws are not independent"


def test_what_bf16_holds_stays_and_so_does_what_is_not_finite() -> None:
    values_N = torch.tensor([0.0, -0.0, 1.5, -(2.0**100), float("inf"), -float("inf")])
    for found_N in rounded(values_N, 3):
        assert torch.equal(found_N.view(torch.int32), values_N.view(torch.int32))
    assert rounded(torch.tensor([float("nan")]), 3)[0].isnan().all()


def updated(bounds: list[int], seed: int = 1, num_steps: int = 4) -> torch.Tensor:
    """The weights of one tensor, cut at `bounds`, after some steps."""
    tensor = Tensor("w", (bounds[-1],), True, 0)
    generator = torch.Generator().manual_seed(0)
    weights_N, gradient_N = torch.randn(bounds[-1], generator=generator), torch.empty(bounds[-1])
    fragments = [
        Fragment(number, 0, begin, end, (end - begin,)) for number, (begin, end) in enumerate(pairwise(bounds))
    ]
    cuts = [(fragment.begin, fragment.end) for fragment in fragments]
    optimizer = Bf16MomentsOptimizer(
        [weights_N[begin:end] for begin, end in cuts],
        [gradient_N[begin:end] for begin, end in cuts],
        fragments,
        [tensor] * len(cuts),
        RULE,
        seed,
    )
    for step in range(num_steps):
        gradient_N.copy_(torch.randn(len(gradient_N), generator=generator))
        optimizer.step(0.01, step)
    return weights_N


def test_bits_do_not_depend_on_the_cut_and_do_on_the_seed() -> None:
    assert torch.equal(updated([0, 1003]), updated([0, 256, 768, 1003]))
    assert not torch.equal(updated([0, 1003]), updated([0, 1003], seed=2))


@pytest.mark.parametrize("num_servers", [1, 2])
async def test_the_same_bits_on_any_number_of_servers_and_over_a_restart(tmp_path: Path, num_servers: int) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    optimizer = {"moments": "bf16"}
    plan = make_plan(
        1, pull="delta-int8", data=str(tmp_path), checkpoint_root=str(tmp_path / "checkpoints"), optimizer=optimizer
    )
    digests = []
    async with serving(plan) as cluster:
        for step in range(2):
            await cluster.push(cluster.all_keys(), step=step)
            expected = await cluster.pull(step + 1)
            await until(lambda count=step + 1: len(cluster.checkpoints) == count)
        directory = directory_of(plan.checkpoint_root, 1)
        write_manifest(directory, plan, 1, cluster.checkpoints[:1], {})
        digests.append({each.fragment: each.sha256 for each in cluster.checkpoints[1].fragments})
    name = plan.tensors[0].name
    moment_N = CheckpointReader(directory).read("exp_avg_sq", name, 0, 8)
    assert moment_N.any()
    assert not (moment_N.view(np.uint32) & 0xFFFF).any(), "the checkpoint has more bits than bf16"
    other = make_plan(
        num_servers,
        pull="delta-int8",
        epoch=6,
        data=str(tmp_path),
        checkpoint_root=str(tmp_path / "again"),
        start_version=1,
        checkpoint_path=directory,
        optimizer=optimizer,
    )
    async with serving(other) as cluster:
        await cluster.push(cluster.all_keys(), step=1)
        assert same(await cluster.pull(2), expected)
        await until(lambda: len(cluster.checkpoints) == num_servers)
        digests.append({each.fragment: each.sha256 for report in cluster.checkpoints for each in report.fragments})
    assert digests[0] == digests[1]


def test_the_loss_of_a_tiny_job_is_near_that_of_fp32() -> None:
    """A network of 1,000 parameters learns a function; steps of second moments are far below bf16's last bit."""
    generator = torch.Generator().manual_seed(0)
    inputs_BD = torch.randn(512, 8, generator=generator)
    targets_B1 = torch.sin(inputs_BD.sum(1, keepdim=True))
    losses = {}
    for kind in ("fp32", "bf16"):
        config = OptimizerConfig(betas=(0.9, 0.999), weight_decay=0.0)
        first_N, second_N = (torch.randn(count, generator=generator.manual_seed(count)) * 0.3 for count in (800, 100))
        weights = [first_N, second_N]
        gradients = [torch.empty_like(weights_N) for weights_N in weights]
        tensors = [Tensor(f"w{number}", (len(weights_N),), False, 0) for number, weights_N in enumerate(weights)]
        fragments = [Fragment(number, number, 0, len(each)) for number, each in enumerate(weights)]
        optimizer = (
            Optimizer(list(map(Slice, weights, gradients, tensors)), config)
            if kind == "fp32"
            else Bf16MomentsOptimizer(weights, gradients, fragments, tensors, config, 1)
        )
        for step in range(400):
            leaves = [weights_N.clone().requires_grad_() for weights_N in weights]
            outputs_B1 = torch.tanh(inputs_BD @ leaves[0].reshape(8, 100)) @ leaves[1].reshape(100, 1)
            loss = (outputs_B1 - targets_B1).square().mean()
            loss.backward()
            for gradient_N, leaf in zip(gradients, leaves, strict=True):
                assert leaf.grad is not None
                gradient_N.copy_(leaf.grad)
            optimizer.step(0.003, step)
        losses[kind] = loss.item()
    assert losses["fp32"] < 0.1
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
