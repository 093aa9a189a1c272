"""A finished job goes on to more steps: the bits are those of the resulting recipe, also after deaths."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cluster import Cluster
from support.tiny import tiny_recipe

from gradstream.client import Step
from gradstream.core.recipe.learning_rate import learning_rate
from gradstream.core.recipe.loading import parse_recipe


@pytest.mark.timeout(240)
def test_more_steps_are_a_function_of_recipe_seed_and_data(cluster: Cluster, tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tiny_data, tmp_path / "runs", training={"num_steps": 6}, codec={"push": "int8", "pull": "delta-int8"}
    )
    cluster.start_coordinator()
    cluster.start_servers("server-0", "server-1")
    cluster.start_workers("worker-0")
    # 1. Six steps, then ten more without a disturbance.
    first = cluster.client.submit(recipe).job_id
    cluster.finish(first)
    told = cluster.client.resume(first, 16)
    assert "goes on from version 6 to 16 steps in all (6 before)" in told.reason
    finished = cluster.finish(first)
    assert (finished.version, finished.num_steps, finished.submitted_num_steps) == (16, 16, 6)
    assert finished.num_tokens == 16 * 8 * 32
    reference = cluster.final_digest(first)
    steps = [item for item in cluster.client.watch(first, follow=False) if isinstance(item, Step)]
    expected = [learning_rate(step, 6 if step < 6 else 16, recipe.optimizer, recipe.schedule) for step in range(16)]
    assert [item.learning_rate for item in steps] == expected
    # 2. The recipe that the job has now, from the start.
    whole = cluster.client.submit(parse_recipe(dict(finished.recipe))).job_id
    cluster.finish(whole)
    assert cluster.final_digest(whole) == reference
    # 3. Six steps, then ten more over the death of a server and of the coordinator, with another worker.
    again = cluster.client.submit(recipe).job_id
    cluster.finish(again)
    cluster.client.resume(again, 16)
    cluster.wait_for(again, lambda job: job.version > 8, "go on")
    cluster.kill("server-1", "coordinator")
    cluster.start_coordinator()
    cluster.start_servers("server-1")
    cluster.start_workers("worker-1")
    assert cluster.finish(again).version == 16
    assert cluster.final_digest(again) == reference
