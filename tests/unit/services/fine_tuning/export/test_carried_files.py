"""A result has its base's tokens, templates and ends of text, and the files that define them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bases import change_json, full_checkpoint, lora_checkpoint
from support.chat_bases import WORDS, chat_base
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gradstream.core.errors import ConfigError
from gradstream.core.pretrained.base import find_base
from gradstream.core.pretrained.export import export_huggingface
from gradstream.core.pretrained.tokenizer import end_ids, load_tokenizer, write_generation_config
from gradstream.core.recipe.fine_tuning import Base, FineTuning, LoraConfig
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.services.fine_tuning.examples.encoding import Encoder
from gradstream.services.fine_tuning.export.directories import export_adapter, export_merged
from gradstream.services.fine_tuning.generation.serving import Serving

LAST = len(WORDS)
"""The first id that is free in the vocabulary; the model has 64."""
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def results(root: Path, base_directory: Path, chat: bool = True) -> dict[str, Path]:
    """Every kind of export of a fine-tuning of a base."""
    base, config = find_base(str(base_directory))
    lora = lora_checkpoint(root / "lora", base, config, LoraConfig(rank=2))
    full = full_checkpoint(root / "full", config, FineTuning(base=base, method="full"))
    for directory in (lora, full):  # as a data set of examples has it, and with it the job's checkpoints
        (Path(directory) / "tokenizer.json").write_bytes(Encoder(load_tokenizer(base)).content)
    export_adapter(lora, root / "adapter", "", chat)
    export_merged(lora, root / "merged", "", chat)
    export_merged(full, root / "model", "", chat)
    export_huggingface(full, root / "exported")
    return {name: root / name for name in ("adapter", "merged", "model", "exported")}


def same(found: Any, expected: Any) -> None:
    assert found.special_tokens_map == expected.special_tokens_map
    assert found.chat_template == expected.chat_template
    assert found("a <|im_end|> b").input_ids == expected("a <|im_end|> b").input_ids
    assert found.get_vocab() == expected.get_vocab()


def test_every_export_has_the_files_of_its_base(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base")
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<end>"}))
    for name, directory in results(tmp_path, base).items():
        for file in (*FILES, "special_tokens_map.json"):
            assert (directory / file).read_bytes() == (base / file).read_bytes(), (name, file)
        same(AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(base))


def test_a_result_that_is_the_next_base_has_them_too(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base")
    expected = AutoTokenizer.from_pretrained(base)
    made = results(tmp_path, base)
    for directory in (tmp_path / "full", made["merged"], made["model"]):
        tokenizer = load_tokenizer(find_base(str(directory))[0])
        same(tokenizer, expected)
        assert end_ids(tokenizer) == {0, 3}
    again = results(tmp_path / "again", made["merged"]) | results(tmp_path / "further", tmp_path / "full")
    for directory in again.values():
        for file in FILES:
            assert (directory / file).read_bytes() == (base / file).read_bytes()


def test_a_base_whose_tokenizer_changed_is_not_taken_for_it(tmp_path: Path) -> None:
    """The checkpoint's own tokenizer.json is what it was trained with."""
    base = chat_base(tmp_path / "base")
    results(tmp_path, base)
    change_json(base / "tokenizer_config.json", added_tokens_decoder={str(LAST): {"content": "<new>"}})
    tokenizer = load_tokenizer(find_base(str(tmp_path / "full"))[0])
    assert "<new>" not in tokenizer.get_vocab()
    assert (tokenizer.chat_template, tokenizer.eos_token) == (None, "<end>")


def test_the_end_that_was_taught_is_one_that_transformers_stops_at(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base", top_k=7)  # no end of turn, and of text by the config alone
    for number, chat in enumerate((False, True)):
        for directory in results(tmp_path / str(number), base, chat).values():
            found = GenerationConfig.from_pretrained(directory)
            if chat and directory.name != "exported":
                assert (found.eos_token_id, found.top_k) == ([0, 3], 7)
            else:
                content = (directory / "generation_config.json").read_bytes()
                assert content == (base / "generation_config.json").read_bytes()


def test_named_templates_are_read_and_carried(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | tojson }}")
    expected = AutoTokenizer.from_pretrained(base).chat_template
    assert load_tokenizer(find_base(str(base))[0]).chat_template == expected
    for directory in results(tmp_path, base).values():
        assert AutoTokenizer.from_pretrained(directory).chat_template == expected
        assert all(path.is_file() for path in directory.iterdir())  # as exports are sent


# Tokens that lie outside of tokenizer.json


def in_added_tokens(base: Path) -> None:
    (base / "added_tokens.json").write_text(json.dumps({"<tool>": LAST, "<more>": LAST + 1}))
    change_json(base / "tokenizer_config.json", additional_special_tokens=["<tool>"])


def in_the_config(base: Path) -> None:
    fields = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False, "special": True}
    decoder = {str(LAST): {"content": "<tool>", **fields}, str(LAST + 1): {"content": "<more>", "special": False}}
    change_json(base / "tokenizer_config.json", added_tokens_decoder=decoder)


