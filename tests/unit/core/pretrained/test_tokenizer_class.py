"""A base's tokens equal AutoTokenizer's, for every class that a tokenizer_config.json can name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support.bases import change_json, save_tokenizer
from support.tokenizers import CHATML, byte_level, sentencepiece_like
from transformers import AutoTokenizer

from gradstream.core.errors import ConfigError
from gradstream.core.pretrained.tokenizer import load_tokenizer
from gradstream.core.recipe.fine_tuning import Base
from gradstream.services.fine_tuning.examples.chat import chat_prompt_ids
from gradstream.services.fine_tuning.examples.encoding import Encoder

TEXTS = ["What is the capital?", "  two  blanks", "Paris.</s>hello\n there", "</s><s>\nuser", "é"]
MESSAGES = [
    {"role": "user", "content": "the capital"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "how"},
]
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""As TinyLlama's: text stands after the end of a turn."""


def saved(directory: Path, tokenizer: Any, model_type: str, **config: Any) -> Base:
    """The tokenizer's files of a base, with `config` in its tokenizer_config.json."""
    directory.mkdir(exist_ok=True)
    tokenizer.save_pretrained(directory)
    change_json(directory / "tokenizer_config.json", **config)
    (directory / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    return Base(kind="huggingface", path=str(directory), title="base", files=(), sha256="0" * 64)


@pytest.mark.parametrize(
    ("make", "model_type", "config"),
    [
        (sentencepiece_like, "llama", {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}),
        (sentencepiece_like, "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": True}),
        (sentencepiece_like, "llama", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}),
        (sentencepiece_like, "mistral", {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
        (sentencepiece_like, "gemma2", {"tokenizer_class": "GemmaTokenizerFast"}),
        (sentencepiece_like, "llama", {"tokenizer_class": "PreTrainedTokenizerFast"}),
        (byte_level, "llama", {"tokenizer_class": "LlamaTokenizerFast"}),
        (byte_level, "qwen2", {"tokenizer_class": "Qwen2Tokenizer"}),
        (byte_level, "gpt2", {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
        (byte_level, "gpt2", {"tokenizer_class": None}),
    ],
)
def test_the_tokens_are_those_of_transformers_class(
    tmp_path: Path, make: Any, model_type: str, config: dict[str, Any]
) -> None:
    base = saved(tmp_path, make(ZEPHYR), model_type, **config)
    expected, found = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(base)
    for text in TEXTS:
        assert found(text).input_ids == expected(text).input_ids
    known = make().get_vocab()
    named = {kind: text for kind, text in expected.special_tokens_map.items() if text in known}
    assert found.special_tokens_map == named  # a class names tokens that the vocabulary may not have
    theirs = expected.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert chat_prompt_ids(MESSAGES, found) == theirs
    # What the job's checkpoints hold gives the same, with no class beside it.
    (tmp_path / "tokenizer.json").write_bytes(Encoder(found).content)
    change_json(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert AutoTokenizer.from_pretrained(tmp_path)("</s>\nuser").input_ids == expected("</s>\nuser").input_ids


@pytest.mark.parametrize(
    "config",
    [
        {"sep_token": "<|im_start|>"},
        {"turn_token": "<|im_start|>"},
        {"extra_special_tokens": {"turn_token": "<|im_start|>"}},
    ],
)
def test_a_template_may_write_every_special_token_that_has_a_name(tmp_path: Path, config: dict[str, Any]) -> None:
    kind = "sep_token" if "sep_token" in config else "turn_token"
    template = CHATML.replace("'<|im_start|>'", kind)
    base = saved(tmp_path, byte_level(template), "llama", **config)
    expected = AutoTokenizer.from_pretrained(tmp_path)
    theirs = expected.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    found = load_tokenizer(base)
    assert chat_prompt_ids(MESSAGES, found) == theirs
    assert theirs[0] == found.convert_tokens_to_ids("<|im_start|>")


def test_a_special_token_that_a_template_writes_and_the_vocabulary_lacks_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path, byte_level(CHATML), "llama", pad_token="<pad>")
    assert "pad_token" not in load_tokenizer(base).special_tokens_map  # as no example has it
    base = saved(tmp_path, byte_level(CHATML + "{{ pad_token }}"), "llama", pad_token="<pad>")
    with pytest.raises(ConfigError, match=r"the pad_token '<pad>' of .* is in neither its vocabulary nor its added"):
        load_tokenizer(base)


def test_a_special_token_takes_the_blanks_around_it_that_it_says(tmp_path: Path) -> None:
    fields = {"content": "<x>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
    base = saved(tmp_path, byte_level(), "llama", additional_special_tokens=[{"__type": "AddedToken", **fields}])
    assert load_tokenizer(base)("a <x> b").input_ids == AutoTokenizer.from_pretrained(tmp_path)("a <x> b").input_ids
    base = saved(tmp_path, byte_level(), "llama", split_special_tokens=True)
    with pytest.raises(ConfigError, match=r"split_special_tokens in the tokenizer_config.json of .*; take it out"):
        load_tokenizer(base)


def test_a_class_for_another_kind_of_model_is_not_used(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    base = saved(tmp_path, AutoTokenizer.from_pretrained(tmp_path), "llama", tokenizer_class="GPT2Tokenizer")
    with capture_logs() as logs:
        assert load_tokenizer(base)("user a b").input_ids == [2, 4, 5]
    assert not logs


def test_a_class_that_cannot_be_made_is_warned_of(tmp_path: Path) -> None:
    base = saved(tmp_path, byte_level(), "llama", tokenizer_class="GPT2Tokenizer", add_prefix_space="neither")
    with capture_logs() as logs:
        assert load_tokenizer(base)("hello").input_ids == byte_level()("hello").input_ids
    assert [log["tokenizer_class"] for log in logs] == ["GPT2Tokenizer"]
