"""First recipes: valid for any text, size and machines, and each value with its reason."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.coordinator.planning.first_recipe import (
    SIZES,
    Machines,
    OwnModel,
    Text,
    choose_size,
    first_recipe,
    steps_in,
)
from gradstream.core.errors import ConfigError
from gradstream.core.recipe.loading import parse_recipe

TEXT = Text("data/mine", 300_000, ("mine.txt",))


@given(
    st.integers(0, 10**12),
    st.none() | st.sampled_from(list(SIZES)),
    st.integers(1, 70),
    st.integers(1, 9),
    st.none() | st.floats(1e5, 1e11),
)
def test_a_first_recipe_is_valid(
    num_tokens: int, size: str | None, workers: int, servers: int, link: float | None
) -> None:
    found = first_recipe("mine", Text("data/mine", num_tokens, ("a",)), Machines(servers, workers, link), size)
    recipe = parse_recipe(found.tree)
    training = recipe.training
    assert training.num_slots % workers == 0
    assert training.num_slots >= 4
    assert training.global_batch * training.sequence_length == found.step_tokens
    assert recipe.cluster.min_workers == workers
    assert (1 if found.validates else 0) <= recipe.validation.interval_steps <= training.num_steps
    assert recipe.schedule.warmup_steps < training.num_steps
    assert {"model", "training.num_steps", "training.num_slots", "training.global_batch", "codec"} <= set(found.reasons)


@pytest.mark.parametrize("name", SIZES)
def test_a_size_has_the_parameters_that_it_says(name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    size = SIZES[name]
    with torch.device("meta"):
        config = {key: value for key, value in size.config(size.vocab_size).items() if key != "model_type"}
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(size.num_parameters, rel=0.02)
    unit = {"M": 1e6, "B": 1e9}[name[-1]]
    assert count == pytest.approx(float(name[:-1]) * unit, rel=0.25)


@pytest.mark.parametrize(
    ("num_tokens", "size"), [(0, "1M"), (300_000, "1M"), (7_000_000, "3M"), (30_000_000, "10M"), (10**12, "10M")]
)
def test_the_size_follows_from_the_text(num_tokens: int, size: str) -> None:
    assert choose_size(num_tokens)[0] == size


@pytest.mark.parametrize(("link", "push"), [(None, "int8"), (1e9, "int8"), (1e8, "int4")])
def test_the_codec_follows_from_the_link(link: float | None, push: str) -> None:
    found = first_recipe("mine", TEXT, Machines(link_bits_per_second=link))
    assert found.tree["codec"] == {"push": push, "pull": f"delta-{push}"}


def test_time_sets_the_steps_and_what_follows_from_them() -> None:
    found = first_recipe("mine", TEXT, Machines()).with_steps(*steps_in(600, 0.5))
    recipe = parse_recipe(found.tree)
    assert (recipe.training.num_steps, recipe.validation.interval_steps, recipe.schedule.warmup_steps) == (
        1200,
        120,
        60,
    )
    assert "10 minutes" in found.reasons["training.num_steps"]


@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 1), (33, 6), (200, 20), (1200, 60), (100_000, 2000)])
def test_a_short_run_warms_up_too(num_steps: int, warmup: int) -> None:
    assert first_recipe("mine", TEXT, Machines()).with_steps(num_steps, "").tree["schedule"]["warmup_steps"] == warmup


def test_few_steps_have_their_reason() -> None:
    little = first_recipe("mine", Text("data/mine", 50_000, ("a",)), Machines())
    assert little.tree["training"]["num_steps"] == 200
    assert "fewer than 200 steps teach little" in little.reasons["training.num_steps"]
    assert (
        "fewer" not in first_recipe("mine", Text("data/mine", 10**8, ("a",)), Machines()).reasons["training.num_steps"]
    )


def test_an_own_model_keeps_its_positions_and_words() -> None:
    own = OwnModel("config.json", 12_000_000, 5000, 64)
    found = first_recipe("mine", TEXT, Machines(), own)
    assert found.tree["training"]["sequence_length"] == 64
    assert found.tree["data"]["prepare"]["vocab_size"] <= 5000
    with pytest.raises(ConfigError, match=r"has 6000 words, the model of config\.json 5000; prepare"):
        first_recipe("mine", Text("data/mine", 10, vocab_size=6000), Machines(), own)


@pytest.mark.parametrize(("size", "message"), [("2M", "no size '2M'"), ("10", "did you mean '10M'"), ("big", "1B or")])
def test_an_unknown_size_is_refused(size: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        first_recipe("mine", TEXT, Machines(), size)
