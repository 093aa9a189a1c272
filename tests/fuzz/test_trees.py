"""Recipes and manifests with wrong values, and directories with such files."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fuzz.atheris_targets import MANIFEST, PREPARED, RECIPE, TASK, base_directory, checkpoint_directory
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.fuzzing import ODD_TEXTS, ODD_VALUES, allocating_at_most, fuzzed, mutated_tree, taken
from support.micro import MICRO_LLAMA

from gradstream.coordinator.planning.planner import check_data
from gradstream.coordinator.servicers.recipe_data import read_data_manifest
from gradstream.coordinator.servicers.submissions import make_run_directory
from gradstream.core.checkpoint.manifest import read_manifest
from gradstream.core.checkpoint.shard import CheckpointReader
from gradstream.core.data.manifest import parse_manifest
from gradstream.core.errors import CheckpointError, ConfigError, DataError
from gradstream.core.model.model import build
from gradstream.core.pretrained.base import BaseReader, find_base, load_tokenizer
from gradstream.core.pretrained.export import write_huggingface
from gradstream.core.recipe.fine_tuning_recipe import load_any_recipe, load_fine_tuning_recipe, parse_fine_tuning_recipe
from gradstream.core.recipe.loading import absolute_paths, load_recipe, parse_recipe
from gradstream.services.fine_tuning.examples.dataset import load_prepared
from gradstream.services.fine_tuning.examples.preparation import check_data as check_examples
from gradstream.services.fine_tuning.store import Record, Store

MIB = 1 << 20


# -- recipes -----------------------------------------------------------------------------------------------------------


@fuzzed(3)
@given(mutated_tree(RECIPE))
def test_a_recipe_is_taken_or_refused(tree: Any) -> None:
    recipe = taken(lambda: parse_recipe(tree), ConfigError)
    if recipe is None:
        return
    # What is taken can be stored, sent and read again as the same.
    assert parse_recipe(recipe.model_dump_json()) == recipe
    absolute = taken(lambda: absolute_paths(recipe), ConfigError)
    if absolute is not None:
        # And what comes next refuses in one line too.
        taken(lambda: check_data(absolute, parse_manifest(MANIFEST)), DataError)
        taken(lambda: read_data_manifest(absolute), DataError)


@fuzzed(2)
@given(mutated_tree(TASK))
def test_a_fine_tuning_recipe_is_taken_or_refused(tree: Any) -> None:
    recipe = taken(lambda: parse_fine_tuning_recipe(tree), ConfigError)
    if recipe is not None:
        assert parse_fine_tuning_recipe(recipe.model_dump_json()) == recipe
        taken(lambda: check_examples(recipe.data), DataError, ConfigError)


@fuzzed(0.4)
@given(mutated_tree(RECIPE), mutated_tree(TASK))
def test_recipe_files_are_taken_or_refused(tmp_path: Path, recipe: Any, task: Any) -> None:
    """As YAML, which has more kinds of values than JSON."""
    for tree, load in ((recipe, load_recipe), (task, load_fine_tuning_recipe), (task, load_any_recipe)):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=False), encoding="utf-8", errors="surrogateescape")
        found = taken(lambda load=load, path=path: load(path), ConfigError)
        if found is not None:
            found.model_dump_json()


@fuzzed(0.2)
@given(st.lists(st.sampled_from(["training", "num_steps", "data", "prepare", "0", "", "é", "a" * 300]), max_size=4))
def test_overrides_are_taken_or_refused(tmp_path: Path, keys: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    for value in ("5", "[1, 2]", "{a: [", "&a [*a]", "!!python/object:os.system {}", "\x00", "2001-01-01", "1e999"):
        taken(lambda value=value: load_recipe(tmp_path / "recipe.yaml", [f"{'.'.join(keys)}={value}"]), ConfigError)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [*{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}, *{before}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "name: x\nmodel:\n  config: &a {b: *a}\n",
        "model: &a {config: *a}\n",
        "? {a: 1}\n: 2\n",
        "? [a]\n: 2\n",
        "base: [1]\n",
        "base: \x00\n",
        "base: .\n",
        "base: ~nobody-of-that-name/x\n",
        "1: 2\nname: x\n",
        "model: {config: '\\0'}\n",
        "!!python/object:os.system {}\n",
    ],
)
def test_yaml_that_unfolds_without_end_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    for load in (load_recipe, load_any_recipe):
        assert taken(lambda load=load: load(tmp_path / "recipe.yaml"), ConfigError) is None


def test_a_deep_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"name: x\nmore: {'[' * 900}{']' * 900}\n")
    assert taken(lambda: load_recipe(tmp_path / "recipe.yaml"), ConfigError) is None
    assert taken(lambda: parse_recipe("[" * 100_000), ConfigError) is None
    assert taken(lambda: parse_recipe('{"a":' * 100_000), ConfigError) is None


@fuzzed()
@given(st.text(max_size=20) | ODD_TEXTS)
def test_run_roots_are_taken_or_refused(tmp_path: Path, root: str) -> None:
    recipe = taken(lambda: parse_recipe(RECIPE | {"run_root": f"{tmp_path}/{root}"}), ConfigError)
    if recipe is not None:
        found = taken(lambda: make_run_directory(recipe, []), ConfigError)
        assert found is None or found[1].is_dir()


# -- data sets ---------------------------------------------------------------------------------------------------------


@fuzzed(2)
@given(mutated_tree(MANIFEST))
def test_a_data_manifest_is_taken_or_refused(tree: Any) -> None:
    manifest = taken(lambda: parse_manifest(tree), DataError)
    if manifest is not None:
        assert parse_manifest(manifest.model_dump_json()) == manifest
        for shard in manifest.shards:
            for name in (shard.file, shard.index_file, manifest.tokenizer_file):
                assert "/" not in name
                assert not name.startswith(".")
        taken(lambda: check_data(parse_recipe(RECIPE), manifest), DataError)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose files may be damaged, if they are mended again."""
    directory = tmp_path_factory.mktemp("checkpoint") / "step-00000004"
    shutil.copytree(checkpoint_directory(), directory)
    return directory


@contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """A file with other bytes for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def read_all(directory: Path) -> None:
    """All that a server reads of a checkpoint."""
    reader = CheckpointReader(str(directory))
    for entry in reader.manifest.tensors:
        array = reader.read("weight", entry.name, 0, entry.tensor().num_elements)
        assert array.dtype == np.float32
        assert len(array) == entry.tensor().num_elements


HUGE = [{"name": "a", "shape": [2**40, 2**40], "decay": True, "unit": 0}]


@fuzzed(2)
@given(data=st.data())
@example(data={"tensors": HUGE})
@example(data={"fragment_elements": 1, "tensors": HUGE})
def test_a_checkpoint_manifest_is_taken_or_refused(checkpoint: Path, tmp_path: Path, data: Any) -> None:
    tree = json.loads((checkpoint / "manifest.json").read_text())
    tree = tree | data if isinstance(data, dict) else data.draw(mutated_tree(tree))
    with replaced(checkpoint / "manifest.json", json.dumps(tree).encode("utf-8", "surrogatepass")):
        if taken(lambda: read_manifest(str(checkpoint)), CheckpointError) is None:
            return
        taken(lambda: read_all(checkpoint) or True, CheckpointError)
        destination = tmp_path / "export"
        shutil.rmtree(destination, ignore_errors=True)
        destination.mkdir()
        taken(lambda: write_huggingface(str(checkpoint), destination), CheckpointError)


@fuzzed()
@given(data=st.data())
def test_a_checkpoint_file_whose_hash_is_right_is_taken_or_refused(checkpoint: Path, data: Any) -> None:
    """Whoever makes a file can make its hash: tensors of other names, shapes and types."""
    (entry,) = json.loads((checkpoint / "manifest.json").read_text())["files"]
    arrays = load_file(checkpoint / entry["file"])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(arrays)))
        array = arrays.pop(name)
        made = {
            "shape": lambda array=array: array.reshape(1, -1),
            "short": lambda array=array: array[:1],
            "empty": lambda array=array: array[:0],
            "type": lambda array=array: array.astype(np.float64),
            "ints": lambda array=array: array.astype(np.int8),
            "nan": lambda array=array: array * np.nan,
            "absent": lambda: None,
        }[data.draw(st.sampled_from(["shape", "short", "empty", "type", "ints", "nan", "absent"]))]()
        if made is not None:
            arrays[name] = np.ascontiguousarray(made)
    file = checkpoint / entry["file"]
    before = file.read_bytes()
    save_file(arrays, file)
    content = file.read_bytes()
    tree = json.loads((checkpoint / "manifest.json").read_text())
    tree["files"][0] |= {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    try:
        with replaced(checkpoint / "manifest.json", json.dumps(tree).encode()):
            taken(lambda: read_all(checkpoint) or True, CheckpointError)
    finally:
        file.write_bytes(before)


# -- bases -------------------------------------------------------------------------------------------------------------

JSON_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory whose files may be damaged, if they are mended again."""
    directory = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(base_directory(), directory)
    return directory


def use(directory: Path) -> None:
    """Find a base and read of it what a service reads."""
    found, _ = find_base(str(directory))
    tokenizer = load_tokenizer(found)
    assert tokenizer.eos_token
    reader = BaseReader(found)
    for name in reader.names()[:3]:
        reader.read(name, 0, 4)
        reader.tensor(name)


