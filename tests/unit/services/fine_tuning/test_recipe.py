"""The job's recipe, made from a fine-tuning recipe by a pure function."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny import LLAMA

from gradstream.core.data.manifest import DataShard, Manifest
from gradstream.core.errors import ConfigError, DataError
from gradstream.core.recipe.fine_tuning import Base
from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe, parse_fine_tuning_recipe
from gradstream.core.recipe.recipe import CodecConfig
from gradstream.services.fine_tuning.recipe import check_recipe, fit_length, make_recipe

LENGTH = 16
BASE = Base(kind="huggingface", path="/models/tiny", title="tiny", files=(), sha256="ab" * 32)


def asked(**sections: Any) -> FineTuningRecipe:
    """A recipe of two slots of four rows; keyword arguments replace keys of sections, or whole values."""
    tree: dict[str, Any] = {
        "name": "task",
        "base_model": "/models/tiny",
        "data": {"path": "/data/task.jsonl"},
        "training": {"num_slots": 2, "global_batch": 8, "microbatch": 4, "sequence_length": LENGTH},
    }
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) and isinstance(tree.get(key), dict) else value
    return parse_fine_tuning_recipe(tree)


def rows(train: list[int], validation: list[int], length: int = LENGTH) -> Manifest:
    """A data set with so many rows in each data shard."""
    shards = tuple(
        DataShard(
            file=f"{split}-{index}.rows",
            index_file=f"{split}-{index}.index",
            split=split,  # type: ignore[arg-type]
            num_tokens=count * length,
            num_documents=count,
            num_bytes=count * length * 12,
            sha256="0" * 64,
            index_sha256="0" * 64,
        )
        for split, counts in (("train", train), ("validation", validation))
        for index, count in enumerate(counts)
    )
    return Manifest(
        token_dtype="uint32",
        vocab_size=320,
        end_of_text_id=0,
        tokenizer_sha256="0" * 64,
        shards=shards,
        layout="rows",
        row_length=length,
    )


def test_a_job_of_adapters() -> None:
    made = make_recipe(asked(), BASE, LLAMA, rows([50, 51], [7, 9]), "/state/task/data-1")
    assert (made.name, made.data.path, made.model.config) == ("task", "/state/task/data-1", LLAMA)
    # 3 epochs of 101 rows, 8 a step.
    assert made.training.num_steps == 38
    assert made.optimizer.learning_rate == 2e-4
    assert made.codec == CodecConfig()
    # As many as the slot with most has, of each.
    assert made.validation.num_samples == 18
    assert made.validation.interval_steps == made.checkpoint.interval_steps == 3
    # None of the passes' checkpoints is removed: 0, 3, …, 36, 38.
    assert made.checkpoint.keep == 3
    assert made.fine_tuning is not None
    assert made.fine_tuning.base == BASE
    assert made.fine_tuning.lora == asked().lora
    assert made.fine_tuning.held == "bf16"


def test_a_job_of_the_whole_model() -> None:
    recipe = asked(method="full", validation={"interval_steps": 5, "patience": 2}, optimizer={"betas": [0.8, 0.9]})
    made = make_recipe(recipe, BASE, LLAMA, rows([50, 51], [7, 9]), "/state/task/data-1")
    assert made.optimizer.learning_rate == 2e-5
    assert made.optimizer.betas == (0.8, 0.9)
    assert made.optimizer.weight_decay == 0.0
    assert made.codec == CodecConfig(push="int8", pull="delta-int8")
    assert made.validation.interval_steps == made.checkpoint.interval_steps == 5
    assert made.fine_tuning is not None
    assert made.fine_tuning.lora is None
    assert made.fine_tuning.patience == 2


def test_what_is_given_stays() -> None:
    codec = {"push": "bf16", "pull": "fp32"}
    recipe = asked(codec=codec, optimizer={"learning_rate": 1e-3}, training={"num_steps": 7}, seed=9, run_root="/runs")
    made = make_recipe(recipe, BASE, LLAMA, rows([50, 51], [7, 9]), "/data")
    assert made.codec == CodecConfig(push="bf16", pull="fp32")
    assert (made.optimizer.learning_rate, made.training.num_steps, made.seed, made.run_root) == (1e-3, 7, 9, "/runs")
    assert made.validation.interval_steps == 1


@pytest.mark.parametrize(
    ("training", "num_rows", "steps"),
    [({}, 8, 3), ({}, 9, 4), ({"num_epochs": 0.5}, 8, 1), ({"num_epochs": 2}, 17, 5), ({"num_steps": 40}, 8, 40)],
)
def test_epochs_are_rounded_up(training: dict[str, Any], num_rows: int, steps: int) -> None:
    assert asked(training=training).training.count_steps(num_rows) == steps


LOCAL = {"steps": 5, "after": 2}


@pytest.mark.parametrize(
    ("epochs", "num_rows", "steps"), [(1, 8, 7), (2, 27, 7), (2, 28, 7), (2, 29, 12), (3, 100, 42)]
)
def test_epochs_are_rounded_up_to_whole_rounds(epochs: int, num_rows: int, steps: int) -> None:
    recipe = asked(training={"num_epochs": epochs}, local=LOCAL)
    assert recipe.count_steps(num_rows) == steps
    made = make_recipe(recipe, BASE, LLAMA, rows([num_rows // 2, num_rows - num_rows // 2], [7, 9]), "/data")
    assert made.training.num_steps == steps
    assert made.local == recipe.local
    check_recipe(recipe, BASE, LLAMA)


def test_given_steps_must_be_whole_rounds() -> None:
    with pytest.raises(
        ConfigError, match=r"training.num_steps 8 is not local.after 2 plus whole rounds .* use 7 or 12"
    ):
        asked(training={"num_steps": 8}, local=LOCAL)
    with pytest.raises(ConfigError, match="codec auto measures every step"):
        asked(codec={"push": "auto"}, local=LOCAL)
    with pytest.raises(ConfigError, match=r"local.quorum is for training recipes so far, .*; leave it out"):
        asked(local={**LOCAL, "quorum": 1}, training={"num_steps": 12})
    assert asked(training={"num_steps": 12}, local=LOCAL).count_steps(100) == 12


def test_too_few_rows_for_the_slots() -> None:
    with pytest.raises(DataError, match=r"held out make 1 rows .* each of 2 slots one; .*validation_fraction"):
        make_recipe(asked(), BASE, LLAMA, rows([4, 4], [1, 0]), "/data")
    with pytest.raises(DataError, match=r"to train on make 1 rows .*lower training.num_slots"):
        make_recipe(asked(), BASE, LLAMA, rows([1, 0], [5, 1]), "/data")
    # A data shard that is empty leaves no slot without rows.
    assert make_recipe(asked(), BASE, LLAMA, rows([4, 0], [5, 0]), "/data").training.num_slots == 2


def test_rows_of_another_length() -> None:
    with pytest.raises(DataError, match="have 8 tokens, not 16; prepare them again"):
        make_recipe(asked(), BASE, LLAMA, rows([4, 4], [2, 2], length=8), "/data")


def test_rows_are_no_longer_than_the_base_takes() -> None:
    none = asked(training={"sequence_length": None})
    assert fit_length(none, LLAMA).training.sequence_length == 64
    assert fit_length(none, LLAMA | {"max_position_embeddings": 512}).training.sequence_length == 256
    fitted = fit_length(parse_fine_tuning_recipe(none.model_dump_json()), LLAMA)
    assert make_recipe(fitted, BASE, LLAMA, rows([4, 4], [2, 2], length=64), "/data").training.sequence_length == 64
    assert fit_length(asked(), LLAMA).training.sequence_length == LENGTH
    with pytest.raises(ConfigError, match=r"training\.sequence_length 65 is longer than the 64 positions of llama"):
        fit_length(asked(training={"sequence_length": 65}), LLAMA)


def test_what_is_wrong_is_told_before_the_data_is_prepared() -> None:
    with pytest.raises(ConfigError, match="not divisible by microbatch 3"):
        check_recipe(asked(training={"microbatch": 3}), None, {})
    long = asked(training={"sequence_length": 65})
    check_recipe(long, None, {})
    with pytest.raises(ConfigError, match="longer than the model's 64 positions"):
        check_recipe(long, BASE, LLAMA)
