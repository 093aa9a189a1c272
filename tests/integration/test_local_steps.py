"""Jobs with local steps: the same bits on any nodes and after deaths, and the losses of plain PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cluster import Cluster, running
from support.plain_rounds import plain_losses
from support.tiny import tiny_recipe

from gradstream.client import Event, Step
from gradstream.core.data.manifest import parse_manifest
from gradstream.core.data.sampler import SlotSampler
from gradstream.core.model.model import build, initial_weights
from gradstream.core.plan.leases import slots_text
from gradstream.core.recipe.recipe import Recipe

LENGTH = 5
SLOT_STEPS = [LENGTH, 3, 2, 2]
KINDS: dict[str, dict[str, Any]] = {
    "shared": {"local": {"steps": LENGTH}, "codec": {"push": "int8", "pull": "delta-int8", "keyframe_versions": 2}},
    "reset": {"local": {"steps": LENGTH, "inner_state": "reset"}, "codec": {"push": "int8", "pull": "bf16"}},
    "after": {
        "local": {"steps": LENGTH, "after": 10, "moments": {"exp_avg": "int8"}},
        "codec": {"push": "int8", "pull": "fp32"},
    },
    "two bits": {
        "local": {"steps": LENGTH, "inner_state": "reset"},
        "codec": {"push": "int2", "pull": "delta-int2", "embedding": "int2"},
    },
    "muon": {
        "local": {"steps": LENGTH},
        "optimizer": {"kind": "muon"},
        "codec": {"push": "int4", "pull": "delta-int4"},
    },
    "unlike": {"local": {"steps": LENGTH, "slot_steps": SLOT_STEPS}, "codec": {"push": "int8", "pull": "delta-int8"}},
}
WALK = [(2, 2), (3, 1), (1, 3)]
"""Numbers of workers and servers."""


def recipe_of(data: Path, run_root: Path, kind: str, **sections: Any) -> Recipe:
    tree = {"training": {"num_steps": 4 * LENGTH}, "checkpoint": {"interval_steps": LENGTH}, **KINDS[kind], **sections}
    return tiny_recipe(data, run_root, name=f"local-{kind.replace(' ', '-')}", **tree)


def activity_of(cluster: Cluster, name: str) -> str:
    return next(node.activity.detail for node in cluster.client.nodes() if node.name == name)


def losses_of_one_process(recipe: Recipe, data: Path) -> list[float]:
    """The mean loss of every round."""
    torch.set_num_threads(1)
    manifest = parse_manifest((data / "manifest.json").read_bytes())
    training = recipe.training
    model = build(recipe.model.config)
    with torch.no_grad():
        for name, tensor in initial_weights(recipe.model.config, recipe.seed):
            model.get_parameter(name).copy_(tensor)

    def passes(slot: int, step: int) -> tuple[float, int]:
        sampler = SlotSampler(manifest, "train", slot, training.num_slots, training.sequence_length, recipe.seed)
        loss_sum, num_tokens = 0.0, 0
        for address in sampler.samples(step, training.slot_batch):
            tokens = torch.frombuffer(bytearray((data / address.file).read_bytes()), dtype=torch.uint16).long()
            begin = address.window * training.sequence_length
            sample = tokens[begin : begin + training.sequence_length + 1][None]
            logits = model(input_ids=sample[:, :-1], use_cache=False).logits.flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, sample[:, 1:].flatten(), reduction="sum")
            loss.backward()
            loss_sum, num_tokens = loss_sum + loss.item(), num_tokens + training.sequence_length
        return loss_sum, num_tokens

    return plain_losses(recipe, list(model.parameters()), passes)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two workers and two servers. The tests of this module use it one after the other."""
    with running(tmp_path_factory.mktemp("cluster")) as found:
        found.start_coordinator()
        found.start_servers("server-0", "server-1")
        found.start_workers("worker-0", "worker-1")
        yield found


@pytest.mark.timeout(180)
@pytest.mark.parametrize("inner_state", ["shared", "keep"])
def test_losses_equal_plain_pytorch(cluster: Cluster, tiny_data: Path, tmp_path: Path, inner_state: str) -> None:
    recipe = tiny_recipe(
        tiny_data,
        tmp_path / "runs",
        name="local-reference",
        training={"num_steps": 4 * LENGTH},
        local={
            "steps": LENGTH,
            "inner_state": inner_state,
            "moments": "fp32",
            "outer": {"learning_rate": 0.8, "momentum": 0.9},
        },
        optimizer={"clip_norm": 0.5},
        cluster={"min_workers": 2, "min_servers": 2},
    )
    job = cluster.client.submit(recipe)
    cluster.finish(job.job_id)
    losses = [item.loss for item in cluster.client.watch(job.job_id, follow=False) if isinstance(item, Step)]
    expected = losses_of_one_process(recipe, tiny_data)
    assert losses == pytest.approx(expected, rel=1e-6)
    assert expected[-1] < expected[0] - 0.5


