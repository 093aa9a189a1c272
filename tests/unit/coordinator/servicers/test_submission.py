"""Recipes that would fail on a worker, or train another model than intended, are refused on submission."""

from __future__ import annotations

import json
from typing import Any

import pytest
from coordinator_fakes import Cluster, make_recipe

from gradstream.client import AsyncClient, Event
from gradstream.core.errors import ConfigError, DataError
from gradstream.core.recipe.loading import parse_recipe
from gradstream.core.recipe.recipe import Recipe


def recipe_with(cluster: Cluster, config: dict[str, Any], **sections: Any) -> Recipe:
    tree = make_recipe(cluster.directory).model_dump(mode="json")
    tree["model"]["config"] |= config
    return parse_recipe(tree | sections)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token_id": 2}, r"eos_token_id is 2, and the documents of .* end with token 0; set .*eos_token_id=0"),
        ({"eos_token_id": [5, 2]}, r"eos_token_id is \[5, 2\], and the documents of .* end with token 0"),
        ({"bos_token_id": 1}, r"bos_token_id is 1, and the documents of .* begin after token 0; .*leave it out"),
    ],
)
async def test_ends_of_text_that_are_not_the_datas_are_refused(
    cluster: Cluster, config: dict[str, Any], message: str
) -> None:
    async with AsyncClient(cluster.address) as client:
        with pytest.raises(DataError, match=message):
            await client.submit(recipe_with(cluster, config))
        assert await client.jobs() == []


async def test_a_model_that_a_worker_could_not_compute_is_refused(cluster: Cluster) -> None:
    """Built in a child process, on the meta device; nothing is left of the job."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"hidden_act": "sillu"}, r"cannot be built: .*sillu"),
        ({"rms_norm_epss": 1e-5}, r"model\.config\.rms_norm_epss is not a key of llama; did you mean 'rms_norm_eps'\?"),
        ({"pad_token_id": 0}, r"pad_token_id is 0, which is the data set's end of text 0: its embedding would never"),
    ]
    async with AsyncClient(cluster.address) as client:
        for config, message in cases:
            with pytest.raises((ConfigError, DataError), match=message):
                await client.submit(recipe_with(cluster, config))
        assert await client.jobs() == []
    assert not (cluster.directory / "runs").exists()


async def test_what_is_left_out_is_filled_in_and_what_is_odd_is_said(cluster: Cluster) -> None:
    odd = recipe_with(cluster, {"favourite_colour": "blue"}, schedule={"kind": "cosine", "warmup_steps": 2000})
    async with AsyncClient(cluster.address) as client:
        job = await client.submit(odd)
        stored = json.loads(cluster.coordinator.controller.state.list_jobs()[0].recipe_json)["model"]["config"]
        assert (stored["eos_token_id"], stored["bos_token_id"], stored["pad_token_id"]) == (0, 0, None)
        said = [item.message async for item in client.watch(job.job_id, follow=False) if isinstance(item, Event)]
    assert "model.config: favourite_colour is not read by llama and changes nothing" in said
    assert any("warmup_steps 2000 is longer than the run of 4 steps" in each for each in said)
