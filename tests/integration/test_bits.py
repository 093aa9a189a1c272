"""Invariant 1: the final bits are a function of recipe, seed and data, not of the number of nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cluster import running
from support.tiny import GPT2, tiny_recipe

from gradstream.client import Checkpoint

# A walk over the grid {1,2,3} workers x {1,2,3} servers in which neighbours differ by one process.
WALK = [(1, 1), (2, 1), (3, 1), (3, 2), (2, 2), (1, 2), (1, 3), (2, 3), (3, 3)]
PUSH_AND_PULL = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "int8": ("int8", "int8"),
    "delta-int8": ("int8", "delta-int8"),
    "delta-int4": ("int4-hadamard", "delta-int4"),
    "xor-bf16": ("bf16", "xor-bf16"),
    "int2": ("int2", "int8"),
    "delta-int2": ("sparse", "delta-int2"),
    "muon": ("int8", "delta-int8"),
}
# Where a pair is not tried on the whole walk.
CORNERS = [(1, 1), (3, 1), (1, 3), (3, 3)]
TRIED = {
    "delta-int8": CORNERS,
    "delta-int4": CORNERS,
    "xor-bf16": [(1, 1), (2, 3)],
    "int2": [(1, 1), (2, 3)],
    "delta-int2": [(1, 1), (2, 3)],
    "muon": [(1, 1), (2, 3)],
}


@pytest.mark.timeout(900)
def test_same_bits_on_every_number_of_workers_and_servers(tiny_data: Path, tmp_path: Path) -> None:
    digests: dict[str, dict[tuple[int, int], str]] = {name: {} for name in PUSH_AND_PULL}
    with running(tmp_path / "cluster") as cluster:
        cluster.start_coordinator()
        live: dict[str, list[str]] = {"worker": [], "server": []}
        for num_workers, num_servers in WALK:
            for kind, wanted in (("worker", num_workers), ("server", num_servers)):
                while len(live[kind]) > wanted:
                    cluster.terminate(live[kind].pop())
                while len(live[kind]) < wanted:
                    name = f"{kind}-{len(live[kind])}"
                    (cluster.start_workers if kind == "worker" else cluster.start_servers)(name)
                    live[kind].append(name)
            for name, (push, pull) in PUSH_AND_PULL.items():
                if (num_workers, num_servers) not in TRIED.get(name, WALK):
                    continue
                recipe = tiny_recipe(
                    tiny_data,
                    tmp_path / "runs",
                    name=f"bits-{name}",
                    codec={"push": push, "pull": pull, "keyframe_versions": 4}
                    | ({"residual_decay": 0} if push == "sparse" else {}),
                    optimizer={"kind": "muon"} if name == "muon" else {},
                    cluster={"min_workers": num_workers, "min_servers": num_servers},
                )
                job = cluster.client.submit(recipe)
                cluster.finish(job.job_id)
                digests[name][num_workers, num_servers] = cluster.final_digest(job.job_id)
    for name, found in digests.items():
        assert set(found) == set(TRIED.get(name, WALK))
        assert len(set(found.values())) == 1, (name, found)
    # Each pair walks its own trajectory: equal digests would mean that a codec was not used. But changed bits are only
    # another way to send bf16.
    firsts = {name: found[1, 1] for name, found in digests.items()}
    assert firsts.pop("xor-bf16") == firsts["bf16"]
    assert len(set(firsts.values())) == len(firsts)


def test_gpt2_with_dropout_has_the_same_bits(tiny_data: Path, tmp_path: Path) -> None:
    """Tied embeddings, learned positions, biases, and dropout drawn from (seed, step, slot, microbatch)."""
    digests = []
    with running(tmp_path / "cluster") as cluster:
        cluster.start_coordinator()
        cluster.start_servers("server-0")
        cluster.start_workers("worker-0")
        for wanted in (1, 2):
            if wanted == 2:
                cluster.start_servers("server-1")
                cluster.start_workers("worker-1")
            recipe = tiny_recipe(
                tiny_data,
                tmp_path / "runs",
                name="gpt2",
                model={"config": GPT2},
                training={"microbatch": 2, "recompute": True},
                cluster={"min_workers": wanted, "min_servers": wanted},
            )
            job = cluster.client.submit(recipe)
            cluster.finish(job.job_id)
            digests.append(cluster.final_digest(job.job_id))
    assert digests[0] == digests[1]


@pytest.mark.timeout(300)
def test_a_worker_that_joins_a_job_that_pulls_differences_changes_no_bit(tiny_data: Path, tmp_path: Path) -> None:
    """It gets the reference, which the others hold. The job is as long as the worker takes to come; checkpoints
    compare."""
    recipe = tiny_recipe(
        tiny_data,
        tmp_path / "runs",
        training={"num_steps": 5000},
        codec={"push": "int4", "pull": "delta-int4"},
        validation={"interval_steps": 0},
        checkpoint={"interval_steps": 10, "keep": 500},
    )
    with running(tmp_path / "cluster") as cluster:
        cluster.start_coordinator()
        cluster.start_servers("server-0", "server-1")
        cluster.start_workers("worker-0", "worker-1")

        def digests_up_to(job_id: str, version: int) -> dict[int, str]:
            """Of its checkpoints; stops the job when it has made one of this version."""
            for item in cluster.client.watch(job_id):
                if isinstance(item, Checkpoint) and item.version >= version:
                    break
            cluster.client.stop(job_id, now=True)
            cluster.wait_job(job_id)
            return {found.version: found.state_sha256 for found in cluster.client.checkpoints(job_id)}

        job = cluster.client.submit(recipe)
        cluster.wait_for(job.job_id, lambda job: job.version > 0, "begin")
        cluster.start_workers("worker-2")
        joined = cluster.wait_for(
            job.job_id, lambda job: any("worker-2" in holder for holder in job.slot_holders), "give worker-2 a slot"
        ).version
        version = (joined // 10 + 2) * 10
        disturbed = digests_up_to(job.job_id, version)
        assert 0 < joined < version <= max(disturbed)

        cluster.terminate("worker-1", "worker-2")
        reference = digests_up_to(cluster.client.submit(recipe).job_id, version)
    assert version in disturbed
    assert version in reference
    for common in disturbed.keys() & reference.keys():
        assert disturbed[common] == reference[common], common
