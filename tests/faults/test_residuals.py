"""Residuals of codecs on a real cluster: every checkpoint has them, so rolling back to one changes no bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.micro import micro_plan
from support.tiny import LLAMA, tiny_recipe

from gradstream.client import Job
from gradstream.core.checkpoint.manifest import CheckpointManifest, read_manifest
from gradstream.core.recipe.recipe import Recipe

TWO_SLOTS = {"num_slots": 2, "num_steps": 24}


def recipe_of(data: Path, run_root: Path, codec: str = "topk", **sections: object) -> Recipe:
    tree: dict[str, object] = {
        "training": TWO_SLOTS,
        "codec": {"push": codec},
        "checkpoint": {"interval_steps": 0},
        "validation": {"interval_steps": 1000, "num_samples": 8},  # the first version and the last
    }
    return tiny_recipe(data, run_root, **{**tree, **sections})


def reach(cluster: Cluster, recipe: Recipe, step: int) -> Job:
    job = cluster.client.submit(recipe)
    for item in cluster.client.watch(job.job_id):
        if getattr(item, "step", -1) >= step:
            break
    return job


def stop(cluster: Cluster, job: Job) -> CheckpointManifest:
    cluster.client.stop(job.job_id)
    assert cluster.wait_job(job.job_id).state == "stopped"
    return read_manifest(cluster.client.checkpoints(job.job_id)[-1].path)


def messages(cluster: Cluster, job: Job) -> list[str]:
    return [item.message for item in cluster.client.watch(job.job_id, follow=False) if hasattr(item, "message")]


@pytest.mark.timeout(300)
def test_pause_stop_and_resume_change_no_bit(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0", "worker-1")
    nodes = {"min_workers": 2, "min_servers": 2}
    check_bits(cluster, recipe_of(tiny_data, tmp_path / "runs", "topk", cluster=nodes))
    keep = {"steps": 2, "inner_state": "keep"}
    check_bits(cluster, recipe_of(tiny_data, tmp_path / "runs", "int8", name="keep", local=keep, cluster=nodes))


def check_bits(cluster: Cluster, recipe: Recipe) -> None:
    job = cluster.client.submit(recipe)
    cluster.finish(job.job_id)
    reference = cluster.final_digest(job.job_id)

    # --- a pause keeps everything where it is, but takes the slots away in the middle of a step
    job = reach(cluster, recipe, 4)
    cluster.client.pause(job.job_id)
    cluster.wait_for(job.job_id, lambda job: job.state == "paused", "pause")
    cluster.client.resume(job.job_id)
    assert cluster.finish(job.job_id).epoch == 1
    assert cluster.final_digest(job.job_id) == reference

    # --- a stop drops everything: servers and workers load the checkpoint
    job = reach(cluster, recipe, 4)
    manifest = stop(cluster, job)
    assert [entry.slot for entry in manifest.residuals] == [0, 1]
    cluster.client.resume(job.job_id)
    assert cluster.finish(job.job_id).epoch == 2
    assert cluster.final_digest(job.job_id) == reference
    assert not any("were lost" in message or "goes on without" in message for message in messages(cluster, job))

    # --- without its residuals the same checkpoint leads elsewhere: the digests above depend on them
    job = reach(cluster, recipe, 4)
    stop(cluster, job)
    path = Path(cluster.client.checkpoints(job.job_id)[-1].path) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "residuals": []}))
    cluster.client.resume(job.job_id)
    cluster.finish(job.job_id)
    assert cluster.final_digest(job.job_id) != reference


@pytest.mark.timeout(180)
def test_damaged_residual_fails_the_job_with_its_name(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0")
    cluster.start_workers("worker-0")
    job = reach(cluster, recipe_of(tiny_data, tmp_path / "runs"), 2)
    entry = stop(cluster, job).residuals[1]
    path = Path(cluster.client.checkpoints(job.job_id)[-1].path) / entry.file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    cluster.client.resume(job.job_id)
    failed = cluster.wait_job(job.job_id)
    assert failed.state == "failed"
    assert f"{path} is damaged" in failed.reason
    assert "\n" not in failed.reason
    assert failed.reason.startswith("worker worker-0: ")


@pytest.mark.timeout(180)
def test_killed_worker_loses_its_slots_residual_alone(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    cluster.start_workers("worker-1", faults="kill@step=3,slot=1")
    recipe = recipe_of(
        tiny_data,
        tmp_path / "runs",
        training={**TWO_SLOTS, "num_steps": 16},
        checkpoint={"interval_steps": 2},
        cluster={"min_workers": 2, "min_servers": 2},
    )
    job = cluster.client.submit(recipe)
    assert cluster.wait_dead("worker-1") == -9
    assert cluster.finish(job.job_id).epoch == 1
    checkpoints = cluster.client.checkpoints(job.job_id)
    assert [checkpoint.version for checkpoint in checkpoints] == list(range(2, 17, 2))
    # The survivor has kept a residual of slot 1 from step 3 on.
    assert [entry.slot for entry in read_manifest(checkpoints[-1].path).residuals] == [0, 1]
    assert "starts from zero" in (cluster.directory / "worker-0.log").read_text()
    assert any("slot 1 goes on without its residuals" in message for message in messages(cluster, job))

    # --- moments that slots keep
    cluster.start_workers("worker-2", faults="kill@step=6,slot=1")
    keep = {"steps": 2, "inner_state": "keep"}
    recipe = recipe_of(tiny_data, tmp_path / "runs", "int8", name="keep", local=keep, cluster={"min_workers": 2})
    job = cluster.client.submit(recipe)
    assert cluster.wait_dead("worker-2") == -9
    assert cluster.finish(job.job_id).epoch == 1
    gone = [message for message in messages(cluster, job) if "goes on without its moments" in message]
    assert len(gone) == 1
    assert gone[0].startswith("version 3 (step 6): slot ")


@pytest.mark.timeout(180)
def test_checkpoint_is_complete_without_the_residuals_of_the_dead(
    cluster: Cluster, tiny_data: Path, tmp_path: Path
) -> None:
    """The worker dies when all of step 3 is acknowledged, before it hears that version 4 has a checkpoint."""
    training = {**TWO_SLOTS, "num_steps": 16}
    recipe = recipe_of(tiny_data, tmp_path / "runs", training=training, checkpoint={"interval_steps": 4})
    plan = replace(micro_plan(LLAMA), fragment_elements=recipe.cluster.fragment_bytes // 4)
    num_bundles = len(replace(plan, placement=(0,) * len(plan.fragments)).bundles)
    cluster.start_coordinator()
    cluster.start_servers("server-0")
    cluster.start_workers("worker-0", faults=f"kill@step=3,slot=1,acknowledged={num_bundles}")
    job = cluster.client.submit(recipe)
    assert cluster.wait_dead("worker-0") == -9
    cluster.start_workers("worker-1")
    assert cluster.finish(job.job_id).epoch == 1
    found = {
        checkpoint.version: read_manifest(checkpoint.path) for checkpoint in cluster.client.checkpoints(job.job_id)
    }
    assert {version: len(manifest.residuals) for version, manifest in found.items()} == {
        version: 0 if version == 4 else 2 for version in range(4, 17, 4)
    }
    lost = [message for message in messages(cluster, job) if "were lost with their worker" in message]
    assert [message.partition(" were lost")[0] for message in lost] == ["version 4: the residuals of slots 0, 1"]


@pytest.mark.timeout(240)
def test_every_residual_codec_lowers_the_loss(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0", "worker-1")
    digests = set()
    for codec in ("topk", "sign", "powersgd", "sparse"):
        recipe = recipe_of(
            tiny_data,
            tmp_path / "runs",
            codec,
            training={**TWO_SLOTS, "num_steps": 50},
            cluster={"min_workers": 2, "min_servers": 2},
        )
        job = cluster.finish(cluster.client.submit(recipe).job_id)
        digests.add(cluster.final_digest(job.job_id))
        assert job.initial_validation_loss is not None
        assert job.validation_loss is not None
        print(f"{codec}: validation loss {job.initial_validation_loss:.3f} → {job.validation_loss:.3f}")
        assert job.validation_loss < job.initial_validation_loss - 0.5
    assert len(digests) == 4