def test_what_is_damaged_here_was_whole(checkpoint: Path, base: Path, tmp_path: Path) -> None:
    """Else everything below could be refused for another reason."""
    use(base)
    read_all(checkpoint)
    parse_recipe(RECIPE)
    parse_fine_tuning_recipe(TASK)
    build(MICRO_LLAMA, "meta")


@pytest.mark.parametrize("file", JSON_FILES)
def test_a_base_with_odd_json_is_taken_or_refused(base: Path, file: str) -> None:
    tree = json.loads((base / file).read_text())
    if file == "tokenizer_config.json":
        tree |= {"eos_token_id": 0, "chat_template": [{"name": "default", "template": "x"}]}
        tree |= {"add_bos_token": True, "bos_token": {"content": "<end>"}, "model_max_length": 32}

    @fuzzed(0.5)
    @given(mutated_tree(tree))
    def check(tree: Any) -> None:
        with replaced(base / file, json.dumps(tree).encode()):
            taken(lambda: use(base) or True, ConfigError, CheckpointError)

    check()


@fuzzed()
@given(mutated_tree(MICRO_LLAMA))
def test_a_model_config_is_taken_or_refused(tree: Any) -> None:
    if isinstance(tree.get("num_hidden_layers"), int) and 100 < tree["num_hidden_layers"] <= 4096:
        return
    taken(lambda: build(tree, "meta"), ConfigError)


@pytest.mark.parametrize(
    "more",
    [
        {"num_hidden_layers": 10**6},
        {"num_hidden_layers": 10**12},
        {"hidden_size": 10**12},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "someone/else@main"},
        {"attn_implementation": "flash_attention_2"},
        {"auto_map": {"AutoModelForCausalLM": "modeling.Evil", "AutoConfig": "modeling.Evil"}},
        {"layer_types": ["nonsense"] * 2},
        {"rope_scaling": {"rope_type": "nonsense"}},
        {"rope_parameters": {"rope_type": "yarn"}},
        {"quantization_config": {"quant_method": "nonsense"}},
        {"torch_dtype": "nonsense"},
        {"dtype": "float1"},
        {"hidden_act": "nonsense"},
    ],
)
def test_a_model_config_that_would_take_long_or_run_code_is_refused(more: dict[str, Any]) -> None:
    with allocating_at_most(200 * MIB):
        taken(lambda: build(MICRO_LLAMA | more, "meta"), ConfigError)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "a/b", "..", "", ".", "config.json"])
def test_an_index_names_no_file_outside(base: Path, place: str) -> None:
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], place)
    with replaced(base / "model.safetensors.index.json", json.dumps(index).encode()):
        assert taken(lambda: use(base) or True, ConfigError, CheckpointError) is None


# -- what services keep ------------------------------------------------------------------------------------------------

RECORD = json.loads(
    Record(
        name="one",
        created_unix_ms=1,
        recipe_json=json.dumps(TASK),
        examples={"num_rows": 3},
        losses={0: 1.5, 4: 1.0},
        checkpoints={4: "/runs/4"},
    ).model_dump_json()
)


@fuzzed()
@given(mutated_tree(RECORD))
def test_a_record_is_taken_or_refused(tmp_path: Path, tree: Any) -> None:
    directory = tmp_path / "fine-tunings" / "one"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "record.json").write_text(json.dumps(tree))
    found = taken(lambda: Store(tmp_path), ConfigError)
    if found is not None:
        found.close()


@fuzzed()
@given(st.sampled_from(sorted(PREPARED)), st.data())
def test_prepared_examples_are_taken_or_refused(tmp_path: Path, file: str, data: Any) -> None:
    for name, content in PREPARED.items():
        (tmp_path / name).write_bytes(content)
    lines = [json.loads(line) for line in PREPARED[file].splitlines()]
    changed = data.draw(mutated_tree(copy.deepcopy(lines)))
    (tmp_path / file).write_text("\n".join(json.dumps(line) for line in changed))
    taken(lambda: load_prepared(str(tmp_path)), DataError)


@fuzzed()
@given(ODD_VALUES)
def test_files_of_one_odd_value_are_refused(tmp_path: Path, value: Any) -> None:
    text = json.dumps(value)
    for name in ("manifest.json", "config.json", "record.json"):
        (tmp_path / name).write_text(text)
    assert taken(lambda: read_manifest(str(tmp_path)), CheckpointError) is None
    assert taken(lambda: find_base(str(tmp_path)), ConfigError, CheckpointError) is None
    assert taken(lambda: parse_manifest(text), DataError) is None
