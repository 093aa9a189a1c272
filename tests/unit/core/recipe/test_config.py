"""Recipes: errors of one line with the mistake and the remedy; bases, overrides and the round trip through JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gradstream.core.errors import ConfigError
from gradstream.core.recipe.fine_tuning import KEY, OLD_KEY, Base, FineTuning, with_new_key
from gradstream.core.recipe.fine_tuning_recipe import FineTuningRecipe, load_any_recipe, parse_fine_tuning_recipe
from gradstream.core.recipe.loading import load_recipe, parse_recipe
from gradstream.core.recipe.problems import OTHER_NAMES, all_keys
from gradstream.core.recipe.recipe import Recipe

TREE: dict[str, Any] = {
    "name": "tiny",
    "model": {"config": {"model_type": "llama", "max_position_embeddings": 32}},
    "training": {"num_steps": 4, "num_slots": 2, "global_batch": 8, "microbatch": 2, "sequence_length": 32},
    "data": {"path": "data", "prepare": {"sources": ["corpus/*.txt", "stdlib:"]}},
    "validation": {"num_samples": 4},
}


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    """The valid tree with some keys of some sections replaced."""
    return {key: {**value, **sections[key]} if key in sections else value for key, value in TREE.items()} | {
        key: value for key, value in sections.items() if key not in TREE
    }


def write(path: Path, tree: Any) -> Path:
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def refusal(tree: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(tree)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (TREE | {"trainin": {}}, "unknown key 'trainin'; did you mean 'training'?"),
        (changed(training={"num_step": 3}), "unknown key 'training.num_step'; did you mean 'num_steps'?"),
        (changed(optimizer={"lr_rate": 1, "learning_rat": 1}), "unknown key 'optimizer.lr_rate'"),
        (
            changed(data={"prepare": {"sources": ["x"], "vocabsize": 1}}),
            "unknown key 'data.prepare.vocabsize'; did you mean 'vocab_size'?",
        ),
        (TREE | {"zzzzzzzz": 1}, "unknown key 'zzzzzzzz'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(tree: Any, message: str) -> None:
    assert message in refusal(tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({key: value for key, value in TREE.items() if key != "model"}, "'model' is missing"),
        (changed(training={"num_steps": 0}), "'training.num_steps': input should be greater than 0, not 0"),
        (changed(training={"num_steps": "many"}), "'training.num_steps'"),
        (changed(training={"global_batch": 9}), "global_batch 9 is not divisible by num_slots 2; use 8 or another"),
        (changed(training={"global_batch": 1}), "use 2 or another number of slots"),
        (changed(training={"microbatch": 3}), "not divisible by microbatch 3; use a microbatch that divides 4"),
        (changed(training={"sequence_length": 33}), "sequence_length 33 is longer than the model's 32 positions"),
        (changed(validation={"num_samples": 5}), "validation.num_samples 5 is not divisible by training.num_slots 2"),
        (changed(optimizer={"kind": "adam"}), "'optimizer.kind'"),
        (changed(optimizer={"kind": "sgd", "moments": "bf16"}), "optimizer.moments bf16 is for adamw, not sgd"),
        (changed(optimizer={"kind": "muon", "moments": "bf16"}), "optimizer.moments bf16 is for adamw, not muon"),
        (
            changed(optimizer={"kind": "muon", "muon": {"momentum": 1.0}}),
            "'optimizer.muon.momentum': input should be less",
        ),
        (changed(optimizer={"betas": [0.9, 1.5]}), "'optimizer.betas.1'"),
        (changed(optimizer={"clip_norm": float("inf")}), "'optimizer.clip_norm': input should be a finite number"),
        (changed(codec={"push": "int5"}), "'codec.push'"),
        (changed(codec={"residual_decay": 1.5}), "'codec.residual_decay': input should be less than or equal to 1"),
        (
            changed(codec={"push": "bf16", "residual_decay": 0.9}),
            "codec.residual_decay 0.9 has no use with codec.push bf16",
        ),
        (changed(codec={"push": "auto", "residual_decay": 0.9}), "has no use with codec.push auto"),
        (changed(codec={"push": "powersgd", "residual_decay": 0}), "which carries a basis from step to step"),
        (
            changed(codec={"push": "int2", "residual_decay": 0.9}, pipeline={"stages": 2}),
            "use codec.residual_decay=0 or pipeline.stages=1",
        ),
        (changed(codec={"push": "sparse"}, pipeline={"stages": 2}), "use codec.push=int8 or pipeline.stages=1"),
        (changed(local={"steps": 1, "quorum": 3}), "local.quorum 3 is more than training.num_slots 2; lower it"),
        (
            changed(local={"steps": 1, "grace_seconds": 5}),
            "local.grace_seconds 5.0 has no use without local.quorum; set that too, or leave it out",
        ),
        (changed(local={"steps": 1, "replay": "a-1"}), "local.replay a-1 has no use without local.quorum"),
        (
            changed(local={"steps": 1, "quorum": 1}, codec={"push": "sparse"}),
            "local.quorum is not for codec.push sparse with a residual: it also depends on the slots that were late, "
            "which a replay leaves out; use codec.push=int4, or leave local.quorum out",
        ),
        (
            changed(local={"steps": 1, "quorum": 1, "inner_state": "keep"}),
            "a replay leaves out; use local.inner_state=shared, or leave local.quorum out",
        ),
        # `yes` is true in YAML, and true is 1 in Python.
        (changed(training={"num_steps": True}), "'training.num_steps': input should be a number, not True"),
        (changed(optimizer={"learning_rate": True}), "'optimizer.learning_rate': input should be a number, not True"),
        (changed(optimizer={"betas": [True, 0.9]}), "'optimizer.betas': input should be a number, not [True, 0.9]"),
        (changed(pipeline={"stages": True}), "'pipeline.stages': input should be a number, not True"),
        (changed() | {"seed": False}, "'seed': input should be a number, not False"),
        (changed() | {"name": "Not a name"}, "'name'"),
        (changed() | {"name": "../up"}, "'name'"),
        ("{not json", "not JSON"),
        ("[]", "recipe:"),
    ],
)
def test_a_wrong_value_is_refused_with_its_reason(tree: Any, message: str) -> None:
    assert message in refusal(tree)


@pytest.mark.parametrize(
    ("codec", "decay"),
    [
        ({}, 0),
        ({"push": "int2"}, 0),
        ({"push": "int2", "residual_decay": 0.9}, 0.9),
        ({"push": "int8", "residual_decay": 1}, 1),
        ({"push": "topk"}, 1),
        ({"push": "sparse"}, 0.95),
        ({"push": "sparse", "residual_decay": 0}, 0),
    ],
)
def test_a_job_keeps_residuals_where_their_decay_is_above_zero(codec: dict[str, Any], decay: float) -> None:
    recipe = parse_recipe(changed(codec=codec))
    assert recipe.codec.decay == decay
    assert recipe.keeps_slot_state() == (decay > 0)


def test_positions_of_gpt2_are_known_too() -> None:
    tree = changed(model={"config": {"model_type": "gpt2", "n_positions": 16}})
    assert "longer than the model's 16 positions" in refusal(tree)


def test_all_mistakes_are_told_at_once() -> None:
    tree = changed(training={"num_steps": 0, "microbatch": 0}, pipeline={"stages": "two"}, optimizer={"lr": 1})
    del tree["data"]
    told = refusal(tree)
    assert told.startswith("recipe: 5 problems: (1) ")
    for part in ("'training.num_steps'", "'training.microbatch'", "'pipeline.stages", "'optimizer.lr'", "'data' is"):
        assert told.count(part) == 1
    many = refusal(changed() | {f"key{number}": 1 for number in range(40)})
    assert "40 problems" in many
    assert many.endswith("; and 28 more")


@pytest.mark.parametrize(
    ("tree", "written", "meant"),
    [
        (changed() | {"lr": 1e-3}, "lr", "optimizer.learning_rate"),
        (changed(training={"learning_rate": 1e-3}), "training.learning_rate", "optimizer.learning_rate"),
        (changed(training={"batch_size": 8}), "training.batch_size", "training.global_batch"),
        (changed(training={"gradient_accumulation_steps": 8}), "training.gradient_acc", "training.global_batch"),
        (changed(training={"max_steps": 8}), "training.max_steps", "training.num_steps"),
        (changed(training={"epochs": 8}), "training.epochs", "training.num_steps"),
        (changed() | {"seq_len": 8}, "seq_len", "training.sequence_length"),
        (changed(optimizer={"warmup_steps": 8}), "optimizer.warmup_steps", "schedule.warmup_steps"),
    ],
)
def test_names_of_other_tools_are_understood(tree: Any, written: str, meant: str) -> None:
    told = refusal(tree)
    assert f"unknown key '{written}" in told
    assert f"did you mean '{meant}'?" in told


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("lora_r", "lora.rank"),
        ("r", "lora.rank"),
        ("epochs", "training.num_epochs"),
        ("model_name_or_path", "base_model"),
    ],
)
def test_names_of_other_tools_are_understood_for_fine_tunings(key: str, meant: str) -> None:
    tree = {"name": "tiny", "base_model": "base", "data": {"path": "rows.jsonl"}, key: 3}
    with pytest.raises(ConfigError, match=f"unknown key '{key}'; did you mean '{meant}'"):
        parse_fine_tuning_recipe(tree)


def test_every_meant_key_exists() -> None:
    keys = set(all_keys(Recipe)) | set(all_keys(FineTuningRecipe))
    assert {key for meant in OTHER_NAMES.values() for key in meant} <= keys
    assert not set(OTHER_NAMES) & {key for key in keys if "." not in key}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*TREE, "config", "x"]), inner),
        max_leaves=10,
    )
)
def test_any_tree_is_a_recipe_or_a_config_error(tree: Any) -> None:
    for candidate in (tree, {**TREE, **tree} if isinstance(tree, dict) else {**TREE, "training": tree}):
        if isinstance(candidate, str):
            continue
        try:
            parse_recipe(candidate)
        except ConfigError:
            assert refusal(candidate)


def test_a_recipe_survives_json() -> None:
    recipe = parse_recipe(changed(optimizer={"learning_rate": 0.1 + 0.2, "eps": 1e-12, "betas": [0.1, 0.7]}))
    again = parse_recipe(recipe.model_dump_json())
    assert again == recipe
    assert again.model_dump_json() == recipe.model_dump_json()
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@given(rate=st.floats(min_value=1e-300, max_value=1e300), seed=st.integers(0, 2**80))
def test_numbers_survive_json_to_the_last_bit(rate: float, seed: int) -> None:
    """The recipe determines the trajectory, so its numbers must be the same in every process."""
    recipe = parse_recipe(changed(optimizer={"learning_rate": rate}) | {"seed": seed})
    again = parse_recipe(recipe.model_dump_json())
    assert (again.optimizer.learning_rate, again.seed) == (rate, seed)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-2", 0.02),
        ("1E6", 1e6),
        ("-3e4", -3e4),
        ("+1e+2", 100.0),
        ("1.e3", 1e3),
        ("5_0e1", 500.0),
        ("1.5e-3", 0.0015),
    ],
)
def test_a_number_with_an_exponent_is_a_number_everywhere(tmp_path: Path, text: str, value: float) -> None:
    """Also where its dot is missing, which YAML 1.1 takes for a text: transformers would not."""
    path = tmp_path / "sci.yaml"
    path.write_text(yaml.safe_dump(TREE).replace("model_type: llama", f"model_type: llama\n    rope_theta: {text}"))
    assert load_recipe(path).model.config["rope_theta"] == value
    assert load_recipe(path, [f"model.config.rms_norm_eps={text}"]).model.config["rms_norm_eps"] == value


@pytest.mark.parametrize("text", ["e5", "1e", "1e5a", "v1e-5", "1.2.3e4"])
def test_what_only_looks_like_a_number_stays_a_text(tmp_path: Path, text: str) -> None:
    assert isinstance(load_recipe(write(tmp_path / "a.yaml", TREE), [f"description={text}"]).description, str)


def test_a_base_is_merged_and_the_top_wins(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    write(tmp_path / "bases" / "bottom.yaml", TREE | {"seed": 1, "description": "bottom"})
    write(tmp_path / "middle.yaml", {"base": "bases/bottom.yaml", "training": {"num_steps": 7}, "seed": 2})
    top = write(tmp_path / "top.yaml", {"base": "middle.yaml", "seed": 3, "data": {"prepare": {"sources": ["a"]}}})
    recipe = load_recipe(top)
    assert (recipe.seed, recipe.description) == (3, "bottom")
    assert (recipe.training.num_steps, recipe.training.global_batch) == (7, 8)  # mappings merge
    assert recipe.data.prepare is not None
    assert [Path(source).name for source in recipe.data.prepare.sources] == ["a"]  # lists replace


@pytest.mark.parametrize("chain", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_circle_of_bases_is_refused(tmp_path: Path, chain: list[str]) -> None:
    for name, base in zip(chain, [*chain[1:], chain[0]], strict=True):
        write(tmp_path / f"{name}.yaml", {"base": f"{base}.yaml"})
    with pytest.raises(ConfigError, match="leads back to this file"):
        load_recipe(tmp_path / "a.yaml")


def test_overrides_come_last_and_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", TREE)
    recipe = load_recipe(
        path,
        [
            "training.num_steps=9",
            "optimizer.betas=[0.5, 0.6]",
            "training.recompute=true",
            "codec.push=int8",
            "model.config.new_key=a=b",
            "description=half: {open",
        ],
    )
    assert recipe.training.num_steps == 9
    assert recipe.training.recompute is True
    assert recipe.optimizer.betas == (0.5, 0.6)
    assert recipe.codec.push == "int8"
    assert recipe.model.config["new_key"] == "a=b"
    assert recipe.description == "half: {open"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.num_steps", "not of the form key.sub=value"),
        ("=3", "not of the form key.sub=value"),
        ("name.sub=3", "'name' holds a value, not a section"),
        ("training.num_stepz=3", "did you mean 'num_steps'?"),
        ("training.num_steps=", "'training.num_steps'"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path / "r.yaml", TREE), [override])
    assert message in str(caught.value)


def test_relative_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "r.yaml", changed(data={"path": "s3://bucket/data"}))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    assert recipe.data.path == "s3://bucket/data"
    assert recipe.run_root == str(tmp_path / "runs")
    assert recipe.data.prepare is not None
    assert recipe.data.prepare.sources == [str(tmp_path / "corpus/*.txt"), "stdlib:"]


def test_a_model_config_may_be_a_path_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2", "n_positions": 32}')
    path = write(tmp_path / "r.yaml", TREE | {"model": {"config": "model"}})
    assert load_recipe(path).model.config == {"model_type": "gpt2", "n_positions": 32}
    (tmp_path / "model" / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="does not hold a JSON object"):
        load_recipe(path)
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"not a readable config\.json"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "a recipe is a mapping"),
        ("a: [\n", "not YAML"),
        ("", "a recipe is a mapping"),
        ("base: nowhere.yaml\n", "nowhere.yaml does not exist; copy it, or correct the 'base' line"),
        ("name: a\nmodel: 3\n", "'model'"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path / "r.yaml", content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_binary_files_and_directories_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("binary", "", "missing.yaml"):
        with pytest.raises(ConfigError):
            load_recipe(tmp_path / name)


def test_the_recipes_that_come_along_are_valid() -> None:
    paths = sorted((Path(__file__).parents[4] / "recipes").glob("**/*.yaml"))
    assert paths
    kinds = {type(load_any_recipe(path)) for path in paths}
    assert kinds == {Recipe, FineTuningRecipe}


def test_a_fine_tuning_recipe_is_told_from_others() -> None:
    with pytest.raises(ConfigError, match="is a fine-tuning recipe; use `gradstream finetune create`"):
        load_recipe(Path(__file__).parents[4] / "recipes" / "stdlib-finetune.yaml")


def test_a_recipe_with_the_older_key_of_fine_tuning_is_read() -> None:
    base = Base(kind="huggingface", path="/models/tiny", title="tiny", files=(), sha256="ab" * 32)
    recipe = parse_recipe(TREE | {KEY: FineTuning(base=base, method="full").model_dump(mode="json")})
    older = recipe.model_dump_json().replace(f'"{KEY}":', f'"{OLD_KEY}":')
    assert OLD_KEY in json.loads(older)
    assert parse_recipe(older) == recipe
    assert with_new_key(json.loads(older)) == json.loads(recipe.model_dump_json())
