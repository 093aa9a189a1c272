"""Defaults that fit each other: omitted keys follow from those given, unless those contradict each other."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.data.manifest import DataShard, Manifest
from gradstream.core.errors import ConfigError
from gradstream.core.recipe.fine_tuning import LoraConfig
from gradstream.core.recipe.fine_tuning_recipe import parse_fine_tuning_recipe
from gradstream.core.recipe.loading import load_recipe, parse_recipe

COUNTS = st.integers(1, 70)
BATCH = {"global_batch": COUNTS, "num_slots": COUNTS, "microbatch": COUNTS}


def pretraining(**sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "fitted",
        "model": {"config": {"model_type": "llama", **sections.pop("config", {})}},
        "training": {"num_steps": 3, **sections.pop("training", {})},
        "data": {"path": "data", "prepare": {"sources": ["x"], **sections.pop("prepare", {})}},
        **sections,
    }


def fine_tuning(**training: Any) -> dict[str, Any]:
    return {"name": "fitted", "base_model": "base", "data": {"path": "rows.jsonl"}, "training": training}


def divides(batch: int, *parts: int) -> bool:
    whole = 1
    for part in parts:
        whole *= part
    return batch % whole == 0


@pytest.mark.parametrize(
    ("given", "batch"),
    [
        ({}, (32, 4, 8)),
        ({"global_batch": 4}, (4, 4, 1)),
        ({"global_batch": 6}, (6, 2, 3)),
        ({"global_batch": 7}, (7, 1, 7)),
        ({"global_batch": 48}, (48, 4, 6)),
        ({"num_slots": 3}, (33, 3, 1)),
        ({"num_slots": 64}, (64, 64, 1)),
        ({"microbatch": 3}, (36, 4, 3)),
        ({"microbatch": 16}, (32, 2, 16)),
        ({"microbatch": 20}, (40, 1, 20)),
        ({"num_slots": 3, "microbatch": 5}, (30, 3, 5)),
        ({"global_batch": "4"}, (4, 4, 1)),
        ({"global_batch": 4.0, "microbatch": None}, (4, 4, 1)),
    ],
)
def test_a_batch_follows_from_any_of_its_keys(given: dict[str, Any], batch: tuple[int, int, int]) -> None:
    training = parse_recipe(pretraining(training=given)).training
    assert (training.global_batch, training.num_slots, training.microbatch) == batch


@pytest.mark.parametrize(
    ("given", "batch"),
    [
        ({}, (16, 2, 4)),
        ({"global_batch": 4}, (4, 2, 2)),
        ({"global_batch": 1}, (1, 1, 1)),
        ({"num_slots": 1}, (16, 1, 4)),
    ],
)
def test_a_fine_tuning_batch_follows_from_any_of_its_keys(given: dict[str, int], batch: tuple[int, int, int]) -> None:
    training = parse_fine_tuning_recipe(fine_tuning(**given)).training
    assert (training.global_batch, training.num_slots, training.microbatch) == batch


@given(st.fixed_dictionaries({}, optional=BATCH))
def test_a_fine_tuning_recipe_is_whole_or_contradicts_itself(batch: dict[str, int]) -> None:
    """Refused exactly where the given values themselves cannot be divided, before a cluster is there."""
    whole = batch.get("global_batch")
    possible = whole is None or divides(whole, *(batch[key] for key in ("num_slots", "microbatch") if key in batch))
    try:
        recipe = parse_fine_tuning_recipe(fine_tuning(**batch))
    except ConfigError:
        assert not possible
        return
    assert possible
    assert recipe.training.model_dump().items() >= batch.items()
    assert parse_fine_tuning_recipe(recipe.model_dump_json()) == recipe
    assert divides(recipe.training.global_batch, recipe.training.num_slots, recipe.training.microbatch)


@given(
    st.fixed_dictionaries({}, optional=BATCH),
    st.none() | COUNTS,
    st.none() | COUNTS,
    st.none() | st.sampled_from([0, 0.0, 0.1]),
    st.none() | st.integers(257, 9000),
    st.none() | st.integers(1, 600),
)
def test_a_pretraining_recipe_is_whole_or_contradicts_itself(
    batch: dict[str, int],
    num_shards: int | None,
    num_samples: int | None,
    held_out: float | None,
    vocab_size: int | None,
    positions: int | None,
) -> None:
    given_ = {
        "training": batch,
        "prepare": {"num_shards": num_shards, "validation_fraction": held_out},
        "validation": {"num_samples": num_samples},
        "config": {"vocab_size": vocab_size, "max_position_embeddings": positions},
    }
    written = {name: {key: value for key, value in keys.items() if value is not None} for name, keys in given_.items()}
    tree = pretraining(**written)
    whole, slots = batch.get("global_batch"), batch.get("num_slots")
    possible = whole is None or divides(whole, *(batch[key] for key in ("num_slots", "microbatch") if key in batch))
    possible &= slots is None or num_samples is None or num_samples % slots == 0
    try:
        recipe = parse_recipe(tree)
    except ConfigError:
        assert not possible
        return
    assert possible
    assert parse_recipe(recipe.model_dump_json()) == recipe
    dumped = recipe.model_dump()
    for name, keys in tree.items():
        if isinstance(keys, dict) and name != "data":
            assert dumped[name].items() >= keys.items()
    assert recipe.data.prepare is not None
    if num_shards is None:
        assert recipe.data.prepare.num_shards % recipe.training.num_slots == 0
    if held_out == 0:
        assert not any(recipe.validates(version) for version in range(4))
    if positions is not None:
        assert recipe.training.sequence_length == min(256, positions)
    if vocab_size is not None:
        assert recipe.data.prepare.vocab_size == min(4096, vocab_size)


@pytest.mark.parametrize("count", range(1, 70))
def test_slots_follow_from_what_they_share(count: int) -> None:
    slots = parse_recipe(pretraining(validation={"num_samples": count})).training.num_slots
    assert count % slots == 0
    assert slots == max(each for each in (1, 2, 4) if count % each == 0)


@pytest.mark.parametrize(
    ("num_train", "num_validation", "interval", "num_samples"),
    [(2, 2, 0, 4), (3, 4, 100, 4), (8, 70, 100, 64), (4, 0, 0, 4)],
)
def test_a_data_set_that_is_there_counts_too(
    tmp_path: Path, num_train: int, num_validation: int, interval: int, num_samples: int
) -> None:
    """Validation is as much as is held out, and off where a slot would have no sample. Shards bind no slots."""
    shards = [
        DataShard(
            file=f"{split}-{number}.tokens",
            index_file=f"{split}-{number}.index",
            split=split,
            num_tokens=9,
            num_documents=1,
            num_bytes=18,
            sha256="0" * 64,
            index_sha256="0" * 64,
        )
        for split, count in (("train", num_train), ("validation", num_validation))
        for number in range(count)
    ]
    manifest = Manifest(
        token_dtype="uint16", vocab_size=9, end_of_text_id=0, tokenizer_sha256="0" * 64, shards=tuple(shards)
    )
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    tree = pretraining(training={"sequence_length": 8})
    tree["data"] = {"path": str(tmp_path)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.training.num_slots == 4
    assert (recipe.validation.interval_steps, recipe.validation.num_samples) == (interval, num_samples)
    asked = load_recipe(tmp_path / "recipe.yaml", ["validation.interval_steps=7", "validation.num_samples=40"])
    assert (asked.validation.interval_steps, asked.validation.num_samples) == (7, 40)


def test_positions_of_a_text_config_count_too() -> None:
    inner = {"text_config": {"max_position_embeddings": 48, "vocab_size": 300}}
    recipe = parse_recipe(pretraining(config=inner))
    assert recipe.training.sequence_length == 48
    assert recipe.data.prepare is not None
    assert recipe.data.prepare.vocab_size == 300
    with pytest.raises(
        ConfigError, match=r"49 is longer than the model's 48 positions; .*model.config.text_config.max"
    ):
        parse_recipe(pretraining(config=inner, training={"sequence_length": 49}))
    with pytest.raises(ConfigError, match=r"data.prepare.vocab_size 301 is more than the model's 300 words"):
        parse_recipe(pretraining(config=inner, prepare={"vocab_size": 301}))


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ({"chunks": 2}, "pipeline.chunks 2 needs pipeline.stages"),
        ({"stages": 4, "chunks": 2, "schedule": "1f1b"}, "schedule 1f1b has one chunk a worker, not 2"),
        ({"stages": 2, "schedule": "interleaved-1f1b"}, "needs pipeline.chunks of at least 2"),
    ],
)
def test_a_pipeline_that_no_schedule_can_run_is_refused_at_once(pipeline: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_recipe(pretraining(pipeline=pipeline))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"r": 4}, {"rank": 4}),
        ({"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_rslora": True}, {"rank": 4, "alpha": 8.0, "dropout": 0.1}),
        ({"target_modules": "q_proj"}, {"target_modules": ("q_proj",)}),
        ({"target_modules": ["all-linear"]}, {"target_modules": "all-linear"}),
        ({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
        (
            {"target_modules": ["q_proj", "layers.0.mlp.up_proj"]},
            {"target_modules": ("q_proj", "layers.0.mlp.up_proj")},
        ),
        # As in the adapter_config.json of another tool.
        (
            {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True, "rank_pattern": {}},
            {"rank": 8},
        ),
        ({"modules_to_save": None, "use_dora": False, "init_lora_weights": True}, {"rank": 8}),
    ],
)
def test_lora_keys_of_peft_are_taken(lora: dict[str, Any], expected: dict[str, Any]) -> None:
    found = parse_fine_tuning_recipe(fine_tuning() | {"lora": lora})
    assert found.lora.model_dump().items() >= expected.items()
    assert parse_fine_tuning_recipe(found.model_dump_json()) == found


def test_a_whole_config_of_peft_is_taken() -> None:
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    config |= {"target_modules": sorted(config["target_modules"]), "peft_type": "LORA"}  # as in its JSON
    assert parse_fine_tuning_recipe(fine_tuning() | {"lora": config}).lora == LoraConfig(
        rank=4, alpha=8, target_modules=("q_proj",)
    )


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": None}, "lora.target_modules is None; list ends of the names of modules"),
        ({"base_model_name_or_path": "x"}, "lora.base_model_name_or_path 'x' is not supported: the base is the recipe"),
        ({"eva_config": {"rho": 2}}, "lora.eva_config {'rho': 2} is not supported: leave it out"),
        ({"target_modules": r".*\.q_proj"}, "regular expressions are not read: list the ends instead"),
        ({"target_modules": [r".*\.q_proj"]}, "'.*\\\\.q_proj' is not the end of a module's name"),
        ({"target_modules": "q_proj,v_proj"}, "list the ends instead, such as [q_proj, v_proj]"),
        ({"target_modules": ["all-linear", "q_proj"]}, "all-linear stands alone"),
        ({"target_modules": []}, "lora.target_modules is empty"),
        ({"modules_to_save": ["lm_head"]}, "lora.modules_to_save ['lm_head'] is not supported: only adapters are"),
        ({"bias": "all"}, "use bias: none, or method: full"),
        ({"use_dora": True}, "lora.use_dora True is not supported: leave it out"),
        ({"r": 4, "rank": 8}, "lora.r and lora.rank say the same; give one of them"),
        ({"rnak": 8}, "unknown key 'lora.rnak'; did you mean 'rank'?"),
    ],
)
def test_lora_keys_that_mean_something_else_are_answered(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_fine_tuning_recipe(fine_tuning() | {"lora": lora})
    assert message in str(refused.value)