@pytest.mark.timeout(240)
def test_rounds_without_late_slots_are_replayed_to_the_same_bits(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """A worker holds its slots up, and a server is lost. The slots that counted give the same bits elsewhere."""
    num_rounds, quorum = 9, 2
    cluster.kill("server-1")
    cluster.start_servers("server-1", faults="kill@step=6,decided=1")
    cluster.start_workers("late", faults="slow@milliseconds=150")
    recipe = recipe_of(
        tiny_data,
        tmp_path / "runs",
        "shared",
        local={"steps": LENGTH, "quorum": quorum, "grace_seconds": 0.05},
        training={"num_steps": num_rounds * LENGTH},
        checkpoint={"interval_steps": 4 * LENGTH},
        cluster={"min_workers": 3, "min_servers": 2},
    )
    client = cluster.client
    job = client.submit(recipe)
    assert cluster.wait_dead("server-1") == -9
    cluster.start_servers("server-1")
    job = cluster.finish(job.job_id)

    rows = [row for row in client.metrics(job.job_id) if row.epoch is not None]
    assert len(rows) == num_rounds
    counts = [len(row.slots) for row in rows]
    assert quorum <= min(counts) < 4, counts
    assert job.num_samples == sum(counts) * LENGTH * 2, "samples of late slots were not used"
    assert job.num_tokens == job.num_samples * 32 == rows[-1].num_tokens
    history = list(client.watch(job.job_id, follow=False))
    steps = [item for item in history if isinstance(item, Step)]
    assert job.epoch == 2
    again = [item for item in steps if item.epoch == 1 and item.version >= 4]
    assert len(again) >= 2, "rounds since the checkpoint were computed again"
    for item in again:
        (other,) = [other for other in steps if other.epoch == 2 and other.version == item.version]
        assert (other.slots, other.loss, other.grad_norm) == (item.slots, item.loss, item.grad_norm)
    said = [item.message for item in history if isinstance(item, Event)]
    late = [slot for slot in range(4) if slot not in rows[counts.index(min(counts))].slots]
    assert any(f"committed with {min(counts)} of 4 slots, without {slots_text(late)}" in line for line in said)
    assert any("outside the exact class" in line and "take the slots that the ledger has" in line for line in said)

    cluster.terminate("late", "worker-1")
    cluster.start_servers("server-2")
    replay = cluster.finish(client.replay(job.job_id, request_id="a-replay").job_id)
    assert client.replay(job.job_id, request_id="a-replay").job_id == replay.job_id, "the request counts once"
    assert [row.slots for row in client.metrics(replay.job_id) if row.epoch is not None] == [row.slots for row in rows]
    assert cluster.final_digest(replay.job_id) == cluster.final_digest(job.job_id)
    assert (replay.num_tokens, replay.validation_loss) == (job.num_tokens, job.validation_loss)
    cluster.terminate("server-2")
    cluster.start_workers("worker-1")


@pytest.mark.timeout(300)
def test_same_bits_on_every_number_of_nodes_and_after_deaths(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    digests: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}

    def finish(kind: str, how: str, job_id: str) -> None:
        job = cluster.finish(job_id)
        num_samples = 4 * sum(SLOT_STEPS) * 2 if kind == "unlike" else 4 * LENGTH * 8
        assert job.num_tokens == num_samples * 32, "every token of every inner step counts once"
        digests[kind][how] = cluster.final_digest(job_id)

    live = {"worker": ["worker-0", "worker-1"], "server": ["server-0", "server-1"]}
    for num_workers, num_servers in WALK:
        for node, wanted in (("worker", num_workers), ("server", num_servers)):
            while len(live[node]) > wanted:
                cluster.terminate(live[node].pop())
            while len(live[node]) < wanted:
                live[node].append(f"{node}-{len(live[node])}")
                (cluster.start_workers if node == "worker" else cluster.start_servers)(live[node][-1])
        needs = {"min_workers": num_workers, "min_servers": num_servers}
        for kind in KINDS:
            if kind == "unlike" and num_workers == 3:
                continue  # 1 and 2 workers are enough
            job = cluster.client.submit(recipe_of(tiny_data, tmp_path / "runs", kind, cluster=needs))
            finish(kind, f"{num_workers} workers, {num_servers} servers", job.job_id)

    cluster.start_workers("mortal", faults=f"kill@step={2 * LENGTH + 2}")
    job = cluster.client.submit(recipe_of(tiny_data, tmp_path / "runs", "shared", cluster={"min_workers": 2}))
    assert cluster.wait_dead("mortal") == -9
    finish("shared", "a worker killed in mid-round", job.job_id)
    assert cluster.client.job(job.job_id).epoch == 1

    # An idle worker takes the slot that a slow one has not begun, and copies the one that it computes.
    cluster.start_workers("snail", faults="slow@milliseconds=1000")
    job = cluster.client.submit(recipe_of(tiny_data, tmp_path / "runs", "shared", cluster={"min_workers": 2}))
    finish("shared", "a slow worker's slots are copied", job.job_id)
    items = list(cluster.client.watch(job.job_id, follow=False))
    messages = [item.message for item in items if isinstance(item, Event)]
    assert any(re.search(r"computes a copy of slot \d: in about \d+ s, while snail needs", text) for text in messages)
    times = [item.time for item in items if isinstance(item, Step)]
    # Without copies the snail's slot alone takes LENGTH seconds a round.
    assert (times[-1] - times[0]).total_seconds() < 0.8 * (len(times) - 1) * LENGTH
    cluster.kill("snail")

    cluster.terminate(*live["worker"])
    cluster.start_workers("slow", faults="slow@milliseconds=100")
    job = cluster.client.submit(recipe_of(tiny_data, tmp_path / "runs", "shared"))
    cluster.wait_for(job.job_id, lambda job: job.version > 0, "commit a round")
    cluster.wait_for(job.job_id, lambda _: activity_of(cluster, "slow").startswith("inner step"), "go on")
    cluster.kill(*cluster.processes)
    cluster.start_coordinator()
    cluster.start_servers("server-a")
    cluster.start_workers("worker-a", "worker-b")
    finish("shared", "everything killed in mid-round, resumed elsewhere", job.job_id)
    assert cluster.client.job(job.job_id).epoch == 2

    for kind, found in digests.items():
        assert len(set(found.values())) == 1, (kind, found)
    assert len({found["2 workers, 2 servers"] for found in digests.values()}) == len(KINDS)
