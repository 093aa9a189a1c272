"""`gradstream init` and `data prepare` without options: from a person's text to a recipe that trains."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from gradstream.coordinator.cli import main
from gradstream.coordinator.cli.init import parse_time
from gradstream.coordinator.cli.options import data_name
from gradstream.core.errors import ConfigError
from gradstream.core.recipe.loading import load_recipe

GRADSTREAM = [sys.executable, "-m", "gradstream.coordinator.cli"]


@pytest.fixture(autouse=True)
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "My Book.txt"
    file.write_text("".join(f"Sentence number {number} of the book. {number * number}\n" for number in range(4000)))
    return file


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(args) == 2
    return capsys.readouterr().err.strip()


def test_a_text_becomes_a_recipe_with_comments(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", text.name]) == 0
    told = capsys.readouterr().out
    assert "my-book.yaml: a Llama of about 1M parameters" in told
    written = Path("my-book.yaml").read_text()
    assert written.count("  # ") >= 12
    recipe = load_recipe("my-book.yaml")
    assert recipe.data.path == str(Path("data/my-book").absolute())
    assert recipe.data.prepare is not None
    assert recipe.data.prepare.sources == [str(text)]
    assert main(["recipes", "validate", "my-book.yaml"]) == 0
    capsys.readouterr()
    assert "my-book.yaml is already there" in refused(["init", text.name], capsys)
    assert main(["init", text.name, "--force", "--size", "3m", "--workers", "3", "-o", "json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["recipe"]["training"]["num_slots"] == 6
    assert "3 workers" in made["reasons"]["training.num_slots"]


def test_prepared_data_becomes_a_recipe(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", text.name, "--vocab-size", "400"]) == 0
    captured = capsys.readouterr()
    assert "long documents were split" in captured.err
    assert main(["init", "data/my-book"]) == 0
    recipe = load_recipe("my-book.yaml")
    assert recipe.model.config["vocab_size"] == 400
    assert recipe.data.prepare is None
    assert recipe.validation.interval_steps > 0
    assert main(["recipes", "validate", "my-book.yaml"]) == 0


def test_prepare_says_when_the_recipe_asks_for_more_text(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", text.name]) == 0
    longer = ["-s", "training.sequence_length=60000", "-s", "model.config.max_position_embeddings=60000"]
    assert main(["data", "prepare", "--recipe", "my-book.yaml", *longer]) == 0
    told = capsys.readouterr().err
    assert (
        "a job of my-book.yaml would be refused: the data set has 0 train samples of 60000 tokens, too few for" in told
    )
    assert main(["data", "prepare", "--recipe", "my-book.yaml", "--force"]) == 0
    assert "would be refused" not in capsys.readouterr().err


@pytest.mark.parametrize("num_bytes", [600, 3000, 20_000, 60_000])
def test_little_text_trains_too(num_bytes: int, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text.write_text(text.read_text()[:num_bytes])
    assert main(["init", text.name]) == 0
    assert main(["data", "prepare", "--recipe", "my-book.yaml"]) == 0
    assert "would be refused" not in capsys.readouterr().err
    assert main(["recipes", "validate", "my-book.yaml"]) == 0


def test_an_own_config_is_taken_as_it_is(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "gpt2", "vocab_size": 600, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main(["init", text.name, "--config", "model", "--name", "own"]) == 0
    recipe = load_recipe("own.yaml")
    assert recipe.model.config["n_embd"] == 32
    assert recipe.training.sequence_length == 48
    assert "none.json cannot be read as JSON" in refused(["init", text.name, "--config", "none.json"], capsys)


def test_time_is_measured(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", text.name, "--time", "1m", "--size", "1M"]) == 0
    steps = load_recipe("my-book.yaml").training.num_steps
    assert 2 < steps < 2000
    assert "as many as fit into 60 s at about" in Path("my-book.yaml").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "what should the model learn from? name files, globs, directories or a data set"),
        (["nothing.txt"], "'nothing.txt' matches no file"),
        (["My Book.txt", "--size", "10M", "--config", "x"], "say the same; give one of them"),
        (["My Book.txt", "--size", "11M"], "no size '11M'; did you mean"),
        (["My Book.txt", "--link", "fast"], "'fast' is not a link's speed"),
        (["My Book.txt", "--time", "soon"], "'soon' is not a time; write it like 30m"),
        (["My Book.txt", "--out", "/proc/x.yaml"], "/proc/x.yaml cannot be written"),
        (["My Book.txt", "--name", "Not a name"], "'name'"),
    ],
)
def test_what_cannot_be_is_one_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(["init", *args], capsys)
    assert message in told
    assert "\n" not in told
    assert not list(Path().glob("*.yaml*"))


def test_on_a_terminal_it_asks(text: Path) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen([*GRADSTREAM, "init"], stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, text=True)
    os.close(theirs)
    os.write(ours, b"'My Book.txt'\n3M\n4\n100Mb/s\nauto\n")
    told, _ = child.communicate(timeout=60)
    asked = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert child.returncode == 0, asked
    assert "Model size (1M, 3M" in asked
    recipe = load_recipe("my-book.yaml")
    assert (recipe.codec.push, recipe.training.num_slots) == ("int4", 4)
    assert "a Llama of about 3M parameters: as asked" in told


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("texts/**/*.txt", "texts"),
        ("/a/b/Shake speare.txt.gz", "shake-speare"),
        ("stdlib:", "stdlib"),
        ("s3://bucket/corpus/", "corpus"),
        ("*.txt", "mine"),
        ("..", "mine"),
    ],
)
def test_data_has_a_name(source: str, name: str) -> None:
    assert data_name([source]) == name


def test_times() -> None:
    assert [parse_time(text) for text in ("90s", "30m", "1.5 h", "2d")] == [90, 1800, 5400, 172800]
    for wrong in ("", "0s", "3", "-1h", "1y"):
        with pytest.raises(ConfigError):
            parse_time(wrong)