@pytest.mark.parametrize("change", [in_added_tokens, in_the_config])
def test_added_tokens_are_added_as_transformers_adds_them(tmp_path: Path, change: Any) -> None:
    base = chat_base(tmp_path / "base")
    change(base)
    expected = AutoTokenizer.from_pretrained(base)
    text = "a <tool> b <more> c<tool>"
    assert LAST in expected(text).input_ids
    tokenizer = load_tokenizer(find_base(str(base))[0])
    assert tokenizer(text).input_ids == expected(text).input_ids
    found = {number: (token.content, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
    assert found == {number: (token.content, token.special) for number, token in expected.added_tokens_decoder.items()}
    for directory in results(tmp_path, base).values():
        assert AutoTokenizer.from_pretrained(directory)(text).input_ids == expected(text).input_ids


def test_what_cannot_be_added_is_refused_by_name(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base")
    for tokens, message in (
        ({"<tool>": 40}, r"the added token '<tool>' of .* has id 40 in .*; save the tokenizer again"),
        ({f"<{number}>": number for number in range(LAST, 65)}, r"has ids up to 64, .* so it does not know '<64>'"),
        ({"<tool>": "x"}, r"the added token .* is malformed; get its files again"),
    ):
        (base / "added_tokens.json").write_text(json.dumps(tokens))
        with pytest.raises(ConfigError, match=message):
            find_base(str(base))
    (base / "added_tokens.json").unlink()
    change_json(base / "tokenizer_config.json", bos_token="<begin>")
    with pytest.raises(ConfigError, match=r"the bos_token '<begin>' of .* is in neither its vocabulary nor its added"):
        find_base(str(base))


@pytest.mark.parametrize("decoder", [True, False])
def test_the_older_companion_comes_after_or_before_as_in_transformers(tmp_path: Path, decoder: bool) -> None:
    base = chat_base(tmp_path / "base")
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    if decoder:
        change_json(base / "tokenizer_config.json", added_tokens_decoder={"0": {"content": "<end>", "special": True}})
    expected = AutoTokenizer.from_pretrained(base).eos_token
    assert load_tokenizer(find_base(str(base))[0]).eos_token == expected == ("<end>" if decoder else "<|im_end|>")


@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_eos_token": True}])
def test_tokenizer_json_says_whether_bos_comes_first(tmp_path: Path, flags: dict[str, bool]) -> None:
    base = chat_base(tmp_path / "base")
    change_json(base / "tokenizer_config.json", **flags)
    expected = AutoTokenizer.from_pretrained(base)("a b").input_ids
    assert load_tokenizer(find_base(str(base))[0])("a b").input_ids == expected == [1, 5, 6]


def test_all_ends_count(tmp_path: Path) -> None:
    """The tokenizer's, config.json's and generation_config.json's, and the template's end of a turn."""
    base = chat_base(tmp_path / "base", eos_token_id=[7, 8])
    change_json(base / "config.json", eos_token_id=6)
    assert end_ids(load_tokenizer(find_base(str(base))[0])) == {0, 3, 6, 7, 8}


def test_the_ends_of_a_text_config_stay_when_another_is_added(tmp_path: Path) -> None:
    base = chat_base(tmp_path / "base")
    (base / "generation_config.json").unlink()
    change_json(base / "config.json", eos_token_id=None, text_config={"eos_token_id": [5, 6]})
    write_generation_config(Base(kind="huggingface", path=str(base), title="", files=(), sha256="0" * 64), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [5, 6, 0]}


@pytest.mark.usefixtures("one_thread")
async def test_the_service_stops_at_every_end_and_takes_zeros_at_their_word(tmp_path: Path) -> None:
    directory = chat_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids_BT = torch.tensor([tokenizer("a b c").input_ids])
    wanted = model.generate(ids_BT, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    fifth = wanted[ids_BT.shape[1] + 4]
    assert fifth not in wanted[ids_BT.shape[1] : ids_BT.shape[1] + 4]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [63, fifth]}))
    serving = Serving("cpu", 2 << 30)
    base = find_base(str(directory))[0]

    async def asked(**fields: Any) -> list[pb.GenerateResponse]:
        request = pb.GenerateRequest(prompt="a b c", **fields)
        return [piece async for piece in serving.generate(base, None, request)]

    try:
        for settings in ({}, {"max_new_tokens": 9}):
            last = (await asked(**settings))[-1]
            assert (last.num_tokens, last.finish_reason) == (4, pb.FINISH_REASON_END_OF_TEXT)
        with pytest.raises(ConfigError, match="max_new_tokens is 0; ask for at least 1"):
            await asked(max_new_tokens=0)
        hot = {"temperature": 9.0, "seed": 1, "max_new_tokens": 28}
        assert (await asked(top_p=0.0, **hot))[-1].num_tokens == 4
        assert (await asked(**hot))[-1].num_tokens != 4
    finally:
        await serving.close()
