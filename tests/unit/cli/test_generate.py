"""`gradstream generate`: prompts are encoded as by transformers' tokenizer, and every end token stops the text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bases import change_json, save_base
from support.tokenizers import byte_level, sentencepiece_like
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradstream.coordinator.cli.generate import WordStreamer, generate_text, prompt_ids
from gradstream.coordinator.cli.views.terminal import WorkingLine
from gradstream.core.machine.openmp import sleep_while_waiting


def with_bos_and_end() -> Any:
    tokenizer = sentencepiece_like()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("prompt", ["What is", " the", "", "</s>x"])
def test_a_prompt_has_the_ids_of_transformers(prompt: str) -> None:
    for tokenizer in (byte_level(), sentencepiece_like()):
        assert prompt_ids(tokenizer, prompt) == tokenizer(prompt).input_ids
    tokenizer = with_bos_and_end()
    assert prompt_ids(tokenizer, prompt) == tokenizer(prompt).input_ids[:-1]  # nothing is generated after an end
    assert prompt_ids(tokenizer, "<s>the") == tokenizer("the").input_ids[:-1]


def test_what_is_being_done_is_said_until_the_text_is_there(tmp_path: Path) -> None:
    save_base(tmp_path)
    said: list[str] = []
    generate_text(tmp_path, "a b", max_new_tokens=2, temperature=0.0, on_progress=said.append)
    assert [line.split()[0] for line in said] == ["loading", "loading", "generating,"]
    assert "loading the model (" in said[1]


def test_the_text_comes_in_words_as_it_is_generated(tmp_path: Path) -> None:
    save_base(tmp_path)
    pieces: list[str] = []
    text = generate_text(tmp_path, "a b", max_new_tokens=20, temperature=0.0, on_text=pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) > 1


def test_a_word_is_held_back_until_the_next_one_begins() -> None:
    words = ["Tom", " did", " n", "'t", " \n", "go", "\ufffd"]

    def decode(ids: list[int]) -> str:
        # As tokenizers that clean up blanks: the word before is joined to its end.
        return "".join(words[index] for index in ids).replace(" n't", "n't")

    pieces: list[str] = []
    streamer = WordStreamer(decode, pieces.append)
    streamer.put(torch.tensor([[5, 5]]))  # the prompt
    for index in range(len(words)):
        streamer.put(torch.tensor([index]))
    assert pieces == ["Tom", " did", "n't "]
    streamer.end()
    assert streamer.finish() == "Tom didn't \ngo\ufffd" == "".join(pieces)


def test_threads_of_generation_sleep_while_they_wait(tmp_path: Path) -> None:
    """The policy reaches the OpenMP library: it is set before PyTorch loads it."""
    save_base(tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "true"
    command = [sys.executable, "-m", "gradstream.coordinator.cli", "generate", str(tmp_path), "--prompt", "a b"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "5"], env=environment, capture_output=True, text=True, check=True
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr
    assert done.stdout.startswith("a b")
    assert done.stdout.endswith("\n")


def test_a_policy_of_the_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    sleep_while_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_working_line_is_cleared(capsys: pytest.CaptureFixture[str]) -> None:
    with WorkingLine(interactive=True) as working:
        working("loading")
    assert capsys.readouterr().err == "\r\033[Kloading\r\033[K"
    with WorkingLine(interactive=False) as working:
        working("loading")
    assert capsys.readouterr().err == ""


def test_a_directory_generates_as_in_transformers(tmp_path: Path) -> None:
    save_base(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="user $A", special_tokens=[("user", tokenizer.convert_tokens_to_ids("user"))]
    )
    tokenizer.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    asked = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("a b").input_ids])
    expected = model.generate(asked, max_new_tokens=5, do_sample=False)[0, asked.shape[1] :].tolist()
    settings: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0}
    assert generate_text(tmp_path, "a b", **settings) == tokenizer.decode(expected, skip_special_tokens=True)
    # An end that generation_config.json alone names is one too.
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, expected[2]]}))
    change_json(tmp_path / "config.json", eos_token_id=0)
    stopped = expected[: expected.index(expected[2]) + 1]
    assert generate_text(tmp_path, "a b", **settings) == tokenizer.decode(stopped, skip_special_tokens=True)
