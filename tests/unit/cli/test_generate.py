"""`gradstream generate`: prompts are encoded as by transformers' tokenizer, and every end token stops the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bases import change_json, save_base
from support.tokenizers import byte_level, sentencepiece_like
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradstream.coordinator.cli.generate import generate_text, prompt_ids
from gradstream.coordinator.cli.views.terminal import WorkingLine


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
