"""A base's small files must be those with which it was found; other files under their names are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.bases import change_json, full_checkpoint, lora_checkpoint
from support.chat_bases import chat_base

from gradstream.core.errors import CheckpointError, ConfigError
from gradstream.core.pretrained.base import find_base, load_tokenizer
from gradstream.core.pretrained.export import export_huggingface
from gradstream.core.pretrained.tokenizer import write_generation_config, write_tokenizer
from gradstream.core.recipe.fine_tuning import Base, FineTuning, LoraConfig
from gradstream.proto.v1 import fine_tuning_pb2 as pb
from gradstream.services.fine_tuning import bases
from gradstream.services.fine_tuning.export.directories import export_adapter, export_merged
from gradstream.services.fine_tuning.generation.serving import Serving

CHANGED = "has changed since the base was found; restore the file, or begin again with the base as it is"
LETTERS = "abcdefghij"
OTHER_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def linked(root: Path) -> tuple[Path, Callable[[str], None]]:
    """A base whose tokenizer.json is a link, and what makes it lead to one that has the letters' ids the other way
    round."""
    directory = chat_base(root / "base")
    (directory / "tokenizer.json").rename(root / "first.json")
    tree = json.loads((root / "first.json").read_text())
    words = tree["model"]["vocab"]
    words |= {word: words[other] for word, other in zip(LETTERS, LETTERS[::-1], strict=True)}
    (root / "second.json").write_text(json.dumps(tree))

    def lead_to(name: str) -> None:
        (directory / "tokenizer.json").unlink(missing_ok=True)
        (directory / "tokenizer.json").symlink_to(root / f"{name}.json")

    lead_to("first")
    return directory, lead_to


def test_a_link_that_leads_elsewhere_later(tmp_path: Path) -> None:
    directory, lead_to = linked(tmp_path)
    base, config = find_base(str(directory))
    checkpoint = lora_checkpoint(tmp_path / "lora", base, config, LoraConfig(rank=2))
    lead_to("second")
    (tmp_path / "out").mkdir()
    for use in (
        lambda: load_tokenizer(base),
        lambda: write_tokenizer(base, tmp_path / "out"),
        lambda: export_adapter(checkpoint, tmp_path / "adapter", ""),
        lambda: export_merged(checkpoint, tmp_path / "merged", ""),
    ):
        with pytest.raises(CheckpointError, match=rf"tokenizer\.json {CHANGED}"):
            use()
    other = find_base(str(directory))[0]
    assert other.sha256 == base.sha256  # the weights are: memory holds them once
    assert other != base
    lead_to("first")
    assert load_tokenizer(base)("a").input_ids == [1, 5]


@pytest.mark.parametrize(
    "change",
    [
        lambda base: (base / "chat_template.jinja").write_text(OTHER_TEMPLATE),
        lambda base: (base / "generation_config.json").write_text('{"eos_token_id": 7}'),
        lambda base: change_json(base / "tokenizer_config.json", eos_token="<s>"),
        lambda base: change_json(base / "config.json", eos_token_id=7),
        lambda base: (base / "additional_chat_templates" / "tool_use.jinja").write_text(OTHER_TEMPLATE),
    ],
)
def test_every_file_that_says_something_of_texts_is_recorded(tmp_path: Path, change: Callable[[Path], None]) -> None:
    directory = chat_base(tmp_path / "base")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    base = find_base(str(directory))[0]
    assert Base.model_validate_json(base.model_dump_json()) == base
    change(directory)
    with pytest.raises(CheckpointError, match=CHANGED):
        write_generation_config(base, tmp_path)


def test_a_file_that_comes_later_is_not_taken(tmp_path: Path) -> None:
    directory = chat_base(tmp_path / "base")
    (directory / "chat_template.jinja").unlink()
    base = find_base(str(directory))[0]
    (directory / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    (directory / "added_tokens.json").write_text('{"<more>": 60}')
    tokenizer = load_tokenizer(base)
    assert (tokenizer.chat_template, tokenizer.convert_tokens_to_ids("<more>")) == (None, tokenizer.unk_token_id)
    (tmp_path / "out").mkdir()
    write_tokenizer(base, tmp_path / "out")
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_a_checkpoint_as_a_base_has_its_own_or_its_bases_files(tmp_path: Path) -> None:
    directory = chat_base(tmp_path / "base")
    base, config = find_base(str(directory))
    tuned = full_checkpoint(tmp_path / "tuned", config, FineTuning(base=base, method="full"))
    (tmp_path / "tuned" / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    of_base = find_base(tuned)[0]
    assert of_base.tokenizer is not None
    assert of_base.tokenizer.directory == str(directory)
    (directory / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    with pytest.raises(CheckpointError, match=rf"chat_template\.jinja {CHANGED}"):
        load_tokenizer(of_base)
    own = find_base(tuned)[0]  # which begins again, with the checkpoint's own tokenizer and without a template
    assert own.tokenizer is not None
    assert (own.tokenizer.directory, load_tokenizer(own).chat_template) == (tuned, None)
    change_json(tmp_path / "tuned" / "tokenizer.json", added_tokens=[])
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json {CHANGED}"):
        load_tokenizer(own)


def test_a_whole_model_is_exported_with_these_files_or_not(tmp_path: Path) -> None:
    directory = chat_base(tmp_path / "base")
    base, config = find_base(str(directory))
    tuned = full_checkpoint(tmp_path / "tuned", config, FineTuning(base=base, method="full"))
    (tmp_path / "tuned" / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    (directory / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    for export in (
        lambda: export_merged(tuned, tmp_path / "out", ""),
        lambda: export_huggingface(tuned, tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=rf"chat_template\.jinja {CHANGED}"):
            export()
    shutil.rmtree(directory)  # then the checkpoint's own tokenizer has to do
    export_merged(tuned, tmp_path / "out", "")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


@pytest.mark.usefixtures("one_thread")
async def test_what_the_service_keeps_is_of_the_same_files(tmp_path: Path) -> None:
    """Two tokenizers over the same weights: each is asked and answers with its own."""
    directory, lead_to = linked(tmp_path)
    serving = Serving("cpu", 2 << 30)
    try:
        texts = {}
        for name in ("first", "second", "first"):
            lead_to(name)
            base, _ = bases.find_base(str(directory), "tiny")
            tokenizer, _ = await serving.tokenizer(base)
            assert tokenizer("a").input_ids == [1, 5 if name == "first" else 14]
            # The same prompt of the model, whatever the words are that it is made of.
            prompt = "a b c" if name == "first" else "j i h"
            request = pb.GenerateRequest(prompt=prompt, max_new_tokens=24, temperature=9.0)
            pieces = [piece.text async for piece in serving.generate(base, None, request)]
            texts.setdefault(name, []).append("".join(pieces))
        assert texts["first"][0] == texts["first"][1]
        swapped = texts["first"][0].translate(str.maketrans(LETTERS, LETTERS[::-1]))
        assert texts["second"] == [swapped] != [texts["first"][0]]
    finally:
        await serving.close()


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_a_link_in_a_circle_is_one_line_where_it_is_read(tmp_path: Path, name: str) -> None:
    directory = chat_base(tmp_path / "base")
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(directory / name)
    if name == "notes.txt":  # nobody reads it
        assert bases.find_base(str(directory), "x")[0].title == "x"
        return
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read .*Too many levels of symbolic links"):
        bases.find_base(str(directory), "x")
    for path in (directory / "absent", directory / "tokenizer.json", "/nul\0/x"):
        with pytest.raises(ConfigError, match=r"does not exist|is a file|cannot be read|is not a path"):
            bases.find_base(str(path), "x")


def test_a_time_that_was_set_back_hides_no_change(tmp_path: Path) -> None:
    directory = chat_base(tmp_path / "base")
    first, _ = bases.find_base(str(directory), "x")
    path = directory / "chat_template.jinja"
    before, content = path.stat(), path.read_text()
    path.write_text(content.replace("message", "massage"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert bases.find_base(str(directory), "x")[0].tokenizer != first.tokenizer
