"""`gradstream recipes validate` finds the errors that a node would find.

The model is built, and data and base are compared if they are on this machine.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.bases import save_base
from support.micro import MICRO_LLAMA

from gradstream.coordinator.cli import main
from gradstream.coordinator.cli.options import find_recipe
from gradstream.core.data.manifest import DataShard, Manifest
from gradstream.core.recipe.fine_tuning_recipe import load_any_recipe


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set's manifest: two data shards a split, whose documents end with token 7."""
    shards = tuple(
        DataShard(
            file=f"{split}-{number}.tokens",
            index_file=f"{split}-{number}.index",
            split=split,
            num_tokens=200,
            num_documents=1,
            num_bytes=400,
            sha256="0" * 64,
            index_sha256="0" * 64,
        )
        for split in ("train", "validation")
        for number in range(2)
    )
    manifest = Manifest(token_dtype="uint16", vocab_size=64, end_of_text_id=7, tokenizer_sha256="0" * 64, shards=shards)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(manifest.model_dump_json())
    return tmp_path / "data"


def write(path: Path, tree: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def pretraining(data: Path, **sections: Any) -> dict[str, Any]:
    config = {key: value for key, value in MICRO_LLAMA.items() if not key.endswith("token_id")}
    training = {"num_steps": 3, "global_batch": 4}
    return {"name": "mine", "model": {"config": config}, "training": training, "data": {"path": str(data)}} | sections


def test_what_a_recipe_leaves_out_is_shown(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", write(tmp_path / "a.yaml", pretraining(data)), "--resolved"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    ids = {key: value for key, value in shown["model"]["config"].items() if key.endswith("token_id")}
    assert ids == {"eos_token_id": 7, "bos_token_id": 7, "pad_token_id": None}
    batch = {key: shown["training"][key] for key in ("global_batch", "num_slots", "microbatch", "sequence_length")}
    assert batch == {"global_batch": 4, "num_slots": 4, "microbatch": 1, "sequence_length": 32}


def test_a_valid_recipe_with_something_odd(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.yaml", pretraining(data, schedule={"warmup_steps": 9}))
    assert main(["recipes", "validate", path]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("mine is valid: 3 steps of 4 samples of 32 tokens")
    assert "warning: schedule.warmup_steps 9 is longer than the run of 3 steps" in captured.err


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("model.config.num_key_value_heads=3", 2, "its sizes do not match"),
        ("model.config.eos_token_id=0", 3, "eos_token_id is 0, and the documents of the data set"),
        ("model.config.vocab_size=63", 3, "vocabulary mismatch"),
    ],
)
def test_what_a_node_would_fail_at(
    tmp_path: Path, data: Path, override: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.yaml", pretraining(data))
    assert main(["recipes", "validate", path, "-s", "model.config.num_attention_heads=4", "-s", override]) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_fine_tuning_is_compared_with_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_base(tmp_path / "base")
    tree = {"name": "task", "base_model": str(base), "data": {"path": "x.jsonl"}, "training": {"global_batch": 4}}
    path = write(tmp_path / "task.yaml", tree)
    assert main(["recipes", "validate", path]) == 0  # rows of as many tokens as the base has positions
    capsys.readouterr()
    assert main(["recipes", "validate", path, "-s", "training.sequence_length=256"]) == 2
    assert "sequence_length 256 is longer than the 32 positions of llama" in capsys.readouterr().err
    short = [path, "-s", "training.sequence_length=32"]
    assert main(["recipes", "validate", *short, "-s", "training.num_steps=2", "-s", "schedule.warmup_steps=5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("task is valid: lora on ")
    assert "warning: schedule.warmup_steps 5 is longer than the run of 2 steps" in captured.err
    assert main(["recipes", "validate", *short, "-s", "lora.target_modules=query"]) == 2
    assert (
        "'query' matches no module of the model; those that can have an adapter are q_proj" in capsys.readouterr().err
    )
    (base / "adapter_config.json").write_text("{}")
    assert main(["recipes", "validate", *short]) == 2
    assert "adapter_config.json beside its model" in capsys.readouterr().err


def test_a_base_that_is_elsewhere_is_left_to_the_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"name": "task", "base_model": str(tmp_path / "gone"), "data": {"path": "x.jsonl"}}
    assert main(["recipes", "validate", write(tmp_path / "task.yaml", tree)]) == 0
    assert "gone is not on this machine; the service checks it" in capsys.readouterr().err
    assert main(["recipes", "validate", str(tmp_path / "task.yaml"), "-s", "base_model=job:a-1"]) == 0
    assert "base_model job:a-1 is a job's; the service checks it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stdlib-gpt", "stdlib-finetune"])
def test_a_resolved_recipe_is_the_recipe_without_nulls(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", "show", name, "--resolved"]) == 0
    shown = capsys.readouterr().out
    assert "null" not in shown
    assert "# num_epochs: derived: 3 where" in shown or "# tokenizer: derived: trained on the sources" in shown
    (tmp_path / "resolved.yaml").write_text(shown)
    assert load_any_recipe(tmp_path / "resolved.yaml") == load_any_recipe(find_recipe(name))
